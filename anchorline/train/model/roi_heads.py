"""The Fast R-CNN half: pooled regions to classes and boxes, and their losses (Faster R-CNN, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor

from anchorline.train.model import boxes as box_ops
from anchorline.train.model import ops
from anchorline.train.model.assign import Matcher, Sampler, Samples, Targets
from anchorline.train.model.backbones import build_last_stage
from anchorline.train.model.losses import roi_losses
from anchorline.train.model.ops import mark
from anchorline.train.model.roi_pooling import RoIMaxPooling, RoIPooling
from anchorline.train.model.rpn import Proposals
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import TrainingSettings


class BoxHead(nn.Module):
    """Two fully connected layers over a pooled region, with ``dropout`` behind each while training."""

    def __init__(self, in_features: int, representation: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc6 = nn.Linear(in_features, representation)
        self.fc7 = nn.Linear(representation, representation)

    def forward(self, pooled: Tensor) -> Tensor:
        """[N, representation] of ``pooled`` [N, C, S, S]."""
        hidden = pooled.flatten(1)
        for layer in (self.fc6, self.fc7):
            hidden = F.relu(layer(hidden))
            if self.training and self.dropout:
                hidden = F.dropout(hidden, self.dropout)
        return hidden


class Res5Head(nn.Module):
    """The last stage of a ResNet over a pooled region, then the mean of its cells: the head of C4 models.

    As Detectron2's ``modeling/roi_heads/roi_heads.py`` (``Res5ROIHeads``): the stage, under torchvision's
    name ``layer4``, halves the 14x14 cells to 7x7.
    """

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.layer4 = stage

    def forward(self, pooled: Tensor) -> Tensor:
        """[N, width of the stage] of ``pooled`` [N, C, S, S]."""
        features: Tensor = self.layer4(pooled)
        return features.mean(dim=(2, 3))


@dataclass(frozen=True)
class DetectionBatch:
    """Detections of B images in D slots, falling by score; unused slots are zero.

    ``boxes`` float32 [B, D, 4] xyxy on the canvas, ``scores`` float32 [B, D], ``labels`` int32
    [B, D] indexing the class names, ``num_detections`` int32 [B].
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    num_detections: Tensor


