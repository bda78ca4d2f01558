"""How much each layer costs when it computes with integers.

Two figures a layer, of a few images and with everything before the layer in float32:

- ``sqnr_db``: signal to quantisation noise in the layer's own output, in decibels. One run gives all.
- ``effect``: how far the network's scores and box deltas move when this layer alone is quantised, as
  the root mean square of the difference by that of the value, the worst stage counting. One graph with
  a switch a layer gives it, at one run a layer. The second stage sees the float model's proposals, since
  two lists of boxes could not be compared row by row.

Integers are simulated: rounded values in float32, which is what they stand for and what the kernels of every
processor give (``graph.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anchorline.export.quantize.graph import Layer
from anchorline.runtime.backends.onnxruntime import open_for_checks
from anchorline.verify.stages import opened_up, stage_of

Inputs = Mapping[str, NDArray[Any]]
Done = Callable[[], None]

_RESULTS = ("objectness", "bbox_deltas", "class_logits", "box_regression")
_PROPOSALS = "proposals"
_SWITCHES = "quantised"


@dataclass(frozen=True)
class Sensitivity:
    """What a layer costs; ``effect`` is None for a graph without stage names."""

    name: str
    op: str
    sqnr_db: float
    effect: float | None


@dataclass(frozen=True)
class _Rounding:
    """Names of constants in the quantised graph: a scale and a zero point."""

    scale: str
    zero_point: str


@dataclass(frozen=True)
class _Twin:
    """A layer's node in the quantised graph: how its input and output are rounded, and its weight's
    ``DequantizeLinear``. ``after`` is None where the output stays float32."""

    node: onnx.NodeProto
    before: _Rounding
    weight: onnx.NodeProto
    after: _Rounding | None


def measure_sensitivity(
    model: onnx.ModelProto,
    quantised: onnx.ModelProto,
    layers: Sequence[Layer],
    images: Sequence[Inputs],
    done: Done = lambda: None,
) -> list[Sensitivity]:
    """Each of ``layers``, the most costly first.

    ``quantised`` is ``model`` with all of ``layers`` in integers; ``images`` are inputs of the network.
    ``done`` is called after each layer.
    """
    twins = _twins(model, quantised, layers)
    noise = _noise(_with_noise(model, quantised, twins), layers, images)
    effects = _effects(model, quantised, layers, twins, images, done)
    rows = [
        Sensitivity(layer.name, layer.op, decibels, effects.get(layer.name))
        for layer, decibels in zip(layers, noise, strict=True)
    ]
    return sorted(rows, key=lambda row: (-(row.effect or 0.0), row.sqnr_db))


def _twins(model: onnx.ModelProto, quantised: onnx.ModelProto, layers: Sequence[Layer]) -> dict[str, _Twin]:
    """By name of the node. The quantiser keeps the names of nodes."""
    makers = {name: node for node in quantised.graph.node for name in node.output}
    rounded = {n.input[0]: n for n in quantised.graph.node if n.op_type == "QuantizeLinear"}
    wanted = {name for layer in layers for name in layer.nodes}
    found = {}
    for node in quantised.graph.node:
        if node.name in wanted:
            before = makers[node.input[0]]
            after = rounded.get(node.output[0])
            found[node.name] = _Twin(
                next(n for n in model.graph.node if n.name == node.name),
                _Rounding(*before.input[1:3]),
                makers[node.input[1]],
                None if after is None else _Rounding(*after.input[1:3]),
            )
    return found


def _in_integers(twin: _Twin, output: str) -> list[onnx.NodeProto]:
    """The nodes that compute ``output`` from the layer's float input, rounded as its twin rounds."""
    value = twin.node.input[0]
    plain = f"{output}/plain" if twin.after is not None else output
    nodes = [*_round(value, f"{output}/in", twin.before)]
    layer = onnx.NodeProto.FromString(twin.node.SerializeToString())
    layer.input[:2] = [f"{output}/in", f"{output}/weight"]
    layer.output[:] = [plain]
    layer.name = f"{output}/layer"
    weight = onnx.NodeProto.FromString(twin.weight.SerializeToString())
    weight.output[:] = [f"{output}/weight"]
    weight.name = f"{output}/weight"
    nodes += [weight, layer]
    return nodes if twin.after is None else [*nodes, *_round(plain, output, twin.after)]


