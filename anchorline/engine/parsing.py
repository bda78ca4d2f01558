"""From the lowered graph to TensorRT's network, with its errors in words."""

from __future__ import annotations

import re
from typing import Any

import onnx

from anchorline.engine.flavours import Toolkit
from anchorline.engine.options import Batch
from anchorline.runtime.errors import ArtefactError
from anchorline.runtime.tensorrt_library import captured_log, tensorrt_logger

_CAUSES = (
    (r"plugin|Plugin not found|creator", "the plugin is not registered or refused the node's attributes"),
    (r"TopK|topk", "TensorRT's TopK takes at most 3840 values"),
    (r"UINT8|uint8", "TensorRT moves no uint8 about: it must be Cast first"),
    (r"NonZero|NonMaxSuppression", "TensorRT does not run operators whose output size depends on the data"),
    (r"RoiAlign", "TensorRT for RTX cannot parse RoiAlign without a driver"),
    (r"opset|Opset", "this TensorRT does not know the graph's opset"),
)


def parse(toolkit: Toolkit, builder: Any, model: onnx.ModelProto, batch: Batch) -> Any:
    """The network of ``model``; where the batch does not vary, its inputs have that batch fixed.

    Raises ``ArtefactError`` naming node and operator, with the known cause if there is one.
    """
    network = toolkit.create_network(builder)
    parser = toolkit.trt.OnnxParser(network, tensorrt_logger(toolkit.name))
    with captured_log() as records:
        parsed = parser.parse(model.SerializeToString())
    if not parsed:
        told = [_describe(parser.get_error(index), model) for index in range(parser.num_errors)]
        reason = (told or [record.getMessage() for record in records] or ["no reason given"])[0]
        raise ArtefactError(f"{toolkit.title} {toolkit.version} cannot parse the graph: {reason}")
    if batch[0] == batch[2]:
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            tensor.shape = (batch[0], *tuple(tensor.shape)[1:])
    return network


def _describe(error: Any, model: onnx.ModelProto) -> str:
    """One parser error: node and operator, what TensorRT says, and the known cause.

    Inside a function the node has no name, but the stack of calls has; elsewhere its number helps.
    """
    text = " ".join(str(error.desc()).split())
    names = [name for name in (error.node_name(), *error.local_function_stack()) if name]
    operator, index, nodes = error.node_operator(), error.node(), model.graph.node
    if 0 <= index < len(nodes):
        names.append(nodes[index].name or ", ".join(nodes[index].output))
        operator = operator or nodes[index].op_type
    node = f"node {names[0]} ({operator or 'unknown operator'})" if names else "the graph"
    cause = next((cause for pattern, cause in _CAUSES if re.search(pattern, f"{text} {node}")), None)
    return f"{node}: {text}" + (f" ({cause})" if cause else "")
