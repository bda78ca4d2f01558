"""What a model delivers for each task, by the output names of the contract."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from anchorline.runtime.contract import Contract
from anchorline.runtime.errors import ArtefactError
from anchorline.train.faster_rcnn import FasterRCNN

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
