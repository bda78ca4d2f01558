"""What a graph does on real images: the range of every activation, and what each layer costs in integers.

Both are measured by nodes in the graph, one image at a time. onnxruntime's calibrators know no least rounding
error, and for percentiles make every map an output: 1.4 times the memory and 2.5 times the processor time
(ResNet-18-FPN at 800x1344). Its ``qdq_loss_debug`` compares with a graph in which everything is rounded, and
so blames a layer for those before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anchorline.export.integer_graph import Layer, Range
from anchorline.runtime.backends.onnxruntime import open_for_checks
from anchorline.runtime.io.errors import ArtefactError, DataError, one_line
from anchorline.verify.stages import opened_up, stage_of

METHODS = ("minmax", "percentile", "mse")
Inputs = Mapping[str, NDArray[Any]]

_SAMPLES = 32768  # of one tensor, over all images: of some 200 tensors 26 MB
_PERCENTILE = 99.99
_SHRUNK = np.linspace(1.0, 0.3, 36)  # shares of the range that the search for the least error tries


def measure_ranges(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Iterable[Inputs],
    count: int,
    method: str,
    done: Callable[[int], None] = lambda number: None,
) -> dict[str, Range]:
    """(lowest, highest) of ``tensors`` over ``count`` ``images``, each the network's inputs by name.

    ``method``: "minmax" takes all that was seen; "percentile" leaves out the outermost 0.01 % on either
    side; "mse" narrows the range as far as that lessens the squared error of rounding to 256 steps.
    ``done(number)`` is called after each image. Raises ``DataError`` where a value is not finite,
    ``ArtefactError`` where the model does not run.
    """
    observed = _with_observers(model, tensors, max(16, _SAMPLES // max(count, 1)))
    session = open_for_checks(observed.SerializeToString(), arena=False, in_order=True)
    lows, highs = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    samples: list[list[NDArray[np.float32]]] = [[] for _ in tensors]
    for number, inputs in enumerate(images, start=1):
        try:
            values = session.run(None, dict(inputs))
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise ArtefactError(
                f"calibration image {number}: onnxruntime cannot run the model on it "
                f"({one_line(error)[:300]}); compare the model with what it was exported from with "
                "anchorline verify"
            ) from error
        for index, name in enumerate(tensors):
            low, high, some = values[3 * index : 3 * index + 3]
            if not (math.isfinite(low) and math.isfinite(high)):
                raise DataError(
                    f"calibration image {number}: {name} has values that are not finite; leave the image "
                    "out, or find the fault with anchorline verify"
                )
            lows[index], highs[index] = min(lows[index], low), max(highs[index], high)
            samples[index].append(some)
        done(number)
    return {
        name: _narrowed(float(low), float(high), np.concatenate(some), method)
        for name, low, high, some in zip(tensors, lows, highs, samples, strict=True)
    }


def _narrowed(low: float, high: float, sample: NDArray[np.float32], method: str) -> Range:
    low, high = min(low, 0.0), max(high, 0.0)  # padding is zero, and zero must be exact
    if method == "percentile":
        narrow = np.percentile(sample, (100.0 - _PERCENTILE, _PERCENTILE))
        return max(low, min(float(narrow[0]), 0.0)), min(high, max(float(narrow[1]), 0.0))
    if method == "mse" and high > low:
        errors = [_rounding_error(sample, low * share, high * share) for share in _SHRUNK]
        share = float(_SHRUNK[int(np.argmin(errors))])
        return low * share, high * share
    return low, high


def _rounding_error(sample: NDArray[np.float32], low: float, high: float) -> float:
    """The mean squared error of ``sample`` rounded to 256 even steps from ``low`` to ``high``."""
    step = (high - low) / 255.0
    rounded = np.clip(np.rint(sample / step), np.rint(low / step), np.rint(high / step)) * step
    return float(np.square(rounded - sample, dtype=np.float64).mean())


def _with_observers(model: onnx.ModelProto, tensors: Sequence[str], count: int) -> onnx.ModelProto:
    """A copy of ``model`` that gives of each tensor its extremes and about ``count`` values, and no more.

    They are taken right behind the node that makes the tensor, which can be given back then.
    """
    copy = deepcopy(model)
    graph = copy.graph
    del graph.node[:], graph.output[:]

    def constant(name: str, *values: int) -> str:
        name = f"observed/{name}"
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    all_, zero, end = constant("all", -1), constant("zero", 0), constant("end", np.iinfo(np.int64).max)
    wanted, one, primes = constant("wanted", count), constant("one", 1), constant("primes", *_primes())
    observers = {}
    for name in tensors:
        flat, size, most, small, rest, odd, fits, steps, step, low, high, some = (
            f"observed/{name}/{part}"
            for part in (
                "flat", "size", "most", "small", "rest", "odd", "fits", "steps", "step",
                "low", "high", "some",
            )
        )  # fmt: skip
        observers[name] = [
            helper.make_node("Reshape", [name, all_], [flat]),
            # How large a map is depends on the frame. The stride is the largest prime that gives enough
            # values and is no factor of the size: columns and channels mix.
            helper.make_node("Shape", [flat], [size]),
            helper.make_node("Div", [size, wanted], [most]),
            helper.make_node("LessOrEqual", [primes, most], [small]),
            helper.make_node("Mod", [size, primes], [rest]),
            helper.make_node("Cast", [rest], [odd], to=TensorProto.BOOL),
            helper.make_node("And", [small, odd], [fits]),
            helper.make_node("Where", [fits, primes, one], [steps]),
            helper.make_node("ReduceMax", [steps], [step], keepdims=1),
            helper.make_node("ReduceMin", [flat], [low], keepdims=0),
            helper.make_node("ReduceMax", [flat], [high], keepdims=0),
            helper.make_node("Slice", [flat, zero, end, zero, step], [some]),
        ]
        graph.output.extend(onnx.ValueInfoProto(name=output) for output in (low, high, some))
    for value in graph.input:
        graph.node.extend(observers.get(value.name, ()))
    for node in model.graph.node:
        graph.node.append(node)
        for name in node.output:
            graph.node.extend(observers.get(name, ()))
    return copy


def _primes() -> list[int]:
    """Strides: primes up to a million, each a quarter larger than the one before at most."""
    found = [2]
    while found[-1] < 1_000_000:
        step = found[-1] + max(1, found[-1] // 8)
        while any(step % factor == 0 for factor in range(2, math.isqrt(step) + 1)):
            step += 1
        found.append(step)
    return found


# What each layer costs. Integers are simulated: rounded values in float32, which is what they stand for and
# what the kernels of every processor give. Everything before the layer stays float32.

_RESULTS = ("objectness", "bbox_deltas", "class_logits", "box_regression")
_PROPOSALS = "proposals"
_SWITCHES = "quantised"


@dataclass(frozen=True)
class Sensitivity:
    """What a layer costs, alone in integers.

    ``sqnr_db``: signal to quantisation noise in its own output, in decibels. ``effect``: how far the
    network's scores and box deltas move, as the root mean square of the difference by that of the value,
    the worst of them counting; None for a graph without stage names.
    """

    name: str
    op: str
    sqnr_db: float
    effect: float | None


def measure_sensitivity(
    model: onnx.ModelProto,
    quantised: onnx.ModelProto,
    layers: Sequence[Layer],
    images: Sequence[Inputs],
    done: Callable[[], None] = lambda: None,
) -> list[Sensitivity]:
    """Each of ``layers``, the most costly first.

    ``quantised`` is ``model`` with all of ``layers`` in integers; ``images`` are inputs of the network.
    ``done`` is called after each layer. One graph, in which every layer has a switch, gives all. The second
    part of the network sees the float model's proposals, since two lists of boxes could not be compared
    row by row.
    """
    made = {name for node in model.graph.node for name in node.output}
    results = sorted(name for name in made if stage_of(name) in _RESULTS)
    fed = [_PROPOSALS] if results and _PROPOSALS in made else []
    switched, powers = _with_switches(model, quantised, layers)
    wanted = [*results, *fed, *(name for names in powers for name in names)]
    session = open_for_checks(
        opened_up(switched, fed, wanted).SerializeToString(),
        config={"session.disable_quant_qdq": "1"},  # rounding alone, not what onnxruntime would fuse with it
    )
    off = np.zeros(len(layers), np.bool_)
    references = []
    for inputs in images:
        feed = {**inputs, _SWITCHES: off}
        if fed:
            shape = next(_shape_of(v) for v in model.graph.value_info if v.name == _PROPOSALS)
            first = {**feed, f"fed/{_PROPOSALS}": np.zeros(shape, np.float32)}
            feed[f"fed/{_PROPOSALS}"] = session.run(fed, first)[0]
        references.append((feed, session.run(results, feed) if results else []))
    rows = []
    for index, layer in enumerate(layers):
        signal = noise = 0.0
        moved = [0.0]
        switches = off.copy()
        switches[index] = True
        for feed, reference in references:
            found = session.run([*results, *powers[index]], {**feed, _SWITCHES: switches})
            moved += [_relative_rms(a, b) for a, b in zip(reference, found[: len(results)], strict=True)]
            signal += sum(map(float, found[len(results) :: 2]))
            noise += sum(map(float, found[len(results) + 1 :: 2]))
        decibels = float(10 * np.log10(max(signal, 1e-30) / max(noise, 1e-30)))
        rows.append(Sensitivity(layer.name, layer.op, decibels, max(moved) if results else None))
        done()
    return sorted(rows, key=lambda row: (-(row.effect or 0.0), row.sqnr_db))


def _relative_rms(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    difference = np.square(found - reference, dtype=np.float64).mean()
    return float(np.sqrt(difference / max(np.square(reference, dtype=np.float64).mean(), 1e-30)))


def _with_switches(
    model: onnx.ModelProto, quantised: onnx.ModelProto, layers: Sequence[Layer]
) -> tuple[onnx.ModelProto, list[list[str]]]:
    """A copy of ``model`` whose input ``quantised`` (bool, one a layer) makes layers round.

    And for each layer the names of the power of its output and of its noise, node by node; zero while off.
    """
    copy = deepcopy(model)
    graph = copy.graph
    there = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(t for t in quantised.graph.initializer if t.name not in there)
    graph.input.append(helper.make_tensor_value_info(_SWITCHES, TensorProto.BOOL, [len(layers)]))
    flags = [f"switch/{index}" for index in range(len(layers))]
    nodes = [helper.make_node("Split", [_SWITCHES], flags, num_outputs=len(layers))]
    flag_of = {name: flag for flag, layer in zip(flags, layers, strict=True) for name in layer.nodes}
    makers = {name: node for node in quantised.graph.node for name in node.output}
    rounders = {node.input[0]: node for node in quantised.graph.node if node.op_type == "QuantizeLinear"}
    twins = {node.name: node for node in quantised.graph.node}  # the quantiser keeps the names of nodes
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    ends = {}
    for node in model.graph.node:
        if node.name not in flag_of:
            nodes.append(node)
            continue
        twin, following = twins[node.name], readers.get(node.output[0], [])
        after = rounders.get(twin.output[0])
        # Noise in what a ReLU takes away counts, unless the quantiser has dropped the ReLU into the rounding.
        dropped = after is not None and [n.op_type for n in following] in (["Relu"], ["Clip"])
        switch = _switch(
            node,
            flag_of[node.name],
            before=makers[twin.input[0]],
            weight=makers[twin.input[1]],
            after=after,
            activation=following[0] if dropped and there.issuperset(following[0].input[1:]) else None,
        )
        nodes.append(switch)
        ends[node.name] = switch.output[1:]
    del graph.node[:]
    graph.node.extend(nodes)
    return copy, [[end for name in layer.nodes for end in ends[name]] for layer in layers]


def _switch(
    node: onnx.NodeProto,
    flag: str,
    *,
    before: onnx.NodeProto,
    weight: onnx.NodeProto,
    after: onnx.NodeProto | None,
    activation: onnx.NodeProto | None,
) -> onnx.NodeProto:
    """``If``, of whose branches only the one taken computes: ``node``, or ``node`` on rounded values.

    ``before`` and ``after`` round its input and output in the quantised graph, ``weight`` gives its
    weight. The powers are taken behind ``activation``, which is what the rounded output stands for.
    """
    output = node.output[0]
    plain, integers, exact = f"{output}/plain", f"{output}/integers", f"{output}/exact"
    signal, noise = f"{output}/signal", f"{output}/noise"
    inputs = [f"{output}/in", f"{output}/weight", *node.input[2:]]
    rounded = [
        *_round(node.input[0], inputs[0], before),
        _clone(weight, weight.input, inputs[1]),
        _clone(node, inputs, integers if after is None else plain),
        *(() if after is None else _round(plain, integers, after)),
        _clone(node, node.input, exact),
    ]
    if activation is not None:
        rounded.append(_clone(activation, [exact, *activation.input[1:]], f"{exact}/cut"))
        exact = f"{exact}/cut"
    rounded += [
        helper.make_node("Sub", [exact, integers], [f"{output}/difference"]),
        helper.make_node("ReduceSumSquare", [exact], [signal], keepdims=0),
        helper.make_node("ReduceSumSquare", [f"{output}/difference"], [noise], keepdims=0),
    ]
    off = [f"{output}/off", f"{signal}/off", f"{noise}/off"]
    floats = [
        _clone(node, node.input, off[0]),
        *(helper.make_node("Constant", [], [name], value_float=0.0) for name in off[1:]),
    ]
    branches = {
        f"{branch}_branch": helper.make_graph(made, branch, [], [onnx.ValueInfoProto(name=n) for n in ends])
        for branch, made, ends in (("then", rounded, [integers, signal, noise]), ("else", floats, off))
    }
    return helper.make_node("If", [flag], [output, f"{signal}/if", f"{noise}/if"], node.name, **branches)


def _round(value: str, output: str, by: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Rounding with the scale and the zero point of the node ``by``."""
    return [
        helper.make_node("QuantizeLinear", [value, *by.input[1:3]], [f"{output}/q"]),
        helper.make_node("DequantizeLinear", [f"{output}/q", *by.input[1:3]], [output]),
    ]


def _clone(node: onnx.NodeProto, inputs: Sequence[str], output: str) -> onnx.NodeProto:
    made = deepcopy(node)
    made.name, made.input[:], made.output[:] = output, inputs, [output]
    return made


def _shape_of(value: onnx.ValueInfoProto) -> list[int]:
    """The shape for one image: a free dimension counts as 1."""
    return [max(1, dim.dim_value) for dim in value.type.tensor_type.shape.dim]
