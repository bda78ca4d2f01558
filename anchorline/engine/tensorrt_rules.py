"""What TensorRT's ONNX parser asks of a graph beyond ONNX itself, as rewrites and as a check."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from anchorline.engine.graph_tools import consumers, element_types, fresh_name, replace_nodes, tensor_names
from anchorline.runtime.errors import ArtefactError

# Parsed, and then nothing runs them ("no runners").
_DATA_DEPENDENT = ("NonMaxSuppression", "NonZero")
# TensorRT for RTX cannot parse RoiAlign without a driver.
_NOT_ON = {"tensorrt": _DATA_DEPENDENT, "tensorrt-rtx": (*_DATA_DEPENDENT, "RoiAlign")}


def cast_bytes_first(model: onnx.ModelProto) -> None:
    """Cast every uint8 input to float32 at once, in place: TensorRT moves no uint8 about."""
    graph = model.graph
    used, readers = tensor_names(graph), consumers(graph)
    casts, moved = [], set()
    for value in graph.input:
        if value.type.tensor_type.elem_type != TensorProto.UINT8:
            continue
        name = fresh_name(f"{value.name}_f32", used)
        casts.append(
            helper.make_node("Cast", [value.name], [name], name=f"cast_{name}", to=TensorProto.FLOAT)
        )
        for node in readers.get(value.name, []):
            if node.op_type not in ("Transpose", "Cast"):
                raise ArtefactError(
                    f"input {value.name} is uint8 and read by {node.op_type}; expected a Transpose or a Cast"
                )
            node.input[0] = name
            moved.update(node.output)
    notes = [value for value in graph.value_info if value.name not in moved]
    del graph.value_info[:]
    graph.value_info.extend(notes)
    replace_nodes(graph, [*casts, *graph.node])


def bake_casts(model: onnx.ModelProto) -> None:
    """Turn every ``CastLike`` into a ``Cast`` to the type it stands for, in place."""
    types = element_types(model)
    for node in model.graph.node:
        if node.op_type == "CastLike":
            kind = types[node.input[1]]
            node.op_type = "Cast"
            del node.input[1:]
            node.attribute.append(helper.make_attribute("to", kind))


def check_rules(model: onnx.ModelProto, target: str, plugins: set[str]) -> None:
    """Raise ``ArtefactError`` naming the first node that ``target`` would refuse."""
    for node in model.graph.node:
        where = f"node {node.name or node.output[0]} ({node.op_type})"
        if node.domain and node.op_type not in plugins:
            raise ArtefactError(f"{where}: {target} does not know the domain {node.domain!r}; export again")
        if node.op_type in _NOT_ON[target]:
            raise ArtefactError(f"{where}: {target} cannot run this op; export the model again")
        if node.op_type == "Resize" and any(a.name == "antialias" and a.i for a in node.attribute):
            raise ArtefactError(f"{where}: {target} has no antialiased resizing; export without it")
