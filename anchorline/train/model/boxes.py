"""Boxes in PyTorch, xyxy in pixels: their geometry, and their coding as regression targets.

Edges are continuous, so a width is x2 - x1. py-faster-rcnn's boxes include their last pixel: (x1, y1, x2, y2)
there is (x1, y1, x2 + 1, y2 + 1) here. What is left of that is ``last_pixel``, its side in canvas pixels: 1,
or another where py-faster-rcnn works on the unscaled image; 0 in all other libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anchorline.train.model import ops
from anchorline.train.model.settings import ModelSettings


def box_area(boxes: Tensor) -> Tensor:
    """Areas [...] of ``boxes`` [..., 4], in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU [B, N, M] of every box of ``a`` [B, N, 4] (or [1, N, 4]) with every one of ``b`` [B, M, 4].

    As ``torchvision.ops.box_iou``, with a batch; a pair without area has IoU 0, never NaN.
    """
    intersection = _intersections(a, b)
    union = box_area(a)[..., :, None] + box_area(b)[..., None, :] - intersection
    return torch.where(union > 0, intersection / union, 0.0)


def pairwise_ioa(a: Tensor, b: Tensor) -> Tensor:
    """IoA [B, N, M]: the share of each box of ``a`` [B, N, 4] (or [1, N, 4]) in each of ``b`` [B, M, 4].

    Intersection over the area of ``a``, as pycocotools measures overlaps with crowds; 0 without area.
    """
    intersection = _intersections(a, b)
    area = box_area(a)[..., :, None].expand_as(intersection)
    return torch.where(area > 0, intersection / area, 0.0)


def _intersections(a: Tensor, b: Tensor) -> Tensor:
    top_left = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    bottom_right = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    width, height = (bottom_right - top_left).clamp_(min=0).unbind(-1)
    return width * height


def clip_to_images(boxes: Tensor, image_sizes: Tensor, last_pixel: float = 0.0) -> Tensor:
    """Clip ``boxes`` [B, ..., 4] to their own image: x to [0, width], y to [0, height].

    ``image_sizes`` float [B, 2] holds (height, width) of the valid part of each canvas. With a ``last_pixel``
    as py-faster-rcnn's ``clip_boxes``, which leaves one pixel: x1 to [0, width - last_pixel] and x2 to
    [last_pixel, width].
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(_clipped(x1, y1, x2, y2, image_sizes, last_pixel), dim=-1)


