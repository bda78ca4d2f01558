"""A checkpoint as one ONNX file: PyTorch's exporter, the custom ops' functions, stage names, the contract.

Published only if onnxruntime agrees with PyTorch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anchorline import __version__
from anchorline.data.dataset import from_frames
from anchorline.data.synthetic import scenes
from anchorline.export.functions import OPSET, attach_functions, pool_in_bands, save_model
from anchorline.export.graph_settings import contract_in
from anchorline.export.winograd import make_winograd
from anchorline.runtime.canvas import frame_canvas, held_to, is_large, usual_canvas
from anchorline.runtime.contract import CONTRACT_KEY, TASKS, Contract
from anchorline.runtime.io.errors import SettingsError, check_choice
from anchorline.runtime.io.files import atomic_path
from anchorline.runtime.model_file import read_onnx
from anchorline.train.checkpoint import load_checkpoint, read_header
from anchorline.train.model.faster_rcnn import OUTPUTS, FasterRCNN, run_task
from anchorline.train.model.ops import MARKER, slots_of_trace
from anchorline.train.predict import TorchDetector, TorchStages, check_own_proposals
from anchorline.verify.stages import Subject, onnx_subject
from anchorline.verify.verification import VerifyReport, settle, verify_subjects, write_not_executed

_SLOTS, _SLOT_AXIS = "slots", {"start": 1, "end": 2}
_EXAMPLE_CANVAS = (192, 256)  # in the trace of a graph for any

# The quick set, for some seconds: ``anchorline verify`` tries everything. On a large canvas that is fixed,
# where one image takes seconds, less of it.
QUICK_SCENES = 3
QUICK_TRAPS = ("empty image", "all 255", "mixed sizes in a batch")
QUICK_ROOM = (384, 512)  # pixels
LARGE_SCENES = 1
LARGE_TRAPS = ("mixed sizes in a batch",)


@dataclass(frozen=True)
class ExportResult:
    """The published file, its contract, and how it compared with PyTorch (None when not verified)."""

    path: Path
    contract: Contract
    verification: VerifyReport | None


def export_onnx(
    checkpoint: str | Path,
    out: str | Path,
    *,
    task: str | None = None,
    canvas: tuple[int, int] | None = None,
    frame_size: tuple[int, int] | None = None,
    max_batch: int | None = None,
    winograd: bool = False,
    verify: bool = True,
    images: Sequence[NDArray[np.uint8]] = (),
) -> ExportResult:
    """Write the ONNX form of ``checkpoint`` to ``out``.

    It takes frames of every size. ``canvas`` (height, width) fixes that of the graph's input;
    ``frame_size`` (height, width) fixes it to what frames of a camera fill (see ``frame_canvas``).
    ``max_batch`` bounds the otherwise free batch. ``winograd`` writes 3x3 convolutions in fewer
    multiplications, for processors (``winograd.py``); the contract's ``source`` says how many. With
    ``verify`` the new file must give what PyTorch gives, stage by stage and detection by detection, on
    ``images`` (BGR uint8, any sizes; generated scenes when empty) and in a few traps, or ``ParityError`` is
    raised and nothing is published. The verdict, or that there is none, goes to the record beside the file.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if task is not None:
        check_choice("task", task, TASKS)
    if max_batch is not None and max_batch < 1:
        raise SettingsError(f"max batch is {max_batch}; expected at least 1")
    if out.suffix.lower() != ".onnx":
        raise SettingsError(f"output is {str(out)!r}; expected a file name that ends in .onnx")
    if frame_size is not None:
        if canvas is not None:
            raise SettingsError(
                f"both a canvas {canvas} and a frame size {frame_size} are given; expected one"
            )
        canvas = frame_canvas(frame_size, read_header(checkpoint)[1])
    model, contract = load_checkpoint(checkpoint)
    task = task or contract.task
    check_own_proposals(checkpoint, contract, task)
    contract = dataclasses.replace(
        held_to(contract, canvas, None),
        task=task,
        outputs=OUTPUTS[task],
        max_batch=max_batch,
        source={**contract.source, "exported_by": f"anchorline {__version__}"},
    )
    proto = to_onnx(model, contract)
    if winograd:
        make_winograd(proto)
        contract = contract_in(proto)
    report = None
    with atomic_path(out) as draft:
        save_model(proto, draft)
        if verify:
            report = verify_with_pytorch(checkpoint, model, draft, images)
            settle(draft, report, "onnxruntime and PyTorch")
        else:
            write_not_executed(draft, "exported with --no-verify", checkpoint)
    return ExportResult(out, contract, report)


def verify_with_pytorch(
    checkpoint: Path, model: FasterRCNN, path: Path, images: Sequence[NDArray[np.uint8]]
) -> VerifyReport:
    """Compare the ONNX file at ``path``, on onnxruntime's CPU provider, with ``model``: the quick set.

    A graph for any frame size is the same for all, so where its own canvases are large it is compared on
    smaller ones, and the report says so.
    """
    contract = read_onnx(path).contract
    large = is_large(contract)
    smaller = large and contract.canvas is None and not images
    rule = dataclasses.replace(contract.resize, within=QUICK_ROOM) if smaller else None
    some = large and not smaller
    made = scenes(contract.names, LARGE_SCENES if some else QUICK_SCENES)
    dataset = from_frames("the given images", contract.names, images) if images else made
    which = LARGE_TRAPS if some else QUICK_TRAPS
    with onnx_subject(path, resize=rule) as candidate:
        detector = TorchDetector(model, candidate.detector.contract)
        reference = Subject(checkpoint, detector, TorchStages(detector))
        report = verify_subjects(reference, candidate, dataset, which_traps=which)
    if not smaller:
        return report
    note = "compared with frames scaled to fit {}x{}; anchorline verify compares at full scale".format(
        *QUICK_ROOM
    )
    return dataclasses.replace(report, notes=(*report.notes, note))


