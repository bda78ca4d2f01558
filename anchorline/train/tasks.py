"""What a model delivers for each task, by the output names of the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from anchorline.train.faster_rcnn import FasterRCNN

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
        found = model(images, image_sizes)
        values: tuple[Tensor, ...] = (found.boxes, found.scores, found.labels, found.num_detections)
    else:
        proposals = model.propose(model.features(images, image_sizes), image_sizes)
        count = proposals.present.sum(dim=1).to(torch.int32)
        values = (proposals.boxes, proposals.scores.clamp(min=0.0), count)
    return dict(zip(OUTPUTS[task], values, strict=True))
