"""Bodies of standard operators for our custom ops, where a target has neither a plugin nor the op itself.

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
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser

from anchorline.engine.graph import OPSET

# Not the domain of the custom ops: a registered plugin would take a node of that name, body or not.
BODY_DOMAIN = "anchorline.body"

# A graph cannot sample adaptively (``sampling_ratio`` 0: a RoI's size decides how many points a cell has), so
# so many points per axis stand for it. Of 1 to 4 it is the best compromise: with a detector trained on BCCD,
# RoIs aligned, the pooled features then differ by 3 % (1: 18 %, 3 and 4: 3 %), 99 % of the detections stay
# matched and their scores move by 0.002 on average (1: 0.02, 3 and 4: 0.004 and 0.005).
IN_PLACE_OF_ADAPTIVE = 2


def _literal(value: float) -> str:
    """``value`` as a float32 literal of ONNX's text form, exactly."""
    text = repr(float(np.float32(value)))
    return text if "." in text or "e" in text else f"{text}.0"


# Invalid boxes are zeroed: a NaN must not reach the overlaps. IoU is inter / union in float32, and
# the overlap matrix holds only 0 and 1, which half precision counts exactly as far as it matters.
_NMS_START = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{name} (boxes, scores) => ({outputs})
{{
    last = Constant <value_ints = [-1]> ()
    zero = Constant <value_float = 0.0> ()
    infinity = Constant <value_float = inf> ()
    iou_limit = Constant <value_float = {iou_threshold}> ()
    score_limit = Constant <value_float = {score_threshold}> ()
    x1, y1, x2, y2 = Split <axis = -1, num_outputs = 4> (boxes)
    width = Sub (x2, x1)
    height = Sub (y2, y1)
    area = Mul (width, height)
    scores_3d = Unsqueeze (scores, last)
    has_width = Greater (width, zero)
    has_area = Greater (area, zero)
    is_finite = Less (area, infinity)
    has_score = Greater (scores_3d, score_limit)
    has_box = And (has_width, has_area)
    is_sound = And (has_box, is_finite)
    all_valid = And (is_sound, has_score)
    all_sound_boxes = Where (all_valid, boxes, zero)
"""

_ALL = """
    valid = Identity (all_valid)
    sound_boxes = Identity (all_sound_boxes)
"""

_BEST = """
    origin = Constant <value_ints = [0]> ()
    limit = Constant <value_ints = [{limit}]> ()
    end = Constant <value_ints = [{count}]> ()
    middle = Constant <value_ints = [1]> ()
    valid = Slice (all_valid, origin, limit, middle)
    sound_boxes = Slice (all_sound_boxes, origin, limit, middle)
"""

_OVERLAPS = """
    one = Constant <value_float = 1.0> ()
    half = Constant <value_float = 0.5> ()
    one_f16 = Cast <to = 10> (one)
    zero_f16 = Cast <to = 10> (zero)
    half_f16 = Cast <to = 10> (half)
    left, top, right, bottom = Split <axis = -1, num_outputs = 4> (sound_boxes)
    boxes_t = Transpose <perm = [0, 2, 1]> (sound_boxes)
    left_t, top_t, right_t, bottom_t = Split <axis = 1, num_outputs = 4> (boxes_t)
    valid_t = Transpose <perm = [0, 2, 1]> (valid)
    sound_width = Sub (right, left)
    sound_height = Sub (bottom, top)
    sound_area = Mul (sound_width, sound_height)
    sound_area_t = Transpose <perm = [0, 2, 1]> (sound_area)
    inter_left = Max (left, left_t)
    inter_top = Max (top, top_t)
    inter_right = Min (right, right_t)
    inter_bottom = Min (bottom, bottom_t)
    raw_width = Sub (inter_right, inter_left)
    raw_height = Sub (inter_bottom, inter_top)
    inter_width = Max (raw_width, zero)
    inter_height = Max (raw_height, zero)
    inter = Mul (inter_width, inter_height)
    areas = Add (sound_area, sound_area_t)
    union = Sub (areas, inter)
    iou = Div (inter, union)
    overlaps = Greater (iou, iou_limit)
    start = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    entries = Constant <value_int = {entries}> ()
    column = Range (start, entries, step)
    row = Unsqueeze (column, last)
    before = Less (row, column)
    both_valid = And (valid, valid_t)
    ordered = And (overlaps, before)
    suppresses = And (ordered, both_valid)
    overlap_matrix = Where (suppresses, one_f16, zero_f16)
    keep_0 = Where (valid_t, one_f16, zero_f16)
"""

_ROUND = """
    hits_{now} = MatMul (keep_{before}, overlap_matrix)
    free_{now} = Less (hits_{now}, half_f16)
    is_kept_{now} = And (free_{now}, valid_t)
    keep_{now} = Where (is_kept_{now}, one_f16, zero_f16)
"""

_NMS_END = """
    suppressed = Constant <value_float = -1.0> ()
    middle_axis = Constant <value_ints = [1]> ()
    is_kept = Squeeze (is_kept_{rounds}, middle_axis)
"""

_KEPT_ALL = """
    kept = Where (is_kept, scores, suppressed)
"""

_KEPT_BEST = """
    best_scores = Slice (scores, origin, limit, middle)
    kept_best = Where (is_kept, best_scores, suppressed)
    padding = Constant <value_ints = [0, 0, 0, {beyond}]> ()
    kept = Pad (kept_best, padding, suppressed)
"""

_CONVERGED = """
    moved = Sub (keep_{rounds}, keep_{more})
    moves = Abs (moved)
    moves_f32 = Cast <to = 1> (moves)
    most_moved = ReduceMax <keepdims = 0> (moves_f32)
    unsettled_1 = Reshape (most_moved, middle_axis)
"""

_NONE_BEYOND = """
    unsettled = Identity (unsettled_1)
"""

_SOME_BEYOND = """
    beyond = Slice (all_valid, limit, end, middle)
    beyond_f32 = Cast <to = 1> (beyond)
    most_beyond = ReduceMax <keepdims = 0> (beyond_f32)
    beyond_1 = Reshape (most_beyond, middle_axis)
    unsettled = Max (unsettled_1, beyond_1)
"""


def fixed_point_nms(
    name: str,
    *,
    count: int,
    iou_threshold: float,
    score_threshold: float,
    rounds: int,
    limit: int | None = None,
    report: bool = False,
) -> onnx.FunctionProto:
    """The function ``name``: (boxes [G, N, 4], scores [G, N]) -> kept scores [G, N].

    ``count`` is N; G stays open. ``rounds`` is T, even. Of more than ``limit`` entries only the first
    are considered, which bounds the memory of G x limit^2. With ``report`` a second output, float32
    [1], is above 0 when T rounds did not settle some entry, or a valid one stood beyond the limit.
    """
    cut = limit is not None and limit < count
    entries = limit if cut and limit is not None else count
    values = {
        "domain": BODY_DOMAIN,
        "opset": OPSET,
        "name": name,
        "outputs": "kept, unsettled" if report else "kept",
        "iou_threshold": _literal(iou_threshold),
        "score_threshold": _literal(score_threshold),
        "count": count,
        "limit": entries,
        "entries": entries,
        "beyond": count - entries,
        "rounds": rounds,
        "more": rounds + 1,
    }
    parts = [_NMS_START, _BEST if cut else _ALL, _OVERLAPS]
    parts += [_ROUND.replace("{now}", str(r)).replace("{before}", str(r - 1)) for r in range(1, rounds + 1)]
    parts += [_NMS_END, _KEPT_BEST if cut else _KEPT_ALL]
    if report:
        parts.append(_ROUND.replace("{now}", str(rounds + 1)).replace("{before}", str(rounds)))
        parts += [_CONVERGED, _SOME_BEYOND if cut else _NONE_BEYOND]
    return onnx.parser.parse_function("".join(parts).format(**values) + "}")


# Always sampled in float32: half-precision coordinates on a large map are a quarter of a cell off,
# and GridSample takes map and grid of one type.
_ALIGN_START = """
<domain: "{domain}", opset_import: ["" : {opset}]>
{name} (features, rois) => (pooled)
{{
    one = Constant <value_float = 1.0> ()
    to_grid_x = Constant <value_float = {to_grid_x}> ()
    to_grid_y = Constant <value_float = {to_grid_y}> ()
    share = Constant <value_float = {share}> ()
    zeros = Constant <value_floats = [{zeros}]> ()
    row_shape = Constant <value_ints = [1, 1, 1, {size}]> ()
    column_shape = Constant <value_ints = [1, 1, {size}, 1]> ()
    zero_row = Reshape (zeros, row_shape)
    zero_column = Reshape (zeros, column_shape)
    second = Constant <value_ints = [2]> ()
    third = Constant <value_ints = [3]> ()
    last = Constant <value_ints = [-1]> ()
    grid_shape = Constant <value_ints = [-1, {rows}, {size}, 2]> ()
    map = Cast <to = 1> (features)
    rois_f32 = Cast <to = 1> (rois)
    x1, y1, x2, y2 = Split <axis = -1, num_outputs = 4> (rois_f32)
    width = Sub (x2, x1)
    height = Sub (y2, y1)
"""

# Sample k of every cell along one axis: x and y [B, R, S, S, 1] in the grid's units, -1 to 1.
_PLACES = """
    offsets_{k} = Constant <value_floats = [{offsets}]> ()
    from_left_{k} = Mul (width, offsets_{k})
    from_top_{k} = Mul (height, offsets_{k})
    x_{k} = Add (x1, from_left_{k})
    y_{k} = Add (y1, from_top_{k})
    scaled_x_{k} = Mul (x_{k}, to_grid_x)
    scaled_y_{k} = Mul (y_{k}, to_grid_y)
    grid_x_{k} = Sub (scaled_x_{k}, one)
    grid_y_{k} = Sub (scaled_y_{k}, one)
    row_{k} = Unsqueeze (grid_x_{k}, second)
    column_{k} = Unsqueeze (grid_y_{k}, third)
    all_x_{k} = Add (row_{k}, zero_column)
    all_y_{k} = Add (column_{k}, zero_row)
    pair_x_{k} = Unsqueeze (all_x_{k}, last)
    pair_y_{k} = Unsqueeze (all_y_{k}, last)
"""

_SAMPLE = """
    grid_5d_{sample} = Concat <axis = -1> (pair_x_{column}, pair_y_{row})
    grid_{sample} = Reshape (grid_5d_{sample}, grid_shape)
    read_{sample} = GridSample <mode = "bilinear", padding_mode = "border", align_corners = 0> (
        map, grid_{sample}
    )
    sum_{sample} = {sum}
"""

_ALIGN_END = """
    mean = Mul (sum_{samples}, share)
    cells = Cast <to = {kind}> (mean)
    by_channel_shape = Constant <value_ints = [0, {channels}, {rois}, {area}]> ()
    by_channel = Reshape (cells, by_channel_shape)
    by_roi = Transpose <perm = [0, 2, 1, 3]> (by_channel)
    pooled_shape = Constant <value_ints = [-1, {channels}, {size}, {size}]> ()
    pooled = Reshape (by_roi, pooled_shape)
}}
"""


def grid_sample_align(
    name: str,
    *,
    map_shape: tuple[int, int, int],
    rois: int,
    output_size: int,
    sampling_ratio: int,
    kind: int,
) -> onnx.FunctionProto:
    """The function ``name``: (features [B, C, H, W], rois [B, R, 4]) -> [B * R, C, S, S].

    ``map_shape`` is (C, H, W), ``rois`` R, ``kind`` the ``TensorProto`` type of features and result; B
    stays open. A ``sampling_ratio`` of 0 becomes ``IN_PLACE_OF_ADAPTIVE``.
    """
    sampling_ratio = sampling_ratio or IN_PLACE_OF_ADAPTIVE
    channels, height, width = map_shape
    values = {
        "domain": BODY_DOMAIN,
        "opset": OPSET,
        "name": name,
        # A coordinate on the map, 0 to W, becomes -1 to 1.
        "to_grid_x": _literal(2.0 / width),
        "to_grid_y": _literal(2.0 / height),
        "share": _literal(1.0 / sampling_ratio**2),
        "zeros": ", ".join(["0.0"] * output_size),
        "rows": rois * output_size,
        "channels": channels,
        "rois": rois,
        "area": output_size * output_size,
        "size": output_size,
        "samples": sampling_ratio**2 - 1,
        "kind": kind,
    }
    places = "".join(_places(k, output_size, sampling_ratio) for k in range(sampling_ratio))
    return onnx.parser.parse_function(
        _ALIGN_START.format(**values) + places + _samples(sampling_ratio) + _ALIGN_END.format(**values)
    )


def _places(k: int, output_size: int, sampling_ratio: int) -> str:
    """Where sample ``k`` of each cell lies along an axis, as a share of the RoI's side."""
    points = output_size * sampling_ratio
    offsets = [_literal((cell * sampling_ratio + k + 0.5) / points) for cell in range(output_size)]
    return _PLACES.format(k=k, offsets=", ".join(offsets))


def _samples(sampling_ratio: int) -> str:
    """The samples of a cell, row by row, each added to those before it."""
    text = ""
    for sample in range(sampling_ratio**2):
        row, column = divmod(sample, sampling_ratio)
        total = f"Add (sum_{sample - 1}, read_{sample})" if sample else "Identity (read_0)"
        text += _SAMPLE.format(sample=sample, sum=total, row=row, column=column)
    return text