def to_onnx(model: FasterRCNN, contract: Contract) -> onnx.ModelProto:
    """The ONNX form of ``model`` for ``contract.task``, with a dynamic batch and the contract inside.

    Height and width are the contract's canvas or, where that is None, free. ``model`` is in evaluation mode
    on the CPU.
    """
    contract = dataclasses.replace(contract, outputs=OUTPUTS[contract.task])
    # Two images: torch.export would take a batch of one for a constant.
    canvas = contract.canvas or _EXAMPLE_CANVAS
    images = torch.zeros(2, *canvas, 3, dtype=getattr(torch, contract.input_dtype))
    sizes = torch.tensor([canvas] * 2, dtype=torch.float32)
    batch, free = torch.export.Dim("batch"), {}
    if contract.canvas is None:
        unit = contract.resize.padding
        # Graphs need more than one place on the finest map: unless it is said, a trace in vain finds that.
        smallest = 1 if unit > 1 else model.backbone.strides[0] + 1
        sides = [torch.export.Dim(name, min=smallest) for name in ("height", "width")]
        free = dict(enumerate((unit * side if unit > 1 else side for side in sides), start=1))
    arguments, shapes = [images, sizes], [{0: batch, **free}, {0: batch}]
    few = contract.task == "detections" and model.roi_heads.few_proposals
    if few:  # a third input, taken out again: its size is one that the data will decide
        arguments.append(torch.zeros(model.settings.rpn_post_nms))
        shapes.append({0: torch.export.Dim(_SLOTS, min=2, max=model.settings.rpn_post_nms)})
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            TaskGraph(model, contract.task),
            tuple(arguments),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=tuple(shapes),
            input_names=[*contract.inputs, _SLOTS][: len(arguments)],
            output_names=list(contract.outputs),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    if few:
        _take_slots_from_the_data(proto)
    name_stages(proto)
    pool_in_bands(proto, usual_canvas(contract), model.settings.rpn_post_nms)
    attach_functions(proto)
    name_free_sides(proto, contract)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {CONTRACT_KEY: contract.to_json()})
    proto.producer_name = "anchorline"
    # The exporter's notes are Python stack traces with paths of this machine.
    graph = proto.graph
    for node in graph.node:
        node.doc_string = ""
    for noted in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del noted.metadata_props[:]
    onnx.checker.check_model(proto, full_check=True)
    return proto


class TaskGraph(nn.Module):
    """A model and a task, with the outputs as a tuple in the contract's order."""

    def __init__(self, model: FasterRCNN, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, images: Tensor, image_sizes: Tensor, slots: Tensor | None = None) -> tuple[Tensor, ...]:
        with contextlib.nullcontext() if slots is None else slots_of_trace(slots.shape[0]):
            return tuple(run_task(self.model, self.task, images, image_sizes).values())


def _take_slots_from_the_data(proto: onnx.ModelProto) -> None:
    """Let all that reads the size of the input ``_SLOTS`` read that of ``Occupied``, and drop the input."""
    graph = proto.graph
    occupied = next(node for node in graph.node if node.op_type == "Occupied")
    for node in graph.node:
        if _SLOTS in node.input:
            assert node.op_type == "Shape"
            node.input[0] = occupied.output[0]
            del node.attribute[:]
            node.attribute.extend(onnx.helper.make_attribute(name, end) for name, end in _SLOT_AXIS.items())
    kept = [value for value in graph.input if value.name != _SLOTS]
    del graph.input[:]
    graph.input.extend(kept)
    # What was computed from the input may stand before what it is computed from now.
    waiting, ordered = list(graph.node), []
    missing = {name for node in waiting for name in node.output}
    while waiting:
        later = []
        for node in waiting:
            if missing.isdisjoint(node.input):
                ordered.append(node)
                missing.difference_update(node.output)
            else:
                later.append(node)
        assert len(later) < len(waiting), "a cycle"
        waiting = later
    del graph.node[:]
    graph.node.extend(ordered)


def name_stages(proto: onnx.ModelProto) -> None:
    """Take the stage markers (``train/model/ops.py``) out of ``proto``; marked values get their names.

    Where a marked value is an output of the graph, which has a name of its own, an Identity remains.
    """
    graph = proto.graph
    outputs = {value.name for value in graph.output}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type != MARKER:
            kept.append(node)
            continue
        stage = node.attribute[0].s.decode()
        renamed[node.input[0]] = stage
        if node.output[0] in outputs:
            kept.append(onnx.helper.make_node("Identity", [stage], [node.output[0]], name=f"stage_{stage}"))
        else:
            renamed[node.output[0]] = stage
    for node in kept:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    shapes = {renamed.get(value.name, value.name): value for value in graph.value_info}
    for name, value in shapes.items():
        value.name = name
    del graph.node[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.value_info.extend(shapes.values())


def name_free_sides(proto: onnx.ModelProto, contract: Contract) -> None:
    """Call the free sides of ``images`` ``height`` and ``width``, and forget what follows from them.

    Of other tensors the exporter notes sides as formulas in names of its own, which no runtime reads.
    """
    images = next(value for value in proto.graph.input if value.name == contract.inputs[0])
    batch = images.type.tensor_type.shape.dim[0].dim_param
    if contract.canvas is None:
        for place, name in ((1, "height"), (2, "width")):
            images.type.tensor_type.shape.dim[place].dim_param = name
    for value in proto.graph.value_info:
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param != batch:
                side.ClearField("dim_param")


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
