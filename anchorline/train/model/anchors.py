"""Anchors: the reference boxes of the RPN (Faster R-CNN, section 3.1.1).

Three styles. ``torchvision`` is numerically ``models/detection/anchor_utils.py``: base anchors are rounded
to whole pixels and centred at 0. ``caffe`` is py-faster-rcnn's ``lib/rpn/generate_anchors.py``: a window
of 16x16 pixels is given each aspect ratio, rounded, and then scaled. That window is (0, 0, 15, 15) with
its last pixels included, which with continuous edges is (0, 0, 16, 16), centred at 8. ``unrounded`` is
Detectron2's ``modeling/anchor_generator.py`` (offset 0) and MMDetection's ``AnchorGenerator`` (centre
offset 0): as torchvision's without the rounding.

At one place anchors run ratio by ratio in every style, the sizes within each: torchvision's,
py-faster-rcnn's and MMDetection's order. Detectron2's runs size by size, so the RPN's output channels
have to be permuted when its C4 and DC5 models, with five sizes on one map, are imported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def base_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Anchors [len(aspect_ratios) * len(sizes), 4] around the origin, ratio by ratio.

    ``sizes`` are square roots of areas in pixels; an aspect ratio is height / width.
    """
    side = torch.as_tensor(sizes, dtype=torch.float32)
    ratio = torch.as_tensor(aspect_ratios, dtype=torch.float32)
    height_factor = torch.sqrt(ratio)
    widths = ((1.0 / height_factor)[:, None] * side[None, :]).reshape(-1)
    heights = (height_factor[:, None] * side[None, :]).reshape(-1)
    return torch.round(torch.stack((-widths, -heights, widths, heights), dim=1) / 2)


def unrounded_base_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """As ``base_anchors`` in Detectron2 and MMDetection: w = size * sqrt(1 / ratio) and h = ratio * w.

    In MMDetection's terms a size is stride * scale.
    """
    side = torch.as_tensor(sizes, dtype=torch.float64)
    ratio = torch.as_tensor(aspect_ratios, dtype=torch.float64)[:, None]
    width = side[None, :] * torch.sqrt(1.0 / ratio)
    half = torch.stack((width, ratio * width), dim=-1).reshape(-1, 2) / 2
    return torch.cat((-half, half), dim=1).float()


# The side of the window that py-faster-rcnn's anchors are multiples of, in pixels.
CAFFE_WINDOW = 16


def caffe_base_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """As ``base_anchors`` in py-faster-rcnn, at the first place; the scale of a size is size / 16.

    Edges are continuous: py-faster-rcnn's x2 and y2 are 1 less.
    """
    ratio = torch.as_tensor(aspect_ratios, dtype=torch.float64)
    scale = torch.as_tensor(sizes, dtype=torch.float64) / CAFFE_WINDOW
    width = torch.round(torch.sqrt(CAFFE_WINDOW**2 / ratio))
    height = torch.round(width * ratio)
    half = (torch.stack((width, height), dim=1)[:, None] * scale[None, :, None] / 2).reshape(-1, 2)
    return (CAFFE_WINDOW / 2 + torch.cat((-half, half), dim=1)).float()


_BASE_ANCHORS = {
    "torchvision": base_anchors,
    "caffe": caffe_base_anchors,
    "unrounded": unrounded_base_anchors,
}


def grid_anchors(base: Tensor, grid: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Anchors [rows * columns * k, 4] of one level: ``base`` [k, 4] at every place of the ``grid``.

    Places run row by row, and at each place the k anchors follow each other, which is the order of
    the RPN head's outputs once flattened. ``stride`` is (y, x) in pixels.
    """
    y = torch.arange(grid[0], dtype=torch.float32) * stride[0]
    x = torch.arange(grid[1], dtype=torch.float32) * stride[1]
    shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack((shift_x, shift_y, shift_x, shift_y), dim=-1).reshape(-1, 1, 4)
    return (shifts + base).reshape(-1, 4)


class AnchorGenerator:
    """The anchors of every level in canvas pixels, in one of the three styles.

    ``canvas`` is (height, width) of the network input; ``sizes`` holds the anchor sizes of each level. A
    level's stride is canvas // grid, as in torchvision, unless ``strides`` says it: a map whose size was
    rounded up is larger than canvas / stride (P6 of 800x1088 is 13x17, and 800 // 13 is 61 where
    Detectron2 and MMDetection step by 64).
    """

    def __init__(
        self,
        canvas: tuple[int, int],
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float],
        style: str = "torchvision",
        strides: Sequence[int] | None = None,
    ) -> None:
        self.canvas, self.sizes, self.aspect_ratios, self.strides = canvas, sizes, aspect_ratios, strides
        self.base = _BASE_ANCHORS[style]
        self._kept: dict[tuple[object, ...], list[Tensor]] = {}

    def __call__(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Anchors [A_level, 4] of each of ``features`` [B, C, rows, columns], made once for each device."""
        grids = [(feature.shape[2], feature.shape[3]) for feature in features]
        key = (features[0].device, *grids)
        if key not in self._kept:
            self._kept[key] = [anchors.to(features[0].device) for anchors in self.levels(grids)]
        return self._kept[key]

    def levels(self, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Anchors [A_level, 4] for maps of ``grids`` (rows, columns).

        Raises ``ValueError`` where there are other levels than sizes.
        """
        if len(self.sizes) != len(grids):
            raise ValueError(
                f"got anchor sizes for {len(self.sizes)} levels and {len(grids)} feature maps; "
                "expected one each"
            )
        height, width = self.canvas
        steps = [(height // rows, width // columns) for rows, columns in grids]
        if self.strides is not None:
            steps = [(stride, stride) for stride in self.strides]
        return [
            grid_anchors(self.base(sizes, self.aspect_ratios), grid, step)
            for sizes, grid, step in zip(self.sizes, grids, steps, strict=True)
        ]