def _clipped(
    x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor, image_sizes: Tensor, last_pixel: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = [image_sizes.shape[0]] + [1] * (x1.dim() - 1)
    height, width = image_sizes[:, 0].reshape(shape), image_sizes[:, 1].reshape(shape)
    zero = torch.zeros_like(height)
    return (
        torch.minimum(torch.maximum(x1, zero), width - last_pixel),
        torch.minimum(torch.maximum(y1, zero), height - last_pixel),
        torch.minimum(torch.maximum(x2, zero + last_pixel), width),
        torch.minimum(torch.maximum(y2, zero + last_pixel), height),
    )


def inside_images(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Bool [B, N]: which ``boxes`` [N, 4] lie wholly in each image of ``image_sizes`` [B, 2]."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return ((x1 >= 0) & (y1 >= 0)) & (x2 <= image_sizes[:, 1:]) & (y2 <= image_sizes[:, :1])


def at_least(boxes: Tensor, side: float) -> Tensor:
    """Bool [...]: which ``boxes`` [..., 4] have both sides >= ``side`` pixels."""
    return (boxes[..., 2] - boxes[..., 0] >= side) & (boxes[..., 3] - boxes[..., 1] >= side)


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """Rows [..., S, 4] of ``values`` [..., N, 4], boxes or deltas, at ``index`` int64 [..., S]."""
    return values.gather(index.dim() - 1, index[..., None].expand(*[-1] * index.dim(), 4))


def best_after_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    score_threshold: float,
    count: int,
    slots: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The K best, at most ``count``, of ``boxes`` [B, G, N, 4] after NMS within each of G groups.

    ``scores`` [B, G, N] fall within a group. Returns boxes [B, K, 4], scores [B, K] and places int64 [B, K]
    among the G * N; unused slots are zero with the score ``SUPPRESSED``. N is filled up to ``slots`` after
    the NMS, where K shall not depend on it.
    """
    batch, groups, size = scores.shape
    kept = ops.batched_nms(
        boxes.reshape(batch * groups, size, 4),
        scores.reshape(batch * groups, size),
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
    ).reshape(batch, groups, size)
    if slots is not None:
        kept = F.pad(kept, (0, slots - size), value=ops.SUPPRESSED)
        boxes, size = F.pad(boxes, (0, 0, 0, slots - size)), slots
    best, index = kept.reshape(batch, groups * size).topk(min(count, groups * size), dim=1)
    boxes = rows_at(boxes.reshape(batch, groups * size, 4), index)
    return torch.where((best > ops.SUPPRESSED)[..., None], boxes, 0.0), best, index


# A box may grow at most to 1000/16 of its anchor; exp() of more would overflow long before it helps.
MAX_LOG_SCALE = math.log(1000.0 / 16)


@dataclass(frozen=True)
class BoxCoder:
    """Turns boxes into ``bbox_deltas`` (dx, dy, dw, dh) relative to reference boxes, and back.

    Section 3.1.2, equation (2), as torchvision's ``models/detection/_utils.py`` and py-faster-rcnn's
    ``lib/fast_rcnn/bbox_transform.py``, which decodes x2 and y2 one ``last_pixel`` further than it encodes.
    ``weights`` multiply the four deltas, so that the loss sees values of similar size. ``max_log_scale``
    limits dw and dh (infinity: no limit) as Detectron2's ``Box2BoxTransform``, with ``both_sides`` also from
    below as MMDetection's ``DeltaXYWHBBoxCoder``, whose ``target_stds`` are 1 / ``weights``.
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    max_log_scale: float = MAX_LOG_SCALE
    both_sides: bool = False
    last_pixel: float = 0.0

    @classmethod
    def of(
        cls,
        settings: ModelSettings,
        weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
        pixel: float = 1.0,
    ) -> BoxCoder:
        """The coder of a model's numeric profile, whose boxes lie in units of ``pixel`` canvas pixels."""
        limit = MAX_LOG_SCALE if settings.clamp_deltas else math.inf
        last_pixel = pixel if settings.box_edges == "inclusive" else 0.0
        return cls(weights, limit, settings.clamp_deltas_below, last_pixel)

    def encode(self, boxes: Tensor, references: Tensor) -> Tensor:
        """Deltas [..., 4] that move ``references`` [..., 4] onto ``boxes`` [..., 4], both with area."""
        wx, wy, ww, wh = self.weights
        centre_x, centre_y, width, height = _centre_form(boxes)
        ref_x, ref_y, ref_width, ref_height = _centre_form(references)
        return torch.stack(
            (
                wx * (centre_x - ref_x) / ref_width,
                wy * (centre_y - ref_y) / ref_height,
                ww * torch.log(width / ref_width),
                wh * torch.log(height / ref_height),
            ),
            dim=-1,
        )

    def decode(self, deltas: Tensor, references: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """Boxes [..., 4] that ``deltas`` [..., 4] make of ``references``, broadcast together; with
        ``image_sizes`` [B, 2] clipped as by ``clip_to_images``."""
        wx, wy, ww, wh = self.weights
        if self.last_pixel not in (0.0, 1.0):  # the references end one canvas pixel behind caffe's x2 and y2
            shift = self.last_pixel - 1.0
            references = torch.cat((references[..., :2], references[..., 2:] + shift), dim=-1)
        ref_x, ref_y, ref_width, ref_height = _centre_form(references)
        dx, dy, dw, dh = deltas.unbind(-1)
        dw, dh = dw / ww, dh / wh
        if self.max_log_scale < math.inf:
            dw, dh = torch.clamp(dw, max=self.max_log_scale), torch.clamp(dh, max=self.max_log_scale)
        if self.both_sides:
            dw, dh = torch.clamp(dw, min=-self.max_log_scale), torch.clamp(dh, min=-self.max_log_scale)
        centre_x = dx / wx * ref_width + ref_x
        centre_y = dy / wy * ref_height + ref_y
        half_width = 0.5 * torch.exp(dw) * ref_width
        half_height = 0.5 * torch.exp(dh) * ref_height
        x2, y2 = centre_x + half_width, centre_y + half_height
        if self.last_pixel:
            x2, y2 = x2 + self.last_pixel, y2 + self.last_pixel
        edges = centre_x - half_width, centre_y - half_height, x2, y2
        if image_sizes is not None:
            edges = _clipped(*edges, image_sizes, self.last_pixel)
        return torch.stack(edges, dim=-1)


def _centre_form(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, centre y, width and height [...] of ``boxes`` [..., 4]."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height
