"""``BatchedNMS`` without a plugin: greedy NMS as a fixed number of matrix products.

With S[i, j] = 1 where box i stands before box j and overlaps it too much, greedy NMS is the fixed point
of ``keep = valid & (keep @ S < 0.5)``. Starting from all valid entries, T rounds settle every entry
whose chain of suppressions (a suppresses b, which would have suppressed c, ...) is at most T long. An
even T errs on the side of duplicates, and one round more tells whether anything was still moving.
"""

from __future__ import annotations

import onnx
import onnx.parser

from anchorline.engine.bodies.naming import BODY_DOMAIN, literal
from anchorline.engine.model_file import OPSET

# Invalid boxes are zeroed: a NaN must not reach the overlaps. IoU is inter / union in float32, and
# the overlap matrix holds only 0 and 1, which half precision counts exactly as far as it matters.
_START = """
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
    left_t = Transpose <perm = [0, 2, 1]> (left)
    top_t = Transpose <perm = [0, 2, 1]> (top)
    right_t = Transpose <perm = [0, 2, 1]> (right)
    bottom_t = Transpose <perm = [0, 2, 1]> (bottom)
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

_END = """
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
        "iou_threshold": literal(iou_threshold),
        "score_threshold": literal(score_threshold),
        "count": count,
        "limit": entries,
        "entries": entries,
        "beyond": count - entries,
        "rounds": rounds,
        "more": rounds + 1,
    }
    parts = [_START, _BEST if cut else _ALL, _OVERLAPS]
    parts += [_ROUND.replace("{now}", str(r)).replace("{before}", str(r - 1)) for r in range(1, rounds + 1)]
    parts += [_END, _KEPT_BEST if cut else _KEPT_ALL]
    if report:
        parts.append(_ROUND.replace("{now}", str(rounds + 1)).replace("{before}", str(rounds)))
        parts += [_CONVERGED, _SOME_BEYOND if cut else _NONE_BEYOND]
    return onnx.parser.parse_function("".join(parts).format(**values) + "}")
