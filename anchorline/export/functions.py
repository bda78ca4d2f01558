"""What the custom ops mean in standard ONNX: the default function bodies, for onnxruntime.

A runtime that knows an op runs its own kernel; any other inlines the function. The ops are
described, in the same terms, in ``anchorline/train/model/ops.py``. Opset 18.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser

from anchorline.runtime.contract import BANDS_OP, DOMAIN, OP_VERSION
from anchorline.runtime.model_file import DIGEST_KEY, with_digest

OPSET = 18

# Entries that do not count get the score -inf, which no threshold lets pass. IoU is inter / union in
# float32, and of equal scores the first in order wins, in onnxruntime's NonMaxSuppression as here.
_BATCHED_NMS = """
<domain: "anchorline", opset_import: ["" : 18]>
BatchedNMS <iou_threshold, score_threshold, plugin_namespace, plugin_version> (boxes, scores) => (kept)
{
    last = Constant <value_ints = [-1]> ()
    one = Constant <value_ints = [1]> ()
    x1, y1, x2, y2 = Split <axis = -1, num_outputs = 4> (boxes)
    width_3d = Sub (x2, x1)
    height_3d = Sub (y2, y1)
    area_3d = Mul (width_3d, height_3d)
    width = Squeeze (width_3d, last)
    area = Squeeze (area_3d, last)
    zero = Constant <value_float = 0.0> ()
    infinity = Constant <value_float = inf> ()
    has_width = Greater (width, zero)
    has_area = Greater (area, zero)
    is_finite = Less (area, infinity)
    some = And (has_width, has_area)
    counts = And (some, is_finite)
    minus_infinity = Neg (infinity)
    ranked = Where (counts, scores, minus_infinity)
    ranked_3d = Unsqueeze (ranked, one)
    shape = Shape (scores)
    most = Shape <start = 1, end = 2> (scores)
    iou_limit = Constant <value_float: float = @iou_threshold> ()
    score_limit = Constant <value_float: float = @score_threshold> ()
    selected = NonMaxSuppression (boxes, ranked_3d, most, iou_limit, score_limit)
    group_and_box = Constant <value_ints = [0, 2]> ()
    places = Gather <axis = 1> (selected, group_and_box)
    survivors = GatherND (scores, places)
    suppressed = Constant <value_float = -1.0> ()
    empty = Expand (suppressed, shape)
    kept = ScatterND (empty, places, survivors)
}
"""

# Always pooled in float32: half-precision coordinates on a large map are a quarter of a cell off.
_ROIS = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis = Constant <value_ints = [1]> ()
    box_shape = Constant <value_ints = [-1, 4]> ()
    images_1d = Shape <start = 0, end = 1> (rois)
    images = Squeeze (images_1d)
    image_and_roi = Shape <start = 0, end = 2> (rois)
    numbers = Range (zero, images, one)
    column = Unsqueeze (numbers, axis)
    of_roi = Expand (column, image_and_roi)
    flat_rois = Reshape (rois, box_shape)
    features_f32 = Cast <to = 1> (features)
    rois_f32 = Cast <to = 1> (flat_rois)"""

_ROI_ALIGN = f"""
<domain: "anchorline", opset_import: ["" : 18]>
RoIAlign <output_size, sampling_ratio, plugin_namespace, plugin_version> (features, rois) => (pooled)
{{{_ROIS}
    all = Constant <value_ints = [-1]> ()
    image_index = Reshape (of_roi, all)
    pooled_f32 = RoiAlign <
        mode = "avg", coordinate_transformation_mode = "half_pixel", spatial_scale = 1.0,
        output_height: int = @output_size, output_width: int = @output_size,
        sampling_ratio: int = @sampling_ratio
    > (features_f32, rois_f32, image_index)
    pooled = CastLike (pooled_f32, features)
}}
"""

