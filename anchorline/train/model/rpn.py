"""The region proposal network: head, proposals and losses (Faster R-CNN, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anchorline.train.model import boxes as box_ops
from anchorline.train.model import ops
from anchorline.train.model.anchors import AnchorGenerator, LevelAnchors
from anchorline.train.model.assign import Matcher, Sampler, Targets
from anchorline.train.model.feature_rows import windows_at
from anchorline.train.model.losses import rpn_losses
from anchorline.train.model.ops import mark
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import TrainingSettings


class RPNHead(nn.Module):
    """A 3x3 window of ``width`` (0: ``channels``), then objectness and deltas as sibling 1x1 convolutions.

    With ``pairs`` there are two scores for each anchor as in the paper, 2k channels with the k of
    background first (py-faster-rcnn's order).
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
            scores = self.cls_logits(hidden)
            if self.pairs:  # the sigmoid of their difference is their softmax
                background, object_ = scores.float().chunk(2, dim=1)
                scores = object_ - background
            objectness.append(scores.permute(0, 2, 3, 1).flatten(1).float())
            deltas.append(self.bbox_pred(hidden).permute(0, 2, 3, 1).reshape(feature.shape[0], -1, 4).float())
        return objectness, deltas

    def at(self, features: Sequence[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """Objectness [B, S] and deltas [B, S, 4] of the anchors ``index`` int64 [B, S] alone, of all levels.

        For a head of one 3x3 convolution. The numbers and, but for rounding, the gradients of all anchors'
        outputs gathered there, without a pass over the maps.
        """
        k = self.bbox_pred.out_channels // 4
        windows = windows_at(features, torch.div(index, k, rounding_mode="trunc"))
        layers = (cast(nn.Conv2d, self.conv[0][0]), self.cls_logits, self.bbox_pred)  # type: ignore[index]
        window, score, delta = (layer.weight.permute(0, 2, 3, 1).flatten(1) for layer in layers)
        # Biases are added apart: autocast may hold casts of them that were made without gradients.
        biases = [cast(Tensor, layer.bias) for layer in layers]
        hidden = F.relu(F.linear(windows, window) + biases[0])
        scores, deltas = F.linear(hidden, score) + biases[1], F.linear(hidden, delta) + biases[2]
        if self.pairs:
            background, object_ = scores.float().chunk(2, dim=2)
            scores = object_ - background
        anchor = (index % k)[..., None]
        deltas = deltas.unflatten(2, (k, 4)).gather(2, anchor[..., None].expand(-1, -1, 1, 4))
        return scores.gather(2, anchor).squeeze(2).float(), deltas.squeeze(2).float()


@dataclass(frozen=True)
class Proposals:
    """``boxes`` [B, P, 4] on the canvas in falling order of ``scores`` [B, P]; unused slots are -1 and 0."""

    boxes: Tensor
    scores: Tensor

    @property
    def present(self) -> Tensor:
        """Bool [B, P]: which slots hold a proposal."""
        return self.scores > ops.SUPPRESSED


class AnchorScores(NamedTuple):
    """What the head says of every anchor, by level.

    ``objectness`` logits [B, A_level], ``deltas`` [B, A_level, 4], ``anchors`` [A_level, 4].
    """

    objectness: Sequence[Tensor]
    deltas: Sequence[Tensor]
    anchors: Sequence[LevelAnchors | Tensor]


class RPN(nn.Module):
    """Proposes regions and trains itself to: torchvision's ``RegionProposalNetwork`` in fixed shapes."""

    def __init__(self, channels: int, strides: Sequence[int], settings: ModelSettings) -> None:
        super().__init__()
        s = settings
        self.anchors_per_place = s.anchors_per_place
        self.head = RPNHead(
            channels, s.anchors_per_place, s.rpn_convs, width=s.rpn_channels, pairs=s.rpn_score == "softmax"
        )
        # A single map may be larger than canvas / 16; of a pyramid torchvision's strides are rounded.
        rounded = s.neck not in ("single", "dc5") and s.anchor_style != "unrounded"
        self.anchors = AnchorGenerator(s.anchor_sizes, s.aspect_ratios, s.anchor_style, strides, rounded)
        self.coder = box_ops.BoxCoder.of(s)
        self.pre_nms, self.post_nms, self.nms_iou = s.rpn_pre_nms, s.rpn_post_nms, s.rpn_nms_iou
        self.score_threshold, self.min_side = s.rpn_score_threshold, s.rpn_min_side * s.frame_scale

    def forward(self, features: Sequence[Tensor], image_sizes: Tensor) -> Proposals:
        """The proposals of test time, from the levels' maps [B, C, H, W]."""
        proposals = self.propose(self.score(features), image_sizes)
        return Proposals(mark("proposals", proposals.boxes), mark("proposal_scores", proposals.scores))

    def score(self, features: Sequence[Tensor]) -> AnchorScores:
        """Objectness and deltas of the anchors at every place of ``features``."""
        objectness, deltas = self.head(features)
        return AnchorScores(
            [mark(f"objectness.{level}", each) for level, each in enumerate(objectness)],
            [mark(f"bbox_deltas.{level}", each) for level, each in enumerate(deltas)],
            self.anchors([(feature.shape[2], feature.shape[3]) for feature in features]),
        )

    def score_to_train(self, features: Sequence[Tensor], settings: TrainingSettings) -> AnchorScores:
        """``score``, without gradients where ``losses`` scores the sampled anchors again."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._samples_few(features, settings)):
            return self.score(features)

    def _samples_few(self, features: Sequence[Tensor], settings: TrainingSettings) -> bool:
        """Whether scoring the sampled anchors again costs less than gradients over whole maps."""
        places = sum(feature.shape[2] * feature.shape[3] for feature in features)
        return len(self.head.conv) == 1 and 4 * settings.rpn_samples <= places

    def propose(
        self,
        scored: AnchorScores,
        image_sizes: Tensor,
        pre_nms: int | None = None,
        post_nms: int | None = None,
    ) -> Proposals:
        """Turn the head's outputs into proposals, as torchvision's ``filter_proposals``.

        Per level the ``pre_nms`` best anchors (default: the model's own numbers) are decoded and clipped to
        their image, boxes that are too small or score too low go, NMS runs within each level, and the
        ``post_nms`` best of all levels remain.
        """
        pre_nms, post_nms = pre_nms or self.pre_nms, post_nms or self.post_nms
        boxes_of_level, scores_of_level = [], []
        for objectness, deltas, anchors in zip(*scored, strict=True):
            # A level of a small canvas has fewer anchors; filled up, every shape from here on is the same.
            there = objectness.shape[1]
            logits, index = F.pad(objectness, (0, pre_nms), value=-torch.inf).topk(pre_nms, dim=1)
            is_anchor, index = index < there, index.clamp(max=there - 1)
            deltas = box_ops.rows_at(deltas, index)
            boxes_of_level.append(self.coder.decode(deltas, anchors[index], image_sizes))
            scores = torch.where(is_anchor, logits.sigmoid(), ops.SUPPRESSED)
            scores_of_level.append(scores)
        boxes = torch.stack(boxes_of_level, dim=1)  # [B, L, pre_nms, 4]
        scores = torch.stack(scores_of_level, dim=1)
        counts = box_ops.at_least(boxes, self.min_side)
        if self.score_threshold > 0:
            counts = counts & (scores >= self.score_threshold)
        scores = torch.where(counts, scores, ops.SUPPRESSED)
        # No threshold: a sigmoid that underflows to 0 is still a score.
        boxes, scores, _ = box_ops.best_after_nms(boxes, scores, self.nms_iou, ops.SUPPRESSED, post_nms)
        return Proposals(boxes, scores)

    def losses(
        self,
        scored: AnchorScores,
        image_sizes: Tensor,
        targets: Targets,
        settings: TrainingSettings,
        features: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Objectness and box loss of one batch (equation 1); N_reg is the number of places.

        With ``rpn_ignore_outside`` anchors across the edge of their image have no part. ``features`` are the
        maps that ``score_to_train`` has scored; without them ``scored`` has the gradients.
        """
        anchors = torch.cat([anchors[:] for anchors in scored.anchors])
        s = settings
        inside = box_ops.inside_images(anchors, image_sizes) if s.rpn_ignore_outside else None
        matcher = Matcher(s.rpn_positive_iou, s.rpn_negative_iou, keep_best_of_each_box=True)
        sampler = Sampler(matcher, s.rpn_samples, s.rpn_positive_fraction, stream=1)
        samples = sampler(anchors[None], targets, self.coder, inside)
        if features is not None and self._samples_few(features, s):
            objectness, deltas = self.head.at(features, samples.index)
        else:
            objectness = torch.cat([*scored.objectness], dim=1).gather(1, samples.index)
            deltas = box_ops.rows_at(torch.cat([*scored.deltas], dim=1), samples.index)
        divisors = (s.rpn_samples, len(anchors) // self.anchors_per_place)
        objectness_loss, box_loss = rpn_losses(
            objectness,
            deltas,
            samples.labels > 0,
            samples.drawn,
            samples.deltas,
            s.rpn_box_beta,
            divisors if s.rpn_normalisation == "paper" else None,
        )
        box_weight = s.rpn_loss_weight * s.rpn_box_loss_weight
        return {"loss_objectness": s.rpn_loss_weight * objectness_loss, "loss_rpn_box": box_weight * box_loss}
