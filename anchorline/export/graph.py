"""A model as one ONNX graph: PyTorch's exporter, the custom ops' functions, the contract."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from torch import Tensor, nn

from anchorline.export.functions import OPSET, attach_functions
from anchorline.export.stage_names import name_stages
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.train.faster_rcnn import FasterRCNN
from anchorline.train.tasks import OUTPUTS, run_task


class TaskGraph(nn.Module):
    """A model and a task, with the outputs as a tuple in the contract's order."""

    def __init__(self, model: FasterRCNN, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        return tuple(run_task(self.model, self.task, images, image_sizes).values())


def to_onnx(model: FasterRCNN, contract: Contract) -> onnx.ModelProto:
    """The ONNX form of ``model`` for ``contract.task``, with a dynamic batch and the contract inside.

    ``model`` is in evaluation mode on the CPU, and its canvas is the contract's.
    """
    contract = dataclasses.replace(contract, outputs=OUTPUTS[contract.task])
    # Two images: torch.export would take a batch of one for a constant.
    images = torch.zeros(2, *contract.canvas, 3, dtype=getattr(torch, contract.input_dtype))
    sizes = torch.tensor([contract.canvas] * 2, dtype=torch.float32)
    batch = torch.export.Dim("batch")
    with torch.no_grad(), _quiet_exporter():
        # One eager pass makes the anchors, which then enter the graph as constants.
        model.propose(model.features(images, sizes), sizes)
        program = torch.onnx.export(
            TaskGraph(model, contract.task),
            (images, sizes),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: batch}, {0: batch}),
            input_names=list(contract.inputs),
            output_names=list(contract.outputs),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    name_stages(proto)
    attach_functions(proto)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {CONTRACT_KEY: contract.to_json()})
    proto.producer_name = "anchorline"
    _drop_traces(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _drop_traces(proto: onnx.ModelProto) -> None:
    """Remove the exporter's notes on nodes and values: Python stack traces with paths of this machine."""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter warns about its own internals; its errors still come through as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
