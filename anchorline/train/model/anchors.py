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
from torch import Tensor, nn
from torchvision.models.detection import anchor_utils

Grid = tuple[int, int]  # rows and columns of a feature map


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


def torchvision_base_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """torchvision's anchors around the origin, rounded; arguments and order as above."""
    generator = anchor_utils.AnchorGenerator((tuple(sizes),), (tuple(aspect_ratios),))
    base: Tensor = generator.cell_anchors[0]
    return base


BASE_ANCHORS = {
    "torchvision": torchvision_base_anchors,
    "caffe": caffe_base_anchors,
    "unrounded": unrounded_base_anchors,
}


class LevelAnchors:
    """The anchors [A, 4] of one level, made when they are asked for by their numbers: ``anchors[index]``.

    ``base`` are those of the first place, of a map of ``grid`` whose places are ``step`` pixels apart (down
    and across). Places run row by row and the anchors of a place follow each other, as the RPN head's outputs
    do once flattened.
    """

    def __init__(self, base: Tensor, grid: Grid, step: Grid) -> None:
        self.base, self.grid, self.step = base, grid, step

    def __len__(self) -> int:
        return self.grid[0] * self.grid[1] * len(self.base)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """[..., 4] of the numbers ``index`` int64 [...]; ``anchors[:]`` is all."""
        if isinstance(index, slice):
            index = torch.arange(len(self), device=self.base.device)[index]
        place = torch.div(index, len(self.base), rounding_mode="trunc")
        row = torch.div(place, self.grid[1], rounding_mode="trunc")
        x, y = (place - row * self.grid[1]) * self.step[1], row * self.step[0]
        shift = torch.stack((x, y, x, y), dim=-1)
        return self.base[index - place * len(self.base)] + shift.to(self.base.dtype)


class AnchorGenerator(nn.Module):
    """The anchors of every level in canvas pixels, in one of the three styles, for maps of any size.

    ``sizes`` holds the anchor sizes of each level, ``strides`` the levels' own. With ``rounded_strides`` one
    steps by canvas // grid, as in torchvision: P6 of 800x1088 has been rounded up to 13x17, and 800 // 13 is
    61, where Detectron2 and MMDetection step by 64.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float],
        style: str,
        strides: Sequence[int],
        rounded_strides: bool = False,
    ) -> None:
        super().__init__()
        self.strides, self.rounded_strides = tuple(strides), rounded_strides
        for level, group in enumerate(sizes):
            base = BASE_ANCHORS[style](group, aspect_ratios)
            self.register_buffer(f"base{level}", base, persistent=False)

    def forward(self, grids: Sequence[Grid]) -> list[LevelAnchors]:
        """The anchors of each level, for maps of ``grids`` (rows, columns), finest first.

        Raises ``ValueError`` where there are other levels than strides.
        """
        if len(grids) != len(self.strides):
            raise ValueError(f"got {len(grids)} feature maps; expected {len(self.strides)}, one a level")
        # The finest map is not rounded: the canvas of a pyramid is a multiple of its coarsest stride but one.
        height, width = (side * self.strides[0] for side in grids[0])
        found = []
        for level, (grid, stride) in enumerate(zip(grids, self.strides, strict=True)):
            step = (height // grid[0], width // grid[1]) if self.rounded_strides else (stride, stride)
            found.append(LevelAnchors(getattr(self, f"base{level}"), grid, step))
        return found
