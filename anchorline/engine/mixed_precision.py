"""Precision as a property of the graph: the exported float32 file to a mixed, strongly typed one.

TensorRT 11 takes only strongly typed networks, so what runs in half precision is written into the
graph. Converters exist, and none fits: onnxconverter-common's ``float16`` and its descendant in
onnxruntime convert all that is not forbidden, including box geometry, and clamp weights to the range in
silence; nvidia-modelopt's autocast looks at activations but needs PyTorch, which the builder does not
import, and pins an older onnx.

In half precision run convolutions, fully connected layers, and what lies between them: a list of what may be
half, not of what may not. Everything that decides geometry or order (anchors, decoding, IoU, NMS, TopK,
softmax, sigmoid) is float32 because it is not on the list or does not lie between two layers.
``fp16_range.py`` tells which layers would overflow or lose their digits.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from anchorline.engine import fp16_range
from anchorline.engine.fp16_range import Sample, largest_activations
from anchorline.engine.graph import (
    FLOAT,
    HALF,
    HALF_SCALES_OPSET,
    cast_node,
    check_exported,
    constants,
    drop_unused_constants,
    element_types,
    forget,
    fresh_name,
    insert_after,
    refill,
    state_opset,
    tensor_names,
)
from anchorline.engine.options import Precision
from anchorline.runtime.contract import CONTRACT_KEY, DOMAIN
from anchorline.runtime.io.errors import check_choice

# Which inputs multiply: weights and scales, not biases or bounds, whose small values nothing depends on.
_WEIGHTS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}  # of layers
_FACTORS = {**_WEIGHTS, "Mul": (0, 1), "QuantizeLinear": (1,), "DequantizeLinear": (1,)}
_TO_FLOAT = "DequantizeLinear"
# Averages (pooling, ReduceMean) are not here: their sums of many terms are kept in float32.
_BETWEEN = {(DOMAIN, "RoIAlign"), (DOMAIN, "RoIPool")} | {
    ("", operator) for operator in (
        "Add", "Clip", "Concat", "Flatten", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MaxPool",
        "Mul", "Pad", "Relu", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
        "QuantizeLinear", "DequantizeLinear",
    )
}  # fmt: skip
# Inputs whose type is their own whatever the node computes in: Resize's region and scales, and the
# coordinates of RoIs, which in half precision are a quarter of a cell off on a large map.
_OWN_TYPE = {("", "Resize"): (1, 2), (DOMAIN, "RoIAlign"): (1,), (DOMAIN, "RoIPool"): (1,)}
# They read a shape, whatever the type.
_TYPELESS = ("Shape", "Size")
_DEFAULT_EPSILON = 1e-5  # of BatchNormalization


def fold_batch_norm(model: onnx.ModelProto) -> int:
    """Fold every ``BatchNormalization`` that alone follows a ``Conv``, in place; returns how many.

    The exporter folds most of them itself. A folded layer is one layer instead of two, and what is rounded
    to half precision later are the weights that are really used, not a variance of 1e-6 beside them.
    Computed in float64 and rounded once to float32.
    """
    graph = model.graph
    values, used = constants(graph), tensor_names(graph)
    readers = Counter(name for node in graph.node for name in node.input)
    outputs = {value.name for value in graph.output}
    convolutions = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    folded = []
    for norm in graph.node:
        conv = convolutions.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if conv is None or readers[conv.output[0]] > 1 or conv.output[0] in outputs or len(norm.output) > 1:
            continue
        if not all(name in values for name in (*conv.input[1:], *norm.input[1:])):
            continue
        weight, *biases = (values[name].astype(np.float64) for name in conv.input[1:])
        scale, shift, mean, variance = (values[name].astype(np.float64) for name in norm.input[1:5])
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), _DEFAULT_EPSILON)
        factor = scale / np.sqrt(variance + epsilon)
        weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        bias = ((biases[0] if biases else 0.0) - mean) * factor + shift
        names = [fresh_name(f"{conv.input[1]}_{part}", used) for part in ("folded", "folded_bias")]
        for name, array in zip(names, (weight, bias), strict=True):
            graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
        conv.input[1:] = names
        conv.output[0] = norm.output[0]
        folded.append(norm)
    refill(graph.node, (node for node in graph.node if node not in folded))
    drop_unused_constants(graph)
    return len(folded)


def fp16_nodes(
    graph: onnx.GraphProto, types: dict[str, int], constant: Collection[str]
) -> list[onnx.NodeProto]:
    """The nodes that may compute in half precision, in order.

    ``types`` are element types by tensor name, ``constant`` the names of constants: a fully connected
    layer is a product with one. In a model quantised for TensorRT the integers between a QuantizeLinear
    and its DequantizeLinear pass on what the two are between, and a DequantizeLinear before a layer has
    the layer's precision: with a cast between the two TensorRT would not take integers for the layer.
    """
    known = {n.output[0] for n in graph.node if n.op_type == _TO_FLOAT and n.input[0] in constant}
    known.update(constant)
    layers = {
        node.output[0]
        for node in graph.node
        if not node.domain and any(node.input[place] in known for place in _WEIGHTS.get(node.op_type, ()))
    }
    between = {node.output[0] for node in graph.node if (node.domain, node.op_type) in _BETWEEN}
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
    return [node.input[place] for place in half_places(node, types)]


def half_outputs(node: onnx.NodeProto, types: dict[str, int]) -> list[str]:
    return [name for name in node.output if types.get(name) == FLOAT]


def write_half(model: onnx.ModelProto, half: Collection[str], types: dict[str, int]) -> dict[str, str]:
    """Turn the nodes whose first output is in ``half`` to half precision, in place.

    The others are untouched, with casts where the two meet. Tensors keep their names; of one that exists in
    both types the float32 form keeps it, and the other is ``x_half``. Returns the name of each tensor's
    half-precision form. The graph is strongly typed: every node's inputs have the types ONNX prescribes,
    nothing is left to the runtime's choice.
    """
    graph = model.graph
    values, used = constants(graph), tensor_names(graph)
    chosen = [node for node in graph.node if node.output[0] in half]
    made = dict.fromkeys(name for node in chosen for name in half_outputs(node, types))
    read = dict.fromkeys(name for node in chosen for name in half_inputs(node, types))
    in_float = {value.name for value in graph.output} | (read.keys() - made.keys())
    for node in graph.node:
        if node.output[0] in half:
            places = half_places(node, types)
            in_float.update(name for place, name in enumerate(node.input) if place not in places)
        elif node.op_type not in _TYPELESS:
            in_float.update(node.input)
    names = {
        name: fresh_name(f"{name}_half", used) if name in in_float else name for name in {**made, **read}
    }
    casts = {}
    for name, half_name in names.items():
        if name in made and name in in_float:
            casts[half_name] = [cast_node(half_name, name, FLOAT)]
        elif name in values:
            graph.initializer.append(numpy_helper.from_array(values[name].astype(np.float16), half_name))
        elif name in in_float:
            casts[name] = [cast_node(name, half_name, HALF)]
    for node in graph.node:
        if node.output[0] in half:
            for place in half_places(node, types):
                node.input[place] = names[node.input[place]]
            node.output[:] = [names.get(name, name) for name in node.output]
        elif node.op_type in _TYPELESS and node.input[0] in made:
            node.input[0] = names[node.input[0]]
    insert_after(graph, casts)
    forget(graph, names.keys() - in_float)
    drop_unused_constants(graph)
    return names


@dataclass(frozen=True)
class KeptLayer:
    """A layer that stays float32: ``reason`` is "overflow" or "underflow", ``tensor`` where it would
    happen, ``magnitude`` the largest there."""

    name: str
    op: str
    reason: str
    tensor: str
    magnitude: float

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.op}) stays fp32: {self.reason} in {self.tensor}, up to {self.magnitude:.3g}"
        )


@dataclass(frozen=True)
class PrecisionReport:
    """What ``to_precision`` did.

    ``half`` names the nodes now in half precision, ``kept`` those that could not be. ``samples`` is the
    number of samples on which activations were checked; with 0 only the weights were. ``largest`` is
    the largest activation seen in half precision, as (tensor, magnitude). ``folded`` counts batch norms.
    """

    precision: str
    half: tuple[str, ...] = ()
    kept: tuple[KeptLayer, ...] = ()
    samples: int = 0
    largest: tuple[str, float] | None = None
    folded: int = 0

    def lines(self) -> list[str]:
        """The report for a reader, a line each."""
        if self.precision == "fp32":
            return ["precision fp32: the graph as exported"]
        checked = f"weights, and activations on {self.samples} samples" if self.samples else "weights only"
        lines = [f"precision fp16: {len(self.half)} nodes in half precision, {len(self.kept)} kept fp32"]
        lines.append(f"range checked: {checked}")
        if not self.samples:
            lines.append("no sample images were given: an activation beyond 65504 would not be noticed")
        if self.largest is not None:
            lines.append(f"largest activation in half precision: {self.largest[1]:.4g} in {self.largest[0]}")
        return lines + [str(layer) for layer in self.kept]


def to_precision(
    model: onnx.ModelProto, precision: str, samples: Sequence[Sample] = ()
) -> tuple[onnx.ModelProto, PrecisionReport]:
    """``model`` (an exported file, its functions inlined or not) in ``precision``, and what was done.

    "fp16": convolutions, fully connected layers and what lies between them in half precision, batch
    norm folded first; a node whose weights, inputs or outputs half precision cannot hold stays float32.
    ``samples`` are network inputs by name (``images``, ``image_sizes``) on which activations are
    measured, with ``fp16_range.MARGIN``; without them only weights are. "fp32": a copy.
    Raises ``SettingsError`` for another precision or samples that do not fit, ``ArtefactError`` for a
    model that is not ours.
    """
    check_choice("precision", precision, get_args(Precision))
    check_exported(model)
    mixed = copy.deepcopy(model)
    if precision == "fp32":
        return mixed, PrecisionReport("fp32")
    folded = fold_batch_norm(mixed)
    types, values = element_types(mixed), constants(mixed.graph)
    nodes = fp16_nodes(mixed.graph, types, values)
    kept, magnitudes = _unfit(mixed, nodes, types, values, samples)
    half = [node for node in nodes if node.output[0] not in kept]
    inside = {name for node in half for name in half_outputs(node, types)} & set(magnitudes)
    report = PrecisionReport(
        precision,
        half=tuple(_layer_name(node) for node in half),
        kept=tuple(kept.values()),
        samples=len(samples),
        largest=max(((n, magnitudes[n]) for n in inside), key=lambda item: item[1], default=None),
        folded=folded,
    )
    write_half(mixed, {node.output[0] for node in half}, types)
    if any(node.op_type == "DequantizeLinear" for node in half):
        state_opset(mixed, HALF_SCALES_OPSET)
    contract = check_exported(mixed)
    if contract.precision != "int8":  # of a quantised model the integers are what counts
        stated = dataclasses.replace(contract, precision=precision).to_json()
        next(entry for entry in mixed.metadata_props if entry.key == CONTRACT_KEY).value = stated
    return mixed, report


def _unfit(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    types: dict[str, int],
    values: dict[str, NDArray[np.generic]],
    samples: Sequence[Sample],
) -> tuple[dict[str, KeptLayer], dict[str, float]]:
    """The nodes that half precision cannot hold, by first output, and each tensor's largest magnitude."""
    kept: dict[str, KeptLayer] = {}

    def keep(node: onnx.NodeProto, reason: str, tensor: str, magnitude: float) -> None:
        layer = KeptLayer(_layer_name(node), node.op_type, reason, tensor, magnitude)
        kept.setdefault(node.output[0], layer)

    for node in nodes:
        for place in half_places(node, types):
            name = node.input[place]
            if name not in values:
                continue
            largest = np.abs(values[name]).max(initial=0.0)
            magnitude = float("inf") if np.isnan(largest) else float(largest)
            multiplies = place in _FACTORS.get(node.op_type, ())
            if fp16_range.overflows(magnitude):
                keep(node, "overflow", name, magnitude)
            elif multiplies and fp16_range.rounding_loss(values[name]) > fp16_range.WORST_ROUNDING:
                keep(node, "underflow", name, magnitude)
    rounded = {node.output[0]: (*half_inputs(node, types), *half_outputs(node, types)) for node in nodes}
    tensors = {name for names in rounded.values() for name in names} - set(values)
    magnitudes = largest_activations(model, tensors, samples)
    for node in nodes:
        for name in rounded[node.output[0]]:
            magnitude = magnitudes.get(name, 0.0)
            if 0.0 < magnitude < fp16_range.SMALLEST_NORMAL:
                keep(node, "underflow", name, magnitude)
            elif magnitude * fp16_range.MARGIN > fp16_range.LARGEST:
                keep(node, "overflow", name, magnitude)
    # Magnitudes in float32 do not show it when rounding itself drives values apart. Of a chain of nodes that
    # are not finite once everything before them is rounded the first is kept, and the rest looked at again.
    while samples:
        half = [node for node in nodes if node.output[0] not in kept]
        trial = copy.deepcopy(model)
        names = write_half(trial, {node.output[0] for node in half}, types)
        # In the simulation a half tensor is float32, and not finite if it overflowed.
        simulated = fp16_range.simulate_half(trial)
        found = largest_activations(simulated, [names[n.output[0]] for n in half], samples)
        first = next((node for node in half if not np.isfinite(found[names[node.output[0]]])), None)
        if first is None:
            break
        keep(first, "overflow", first.output[0], float("inf"))
    return kept, magnitudes


def _layer_name(node: onnx.NodeProto) -> str:
    """A layer's name: that of its weight, as the checkpoint has it, else the node's own."""
    for name in node.input[1:2]:
        weight = name.removesuffix("_DequantizeLinear_Output").removesuffix("_folded")
        if weight.endswith(".weight"):
            return weight.removesuffix(".weight")
    return node.name or node.output[0]
