"""Which nodes run in half precision: convolutions, fully connected layers, and what lies between them.

A list of what may be half, not of what may not: everything that decides geometry or order (anchors,
decoding, IoU, NMS, TopK, softmax, sigmoid) is float32 because it is not on the list or does not lie
between two layers.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx

from anchorline.engine.graph_tools import FLOAT
from anchorline.engine.model_file import DOMAIN

_CONVOLUTIONS = {"Conv", "ConvTranspose"}
_FULLY_CONNECTED = {"Gemm", "MatMul"}
_TO_FLOAT = "DequantizeLinear"
# Averages (pooling, ReduceMean) are not here: their sums of many terms are kept in float32.
_BETWEEN = {
    "Add", "Clip", "Concat", "Flatten", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MaxPool", "Mul",
    "Pad", "Relu", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
    "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
# Inputs whose type is their own whatever the node computes in: Resize's region and scales, and the
# coordinates of RoIs, which in half precision are a quarter of a cell off on a large map.
_OWN_TYPE = {("", "Resize"): (1, 2), (DOMAIN, "RoIAlign"): (1,), (DOMAIN, "RoIPool"): (1,)}


def half_region(
    graph: onnx.GraphProto, types: dict[str, int], constant: Collection[str]
) -> list[onnx.NodeProto]:
    """The nodes that may compute in half precision, in order.

    ``types`` are element types by tensor name, ``constant`` the names of constants: a fully connected
    layer is a product with one. In a model quantised for TensorRT the integers between a QuantizeLinear
    and its DequantizeLinear pass on what the two are between, and a DequantizeLinear before a layer has
    the layer's precision: with a cast between the two TensorRT would not take integers for the layer.
    """
    weights = {n.output[0] for n in graph.node if n.op_type == _TO_FLOAT and n.input[0] in constant}
    layers = {n.output[0] for n in graph.node if _is_layer(n, {*constant, *weights})}
    between = {node.output[0] for node in graph.node if _is_between(node)}
    after: set[str] = set()  # tensors that a layer produces, or nodes between from such tensors
    for node in graph.node:
        key = node.output[0]
        if key in layers or (key in between and after & set(_passed_on(node, types))):
            after.update(node.output)
    before: set[str] = set()  # tensors that end in a layer in the same way
    for node in reversed(graph.node):
        key = node.output[0]
        if key in layers or (key in between and before & set(node.output)):
            before.update(_passed_on(node, types))
    read = {name for node in graph.node if node.output[0] in layers for name in node.input[:2]}
    return [
        node
        for node in graph.node
        if node.output[0] in layers
        or (node.output[0] in between and node.output[0] in after and before & set(node.output))
        or (node.op_type == _TO_FLOAT and node.output[0] in read)
    ]


def _passed_on(node: onnx.NodeProto, types: dict[str, int]) -> list[str]:
    """The inputs through which half precision goes on."""
    return [*half_inputs(node, types), *(node.input[:1] if node.op_type == _TO_FLOAT else ())]


def half_places(node: onnx.NodeProto, types: dict[str, int]) -> list[int]:
    """The places of the float inputs that take the type the node computes in."""
    own = _OWN_TYPE.get((node.domain, node.op_type), ())
    return [place for place, name in enumerate(node.input) if place not in own and types.get(name) == FLOAT]


def half_inputs(node: onnx.NodeProto, types: dict[str, int]) -> list[str]:
    """The names of those inputs."""
    return [node.input[place] for place in half_places(node, types)]


def factors(node: onnx.NodeProto) -> list[str]:
    """The inputs that multiply: weights, not biases or bounds, whose small values nothing depends on."""
    if node.op_type in _CONVOLUTIONS:
        return list(node.input[1:2])
    if node.op_type in (_TO_FLOAT, "QuantizeLinear"):
        return list(node.input[1:2])
    return list(node.input[:2]) if node.op_type in (*_FULLY_CONNECTED, "Mul") else []


def half_outputs(node: onnx.NodeProto, types: dict[str, int]) -> list[str]:
    """The float outputs."""
    return [name for name in node.output if types.get(name) == FLOAT]


def _is_layer(node: onnx.NodeProto, constant: Collection[str]) -> bool:
    if node.domain:
        return False
    if node.op_type in _CONVOLUTIONS:
        return node.input[1] in constant
    return node.op_type in _FULLY_CONNECTED and any(name in constant for name in node.input[:2])


def _is_between(node: onnx.NodeProto) -> bool:
    if node.domain == DOMAIN:
        return node.op_type in ("RoIAlign", "RoIPool")
    return not node.domain and node.op_type in _BETWEEN
