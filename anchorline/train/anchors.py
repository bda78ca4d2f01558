"""Anchors: the reference boxes of the RPN (Faster R-CNN, section 3.1.1).

Numerically as torchvision's ``models/detection/anchor_utils.py``: base anchors are rounded to whole
pixels and centred at 0, and shifted by the stride of their level.
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


def level_anchors(
    canvas: tuple[int, int],
    grids: Sequence[tuple[int, int]],
    sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
) -> list[Tensor]:
    """Anchors of every level, a list of [A_level, 4] in canvas pixels.

    ``canvas`` and ``grids`` are (height, width) of the network input and of each feature map;
    ``sizes`` holds the anchor sizes of each level. A level's stride is canvas // grid, as in
    torchvision. Raises ``ValueError`` when the numbers of levels differ.
    """
    if len(sizes) != len(grids):
        raise ValueError(
            f"got anchor sizes for {len(sizes)} levels and {len(grids)} feature maps; expected one each"
        )
    return [
        grid_anchors(
            base_anchors(level_sizes, aspect_ratios), grid, (canvas[0] // grid[0], canvas[1] // grid[1])
        )
        for grid, level_sizes in zip(grids, sizes, strict=True)
    ]
