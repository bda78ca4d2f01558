"""Geometry of boxes in PyTorch. Every box is xyxy in pixels with continuous edges."""

from __future__ import annotations

import torch
from torch import Tensor


def box_area(boxes: Tensor) -> Tensor:
    """Areas [...] of ``boxes`` [..., 4], in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU [B, N, M] of every box of ``a`` [B, N, 4] (or [1, N, 4]) with every one of ``b`` [B, M, 4].

    As ``torchvision.ops.box_iou``, with a batch; a pair without area has IoU 0, never NaN.
    """
    intersection = _intersections(a, b)
    union = box_area(a)[..., :, None] + box_area(b)[..., None, :] - intersection
    return torch.where(union > 0, intersection / union, torch.zeros_like(union))


def pairwise_ioa(a: Tensor, b: Tensor) -> Tensor:
    """IoA [B, N, M]: the share of each box of ``a`` [B, N, 4] (or [1, N, 4]) in each of ``b`` [B, M, 4].

    Intersection over the area of ``a``, as pycocotools measures overlaps with crowds; 0 without area.
    """
    intersection = _intersections(a, b)
    area = box_area(a)[..., :, None].expand_as(intersection)
    return torch.where(area > 0, intersection / area, torch.zeros_like(intersection))


def _intersections(a: Tensor, b: Tensor) -> Tensor:
    top_left = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    bottom_right = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    width, height = (bottom_right - top_left).clamp_(min=0).unbind(-1)
    return width * height


def clip_to_images(boxes: Tensor, image_sizes: Tensor, inclusive: bool = False, pixel: float = 1.0) -> Tensor:
    """Clip ``boxes`` [B, ..., 4] to their own image: x to [0, width], y to [0, height].

    ``image_sizes`` float [B, 2] holds (height, width) of the valid part of each canvas. With ``inclusive``
    as py-faster-rcnn's ``clip_boxes``, which moves all four to existing pixels, so that at least one
    remains: here x1 to [0, width - pixel] and x2 to [pixel, width], where ``pixel`` is its side.
    """
    shape = [image_sizes.shape[0]] + [1] * (boxes.dim() - 2)
    height, width = image_sizes[:, 0].reshape(shape), image_sizes[:, 1].reshape(shape)
    zero = torch.zeros_like(height)
    pixel = pixel if inclusive else 0.0
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(
        (
            torch.minimum(torch.maximum(x1, zero), width - pixel),
            torch.minimum(torch.maximum(y1, zero), height - pixel),
            torch.minimum(torch.maximum(x2, zero + pixel), width),
            torch.minimum(torch.maximum(y2, zero + pixel), height),
        ),
        dim=-1,
    )


def inside_images(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Bool [B, N]: which ``boxes`` [N, 4] lie wholly in each image of ``image_sizes`` [B, 2]."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return ((x1 >= 0) & (y1 >= 0)) & (x2 <= image_sizes[:, 1:]) & (y2 <= image_sizes[:, :1])


def at_least(boxes: Tensor, side: float) -> Tensor:
    """Bool [...]: which ``boxes`` [..., 4] have both sides >= ``side`` pixels."""
    return (boxes[..., 2] - boxes[..., 0] >= side) & (boxes[..., 3] - boxes[..., 1] >= side)
