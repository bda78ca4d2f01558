"""Small questions to an ONNX graph, and small changes of it, shared by the rewrites of this stage."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """A deep copy: rewrites never touch the model they are given."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


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


def consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Make ``nodes``, in topological order, the nodes of ``graph``."""
    kept = list(nodes)  # they may be nodes of the graph itself
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)


def drop_unused_constants(graph: onnx.GraphProto) -> None:
    """Remove constants that nothing reads, and what is noted of tensors that no longer exist."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    replace_nodes(
        graph, [node for node in graph.node if node.op_type != "Constant" or node.output[0] in read]
    )
    exists = {name for node in graph.node for name in node.output}
    notes = [value for value in graph.value_info if value.name in exists]
    del graph.value_info[:]
    graph.value_info.extend(notes)


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
