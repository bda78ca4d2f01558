"""Maps as rows of C values, of which training reads some: windows around places, and RoIAlign by a table.

A cell of a RoI is a weighted sum of the pixels that its sampling points lie between. With pixels and weights
in a table, pooling is an embedding bag over the rows, and its gradient one over the transposed table.
torchvision's kernel for the gradient adds value by value on one thread; this is eight times as fast, and its
sums have the same order in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rows_of(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The pixels [P, C] of maps [B, C, H_i, W_i], one level after the other, in each image by image.

    And int64 [L, 3]: height, width and first row of each level.
    """
    rows = [feature.permute(0, 2, 3, 1).flatten(0, 2) for feature in features]
    sides = torch.tensor([feature.shape[2:] for feature in features])
    count = torch.tensor([len(each) for each in rows])
    table = torch.cat((sides, (count.cumsum(0) - count)[:, None]), dim=1)
    return torch.cat(rows), table.to(features[0].device)


def windows_at(features: Sequence[Tensor], place: Tensor) -> Tensor:
    """The 3x3 windows [B, S, 9 * C] around places, zeros beyond the edge of a map; row by row, channels last.

    ``place`` int64 [B, S] counts the places of all levels, those of a level row by row.
    """
    rows, table = rows_of(features)
    places = table[:, 0] * table[:, 1]
    ends = places.cumsum(0)
    level = torch.searchsorted(ends, place, right=True)
    height, width, start = table[level][..., None, None, :].unbind(-1)
    place = (place - (ends - places)[level])[..., None, None]
    step = torch.arange(-1, 2, device=place.device)
    row, column = torch.div(place, width, rounding_mode="trunc") + step[:, None], place % width + step
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    image = torch.arange(len(place), device=place.device)[:, None, None, None]
    pixel = torch.where(inside, start + (image * height + row) * width + column, 0)
    return torch.where(inside[..., None], F.embedding(pixel, rows), 0).flatten(2)


def pool_by_table(
    features: Sequence[Tensor],
    boxes: Tensor,
    level: Tensor,
    strides: Sequence[int],
    size: int,
    sampling: int,
    aligned: bool,
) -> Tensor:
    """Pooled regions [B * R, C, S, S] of ``boxes`` [B, R, 4] in canvas pixels, channels last in memory.

    As torchvision's ``MultiScaleRoIAlign``, whose convention is not ``aligned``. ``features``
    [B, C, H_i, W_i] have ``strides``; ``level`` int64 [B, R] says which one a box is pooled from,
    ``sampling`` (at least 1) how many points a cell has on each axis.
    """
    rows, table = rows_of(features)
    scale = torch.tensor([1.0 / stride for stride in strides], dtype=boxes.dtype)[level]
    height, width, start = table[level].unbind(-1)
    x1, y1, x2, y2 = (boxes * scale[..., None]).unbind(-1)
    length_x, length_y = x2 - x1, y2 - y1
    if aligned:
        x1, y1 = x1 - 0.5, y1 - 0.5
    else:
        length_x, length_y = length_x.clamp(min=1.0), length_y.clamp(min=1.0)
    row, row_weights = _along_axis(y1, length_y, height, size, sampling)
    column, column_weights = _along_axis(x1, length_x, width, size, sampling)
    image = torch.arange(len(boxes))[:, None]
    row = (start + image * height * width)[..., None, None] + row * width[..., None, None]
    # [B, R, S, S, 2 * sampling, 2 * sampling], then a line for each cell
    pixels = row[:, :, :, None, :, None] + column[:, :, None, :, None, :]
    weights = row_weights[:, :, :, None, :, None] * column_weights[:, :, None, :, None, :]
    pixels, weights = (each.flatten(4).flatten(0, 3) for each in (pixels, weights))
    cells: Tensor = _WeightedRows.apply(rows.float(), pixels, weights)
    return cells.to(rows.dtype).unflatten(0, (-1, size, size)).permute(0, 3, 1, 2)


def _along_axis(
    start: Tensor, length: Tensor, limit: Tensor, size: int, sampling: int
) -> tuple[Tensor, Tensor]:
    """The pixels along one axis that the cells of RoIs read, and their weights, [B, R, S, 2 * sampling] each.

    ``start`` and ``length`` [B, R] in pixels whose values stand at whole numbers, of ``limit`` int64 [B, R].
    Between the last pixel and the limit a point has the last pixel's value, beyond it none.
    """
    offsets = (torch.arange(size * sampling, dtype=start.dtype) + 0.5) / (size * sampling)
    place = start[..., None] + length[..., None] * offsets
    inside = (place >= -1) & (place <= limit[..., None])
    place = torch.where(inside, place, 0.0).clamp(min=0)  # NaN becomes 0 too
    last = limit[..., None] - 1
    low = torch.minimum(place.long(), last)
    share = place - low
    pixels = torch.stack((low, torch.minimum(low + 1, last)), dim=-1)  # behind the last one it again
    weights = torch.stack((1.0 - share, share), dim=-1) * (inside / sampling)[..., None]
    shape = (size, 2 * sampling)
    return pixels.flatten(-2).unflatten(-1, shape), weights.flatten(-2).unflatten(-1, shape)


class _WeightedRows(torch.autograd.Function):
    """``sum_k weights[n, k] * rows[pixels[n, k]]`` [N, C], with a gradient for ``rows`` alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pixels: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(pixels, weights)
        ctx.count = len(rows)
        return F.embedding_bag(pixels, rows, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        pixels, weights = ctx.saved_tensors
        flat = pixels.flatten()
        order = flat.argsort(stable=True)
        uses = torch.bincount(flat, minlength=ctx.count)
        places, by_pixel = uses.cumsum(0) - uses, weights.flatten()[order]
        cells = torch.div(order, pixels.shape[1], rounding_mode="trunc")
        rows = F.embedding_bag(cells, gradient.contiguous(), places, mode="sum", per_sample_weights=by_pixel)
        return rows, None, None
