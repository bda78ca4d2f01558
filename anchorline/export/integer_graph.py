"""An exported graph with 8-bit integer layers, for onnxruntime's CPU provider or for TensorRT.

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

A layer is a weight and the ``Conv``, ``Gemm`` or ``MatMul`` nodes that use it: the RPN head's serve every
level. What is not a layer or between two of them (anchors, box decoding, sigmoid, softmax, TopK, NMS)
stays float32, and so do the last layers, whose outputs are scores and box regressions: nothing after
them evens their rounding out, and they take next to no time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from anchorline.runtime.contract import BANDS_OP, DOMAIN

TARGETS = ("cpu", "tensorrt")
WEIGHT_BITS = {"cpu": 7, "tensorrt": 8}
Range = tuple[float, float]

_WEIGHTED = ("Conv", "Gemm", "MatMul")
# From one layer to the next without a decision in between. Broader than what can be quantised itself.
_PASSES = {
    "Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Flatten", "GlobalAveragePool",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MaxPool", "Mul", "Pad", "ReduceMean", "Relu",
    "Reshape", "Resize", "RoIAlign", "RoIPool", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
    BANDS_OP,
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
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if not node.domain and node.op_type in _WEIGHTED and node.input[1] in weights:
            users.setdefault(node.input[1], []).append(node)
    products = {node.output[0] for nodes in users.values() for node in nodes}
    reaching: set[str] = set()  # the tensors from which another layer is reached without a decision
    for node in reversed(graph.node):
        layer = node.output[0] in products
        passes = node.domain in ("", DOMAIN) and node.op_type in _PASSES
        if layer or (passes and reaching & set(node.output)):
            # The RoIs that RoIAlign reads were chosen; only the features pass through it.
            reaching.update(node.input[:1] if node.domain or layer else node.input)
    return [
        Layer(
            name=weight.removeprefix("model.").removesuffix(".weight"),
            op=nodes[0].op_type,
            nodes=tuple(node.name for node in nodes),
            last=not any(node.output[0] in reaching for node in nodes),
        )
        for weight, nodes in users.items()
    ]


def _integer_nodes(graph: onnx.GraphProto, layers: Sequence[Layer], *, glue: bool) -> list[onnx.NodeProto]:
    """The nodes to quantise: those of ``layers`` and, with ``glue``, what lies between.

    Glue is quantised where everything it reads is: one float input would cost it two more roundings.
    """
    chosen = {name for layer in layers for name in layer.nodes}
    quantised: set[str] = set()
    nodes = []
    for node in graph.node:
        between = glue and not node.domain and node.op_type in _INTEGER_GLUE
        if node.name in chosen or (between and quantised.issuperset(_activations(node))):
            quantised.update(node.output)
            nodes.append(node)
    return nodes


def _activations(node: onnx.NodeProto) -> Sequence[str]:
    """What a layer or glue reads; the other inputs are weights, limits or sizes."""
    return node.input if node.op_type == "Add" else node.input[:1]


def observed_tensors(model: onnx.ModelProto, layers: Sequence[Layer]) -> list[str]:
    """The activations whose ranges ``quantized`` needs for ``layers`` or fewer of them, in order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, None] = {}
    for node in _integer_nodes(model.graph, layers, glue=True):
        found.update(dict.fromkeys(n for n in (*_activations(node), *node.output) if n not in constants))
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
    from onnxruntime.quantization.quant_utils import add_infer_metadata

    copy = deepcopy(model)
    add_infer_metadata(copy)  # else it infers shapes anew, through files on the disk
    on_cpu = target == "cpu"
    options: dict[str, Any] = {"WeightSymmetric": True, "ActivationSymmetric": not on_cpu}
    if not on_cpu:
        options |= {"QuantizeBias": False, "OpTypesToExcludeOutputQuantization": list(_WEIGHTED)}
    limits = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.items()
    }
    logger = logging.getLogger()  # through which it warns about what is by design, such as shared biases
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        quantizer = QDQQuantizer(
            copy,
            per_channel=True,
            reduce_range=WEIGHT_BITS[target] == 7,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8 if on_cpu else QuantType.QInt8,
            tensors_range=limits,
            nodes_to_quantize=[node.name for node in _integer_nodes(copy.graph, layers, glue=on_cpu)],
            nodes_to_exclude=[],
            op_types_to_quantize=sorted({node.op_type for node in copy.graph.node}),
            extra_options=options,
        )
        made: onnx.ModelProto = quantizer.quantize_model()
    finally:
        logger.setLevel(level)
    if on_cpu:
        _keep_in_float(made.graph)
    _restore(made, model)
    return made


def _keep_in_float(graph: onnx.GraphProto) -> None:
    """Stop onnxruntime from quantising the layers that are to stay float, all channels with one scale.

    Its ``WeightBiasQuantization`` does so wherever a float layer stands between rounded values, but leaves
    alone what is dequantised channel by channel: these layers get their input that way, with the same scale
    for each. (TensorRT knows no such activations; our runtime turns that optimiser off as well.)
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    added: dict[str, str] = {}
    for node in list(graph.node):
        maker = makers.get(node.input[0]) if node.op_type in ("Conv", "Gemm") else None
        weight = tensors.get(node.input[1]) if maker is not None else None
        if maker is None or weight is None or maker.op_type != "DequantizeLinear":
            continue
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        axis = 1 if node.op_type == "Conv" or options.get("transB") else 0
        channels = weight.dims[axis] * options.get("group", 1)
        if maker.output[0] not in added:
            name = added[maker.output[0]] = f"{maker.output[0]}_by_channel"
            constants = [f"{name}_scale", f"{name}_zero_point"]
            for constant, source in zip(constants, maker.input[1:3], strict=True):
                value = np.full(channels, numpy_helper.to_array(tensors[source]))
                graph.initializer.append(numpy_helper.from_array(value, constant))
            inputs = [maker.input[0], *constants]
            graph.node.append(helper.make_node("DequantizeLinear", inputs, [name], name, axis=1))
        node.input[0] = added[maker.output[0]]


def _restore(made: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Put back what the quantiser changes besides the nodes, and its own nodes before their readers.

    It appends them; its topological sort would mix the order of the layers, which verification walks.
    """
    del made.metadata_props[:]
    made.metadata_props.extend(model.metadata_props)
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    graph = made.graph
    makers = {name: node for node in graph.node for name in node.output}
    placed: set[str] = set()
    ordered: list[onnx.NodeProto] = []

    def put(node: onnx.NodeProto) -> None:
        if node.output[0] not in placed:
            placed.update(node.output)
            for name in node.input:
                if name in makers:
                    put(makers[name])  # at most the three nodes around one rounding deep
            ordered.append(deepcopy(node))

    for node in graph.node:
        put(node)
    del graph.node[:]
    graph.node.extend(ordered)
    known = [value for value in graph.value_info if value.name in makers]
    del graph.value_info[:]
    graph.value_info.extend(known)
