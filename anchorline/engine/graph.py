"""The exported ONNX file as the builder takes it, with small questions to a graph and changes of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anchorline.runtime.contract import BANDS_OP, CONTRACT_KEY, DOMAIN, WINOGRAD_OP, Contract
from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.io.files import input_errors
from anchorline.runtime.model_file import read_onnx

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
# The functions in the file and those put in their place are written for this opset.
OPSET = 18
# The first whose QuantizeLinear takes scales in half precision. Nothing of ours has another meaning in it;
# in the next one GridSample does.
HALF_SCALES_OPSET = 19
# Our ops that save a processor time, and what they are elsewhere: a convolution in Winograd's form is a plain
# one, RoIs are pooled by RoIAlign, and all slots of proposals are taken, used or not.
FOR_PROCESSORS = {WINOGRAD_OP: "Conv", BANDS_OP: "RoIAlign", "Occupied": "Identity"}


def read_model(path: Path) -> onnx.ModelProto:
    """Load and check an exported ONNX file, without what is in it for processors alone (``FOR_PROCESSORS``).

    Raises ``ArtefactError`` for a file that is missing, unreadable, no ONNX, or not an export of ours.
    """
    read_onnx(path).check()
    with input_errors(path):
        content = path.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's exceptions differ between its implementations
        raise ArtefactError(
            f"{path}: not an ONNX file, or one that was cut off; export or copy it again"
        ) from error
    check_exported(model, str(path))
    take_for_engines(model)
    return model


def take_for_engines(model: onnx.ModelProto) -> None:
    """Undo in an exported ``model``, in place, what is in it for processors alone (``FOR_PROCESSORS``).

    Raises ``ArtefactError`` where the file does not state how many slots of proposals there are.
    """
    stated = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    all_slots: dict[str, int] = {}
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type in FOR_PROCESSORS:
            node.op_type = FOR_PROCESSORS[node.op_type]
            node.domain = DOMAIN if node.op_type == "RoIAlign" else ""
            if node.op_type == "Identity":
                del node.input[1:], node.attribute[:]
                sides = stated.get(node.input[0], ())
                if len(sides) != 3 or sides[1].dim_value < 1:
                    raise ArtefactError(
                        f"{node.input[0]}: the file does not state its shape; expected [batch, slots, 4], "
                        "export the model again"
                    )
                all_slots[node.output[0]] = sides[1].dim_value
        elif node.op_type == "Shape" and node.input[0] in all_slots:  # a TopK's K among what reads it
            slots = all_slots[node.input[0]]
            node.CopyFrom(helper.make_node("Constant", [], [*node.output], node.name, value_ints=[slots]))
    refill(model.functions, (f for f in model.functions if f.name not in FOR_PROCESSORS))


def check_exported(model: onnx.ModelProto, where: str = "model") -> Contract:
    """The contract of ``model``, an exported file or what the builder made of one.

    Raises ``ArtefactError`` naming what is missing: graph, contract, opset, or a tensor of the contract.
    ``where`` names the file in the message.
    """
    if not model.graph.node:
        raise ArtefactError(f"{where}: has no graph; give an ONNX file written by anchorline export")
    text = next((entry.value for entry in model.metadata_props if entry.key == CONTRACT_KEY), None)
    if text is None:
        raise ArtefactError(
            f"{where}: has no anchorline contract, so it is not an export of ours; "
            "make one with anchorline export model.safetensors --out model.onnx"
        )
    contract = Contract.from_json(text, where=where)
    opsets = {opset.domain or "ai.onnx": opset.version for opset in model.opset_import}
    if opsets.get("ai.onnx") not in (OPSET, HALF_SCALES_OPSET):
        raise ArtefactError(
            f"{where}: ONNX opset is {opsets.get('ai.onnx', 'not stated')}; expected {OPSET}; "
            "export the model again with this anchorline"
        )
    for kind, values, wanted in (
        ("input", model.graph.input, contract.inputs),
        ("output", model.graph.output, contract.outputs),
    ):
        missing = [name for name in wanted if name not in {value.name for value in values}]
        if missing:
            raise ArtefactError(
                f"{where}: the graph has no {kind} {', '.join(missing)}, which its contract names; "
                "export the model again"
            )
    return contract


def state_opset(model: onnx.ModelProto, version: int) -> None:
    """Let the graph of ``model`` and all its functions be of ONNX's ``version``, in place."""
    for holder in (model, *model.functions):
        for opset in holder.opset_import:
            if not opset.domain:
                opset.version = version


def constants(graph: onnx.GraphProto) -> dict[str, NDArray[np.generic]]:
    """Every initialiser and the value of every ``Constant`` node, by tensor name."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and len(node.attribute) == 1:
            value = helper.get_attribute_value(node.attribute[0])
            if isinstance(value, TensorProto):
                found[node.output[0]] = numpy_helper.to_array(value)
            else:
                kind = np.float32 if "float" in node.attribute[0].name else np.int64
                found[node.output[0]] = np.array(value, kind)
    return found


def known_values(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Type and shape of every tensor that shape inference reaches, by name.

    What the file itself states (``value_info``) is kept, which covers the outputs of plugin nodes.
    """
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    graph = inferred.graph
    found = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
    for tensor in graph.initializer:
        found.setdefault(
            tensor.name, helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
        )
    return found


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """The ``TensorProto`` type of every tensor that shape inference reaches, by name."""
    return {name: value.elem_type for name, value in known_values(model).items()}


def refill(field: Any, items: Iterable[Any]) -> None:
    """Let a repeated field of a message hold ``items``, which may be some of its own."""
    kept = list(items)
    del field[:]
    field.extend(kept)


def insert_after(graph: onnx.GraphProto, following: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Add the nodes that are to follow certain tensors, each as soon as its tensor is there."""
    nodes: list[onnx.NodeProto] = []
    for value in graph.input:
        nodes += following.get(value.name, ())
    for node in graph.node:
        nodes.append(node)
        for name in node.output:
            nodes += following.get(name, ())
    refill(graph.node, nodes)


def cast_node(source: str, result: str, kind: int) -> onnx.NodeProto:
    """A ``Cast`` to the ``TensorProto`` type ``kind``."""
    return helper.make_node("Cast", [source], [result], name=f"cast_{result}", to=kind)


def forget(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Drop what is noted of the types of these tensors."""
    refill(graph.value_info, (value for value in graph.value_info if value.name not in names))


def drop_unused_constants(graph: onnx.GraphProto) -> None:
    """Remove constants that nothing reads, and what is noted of tensors that no longer exist."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    refill(graph.initializer, (tensor for tensor in graph.initializer if tensor.name in read))
    refill(graph.node, (n for n in graph.node if n.op_type != "Constant" or n.output[0] in read))
    exists = {name for node in graph.node for name in node.output}
    forget(graph, {value.name for value in graph.value_info} - exists)


def fresh_name(wanted: str, used: set[str]) -> str:
    """``wanted``, or with a number where it is taken; it is taken from now on."""
    name, count = wanted, 1
    while name in used:
        name, count = f"{wanted}_{count}", count + 1
    used.add(name)
    return name


def tensor_names(graph: onnx.GraphProto) -> set[str]:
    """Every name that a tensor of ``graph`` has."""
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    return names | {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