# RoIAlign is separable: the sampling points are a grid, and a bilinear sample is a product of two tents. So
# the map's rows are mixed into a band for each row of cells, and the bands' pixels into cells, by matrix
# products. That reads the whole map for each RoI and yet takes a third of the time of onnxruntime's RoiAlign
# on a map of two hundred pixels.
_ROI_BANDS = f"""
<domain: "anchorline", opset_import: ["" : 18]>
{BANDS_OP} <output_size, sampling_ratio, plugin_namespace, plugin_version> (features, rois) => (pooled)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    rest = Constant <value_ints = [-1]> ()
    one_band = Constant <value_ints = [1]> ()
    none_f = Constant <value_float = 0.0> ()
    half_f = Constant <value_float = 0.5> ()
    one_f = Constant <value_float = 1.0> ()
    before = Constant <value_float = -1.0> ()
    size_0d = Constant <value_int: int = @output_size> ()
    sampling_0d = Constant <value_int: int = @sampling_ratio> ()
    size = Unsqueeze (size_0d, zero)
    sampling = Unsqueeze (sampling_0d, zero)
    features_f32 = Cast <to = 1> (features)
    rois_f32 = Cast <to = 1> (rois)

    points = Mul (size_0d, sampling_0d)
    points_f = Cast <to = 1> (points)
    steps = Range (zero, points, one)
    steps_f = Cast <to = 1> (steps)
    centres = Add (steps_f, half_f)
    offsets = Div (centres, points_f)
    corners_shape = Constant <value_ints = [0, 0, 2, 2]> ()
    corners = Reshape (rois_f32, corners_shape)
    starts, ends = Split <axis = 2, num_outputs = 2> (corners)
    axes_shape = Constant <value_ints = [0, 0, 2, 1]> ()
    start = Reshape (starts, axes_shape)
    end = Reshape (ends, axes_shape)
    length = Sub (end, start)
    along = Mul (length, offsets)
    origin = Sub (start, half_f)
    places = Add (origin, along)

    sides = Shape <start = 2> (features)
    x_first = Constant <value_ints = [1, 0]> ()
    lengths = Gather (sides, x_first)
    lengths_f = Cast <to = 1> (lengths)
    limits = Unsqueeze (lengths_f, one_band)
    last_pixels = Sub (limits, one_f)
    not_before = GreaterOrEqual (places, before)
    not_behind = LessOrEqual (places, limits)
    on_map = And (not_before, not_behind)
    on_map_f = Cast <to = 1> (on_map)
    from_first = Max (places, none_f)
    clipped = Min (from_first, last_pixels)
    longest = ReduceMax <keepdims = 0> (lengths)
    pixels = Range (zero, longest, one)
    pixels_f = Cast <to = 1> (pixels)
    clipped_5d = Unsqueeze (clipped, rest)
    apart = Sub (clipped_5d, pixels_f)
    distance = Abs (apart)
    near = Sub (one_f, distance)
    tent = Max (near, none_f)
    counted = Unsqueeze (on_map_f, rest)
    weights = Mul (tent, counted)
    kept_sides = Constant <value_ints = [0, 0, 2]> ()
    samples_shape = Concat <axis = 0> (kept_sides, size, sampling, rest)
    samples = Reshape (weights, samples_shape)
    of_samples = Constant <value_ints = [4]> ()
    cell_weights = ReduceMean <keepdims = 0> (samples, of_samples)
    across_5d, down_5d = Split <axis = 2, num_outputs = 2> (cell_weights)
    width, height = Split <axis = 0, num_outputs = 2> (lengths)
    first = Constant <value_ints = [0]> ()
    of_pixels = Constant <value_ints = [4]> ()
    down_cut = Slice (down_5d, first, height, of_pixels)
    across_cut = Slice (across_5d, first, width, of_pixels)
    kept_batch = Constant <value_ints = [0, -1]> ()
    down_shape = Concat <axis = 0> (kept_batch, height)
    down = Reshape (down_cut, down_shape)
    across_shape = Concat <axis = 0> (rest, one_band, size, width)
    across = Reshape (across_cut, across_shape)

    by_row = Transpose <perm = [0, 2, 3, 1]> (features_f32)
    rows_shape = Constant <value_ints = [0, 0, -1]> ()
    rows = Reshape (by_row, rows_shape)
    bands_3d = MatMul (down, rows)
    channels = Shape <start = 1, end = 2> (features)
    bands_shape = Concat <axis = 0> (rest, size, width, channels)
    bands = Reshape (bands_3d, bands_shape)
    cells = MatMul (across, bands)
    pooled_f32 = Transpose <perm = [0, 3, 1, 2]> (cells)
    pooled = CastLike (pooled_f32, features)
}}
"""

# In pixels, up to where the products gain a quarter; and pixels of the bands of all RoIs, 64 MB of 256
# channels.
LARGEST_MAP = 800
MOST_BANDS = 65_536

