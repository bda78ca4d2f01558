"""Bodies of standard operators for what a target has neither as a plugin nor as an op of its own.

``BatchedNMS`` as a fixed number of matrix products: with S[i, j] = 1 where box i stands before box j and
overlaps it too much, greedy NMS is the fixed point of ``keep = valid & (keep @ S < 0.5)``. Starting from
all valid entries, T rounds settle every entry whose chain of suppressions (a suppresses b, which would
have suppressed c, ...) is at most T long. An even T errs on the side of duplicates, and one round more
tells whether anything was still moving.

``RoIAlign`` as GridSample: a cell is the mean of ``sampling_ratio`` squared bilinear samples. The first
sample of every cell of every RoI is read by one GridSample, the second by another, and so on, and the mean
is a sum of the results: TensorRT for RTX makes one kernel of it all, which writes only the pooled cells.
One GridSample for all samples with an AveragePool after it holds the samples themselves in memory: 2.0 GB
instead of 13 MB for 1000 RoIs of 256 channels at batch 8. Samples beyond the map take the value at its
edge; ONNX's RoiAlign gives 0 from one pixel beyond on, but the canvas of levels with its borders keeps
every sample of our models inside (``train/model/roi_pooling.py``).

``RoIAlign`` as Gather: the same sum, each sample written out as the four pixels around it and their weights.
It asks nothing of GridSample, around which a fusion of TensorRT's has been seen to give wrong results, and
gives 0 beyond the map as ONNX does. TensorRT for RTX makes one kernel of it as well; a table of whole pixels,
gathered by rows, would hold 0.1 GB an image. Either body's map may have free sides.

``TopK`` with a large K as several: the best are taken and struck out, then the best of what remains, and so
on. The results follow each other in falling order, as from one TopK, and entries of -inf come last as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from anchorline.engine.graph import FLOAT, OPSET

INT64 = TensorProto.INT64

# Not the domain of the custom ops: a registered plugin would take a node of that name, body or not.
BODY_DOMAIN = "anchorline.body"

# A graph cannot sample adaptively (``sampling_ratio`` 0: a RoI's size decides how many points a cell has), so
# so many points per axis stand for it. Of 1 to 4 it is the best compromise: with a detector trained on BCCD,
# RoIs aligned, the pooled features then differ by 3 % (1: 18 %, 3 and 4: 3 %), 99 % of the detections stay
# matched and their scores move by 0.002 on average (1: 0.02, 3 and 4: 0.004 and 0.005).
IN_PLACE_OF_ADAPTIVE = 2


class _Operators:
    """A body being written: ``op.Add(a, b)`` appends the node and returns its output's name (or names).

    What is no name becomes a constant: a float of float32, an integer of int64, an array as it is.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        def append(*inputs: Any, **attributes: Any) -> Any:
            names = [each if isinstance(each, str) else self._constant(each) for each in inputs]
            count = 2 if operator == "TopK" else attributes.get("num_outputs", 1)
            outputs = [f"{operator}_{len(self.nodes)}_{place}" for place in range(count)]
            self.nodes.append(helper.make_node(operator, names, outputs, **attributes))
            return outputs if count > 1 else outputs[0]

        return append

    def _constant(self, value: Any) -> Any:
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        return self.Constant(value=numpy_helper.from_array(array))

    def function(self, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.FunctionProto:
        return helper.make_function(
            BODY_DOMAIN, name, inputs, outputs, self.nodes, [helper.make_opsetid("", OPSET)]
        )


def fixed_point_nms(
    name: str,
    *,
    count: int,
    iou_threshold: float,
    score_threshold: float,
    rounds: int,
    limit: int | None = None,
) -> onnx.FunctionProto:
    """The function ``name``: (boxes [G, N, 4], scores [G, N]) -> (kept scores [G, N], unsettled [1]).

    ``count`` is N; G stays open. ``rounds`` is T, even: an odd one drops boxes that should stay. Of more
    than ``limit`` entries only the first are considered, which bounds the memory of G x limit^2.
    ``unsettled`` (float32) is above 0 when T rounds did not settle some entry, or a valid one stood
    beyond the limit.
    """
    op = _Operators()
    entries = count if limit is None else min(limit, count)
    x1, y1, x2, y2 = op.Split("boxes", axis=-1, num_outputs=4)
    width = op.Sub(x2, x1)
    area = op.Mul(width, op.Sub(y2, y1))
    has_area = op.And(op.Greater(width, 0.0), op.Greater(area, 0.0))
    is_sound = op.And(has_area, op.Less(area, np.inf))
    all_valid = op.And(is_sound, op.Greater(op.Unsqueeze("scores", [-1]), score_threshold))
    # Invalid boxes are zeroed: a NaN must not reach the overlaps.
    valid, boxes, scores = all_valid, op.Where(all_valid, "boxes", 0.0), "scores"
    if entries < count:
        valid, boxes, scores = (op.Slice(each, [0], [entries], [1]) for each in (valid, boxes, scores))

    # IoU is inter / union in float32 [G, N, N]; a name with _t is of the second box, along the last axis.
    # The overlap matrix holds only 0 and 1, which half precision counts exactly as far as it matters.
    left, top, right, bottom = op.Split(boxes, axis=-1, num_outputs=4)
    left_t, top_t, right_t, bottom_t = op.Split(op.Transpose(boxes, perm=[0, 2, 1]), axis=1, num_outputs=4)
    valid_t = op.Transpose(valid, perm=[0, 2, 1])
    area = op.Mul(op.Sub(right, left), op.Sub(bottom, top))
    area_t = op.Transpose(area, perm=[0, 2, 1])
    inter_width = op.Max(op.Sub(op.Min(right, right_t), op.Max(left, left_t)), 0.0)
    inter_height = op.Max(op.Sub(op.Min(bottom, bottom_t), op.Max(top, top_t)), 0.0)
    inter = op.Mul(inter_width, inter_height)
    union = op.Sub(op.Add(area, area_t), inter)
    overlaps = op.Greater(op.Div(inter, union), iou_threshold)
    number_t = op.Range(0, entries, 1)
    before = op.Less(op.Unsqueeze(number_t, [-1]), number_t)
    suppresses = op.And(op.And(overlaps, before), op.And(valid, valid_t))
    one, zero = (op.Constant(value=numpy_helper.from_array(np.array(v, np.float16))) for v in (1, 0))
    matrix = op.Where(suppresses, one, zero)

    def settle(keep: str) -> tuple[str, str]:
        """One round: which entries are kept, as bool and as numbers [G, 1, N]."""
        is_kept = op.And(op.Less(op.MatMul(keep, matrix), np.float16(0.5)), valid_t)
        return is_kept, op.Where(is_kept, one, zero)

    keep = op.Where(valid_t, one, zero)
    for _ in range(rounds):
        is_kept, keep = settle(keep)
    kept = op.Where(op.Squeeze(is_kept, [1]), scores, -1.0)
    if entries < count:
        kept = op.Pad(kept, [0, 0, 0, count - entries], -1.0)
    moves = op.Cast(op.Abs(op.Sub(keep, settle(keep)[1])), to=FLOAT)
    unsettled = op.Reshape(op.ReduceMax(moves, keepdims=0), [1])
    if entries < count:
        beyond = op.Cast(op.Slice(all_valid, [entries], [count], [1]), to=FLOAT)
        unsettled = op.Max(unsettled, op.Reshape(op.ReduceMax(beyond, keepdims=0), [1]))
    return op.function(name, ["boxes", "scores"], [kept, unsettled])


MapShape = tuple[int, int | None, int | None]  # (C, H, W); None is a side that is free


def grid_sample_align(
    name: str, *, map_shape: MapShape, rois: int, output_size: int, sampling_ratio: int, kind: int
) -> onnx.FunctionProto:
    """The function ``name``: (features [B, C, H, W], rois [B, R, 4]) -> [B * R, C, S, S].

    ``rois`` is R, ``kind`` the ``TensorProto`` type of features and result; B stays open. A
    ``sampling_ratio`` of 0 becomes ``IN_PLACE_OF_ADAPTIVE``.
    """
    op, size, points = _Operators(), output_size, sampling_ratio or IN_PLACE_OF_ADAPTIVE
    channels, *sides = map_shape
    # From pixels to -1 and 1 at the map's edges.
    y_scale, x_scale = (
        2.0 / known if known else op.Div(2.0, op.Cast(_side(op, axis), to=FLOAT))
        for axis, known in enumerate(sides, 2)
    )
    # Always sampled in float32: half-precision coordinates on a large map are a quarter of a cell off,
    # and GridSample takes map and grid of one type.
    features = op.Cast("features", to=FLOAT)
    zero_row, zero_column = (np.zeros(shape, np.float32) for shape in ((1, 1, 1, size), (1, 1, size, 1)))
    columns, rows = [], []  # sample k of every cell along an axis, [B, R, S, S, 1], -1 to 1 on the map
    for x, y in _samples(op, size, points):
        x, y = (op.Sub(op.Mul(place, scale), 1.0) for place, scale in ((x, x_scale), (y, y_scale)))
        columns.append(op.Unsqueeze(op.Add(op.Unsqueeze(x, [2]), zero_column), [-1]))
        rows.append(op.Unsqueeze(op.Add(op.Unsqueeze(y, [3]), zero_row), [-1]))
    total = None
    for row in rows:
        for column in columns:
            grid = op.Reshape(op.Concat(column, row, axis=-1), [-1, rois * size, size, 2])
            read = op.GridSample(features, grid, mode="bilinear", padding_mode="border", align_corners=0)
            total = read if total is None else op.Add(total, read)
    cells = op.Cast(op.Mul(total, 1.0 / points**2), to=kind)
    by_channel = op.Reshape(cells, [0, channels, rois, size * size])
    return op.function(name, ["features", "rois"], [_by_roi(op, by_channel, channels, size)])


def gather_align(
    name: str, *, map_shape: MapShape, rois: int, output_size: int, sampling_ratio: int, kind: int
) -> onnx.FunctionProto:
    """The function of ``grid_sample_align`` in GatherElements and arithmetic."""
    op, size, points = _Operators(), output_size, sampling_ratio or IN_PLACE_OF_ADAPTIVE
    channels, *sides = map_shape
    height, width = (known if known else _side(op, axis) for axis, known in enumerate(sides, 2))
    pixels = op.Reshape("features", [0, channels, -1])  # [B, C, H * W]
    columns, rows = [], []  # pixels of sample k of every cell along an axis, with their weights
    for x, y in _samples(op, size, points):
        columns += [tuple(op.Unsqueeze(v, [2]) for v in each) for each in _neighbours(op, x, width, points)]
        rows += [tuple(op.Unsqueeze(v, [3]) for v in each) for each in _neighbours(op, y, height, points)]
    total, cells = None, [0, 1, rois * size * size]  # the cells of an image, the same for every channel
    for row, row_weight in rows:
        start = op.Mul(row, width)
        for column, column_weight in columns:
            index = op.Expand(op.Reshape(op.Add(start, column), cells), [1, channels, 1])
            read = op.Cast(op.GatherElements(pixels, index, axis=2), to=FLOAT)
            part = op.Mul(read, op.Reshape(op.Mul(row_weight, column_weight), cells))
            total = part if total is None else op.Add(total, part)
    by_channel = op.Reshape(op.Cast(total, to=kind), [0, channels, rois, size * size])
    return op.function(name, ["features", "rois"], [_by_roi(op, by_channel, channels, size)])


def _by_roi(op: _Operators, by_channel: str, channels: int, size: int) -> Any:
    """[B, C, R, S * S] as [B * R, C, S, S]."""
    return op.Reshape(op.Transpose(by_channel, perm=[0, 2, 1, 3]), [-1, channels, size, size])


def _samples(op: _Operators, size: int, points: int) -> list[tuple[str, str]]:
    """x and y, each [B, R, S] in pixels of the map, of sample k of every cell of ``rois``, for every k."""
    x1, y1, x2, y2 = op.Split(op.Cast("rois", to=FLOAT), axis=-1, num_outputs=4)
    width, height = op.Sub(x2, x1), op.Sub(y2, y1)
    samples = []
    for k in range(points):
        share = (np.arange(size) * points + k + 0.5) / (size * points)  # of the RoI's side
        samples.append((op.Add(x1, op.Mul(width, share)), op.Add(y1, op.Mul(height, share))))
    return samples


def _neighbours(op: _Operators, place: str, side: Any, points: int) -> list[tuple[str, str]]:
    """The two pixels around ``place`` along an axis of ``side`` pixels, and their weights of 1 / ``points``.

    Both weights are 0 where it is further than a pixel beyond the outermost centres, or no number.
    """
    last = op.Sub(op.Cast(side, to=FLOAT), 1.0)
    centre = op.Sub(place, 0.5)  # pixel centres stand at 0.5
    inside = op.And(op.GreaterOrEqual(centre, -1.0), op.LessOrEqual(centre, op.Add(last, 1.0)))
    centre = op.Where(inside, op.Min(op.Max(centre, 0.0), last), 0.0)
    low = op.Floor(centre)
    high = op.Min(op.Add(low, 1.0), last)
    whole = op.Mul(op.Cast(inside, to=FLOAT), 1.0 / points)
    high_weight = op.Mul(op.Sub(centre, low), whole)
    weights = op.Sub(whole, high_weight), high_weight
    return [(op.Cast(pixel, to=INT64), weight) for pixel, weight in zip((low, high), weights, strict=True)]


def _side(op: _Operators, axis: int) -> str:
    """The size of the features along ``axis``, int64 [1]."""
    return str(op.Shape("features", start=axis, end=axis + 1))


def topk_in_pieces(name: str, *, k: int, most: int, axis: int) -> onnx.FunctionProto:
    """The function ``name``: x float32 -> its largest ``k`` along ``axis``, in order, and their indices."""
    op = _Operators()
    # What is struck out has to rank below everything else, -inf included.
    rest = op.Max("x", np.finfo(np.float32).min)
    indices: list[str] = []
    for first in range(0, k, most):
        if indices:
            struck_out = op.Expand(-np.inf, op.Shape(indices[-1]))
            rest = op.ScatterElements(rest, indices[-1], struck_out, axis=axis)
        indices.append(op.TopK(rest, [min(most, k - first)], axis=axis)[1])
    index = op.Concat(*indices, axis=axis)
    return op.function(name, ["x"], [op.GatherElements("x", index, axis=axis), index])
