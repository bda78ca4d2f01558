"""RoI pooling: of several levels in one RoIAlign, with the maps laid out on one canvas of features.

torchvision's ``MultiScaleRoIAlign`` pools every level apart and scatters the results. Here each map has a
border that repeats its edge, and every RoI is moved to the place of its level. The results are the same
(see ``edge_mask``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anchorline.train.model import ops
from anchorline.train.model.boxes import box_area
from anchorline.train.model.feature_rows import pool_by_table
from anchorline.train.model.settings import ModelSettings

# Samples lie at most half a pixel before a map (aligned RoIs) and less than one pixel behind it (RoIs
# widened to one cell); a bilinear sample reads one pixel further.
BORDER_BEFORE, BORDER_AFTER = 1, 2

# In feature pixels: adaptive sampling puts no point into a RoI without extent, such as an unused slot's, and
# TensorRT's kernel then divides 0 by 0. No proposal is this narrow, and float32 still resolves it.
SHORTEST = 1e-3

# From sides [B, R] of RoIs, the canonical size s0 and log2 of the finest level's stride to levels by log2 of
# their strides (FPN paper, equation 1). They differ in their guard against rounding at the steps.
# torchvision: ``LevelMapper``; detectron2: ``modeling/poolers.py``; mmdetection:
# ``single_level_roi_extractor.py``, which counts from the finest level, of ``finest_scale`` s0 * stride / 16.
LEVEL_RULES: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "torchvision": lambda side, s0, _: torch.floor(4 + torch.log2(side / s0) + 1e-6),
    "detectron2": lambda side, s0, _: torch.floor(4 + torch.log2(side / s0 + 1e-8)),
    "mmdetection": lambda side, s0, finest: (
        finest + torch.floor(torch.log2(side / (s0 * 2**finest / 16) + 1e-6))
    ),
}


def assign_levels(
    boxes: Tensor, levels: int, first_stride: int, canonical_size: float, rule: str = "torchvision"
) -> Tensor:
    """Index [B, R] of the level each box [B, R, 4] is pooled from, of ``levels`` from ``first_stride`` on.

    A box of side ``canonical_size`` belongs to the level of stride 16; each doubling is one level up.
    """
    first = first_stride.bit_length() - 1
    level = LEVEL_RULES[rule](torch.sqrt(box_area(boxes)), canonical_size, first)
    return torch.clamp(level, min=first, max=first + levels - 1).to(torch.int64) - first


def feature_canvas(features: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """All maps [B, C, H_i, W_i] on one [B, C, H, W], and where the first pixel of each stands, as (y, x).

    The finest map lies on top, the others, of which each has half the sides of the one before, side by side
    below it, each within its border.
    """
    # The row is at most as wide as the finest map, its borders apart: no case to tell for any size. So the
    # finest map is widened by what they take, in the same pass as its border: it is the one that costs.
    wider = max(len(features) - 2, 0) * (BORDER_BEFORE + BORDER_AFTER)
    first, *rest = (
        F.pad(feature, (BORDER_BEFORE, BORDER_AFTER + more, BORDER_BEFORE, BORDER_AFTER), mode="replicate")
        for feature, more in zip(features, [wider] + [0] * (len(features) - 1), strict=True)
    )
    origins, left = [(BORDER_BEFORE, BORDER_BEFORE)], 0
    for feature in rest:
        origins.append((first.shape[2] + BORDER_BEFORE, left + BORDER_BEFORE))
        left += feature.shape[3]
    if not rest:
        return first, origins
    tallest = rest[0].shape[2]
    row = torch.cat([F.pad(feature, (0, 0, 0, tallest - feature.shape[2])) for feature in rest], dim=3)
    row = F.pad(row, (0, first.shape[3] - row.shape[3]))
    return torch.cat((first, row), dim=2), origins


def edge_mask(start: Tensor, length: Tensor, limit: Tensor, size: int, sampling: int) -> Tensor:
    """Share [B, R, S] of each cell's sampling points along one axis that lie on the map.

    RoIs narrower than a feature pixel are widened to one and may then reach past the far edge,
    where torchvision reads zeros and the repeated border does not. All samples of such a RoI lie in
    the last pixel, so its cells are that pixel's value times this share, exactly.
    """
    steps = torch.arange(size * sampling, dtype=start.dtype, device=start.device)
    offsets = (steps + 0.5) / (size * sampling)
    inside = start[..., None] + length[..., None] * offsets <= limit[..., None]
    return inside.to(start.dtype).unflatten(-1, (size, sampling)).mean(-1)


class RoIMaxPooling(nn.Module):
    """The paper's RoI max pooling (Fast R-CNN, section 2.1), from one map."""

    def __init__(self, stride: int, settings: ModelSettings) -> None:
        super().__init__()
        self.size = settings.roi_size
        self.scale = 1.0 / stride
        # The op reads x2 and y2 as pixels that belong to the box, as caffe writes them.
        self.last_pixel = 1.0 if settings.box_edges == "inclusive" else 0.0

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Pooled regions [B * R, C, S, S] of ``boxes`` [B, R, 4] in canvas pixels, from ``features[0]``."""
        if self.last_pixel:
            boxes = torch.cat((boxes[..., :2], boxes[..., 2:] - self.last_pixel), dim=-1)
        return ops.roi_pool(features[0], boxes, output_size=self.size, spatial_scale=self.scale)


class RoIPooling(nn.Module):
    """RoIAlign over the first levels of a pyramid, in torchvision's convention or the aligned one.

    Aligned it is Detectron2's ``ROIAlignV2`` and mmcv's ``RoIAlign``, which sample adaptively
    (``roi_sampling`` 0): the size of a RoI decides how many points a cell has.
    """

    def __init__(self, strides: Sequence[int], settings: ModelSettings) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.size, self.sampling = settings.roi_size, settings.roi_sampling
        self.aligned = settings.roi_aligned
        self.canonical_size, self.level_rule = settings.canonical_size, settings.roi_level_rule

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Pooled regions [B * R, C, S, S] of ``boxes`` [B, R, 4] in canvas pixels.

        ``features`` are the levels of ``strides``, finest first.
        """
        level = assign_levels(boxes, len(features), self.strides[0], self.canonical_size, self.level_rule)
        if self.training and self.sampling and boxes.device.type == "cpu":
            rule = self.size, self.sampling, self.aligned
            return pool_by_table(features, boxes, level, self.strides, *rule)
        canvas, origins = feature_canvas(features)
        rows = [
            (1.0 / stride, *origin, feature.shape[2], feature.shape[3])
            for stride, origin, feature in zip(self.strides, origins, features, strict=True)
        ]
        # Number by number, since in an export some are known only when the graph runs.
        numbers = [torch.scalar_tensor(number, device=boxes.device) for row in rows for number in row]
        table = torch.stack(numbers).to(boxes.dtype).unflatten(0, (len(rows), -1))
        scale, origin_y, origin_x, height, width = table[level].unbind(-1)
        x1, y1, x2, y2 = (boxes * scale[..., None]).unbind(-1)
        length_x, length_y = x2 - x1, y2 - y1
        # The op puts pixel centres at 0.5, torchvision's aligned=False at 0; hence the half pixel.
        shift = 0.0 if self.aligned else 0.5
        if not self.aligned or not self.sampling:
            shortest = SHORTEST if self.aligned else 1.0
            length_x, length_y = length_x.clamp(min=shortest), length_y.clamp(min=shortest)
        left, top = x1 + (origin_x + shift), y1 + (origin_y + shift)
        rois = torch.stack((left, top, left + length_x, top + length_y), dim=-1)
        pooled = ops.roi_align(canvas, rois, output_size=self.size, sampling_ratio=self.sampling)
        if self.aligned:
            return pooled
        # Adaptive sampling has one point in a cell of the RoIs that matter here, one feature pixel long.
        sampling = self.sampling or 1
        mask_y = edge_mask(y1, length_y, height, self.size, sampling)
        mask_x = edge_mask(x1, length_x, width, self.size, sampling)
        mask = (mask_y[..., :, None] * mask_x[..., None, :]).flatten(0, 1)
        return pooled * mask[:, None].to(pooled.dtype)
