"""Faster R-CNN on one page: canvas of pixels -> features -> proposals -> detections.

Every shape is fixed by the settings and the batch, never by the data, so that the code that is
trained is the code that is exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import ArtefactError
from anchorline.train.loop.settings import TrainingSettings
from anchorline.train.model.anchors import level_anchors
from anchorline.train.model.assign import Targets
from anchorline.train.model.backbones import build_backbone
from anchorline.train.model.roi_heads import (
    BoxPredictor,
    DetectionBatch,
    build_box_head,
    roi_training_losses,
    sample_rois,
    select_detections,
    start_from_normal,
)
from anchorline.train.model.roi_pooling import build_pooling
from anchorline.train.model.rpn import Proposals, RPNHead, rpn_training_losses, select_proposals
from anchorline.train.model.settings import ModelSettings
from anchorline.train.model.stages import mark


class RPN(nn.Module):
    """Holds the RPN head under torchvision's name, ``rpn.head``."""

    def __init__(self, channels: int, settings: ModelSettings) -> None:
        super().__init__()
        self.head = RPNHead(
            channels,
            settings.anchors_per_place,
            settings.rpn_convs,
            width=settings.rpn_channels,
            pairs=settings.rpn_score == "softmax",
        )


class RoIHeads(nn.Module):
    """Holds pooling, box head and predictor under torchvision's names, ``roi_heads.*``."""

    def __init__(self, channels: int, strides: Sequence[int], classes: int, settings: ModelSettings) -> None:
        super().__init__()
        self.pooling = build_pooling(strides, settings)
        self.box_head = build_box_head(channels, settings)
        self.box_predictor = BoxPredictor(self.box_head.out_features, classes)
        if settings.box_init_std:
            start_from_normal(self.box_head, self.box_predictor, std=settings.box_init_std)

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, R, 1 + classes] and deltas [B, R, 1 + classes, 4] of ``boxes`` [B, R, 4]."""
        pooled = mark("roi_features", self.pooling(features, boxes))
        logits, deltas = self.box_predictor(self.box_head(pooled))
        shape = (boxes.shape[0], boxes.shape[1])
        return logits.unflatten(0, shape), deltas.unflatten(0, shape)


class FasterRCNN(nn.Module):
    """The two-stage detector.

    Inputs, everywhere: ``images`` [B, H, W, 3] BGR in grey levels (uint8 or float), laid into the
    top left of the canvas, and ``image_sizes`` float32 [B, 2], the valid height and width of each.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, settings: ModelSettings, classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.backbone = build_backbone(settings)
        self.rpn = RPN(self.backbone.out_channels, settings)
        self.pooled_levels = self.backbone.pooled_levels
        strides = self.backbone.strides[: self.pooled_levels]
        self.roi_heads = RoIHeads(self.backbone.out_channels, strides, classes, settings)
        self._anchors: dict[tuple[object, ...], list[Tensor]] = {}
        self.register_buffer("mean", torch.tensor(settings.mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings.std).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, image_sizes: Tensor) -> DetectionBatch:
        """Detections of each image."""
        features = self.features(images, image_sizes)
        proposals = self.propose(features, image_sizes)
        logits, deltas = self.roi_heads(features[: self.pooled_levels], proposals.boxes)
        logits, deltas = mark("class_logits", logits), mark("box_regression", deltas)
        return select_detections(logits, deltas, proposals, image_sizes, self.settings)

    def normalise(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """Float [B, 3, H, W] in the model's channel order, normalised, and zeros outside each image."""
        pixels = images.permute(0, 3, 1, 2).float()
        if self.settings.channel_order == "rgb":
            pixels = pixels.flip(1)
        pixels = (pixels - self.mean) / self.std
        rows = torch.arange(pixels.shape[2], device=pixels.device)
        columns = torch.arange(pixels.shape[3], device=pixels.device)
        inside = (rows[None, :, None] < image_sizes[:, 0, None, None]) & (
            columns[None, None, :] < image_sizes[:, 1, None, None]
        )
        return torch.where(inside[:, None], pixels, torch.zeros_like(pixels))

    def features(self, images: Tensor, image_sizes: Tensor) -> list[Tensor]:
        """Feature maps [B, C, H / stride, W / stride], finest first."""
        pixels = mark("pixels", self.normalise(images, image_sizes))
        return self.backbone(pixels.contiguous(memory_format=torch.channels_last))

    def anchors(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Anchors [A_level, 4] of every level in canvas pixels, made once for each device."""
        grids = [(f.shape[2], f.shape[3]) for f in features]
        key = (features[0].device, *grids)
        if key not in self._anchors:
            s = self.settings
            # A single map may be larger than canvas / 16; of a pyramid torchvision's strides are rounded.
            true_strides = s.neck in ("single", "dc5") or s.anchor_style == "unrounded"
            strides = self.backbone.strides if true_strides else None
            levels = level_anchors(
                s.canvas, grids, s.anchor_sizes, s.aspect_ratios, style=s.anchor_style, strides=strides
            )
            self._anchors[key] = [anchors.to(features[0].device) for anchors in levels]
        return self._anchors[key]

    def propose(self, features: Sequence[Tensor], image_sizes: Tensor) -> Proposals:
        """The RPN alone: proposals from feature maps."""
        objectness, deltas = self.rpn.head(features)
        objectness = [mark(f"objectness.{level}", each) for level, each in enumerate(objectness)]
        deltas = [mark(f"bbox_deltas.{level}", each) for level, each in enumerate(deltas)]
        s = self.settings
        proposals = select_proposals(
            objectness,
            deltas,
            self.anchors(features),
            image_sizes,
            s,
            pre_nms=s.rpn_pre_nms,
            post_nms=s.rpn_post_nms,
        )
        return Proposals(mark("proposals", proposals.boxes), mark("proposal_scores", proposals.scores))

    def losses(
        self, images: Tensor, image_sizes: Tensor, targets: Targets, settings: TrainingSettings
    ) -> dict[str, Tensor]:
        """The four losses of approximate joint training; gradients do not flow through proposal boxes."""
        features = self.features(images, image_sizes)
        objectness, deltas = self.rpn.head(features)
        proposals = self.training_proposals(features, objectness, deltas, image_sizes, settings)
        detection = self.detection_losses(features, proposals, targets, settings)
        rpn = self.rpn_losses(features, objectness, deltas, image_sizes, targets, settings)
        return {**rpn, **detection}

    def training_proposals(
        self,
        features: Sequence[Tensor],
        objectness: Sequence[Tensor],
        deltas: Sequence[Tensor],
        image_sizes: Tensor,
        settings: TrainingSettings,
    ) -> Proposals:
        """The proposals of a training step, without gradients, from the RPN's outputs on ``features``."""
        with torch.no_grad():
            return select_proposals(
                objectness,
                deltas,
                self.anchors(features),
                image_sizes,
                self.settings,
                pre_nms=settings.rpn_pre_nms,
                post_nms=settings.rpn_post_nms,
            )

    def rpn_losses(
        self,
        features: Sequence[Tensor],
        objectness: Sequence[Tensor],
        deltas: Sequence[Tensor],
        image_sizes: Tensor,
        targets: Targets,
        settings: TrainingSettings,
    ) -> dict[str, Tensor]:
        """The RPN's two losses, from its outputs on ``features``."""
        anchors = torch.cat(self.anchors(features))
        return rpn_training_losses(
            torch.cat(tuple(objectness), dim=1),
            torch.cat(tuple(deltas), dim=1),
            anchors,
            targets,
            settings,
            image_sizes=image_sizes,
            anchors_per_place=self.settings.anchors_per_place,
        )

    def detection_losses(
        self, features: Sequence[Tensor], proposals: Proposals, targets: Targets, settings: TrainingSettings
    ) -> dict[str, Tensor]:
        """Fast R-CNN's two losses on proposals from anywhere: this RPN, or a file of stored ones."""
        samples = sample_rois(proposals, targets, self.settings, settings)
        logits, box_deltas = self.roi_heads(features[: self.pooled_levels], samples.boxes)
        return roi_training_losses(logits, box_deltas, samples, settings)


# What a model delivers for each task, by the output names of the contract.


OUTPUTS = {
    "detections": ("boxes", "scores", "labels", "num_detections"),
    "proposals": ("boxes", "scores", "num_proposals"),
}

# In ``Contract.source`` of a model without a trained RPN: it detects on stored proposals alone.
STORED_PROPOSALS = "stored_proposals"


def check_own_proposals(path: Path, contract: Contract, task: str = "detections") -> None:
    """Raise ``ArtefactError`` where the model in ``path`` cannot do ``task`` by itself."""
    if contract.source.get(STORED_PROPOSALS):
        raise ArtefactError(
            f"{path}: was trained on stored proposals and has no trained RPN; "
            "evaluate it with --proposals FILE, or train with --schedule joint or alternating"
        )
    if contract.task == "proposals" and task == "detections":
        raise ArtefactError(
            f"{path}: holds a trained RPN alone, whose task is proposals; expected a detector, "
            "as --schedule joint or alternating trains it"
        )


def run_task(model: FasterRCNN, task: str, images: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
    """The outputs of ``task``: ``detections`` of the whole model, or ``proposals`` of the RPN alone.

    Boxes float32 [B, D, 4] on the canvas, scores float32 [B, D], labels int32 [B, D] (detections
    only), and the number of filled slots int32 [B]; unused slots are zero.
    """
    if task == "detections":
        found = model(images, image_sizes)
        values: tuple[Tensor, ...] = (found.boxes, found.scores, found.labels, found.num_detections)
    else:
        proposals = model.propose(model.features(images, image_sizes), image_sizes)
        count = proposals.present.sum(dim=1).to(torch.int32)
        values = (proposals.boxes, proposals.scores.clamp(min=0.0), count)
    return dict(zip(OUTPUTS[task], values, strict=True))