class RoIHeads(nn.Module):
    """Classifies and refines proposals, and trains itself to: torchvision's ``RoIHeads`` in fixed shapes.

    RoIs are pooled from the finest maps, those of ``strides``.
    """

    def __init__(self, channels: int, strides: Sequence[int], classes: int, settings: ModelSettings) -> None:
        super().__init__()
        s, self.levels = settings, len(strides)
        self.pooling = RoIMaxPooling(strides[0], s) if s.roi_pooling == "max" else RoIPooling(strides, s)
        size, width = s.roi_size, s.representation
        self.box_head: nn.Module
        if s.box_head == "res5":
            stage, width = build_last_stage(s)
            self.box_head = Res5Head(stage)
        elif s.box_convs:  # undrawn slots of a training batch count in its statistics
            convs = [channels] * s.box_convs
            self.box_head = FastRCNNConvFCHead((channels, size, size), convs, [width], nn.BatchNorm2d)
        else:
            self.box_head = BoxHead(channels * size**2, width, s.box_dropout)
        self.box_predictor = FastRCNNPredictor(width, classes + 1)  # class 0 is background
        if s.box_init_std:  # as the paper starts its new layers (3.1.3)
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=s.box_init_std)
                    nn.init.zeros_(layer.bias)
        self.coder = box_ops.BoxCoder.of(s, s.box_weights, s.frame_scale)
        # Of low objectness few remain, and the two large layers are most of a small model's time.
        self.few_proposals = s.rpn_score_threshold > 0 and s.rpn_post_nms > 2
        self.score_threshold, self.nms_iou = s.score_threshold, s.nms_iou
        self.min_side, self.max_detections = s.box_min_side, s.max_detections

    def forward(
        self, features: Sequence[Tensor], proposals: Proposals, image_sizes: Tensor
    ) -> DetectionBatch:
        """The detections among ``proposals``, from the backbone's maps [B, C, H, W], finest first."""
        slots = None
        if self.few_proposals:
            slots = proposals.boxes.shape[1]
            boxes = ops.occupied(proposals.boxes, proposals.scores)
            proposals = Proposals(boxes, proposals.scores[:, : boxes.shape[1]])
        logits, deltas = self.classify(features, proposals.boxes)
        if slots is not None:  # stages have a row for each slot, as in files without the cut
            used = proposals.boxes.shape[1]
            logits = F.pad(logits, (0, 0, 0, slots - used))
            deltas = F.pad(deltas, (0, 0, 0, 0, 0, slots - used))
        logits, deltas = mark("class_logits", logits), mark("box_regression", deltas)
        if slots is not None:
            logits, deltas = logits[:, :used], deltas[:, :used]
        return self.detect(logits, deltas, proposals, image_sizes, slots)

    def classify(self, features: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, R, 1 + classes] and deltas [B, R, 1 + classes, 4] of ``boxes`` [B, R, 4]."""
        pooled = mark("roi_features", self.pooling(features[: self.levels], boxes))
        logits, deltas = self.box_predictor(self.box_head(pooled))
        deltas = deltas.float().unflatten(1, (-1, 4))
        return logits.float().unflatten(0, boxes.shape[:2]), deltas.unflatten(0, boxes.shape[:2])

    def detect(
        self,
        class_logits: Tensor,
        deltas: Tensor,
        proposals: Proposals,
        image_sizes: Tensor,
        slots: int | None = None,
    ) -> DetectionBatch:
        """Class scores and refined boxes to final detections, as torchvision's ``postprocess_detections``.

        ``class_logits`` [B, P, 1 + classes], ``deltas`` [B, P, 1 + classes, 4]. Per class: decode, clip,
        drop low scores and tiny boxes, NMS; then the best ``max_detections`` of all classes. Where P is what
        the data decides, ``slots`` is the most that it can be.
        """
        scores = class_logits.softmax(dim=-1)[..., 1:].transpose(1, 2)  # [B, classes, P]
        by_class, references = deltas[:, :, 1:].transpose(1, 2), proposals.boxes[:, None]
        boxes = self.coder.decode(by_class, references, image_sizes)
        counts = proposals.present[:, None] & box_ops.at_least(boxes, self.min_side)
        scores = torch.where(counts, scores, ops.SUPPRESSED)
        scores, order = ops.ordered(scores)
        boxes = box_ops.rows_at(boxes, order)
        thresholds = self.nms_iou, self.score_threshold
        boxes, best, index = box_ops.best_after_nms(boxes, scores, *thresholds, self.max_detections, slots)
        found = best > ops.SUPPRESSED
        labels = torch.div(index, slots or scores.shape[2], rounding_mode="floor").to(torch.int32)
        return DetectionBatch(
            boxes=boxes,
            scores=torch.where(found, best, 0.0),
            labels=torch.where(found, labels, 0),
            num_detections=found.sum(dim=1).to(torch.int32),
        )

    def losses(
        self, features: Sequence[Tensor], proposals: Proposals, targets: Targets, settings: TrainingSettings
    ) -> dict[str, Tensor]:
        """Classification and box loss on proposals from anywhere: an RPN, or a file of stored ones."""
        samples = self.sample(proposals, targets, settings)
        logits, deltas = self.classify(features, samples.boxes)
        classifier, box = roi_losses(
            logits, deltas, samples.labels, samples.drawn, samples.deltas, settings.roi_box_beta
        )
        return {"loss_classifier": classifier, "loss_box": settings.roi_box_loss_weight * box}

    def sample(self, proposals: Proposals, targets: Targets, settings: TrainingSettings) -> Samples:
        """Draw proposals for the loss; the ground-truth boxes themselves take part as proposals.

        Ignore regions do not, and proposals that one covers are no background.
        """
        boxes = torch.cat((proposals.boxes, targets.boxes), dim=1)
        present = torch.cat((proposals.present, targets.present), dim=1)
        positive_iou = settings.roi_positive_iou
        matcher = Matcher(positive_iou, positive_iou, background_iou=settings.roi_background_iou)
        sampler = Sampler(matcher, settings.roi_samples, settings.roi_positive_fraction, stream=2)
        return sampler(boxes, targets, self.coder, present)
