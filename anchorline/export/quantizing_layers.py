"""Which layers of an exported graph may compute with 8-bit integers, and which never do.

A layer is a weight and the ``Conv``, ``Gemm`` or ``MatMul`` nodes that use it: the RPN head's serve every
level. What is not a layer or between two of them (anchors, box decoding, sigmoid, softmax, TopK, NMS)
stays float32, and so do the last layers, whose outputs are scores and box regressions: nothing after
them evens their rounding out, and they take next to no time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx

from anchorline.export.functions import DOMAIN

_WEIGHTED = ("Conv", "Gemm", "MatMul")
# From one layer to the next without a decision in between. Broader than what can be quantised itself.
_PASSES = {
    "Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Flatten", "GlobalAveragePool",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MaxPool", "Mul", "Pad", "ReduceMean", "Relu",
    "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
# What onnxruntime's CPU provider computes on 8-bit integers, or drops into the layer before it.
_INTEGER_GLUE = ("Add", "Clip", "MaxPool", "Relu", "Resize")


@dataclass(frozen=True)
class Layer:
    """A weight and the nodes that use it, by name.

    ``name`` is the weight's in the checkpoint, such as ``backbone.body.0.0``. ``last`` says that only
    scores or boxes come after it.
    """

    name: str
    weight: str
    op: str
    nodes: tuple[str, ...]
    last: bool


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own, in place: onnxruntime's quantiser addresses nodes by name."""
    used: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in used:
            node.name = f"{node.op_type}_{index}"
        used.add(node.name)


def find_layers(graph: onnx.GraphProto) -> list[Layer]:
    """The layers with constant weights, in the order of execution."""
    weights = {tensor.name for tensor in graph.initializer}
    reaching = _reaching_layers(graph, weights)
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if is_layer(node, weights):
            users.setdefault(node.input[1], []).append(node)
    return [
        Layer(
            name=weight.removeprefix("model.").removesuffix(".weight"),
            weight=weight,
            op=nodes[0].op_type,
            nodes=tuple(node.name for node in nodes),
            last=not any(node.output[0] in reaching for node in nodes),
        )
        for weight, nodes in users.items()
    ]


def integer_nodes(graph: onnx.GraphProto, layers: Sequence[Layer], *, glue: bool) -> list[str]:
    """The names of the nodes to quantise: those of ``layers`` and, with ``glue``, what lies between.

    Glue is quantised where everything it reads is: one float input would cost it two more roundings.
    """
    chosen = {name for layer in layers for name in layer.nodes}
    weights = {tensor.name for tensor in graph.initializer}
    quantised: set[str] = set()
    names = []
    for node in graph.node:
        if node.name in chosen or (glue and _is_integer_glue(node, quantised, weights)):
            quantised.update(node.output)
            names.append(node.name)
    return names


def is_layer(node: onnx.NodeProto, weights: Collection[str]) -> bool:
    """Whether ``node`` is a product with a constant."""
    return not node.domain and node.op_type in _WEIGHTED and node.input[1] in weights


def _is_integer_glue(node: onnx.NodeProto, quantised: set[str], weights: Collection[str]) -> bool:
    if node.domain or node.op_type not in _INTEGER_GLUE:
        return False
    values = node.input if node.op_type == "Add" else node.input[:1]
    return all(name in quantised for name in values)


def _reaching_layers(graph: onnx.GraphProto, weights: Collection[str]) -> set[str]:
    """The tensors from which another layer can be reached without a decision in between."""
    found: set[str] = set()
    for node in reversed(graph.node):
        if is_layer(node, weights) or (_passes(node) and found & set(node.output)):
            # The RoIs that RoIAlign reads were chosen; only the features pass through it.
            found.update(node.input[:1] if node.domain or is_layer(node, weights) else node.input)
    return found


def _passes(node: onnx.NodeProto) -> bool:
    if node.domain == DOMAIN:
        return node.op_type in ("RoIAlign", "RoIPool")
    return not node.domain and node.op_type in _PASSES
