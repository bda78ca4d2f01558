"""Calibration: the range of every activation on real images, measured inside the graph.

A graph whose every map is an output needs gigabytes on a large canvas. So smallest and largest value and
an even sample of the rest are taken by nodes in the graph, one image at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from anchorline.runtime.backends.onnxruntime import open_for_checks
from anchorline.runtime.io.errors import ArtefactError, DataError, SettingsError

METHODS = ("minmax", "percentile", "mse")
Inputs = Mapping[str, NDArray[Any]]
Range = tuple[float, float]

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
    if method not in METHODS:
        raise SettingsError(f"calibration method is {method!r}; expected one of {', '.join(METHODS)}")
    session, sampled = _open(_with_observers(model, tensors, max(16, _SAMPLES // max(count, 1))), tensors)
    lows, highs = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    samples: list[list[NDArray[np.float32]]] = [[] for _ in tensors]
    for number, inputs in enumerate(images, start=1):
        values = _observe(session, sampled, inputs, number)
        for index in range(len(tensors)):
            low, high, some = values[3 * index : 3 * index + 3]
            if not (math.isfinite(low) and math.isfinite(high)):
                raise DataError(
                    f"calibration image {number}: {tensors[index]} has values that are not finite; leave the "
                    "image out, or find the fault with anchorline verify"
                )
            lows[index], highs[index] = min(lows[index], low), max(highs[index], high)
            samples[index].append(some)
        done(number)
    return {
        name: _narrowed((float(low), float(high)), np.concatenate(some), method)
        for name, low, high, some in zip(tensors, lows, highs, samples, strict=True)
    }


def _observe(session: Any, wanted: Sequence[str], inputs: Inputs, number: int) -> list[NDArray[Any]]:
    try:
        return list(session.run(wanted, dict(inputs)))
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        reason = " ".join(str(error).split())[:300]
        raise ArtefactError(
            f"calibration image {number}: onnxruntime cannot run the model on it ({reason}); compare the "
            "model with what it was exported from with anchorline verify"
        ) from error


def _narrowed(seen: Range, sample: NDArray[np.float32], method: str) -> Range:
    low, high = min(seen[0], 0.0), max(seen[1], 0.0)  # padding is zero, and zero must be exact
    if method == "percentile":
        cut = 100.0 - _PERCENTILE
        narrow = np.percentile(sample, (cut, _PERCENTILE))
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
    """A copy of ``model`` that gives of each tensor its extremes and about ``count`` values, and no more."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.output[:]
    sizes = {value.name: _elements(value) for value in graph.value_info}
    for name, values in (("all", [-1]), ("start", [0]), ("end", [np.iinfo(np.int64).max]), ("axis", [0])):
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), f"observed/{name}"))
    for name in tensors:
        flat, low, high, some, step = (
            f"observed/{name}/{p}" for p in ("flat", "low", "high", "some", "step")
        )
        stride = np.array([_stride(sizes.get(name, 0), count)], np.int64)
        graph.initializer.append(numpy_helper.from_array(stride, step))
        graph.node.extend(
            [
                helper.make_node("Reshape", [name, "observed/all"], [flat]),
                helper.make_node("ReduceMin", [flat], [low], keepdims=0),
                helper.make_node("ReduceMax", [flat], [high], keepdims=0),
                helper.make_node(
                    "Slice", [flat, "observed/start", "observed/end", "observed/axis", step], [some]
                ),
            ]
        )
        graph.output.extend(onnx.ValueInfoProto(name=output) for output in (low, high, some))
    return copy


def _elements(value: onnx.ValueInfoProto) -> int:
    """The number of elements in one image's share of a tensor; a free dimension counts as 1."""
    return math.prod(max(1, dim.dim_value) for dim in value.type.tensor_type.shape.dim)


def _stride(elements: int, count: int) -> int:
    """A step through all elements that has no factor in common with them: columns and channels mix."""
    step = max(1, elements // count)
    while math.gcd(step, elements) > 1:
        step += 1
    return step


def _open(model: onnx.ModelProto, tensors: Sequence[str]) -> tuple[Any, list[str]]:
    session = open_for_checks(model.SerializeToString())
    return session, [f"observed/{name}/{part}" for name in tensors for part in ("low", "high", "some")]
