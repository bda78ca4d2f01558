"""Anchors: the reference boxes of the RPN (Faster R-CNN, section 3.1.1).

Three styles. ``torchvision``: base anchors are rounded to whole pixels and centred at 0. ``unrounded``: they
are not, as in Detectron2's ``modeling/anchor_generator.py`` (offset 0) and MMDetection's ``AnchorGenerator``
(centre offset 0). ``caffe``, py-faster-rcnn's ``lib/rpn/generate_anchors.py``: a window of 16x16 pixels is
given each aspect ratio, rounded, and then scaled. That window is (0, 0, 15, 15) with its last pixels
included, which with continuous edges is (0, 0, 16, 16), centred at 8.

At one place anchors run ratio by ratio in every style, the sizes within each: torchvision's,
py-faster-rcnn's and MMDetection's order. Detectron2's runs size by size, so the RPN's output channels
have to be permuted when its C4 and DC5 models, with five sizes on one map, are imported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection import anchor_utils


def unrounded_base_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Detectron2's and MMDetection's anchors [len(aspect_ratios) * len(sizes), 4] around the origin.

    w = size * sqrt(1 / ratio) and h = ratio * w: ``sizes`` are square roots of areas in pixels (in
    MMDetection's terms stride * scale), an aspect ratio is height / width.
    """
    side = torch.as_tensor(sizes, dtype=torch.float64)
    ratio = torch.as_tensor(aspect_ratios, dtype=torch.float64)[:, None]
    width = side[None, :] * torch.sqrt(1.0 / ratio)
    half = torch.stack((width, ratio * width), dim=-1).reshape(-1, 2) / 2
    return torch.cat((-half, half), dim=1).float()


# The side of the window that py-faster-rcnn's anchors are multiples of, in pixels.
CAFFE_WINDOW = 16


def caffe_base_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """py-faster-rcnn's anchors at the first place, arguments and order as above; its x2 and y2 are 1 less."""
    ratio = torch.as_tensor(aspect_ratios, dtype=torch.float64)
    scale = torch.as_tensor(sizes, dtype=torch.float64) / CAFFE_WINDOW
    width = torch.round(torch.sqrt(CAFFE_WINDOW**2 / ratio))
    height = torch.round(width * ratio)
    half = (torch.stack((width, height), dim=1)[:, None] * scale[None, :, None] / 2).reshape(-1, 2)
    return (CAFFE_WINDOW / 2 + torch.cat((-half, half), dim=1)).float()


_OTHER_BASE_ANCHORS = {"caffe": caffe_base_anchors, "unrounded": unrounded_base_anchors}


class AnchorGenerator:
    """The anchors of every level in canvas pixels, in one of the three styles.

    ``canvas`` is (height, width) of the network input; ``sizes`` holds the anchor sizes of each level. A
    level's stride is canvas // grid, as in torchvision, unless ``strides`` says it: P6 of 800x1088 has been
    rounded up to 13x17, and 800 // 13 is 61 where Detectron2 and MMDetection step by 64.
    """

    def __init__(
        self,
        canvas: tuple[int, int],
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float],
        style: str = "torchvision",
        strides: Sequence[int] | None = None,
    ) -> None:
        self.canvas, self.strides = canvas, strides
        self._generator = anchor_utils.AnchorGenerator(sizes, (tuple(aspect_ratios),) * len(sizes))
        if style in _OTHER_BASE_ANCHORS:
            base = _OTHER_BASE_ANCHORS[style]
            self._generator.cell_anchors = [base(group, aspect_ratios) for group in sizes]
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

        Places run row by row and the anchors of a place follow each other, as the RPN head's outputs do
        once flattened. Raises ``ValueError`` where there are other levels than sizes.
        """
        levels = len(self._generator.cell_anchors)
        if levels != len(grids):
            raise ValueError(
                f"got anchor sizes for {levels} levels and {len(grids)} feature maps; expected one each"
            )
        height, width = self.canvas
        steps = [(height // rows, width // columns) for rows, columns in grids]
        if self.strides is not None:
            steps = [(stride, stride) for stride in self.strides]
        anchors: list[Tensor] = self._generator.grid_anchors(grids, steps)
        return anchors
