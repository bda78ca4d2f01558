"""Writing an exported graph with 8-bit integer layers, for onnxruntime's CPU provider or for TensorRT.

onnxruntime's own quantiser does the work. Both targets get Q/DQ nodes (``QuantizeLinear`` and
``DequantizeLinear`` around float operators): onnxruntime turns them into its integer kernels when it
loads the file, and TensorRT takes INT8 in no other form.

- ``cpu``: activations u8 with a zero point, weights s8 per channel in ``WEIGHT_BITS["cpu"]`` = 7 bits,
  biases s32; what lies between two layers is quantised as well, so that the values stay integers from one
  to the next. Processors without VNNI add two products u8 x s8 in 16 bits that saturate (``vpmaddubsw``);
  two products with weights of at most 64 fit (2 x 255 x 64 = 32640). u8 weights would be exact as well, and
  everywhere half as fast or worse; s8 activations are slower than float32.
- ``tensorrt``: activations s8 and symmetric, weights s8 per channel, biases float32; only the inputs of
  layers, since TensorRT finds itself what it can fuse.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from anchorline.runtime.contract import DOMAIN

# Which layers of an exported graph may compute with 8-bit integers, and which never do.
#
# A layer is a weight and the ``Conv``, ``Gemm`` or ``MatMul`` nodes that use it: the RPN head's serve every
# level. What is not a layer or between two of them (anchors, box decoding, sigmoid, softmax, TopK, NMS)
# stays float32, and so do the last layers, whose outputs are scores and box regressions: nothing after
# them evens their rounding out, and they take next to no time.


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


TARGETS = ("cpu", "tensorrt")
WEIGHT_BITS = {"cpu": 7, "tensorrt": 8}
Range = tuple[float, float]

# How onnxruntime's quantiser marks a graph whose shapes are inferred; without it, it infers them itself,
# through files on the disk.
_INFERRED = ("onnx.infer", "onnxruntime.quant")


def observed_tensors(model: onnx.ModelProto, layers: Sequence[Layer]) -> list[str]:
    """The activations whose ranges ``quantized`` needs for ``layers`` or fewer of them, in order."""
    nodes = {node.name: node for node in model.graph.node}
    constants = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, None] = {}
    for name in integer_nodes(model.graph, layers, glue=True):
        node = nodes[name]
        read = node.input if node.op_type == "Add" else node.input[:1]
        found.update(dict.fromkeys(each for each in (*read, *node.output) if each not in constants))
    return list(found)


def quantized(
    model: onnx.ModelProto, layers: Sequence[Layer], ranges: Mapping[str, Range], target: str
) -> onnx.ModelProto:
    """A copy of ``model`` in which ``layers`` compute with integers; names and functions are kept.

    ``ranges`` are (lowest, highest) of every tensor that may be quantised. ``model``'s nodes have names
    (``name_nodes``).
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import TensorData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.metadata_props.add(key=_INFERRED[0], value=_INFERRED[1])
    on_cpu = target == "cpu"
    options: dict[str, Any] = {"WeightSymmetric": True, "ActivationSymmetric": not on_cpu}
    if not on_cpu:
        options |= {"QuantizeBias": False, "OpTypesToExcludeOutputQuantization": list(_WEIGHTED)}
    limits = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.items()
    }
    with _quiet():
        quantizer = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=WEIGHT_BITS[target] == 7,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8 if on_cpu else QuantType.QInt8,
            tensors_range=limits,
            nodes_to_quantize=integer_nodes(copy.graph, layers, glue=on_cpu),
            nodes_to_exclude=[],
            op_types_to_quantize=sorted({node.op_type for node in copy.graph.node}),
            extra_options=options,
        )
        made: onnx.ModelProto = quantizer.quantize_model()
    if on_cpu:
        _keep_in_float(made.graph)
    _restore(made, model)
    return made


def _keep_in_float(graph: onnx.GraphProto) -> None:
    """Stop onnxruntime from quantising the layers that are to stay float, all channels with one scale.

    Its optimiser (``WeightBiasQuantization``) does so, unasked, wherever a float layer stands between
    rounded values. It leaves alone what is dequantised channel by channel, so these layers get their input
    that way, with the same scale for each channel. (TensorRT knows no such activations; our runtime turns
    that optimiser off as well.)
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    added: dict[str, str] = {}
    for node in list(graph.node):
        maker = makers.get(node.input[0]) if node.op_type in ("Conv", "Gemm") else None
        weight = tensors.get(node.input[1]) if maker is not None else None
        if maker is None or weight is None or maker.op_type != "DequantizeLinear":
            continue
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Conv":
            channels = weight.dims[1] * options.get("group", 1)
        else:
            channels = weight.dims[1 if options.get("transB") else 0]
        if maker.output[0] not in added:
            name = added[maker.output[0]] = f"{maker.output[0]}_by_channel"
            constants = [f"{name}_scale", f"{name}_zero_point"]
            for constant, source in zip(constants, maker.input[1:3], strict=True):
                value = np.full(channels, numpy_helper.to_array(tensors[source]))
                graph.initializer.append(numpy_helper.from_array(value, constant))
            inputs = [maker.input[0], *constants]
            graph.node.append(onnx.helper.make_node("DequantizeLinear", inputs, [name], name, axis=1))
        node.input[0] = added[maker.output[0]]


def _restore(made: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Put back what the quantiser changes besides the graph's nodes."""
    del made.metadata_props[:]
    made.metadata_props.extend(model.metadata_props)
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    _sort(made.graph)
    exists = {name for node in made.graph.node for name in node.output}
    notes = [value for value in made.graph.value_info if value.name in exists]
    del made.graph.value_info[:]
    made.graph.value_info.extend(notes)


def _sort(graph: onnx.GraphProto) -> None:
    """Put each new node before the first that reads it; the quantiser appends them at the end."""
    makers = {name: node for node in graph.node for name in node.output}
    placed: set[str] = set()
    ordered: list[onnx.NodeProto] = []

    def put(node: onnx.NodeProto) -> None:
        if node.output[0] in placed:
            return
        placed.update(node.output)
        for name in node.input:
            if name in makers:
                put(makers[name])  # at most the three nodes around one rounding deep
        ordered.append(onnx.NodeProto.FromString(node.SerializeToString()))

    for node in graph.node:
        put(node)
    del graph.node[:]
    graph.node.extend(ordered)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser warns through the root logger about what is by design, such as shared biases."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
