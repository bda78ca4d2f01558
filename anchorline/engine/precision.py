"""Precision as a property of the graph: the exported float32 file to a mixed, strongly typed one.

TensorRT 11 takes only strongly typed networks, so what runs in half precision is written into the
graph. Converters exist, and none fits: onnxconverter-common's ``float16`` and its descendant in
onnxruntime convert all that is not forbidden, including box geometry, and clamp weights to the range in
silence; nvidia-modelopt's autocast looks at activations but needs PyTorch, which this stage does not
import, and pins an older onnx. What is needed here is short:

- ``half_region.py``: which nodes may be half,
- ``half_range.py``: which of them would overflow or lose their digits,
- ``half_graph.py``: writing the graph with its casts,
- ``half_simulation.py``: the same numbers in float32, to run anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from anchorline.engine.batch_norm import fold_batch_norm
from anchorline.engine.graph_tools import constants, copy_of, element_types
from anchorline.engine.half_graph import write_half
from anchorline.engine.half_range import (
    LARGEST,
    MARGIN,
    SMALLEST_NORMAL,
    WORST_ROUNDING,
    Sample,
    largest_activations,
    largest_weight,
    overflows,
    rounding_loss,
)
from anchorline.engine.half_region import factors, half_inputs, half_outputs, half_region
from anchorline.engine.half_simulation import simulate_half
from anchorline.engine.model_file import HALF_SCALES_OPSET, check_exported, state_opset
from anchorline.runtime.contract import CONTRACT_KEY
from anchorline.runtime.errors import SettingsError

PRECISIONS = ("fp16", "fp32")


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

    def to_json(self) -> dict[str, object]:
        """The report as JSON values."""
        return dataclasses.asdict(self)


def to_precision(
    model: onnx.ModelProto, precision: str, samples: Sequence[Sample] = ()
) -> tuple[onnx.ModelProto, PrecisionReport]:
    """``model`` (an exported file, its functions inlined or not) in ``precision``, and what was done.

    "fp16": convolutions, fully connected layers and what lies between them in half precision, batch
    norm folded first; a node whose weights, inputs or outputs half precision cannot hold stays float32.
    ``samples`` are network inputs by name (``images``, ``image_sizes``) on which activations are
    measured, with a margin of ``MARGIN``; without them only weights are. "fp32": a copy.
    Raises ``SettingsError`` for another precision or samples that do not fit, ``ArtefactError`` for a
    model that is not ours.
    """
    if precision not in PRECISIONS:
        raise SettingsError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    check_exported(model)
    mixed = copy_of(model)
    if precision == "fp32":
        return mixed, PrecisionReport("fp32")
    folded = fold_batch_norm(mixed)
    types, values = element_types(mixed), constants(mixed.graph)
    region = half_region(mixed.graph, types, values)
    kept = _weight_findings(region, types, values)
    magnitudes = _magnitudes(mixed, region, types, values, samples)
    kept |= _activation_findings(region, types, magnitudes, kept)
    kept |= _rounded_findings(mixed, region, types, kept, samples)
    half = [node for node in region if node.output[0] not in kept]
    inside = {name for node in half for name in half_outputs(node, types)} & set(magnitudes)
    report = PrecisionReport(
        precision,
        half=tuple(_layer_name(node, values) for node in half),
        kept=tuple(kept.values()),
        samples=len(samples),
        largest=max(((n, magnitudes[n]) for n in inside), key=lambda item: item[1], default=None),
        folded=folded,
    )
    write_half(mixed, {node.output[0] for node in half}, types)
    if any(node.op_type == "DequantizeLinear" for node in half):
        state_opset(mixed, HALF_SCALES_OPSET)
    _state_precision(mixed, precision)
    return mixed, report


def _weight_findings(
    region: Sequence[onnx.NodeProto], types: dict[str, int], values: dict[str, NDArray[np.generic]]
) -> dict[str, KeptLayer]:
    """Nodes with constants that half precision cannot hold, by first output."""
    found: dict[str, KeptLayer] = {}
    for node in region:
        for name in half_inputs(node, types):
            if name not in values:
                continue
            magnitude = largest_weight(values[name])
            reason = ""
            if overflows(magnitude):
                reason = "overflow"
            elif name in factors(node) and rounding_loss(values[name]) > WORST_ROUNDING:
                reason = "underflow"
            if reason:
                layer = KeptLayer(_layer_name(node, values), node.op_type, reason, name, magnitude)
                found.setdefault(node.output[0], layer)
    return found


def _magnitudes(
    model: onnx.ModelProto,
    region: Sequence[onnx.NodeProto],
    types: dict[str, int],
    values: dict[str, NDArray[np.generic]],
    samples: Sequence[Sample],
) -> dict[str, float]:
    """The largest magnitude in float32 of every tensor that the region would round."""
    tensors = {name for node in region for name in (*half_inputs(node, types), *half_outputs(node, types))}
    return largest_activations(model, tensors - set(values), samples)


def _activation_findings(
    region: Sequence[onnx.NodeProto],
    types: dict[str, int],
    magnitudes: dict[str, float],
    known: dict[str, KeptLayer],
) -> dict[str, KeptLayer]:
    """Nodes that read or write a tensor beyond the range, or one wholly among the subnormals."""
    found: dict[str, KeptLayer] = {}
    for node in region:
        for name in (*half_inputs(node, types), *half_outputs(node, types)):
            magnitude = magnitudes.get(name, 0.0)
            too_small = 0.0 < magnitude < SMALLEST_NORMAL
            if node.output[0] not in known and (magnitude * MARGIN > LARGEST or too_small):
                reason = "underflow" if too_small else "overflow"
                found.setdefault(
                    node.output[0], KeptLayer(_layer_name(node), node.op_type, reason, name, magnitude)
                )
    return found


def _rounded_findings(
    model: onnx.ModelProto,
    region: Sequence[onnx.NodeProto],
    types: dict[str, int],
    known: dict[str, KeptLayer],
    samples: Sequence[Sample],
) -> dict[str, KeptLayer]:
    """Nodes whose outputs are not finite once everything before them is rounded.

    Magnitudes in float32 do not show it when rounding itself drives values apart. Of a chain of such
    nodes the first is kept, and the rest looked at again.
    """
    found: dict[str, KeptLayer] = {}
    while samples:
        half = [node for node in region if node.output[0] not in {**known, **found}]
        trial = copy_of(model)
        names = write_half(trial, {node.output[0] for node in half}, types)
        # In the simulation a half tensor is float32, and not finite if it overflowed.
        tensors = {node.output[0]: names[node.output[0]] for node in half}
        magnitudes = largest_activations(simulate_half(trial), tensors.values(), samples)
        first = next((node for node in half if not np.isfinite(magnitudes[tensors[node.output[0]]])), None)
        if first is None:
            break
        found[first.output[0]] = KeptLayer(
            _layer_name(first), first.op_type, "overflow", first.output[0], float("inf")
        )
    return found


def _layer_name(node: onnx.NodeProto, values: dict[str, NDArray[np.generic]] | None = None) -> str:
    """A layer's name: that of its weight, as the checkpoint has it, else the node's own."""
    for name in node.input[1:2]:
        weight = name.removesuffix("_DequantizeLinear_Output").removesuffix("_folded")
        if weight.endswith(".weight"):
            return weight.removesuffix(".weight")
    return node.name or node.output[0]


def _state_precision(model: onnx.ModelProto, precision: str) -> None:
    """Let the contract inside the model say so; of a quantised one the integers are what counts."""
    contract = check_exported(model)
    if contract.precision == "int8":
        return
    contract = dataclasses.replace(contract, precision=precision)
    for entry in model.metadata_props:
        if entry.key == CONTRACT_KEY:
            entry.value = contract.to_json()
