"""The region proposal network: head, proposals and targets (Faster R-CNN, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anchorline.train.loop.settings import TrainingSettings
from anchorline.train.model import ops
from anchorline.train.model.assign import BACKGROUND, IGNORED, Targets, ignore_covered, match, sample
from anchorline.train.model.boxes import (
    BoxCoder,
    at_least,
    clip_to_images,
    coder_of,
    inside_images,
    pairwise_ioa,
    pairwise_iou,
)
from anchorline.train.model.losses import rpn_losses
from anchorline.train.model.settings import ModelSettings

RPN_CODER = BoxCoder()
RPN_STREAM = 1


class RPNHead(nn.Module):
    """A 3x3 window over the features, then objectness and ``bbox_deltas`` as sibling 1x1 convolutions.

    ``width`` is that of the window's output (0: as ``channels``). With ``pairs`` there are two scores for
    each anchor as in the paper, 2k channels with the k of background first (py-faster-rcnn's order).
    """

    def __init__(
        self, channels: int, anchors_per_place: int, convs: int = 1, *, width: int = 0, pairs: bool = False
    ) -> None:
        super().__init__()
        self.pairs = pairs
        widths = [channels, *[width or channels] * convs]
        # The nesting keeps torchvision's parameter names: conv.0.0.weight.
        self.conv = nn.Sequential(
            *[nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in pairwise(widths)]
        )
        self.cls_logits = nn.Conv2d(widths[-1], anchors_per_place * (2 if pairs else 1), 1)
        self.bbox_pred = nn.Conv2d(widths[-1], anchors_per_place * 4, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.constant_(cast(Tensor, layer.bias), 0.0)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level, objectness logits [B, A_level] and deltas [B, A_level, 4] in anchor order."""
        objectness, deltas = [], []
        for feature in features:
            hidden = self.conv(feature)
            objectness.append(self._logits(self.cls_logits(hidden)).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.bbox_pred(hidden).permute(0, 2, 3, 1).reshape(feature.shape[0], -1, 4))
        return [o.float() for o in objectness], [d.float() for d in deltas]

    def _logits(self, scores: Tensor) -> Tensor:
        """One logit for each anchor: of two scores their difference, whose sigmoid is their softmax."""
        if not self.pairs:
            return scores
        background, object_ = scores.float().chunk(2, dim=1)
        return object_ - background


@dataclass(frozen=True)
class Proposals:
    """``boxes`` [B, P, 4] on the canvas in falling order of ``scores`` [B, P]; unused slots are -1 and 0."""

    boxes: Tensor
    scores: Tensor

    @property
    def present(self) -> Tensor:
        """Bool [B, P]: which slots hold a proposal."""
        return self.scores > ops.SUPPRESSED


def select_proposals(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    image_sizes: Tensor,
    settings: ModelSettings,
    *,
    pre_nms: int,
    post_nms: int,
) -> Proposals:
    """Turn the head's outputs into proposals, as torchvision's ``filter_proposals`` in fixed shapes.

    Per level the ``pre_nms`` best anchors are decoded and clipped to their image, boxes that are too
    small or score too low go, NMS runs within each level, and the ``post_nms`` best of all levels remain.
    """
    slots = max(min(pre_nms, level.shape[1]) for level in objectness)
    boxes_of_level, scores_of_level = [], []
    for level_objectness, level_deltas, level_anchor in zip(objectness, deltas, anchors, strict=True):
        count = min(pre_nms, level_objectness.shape[1])
        logits, index = level_objectness.topk(count, dim=1)
        chosen = level_deltas.gather(1, index[..., None].expand(-1, -1, 4))
        boxes = coder_of(settings).decode(chosen, level_anchor[index])
        boxes_of_level.append(F.pad(boxes, (0, 0, 0, slots - count)))
        scores_of_level.append(F.pad(logits.sigmoid(), (0, slots - count), value=ops.SUPPRESSED))
    boxes = torch.stack(boxes_of_level, dim=1)  # [B, L, slots, 4]
    boxes = clip_to_images(boxes, image_sizes, settings.box_edges == "inclusive")
    scores = torch.stack(scores_of_level, dim=1)
    counts = at_least(boxes, settings.rpn_min_side * settings.frame_scale)
    if settings.rpn_score_threshold > 0:
        counts = counts & (scores >= settings.rpn_score_threshold)
    scores = torch.where(counts, scores, torch.full_like(scores, ops.SUPPRESSED))
    batch, levels = boxes.shape[:2]
    kept = ops.batched_nms(
        boxes.reshape(batch * levels, slots, 4),
        scores.reshape(batch * levels, slots),
        iou_threshold=settings.rpn_nms_iou,
        score_threshold=ops.SUPPRESSED,  # a sigmoid that underflows to 0 is still a score
    )
    kept = kept.reshape(batch, levels * slots)
    scores, index = kept.topk(min(post_nms, levels * slots), dim=1)
    boxes = boxes.reshape(batch, levels * slots, 4).gather(1, index[..., None].expand(-1, -1, 4))
    return Proposals(
        torch.where((scores > ops.SUPPRESSED)[..., None], boxes, torch.zeros_like(boxes)), scores
    )


def match_anchors(
    anchors: Tensor, targets: Targets, settings: TrainingSettings, image_sizes: Tensor | None
) -> Tensor:
    """What each anchor stands for (``matcher.match``), int64 [B, A].

    Anchors that an ignore region covers are no background. With ``rpn_ignore_outside`` anchors across the
    edge of their image have no part: they are not the best of any box either.
    """
    iou = pairwise_iou(anchors[None], targets.boxes)
    inside = None
    if settings.rpn_ignore_outside:
        if image_sizes is None:
            raise ValueError("rpn_ignore_outside needs the sizes of the images, [B, 2]; got None")
        inside = inside_images(anchors, image_sizes)
        iou = torch.where(inside[..., None], iou, torch.full_like(iou, -1.0))
    matches = match(
        iou,
        targets.present,
        positive_iou=settings.rpn_positive_iou,
        negative_iou=settings.rpn_negative_iou,
        keep_best_of_each_box=True,
    )
    if inside is not None:
        matches = torch.where(inside, matches, torch.full_like(matches, IGNORED))
    return ignore_covered(matches, pairwise_ioa(anchors[None], targets.ignored))


def rpn_training_losses(
    objectness: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    targets: Targets,
    settings: TrainingSettings,
    *,
    image_sizes: Tensor | None = None,
    anchors_per_place: int = 1,
) -> dict[str, Tensor]:
    """Objectness and box loss of one batch (equation 1).

    ``objectness`` [B, A], ``deltas`` [B, A, 4] and ``anchors`` [A, 4] with all levels joined;
    ``image_sizes`` [B, 2] for anchors across the edge. N_reg is A / ``anchors_per_place``.
    """
    with torch.no_grad():
        matches = match_anchors(anchors, targets, settings, image_sizes)
        positive, negative = matches >= 0, matches == BACKGROUND
        noise = targets.noise(RPN_STREAM, positive.shape[1])
        index, drawn = sample(positive, negative, settings.rpn_samples, settings.rpn_positive_fraction, noise)
        positive = positive.gather(1, index) & drawn
        box = matches.gather(1, index).clamp(min=0)
        goals = RPN_CODER.encode(targets.boxes_at(box), anchors[index])
    objectness_loss, box_loss = rpn_losses(
        objectness.gather(1, index),
        deltas.gather(1, index[..., None].expand(-1, -1, 4)),
        positive,
        drawn,
        torch.where(positive[..., None], goals, torch.zeros_like(goals)),
        settings.rpn_box_beta,
        (settings.rpn_samples, len(anchors) // anchors_per_place)
        if settings.rpn_normalisation == "paper"
        else None,
    )
    weight, box_weight = settings.rpn_loss_weight, settings.rpn_loss_weight * settings.rpn_box_loss_weight
    return {"loss_objectness": weight * objectness_loss, "loss_rpn_box": box_weight * box_loss}
