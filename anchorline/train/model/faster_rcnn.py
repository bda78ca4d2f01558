"""Faster R-CNN on one page: canvas of pixels -> features -> proposals -> detections.

Every shape is fixed by the settings and the batch, never by the data, so that the code that is
trained is the code that is exported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anchorline.train.model.assign import Targets
from anchorline.train.model.backbones import build_backbone
from anchorline.train.model.ops import mark
from anchorline.train.model.roi_heads import DetectionBatch, RoIHeads
from anchorline.train.model.rpn import RPN
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import TrainingSettings


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
        channels, strides = self.backbone.out_channels, self.backbone.strides
        self.rpn = RPN(channels, strides, settings)
        self.roi_heads = RoIHeads(channels, strides[: self.backbone.pooled_levels], classes, settings)
        self.register_buffer("mean", torch.tensor(settings.mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(settings.std).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, image_sizes: Tensor) -> DetectionBatch:
        """Detections of each image."""
        features = self.features(images, image_sizes)
        return self.roi_heads(features, self.rpn(features, image_sizes), image_sizes)

    def losses(
        self, images: Tensor, image_sizes: Tensor, targets: Targets, settings: TrainingSettings
    ) -> dict[str, Tensor]:
        """The four losses of approximate joint training; gradients do not flow through proposal boxes."""
        features = self.features(images, image_sizes)
        scored = self.rpn.score_to_train(features, settings)
        with torch.no_grad():
            proposals = self.rpn.propose(scored, image_sizes, settings.rpn_pre_nms, settings.rpn_post_nms)
        detection = self.roi_heads.losses(features, proposals, targets, settings)
        return {**self.rpn.losses(scored, image_sizes, targets, settings, features), **detection}

    def features(self, images: Tensor, image_sizes: Tensor) -> list[Tensor]:
        """Feature maps [B, C, H / stride, W / stride], finest first."""
        pixels = mark("pixels", self.normalise(images, image_sizes))
        return self.backbone(pixels.contiguous(memory_format=torch.channels_last))

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
        return torch.where(inside[:, None], pixels, 0.0)


# What a model delivers for each task, by the output names of the contract.
OUTPUTS = {
    "detections": ("boxes", "scores", "labels", "num_detections"),
    "proposals": ("boxes", "scores", "num_proposals"),
}


def run_task(model: FasterRCNN, task: str, images: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
    """The outputs of ``task``: ``detections`` of the whole model, or ``proposals`` of the RPN alone.

    Boxes float32 [B, D, 4] on the canvas, scores float32 [B, D], labels int32 [B, D] (detections
    only), and the number of filled slots int32 [B]; unused slots are zero.
    """
    if task == "detections":
        return vars(model(images, image_sizes))
    proposals = model.rpn(model.features(images, image_sizes), image_sizes)
    count = proposals.present.sum(dim=1).to(torch.int32)
    return {"boxes": proposals.boxes, "scores": proposals.scores.clamp(min=0.0), "num_proposals": count}