def _round(value: str, output: str, by: _Rounding) -> list[onnx.NodeProto]:
    return [
        helper.make_node("QuantizeLinear", [value, by.scale, by.zero_point], [f"{output}/q"]),
        helper.make_node("DequantizeLinear", [f"{output}/q", by.scale, by.zero_point], [output]),
    ]


def _copy_with_constants(model: onnx.ModelProto, quantised: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` that has the quantised graph's scales, zero points and weights as well."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    there = {tensor.name for tensor in model.graph.initializer}
    copy.graph.initializer.extend(t for t in quantised.graph.initializer if t.name not in there)
    return copy


def _with_noise(
    model: onnx.ModelProto, quantised: onnx.ModelProto, twins: Mapping[str, _Twin]
) -> onnx.ModelProto:
    """A copy of ``model`` whose outputs are two numbers a node: the power of its output and of its noise.

    Noise in what a ReLU takes away counts as well, unless the quantised graph has dropped the ReLU into
    the rounding: then both sides are rectified before they are compared.
    """
    copy = _copy_with_constants(model, quantised)
    del copy.graph.output[:]
    limits = _rectified(model, twins)
    for name, twin in twins.items():
        output, made = twin.node.output[0], f"noise/{name}"
        copy.graph.node.extend(_in_integers(twin, f"{made}/integers"))
        sides = []
        for side, value in (("float", output), ("integers", f"{made}/integers")):
            activation = limits.get(output)
            if activation is not None:
                node = onnx.NodeProto.FromString(activation.SerializeToString())
                node.input[0], node.output[0], node.name = value, f"{made}/{side}/cut", f"{made}/{side}"
                copy.graph.node.append(node)
                value = node.output[0]
            sides.append(value)
        copy.graph.node.extend(
            [
                helper.make_node("Sub", sides, [f"{made}/difference"]),
                helper.make_node("ReduceSumSquare", [f"{made}/difference"], [f"{made}/noise"], keepdims=0),
                helper.make_node("ReduceSumSquare", [sides[0]], [f"{made}/signal"], keepdims=0),
            ]
        )
        copy.graph.output.extend(onnx.ValueInfoProto(name=f"{made}/{w}") for w in ("signal", "noise"))
    return copy


def _rectified(model: onnx.ModelProto, twins: Mapping[str, _Twin]) -> dict[str, onnx.NodeProto]:
    """The ``Relu`` or ``Clip`` that alone follows a layer whose output is rounded, by that output."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = [twin.node.output[0] for twin in twins.values() if twin.after is not None]
    return {
        name: readers[name][0]
        for name in outputs
        if len(readers.get(name, ())) == 1 and readers[name][0].op_type in ("Relu", "Clip")
    }


def _noise(graph: onnx.ModelProto, layers: Sequence[Layer], images: Sequence[Inputs]) -> list[float]:
    """The signal to noise ratio of each layer in decibels, over all images and all its nodes."""
    session = _session(graph)
    wanted = [output.name for output in graph.graph.output]
    power = dict.fromkeys(wanted, 0.0)
    for inputs in images:
        for name, value in zip(wanted, session.run(wanted, dict(inputs)), strict=True):
            power[name] += float(value)
    decibels = []
    for layer in layers:
        signal, noise = (sum(power[f"noise/{node}/{w}"] for node in layer.nodes) for w in ("signal", "noise"))
        decibels.append(float(10 * np.log10(max(signal, 1e-30) / max(noise, 1e-30))))
    return decibels


def _effects(
    model: onnx.ModelProto,
    quantised: onnx.ModelProto,
    layers: Sequence[Layer],
    twins: Mapping[str, _Twin],
    images: Sequence[Inputs],
    done: Done,
) -> dict[str, float]:
    """The effect of each layer, by name; none for a graph without stage names."""
    made = {name for node in model.graph.node for name in node.output}
    wanted = sorted(name for name in made if stage_of(name) in _RESULTS)
    fed = [_PROPOSALS] if _PROPOSALS in made else []
    if not wanted:
        return {}
    switched = _with_switches(model, quantised, layers, twins)
    session = _session(opened_up(switched, fed, [*wanted, *fed]))
    worst = dict.fromkeys((layer.name for layer in layers), 0.0)
    off = np.zeros(len(layers), np.bool_)
    references = []
    for inputs in images:
        feed = {f"fed/{name}": np.zeros(_shape(model, name), np.float32) for name in fed}
        first = session.run(fed, {**inputs, **feed, _SWITCHES: off}) if fed else []
        feed = {f"fed/{name}": value for name, value in zip(fed, first, strict=True)}
        feed = {**inputs, **feed}
        references.append((feed, session.run(wanted, {**feed, _SWITCHES: off})))
    for index, layer in enumerate(layers):
        only = off.copy()
        only[index] = True
        for feed, reference in references:
            found = session.run(wanted, {**feed, _SWITCHES: only})
            moved = [_relative_rms(a, b) for a, b in zip(reference, found, strict=True)]
            worst[layer.name] = max(worst[layer.name], *moved)
        done()
    return worst


def _with_switches(
    model: onnx.ModelProto,
    quantised: onnx.ModelProto,
    layers: Sequence[Layer],
    twins: Mapping[str, _Twin],
) -> onnx.ModelProto:
    """A copy of ``model`` with the input ``quantised`` (bool, one a layer): on, and the layer rounds."""
    copy = _copy_with_constants(model, quantised)
    graph = copy.graph
    graph.input.append(helper.make_tensor_value_info(_SWITCHES, TensorProto.BOOL, [len(layers)]))
    switches, index_of = [], {}
    for index, layer in enumerate(layers):
        number = numpy_helper.from_array(np.array(index, np.int64), f"switch/{index}/number")
        graph.initializer.append(number)
        switches.append(helper.make_node("Gather", [_SWITCHES, number.name], [f"switch/{index}"]))
        index_of.update(dict.fromkeys(layer.nodes, index))
    nodes = switches
    for node in model.graph.node:
        twin = twins.get(node.name)
        nodes.append(node if twin is None else _switch(twin, f"switch/{index_of[node.name]}"))
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return copy


def _switch(twin: _Twin, flag: str) -> onnx.NodeProto:
    """``If``, of whose branches only the one taken computes."""
    output = twin.node.output[0]
    branches = []
    for branch, made in (("integers", _in_integers(twin, f"{output}/integers")), ("float", [twin.node])):
        inner = f"{output}/{branch}"
        if branch == "float":
            made = [onnx.NodeProto.FromString(twin.node.SerializeToString())]
            made[0].output[:] = [inner]
        branches.append(helper.make_graph(made, inner, [], [onnx.ValueInfoProto(name=inner)]))
    return helper.make_node(
        "If", [flag], [output], name=twin.node.name, then_branch=branches[0], else_branch=branches[1]
    )


def _shape(model: onnx.ModelProto, name: str) -> list[int]:
    """A value's shape for one image."""
    value = next(v for v in model.graph.value_info if v.name == name)
    return [max(1, dim.dim_value) for dim in value.type.tensor_type.shape.dim]


def _relative_rms(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    difference = np.square(found - reference, dtype=np.float64).mean()
    return float(np.sqrt(difference / max(np.square(reference, dtype=np.float64).mean(), 1e-30)))


def _session(model: onnx.ModelProto) -> Any:
    # The rounding is what is measured, not what onnxruntime would fuse it with.
    return open_for_checks(model.SerializeToString(), config={"session.disable_quant_qdq": "1"})
