"""What the custom ops mean in standard ONNX: the default function bodies, for onnxruntime.

A runtime that knows an op runs its own kernel; any other inlines the function. The ops are
described, in the same terms, in ``anchorline/train/model/ops.py``. Opset 18.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser

from anchorline.runtime.contract import DOMAIN, OP_VERSION
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
    """The functions ``anchorline::BatchedNMS``, ``RoIAlign`` and ``Occupied``."""
    return [onnx.parser.parse_function(text) for text in (_BATCHED_NMS, _ROI_ALIGN, _OCCUPIED)]


def attach_functions(model: onnx.ModelProto) -> None:
    """Add the bodies of the custom ops that ``model`` uses, and their domain, in place."""
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    used = {node.op_type for node in nodes}
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


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model`` to ``path`` with the digest of what it is now."""
    for entry in [each for each in model.metadata_props if each.key == DIGEST_KEY]:
        model.metadata_props.remove(entry)
    path.write_bytes(with_digest(model.SerializeToString()))