# The size and the scale (``SIZE``, ``SCALE``) are written in at the export: a function can hand an attribute
# on only as one of the same type, and output_size is a whole number where MaxRoiPool's pooled_shape is a
# list. A file has one pooling, so one body serves it.
_ROI_POOL = f"""
<domain: "anchorline", opset_import: ["" : 18]>
RoIPool <output_size, spatial_scale, plugin_namespace, plugin_version> (features, rois) => (pooled)
{{{_ROIS}
    index_shape = Constant <value_ints = [-1, 1]> ()
    image_index = Reshape (of_roi, index_shape)
    index_f32 = Cast <to = 1> (image_index)
    indexed = Concat <axis = 1> (index_f32, rois_f32)
    pooled_f32 = MaxRoiPool <pooled_shape = [SIZE, SIZE], spatial_scale = SCALE> (features_f32, indexed)
    pooled = CastLike (pooled_f32, features)
}}
"""


_OCCUPIED = """
<domain: "anchorline", opset_import: ["" : 18]>
Occupied (boxes, scores) => (used)
{
    suppressed = Constant <value_float = -1.0> ()
    one = Constant <value_ints = [1]> ()
    zero = Constant <value_ints = [0]> ()
    holds = Greater (scores, suppressed)
    counted = Cast <to = 7> (holds)
    counts = ReduceSum <keepdims = 0> (counted, one)
    most = ReduceMax <keepdims = 1> (counts)
    end = Max (most, one)
    used = Slice (boxes, zero, end, one)
}
"""


def default_functions() -> list[onnx.FunctionProto]:
    """The functions ``anchorline::BatchedNMS``, ``RoIAlign``, ``RoIBands`` and ``Occupied``."""
    texts = _BATCHED_NMS, _ROI_ALIGN, _ROI_BANDS, _OCCUPIED
    return [onnx.parser.parse_function(text) for text in texts]


def attach_functions(model: onnx.ModelProto) -> None:
    """Add the bodies of the custom ops that ``model`` uses, and their domain, in place."""
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    used = {node.op_type for node in nodes}
    if BANDS_OP in used:
        used.add("RoIAlign")  # which it is wherever else the file goes
    model.functions.extend(f for f in default_functions() if f.name in used)
    pools = {
        tuple(onnx.helper.get_node_attr_value(node, name) for name in ("output_size", "spatial_scale"))
        for node in nodes
        if node.op_type == "RoIPool"
    }
    if len(pools) > 1:
        raise ValueError(f"the graph has RoIPool nodes with {sorted(pools)}; expected one size and scale")
    for size, scale in pools:
        text = _ROI_POOL.replace("SIZE", str(size)).replace("SCALE", repr(scale))
        model.functions.append(onnx.parser.parse_function(text))
    if used and DOMAIN not in {opset.domain for opset in model.opset_import}:
        model.opset_import.add(domain=DOMAIN, version=OP_VERSION)


def pool_in_bands(model: onnx.ModelProto, canvas: tuple[int, int], proposals: int) -> None:
    """Let RoIs, at most ``proposals`` an image, be pooled by ``BANDS_OP`` where that is faster, in place.

    That is from a map that is small on ``canvas`` (height, width). ``attach_functions`` comes after it.
    """
    sides = map_sides(model, canvas)
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type != "RoIAlign" or node.input[0] not in sides:
            continue
        height, width = sides[node.input[0]]
        size = onnx.helper.get_node_attr_value(node, "output_size")
        sampled = onnx.helper.get_node_attr_value(node, "sampling_ratio") > 0
        if sampled and height * width <= LARGEST_MAP and proposals * size * width <= MOST_BANDS:
            node.op_type = BANDS_OP


def map_sides(model: onnx.ModelProto, canvas: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Height and width of the four-dimensional values that are known on ``canvas``."""
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    images = sized.graph.input[0].type.tensor_type.shape.dim
    for dim, side in zip(images[1:3], canvas, strict=True):
        dim.dim_value = side
    inferred = onnx.shape_inference.infer_shapes(sized, data_prop=True)
    found = {}
    for value in inferred.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4 and dims[2].dim_value and dims[3].dim_value:
            found[value.name] = (dims[2].dim_value, dims[3].dim_value)
    return found


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model`` to ``path`` with the digest of what it is now."""
    for entry in [each for each in model.metadata_props if each.key == DIGEST_KEY]:
        model.metadata_props.remove(entry)
    path.write_bytes(with_digest(model.SerializeToString()))
