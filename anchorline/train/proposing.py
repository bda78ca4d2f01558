"""Proposals out of a trained RPN, and detections on stored ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from anchorline.data.proposals import ImageProposals
from anchorline.runtime.canvas import boxes_to_canvas, to_detections
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import DataError
from anchorline.train.checkpoint import load_checkpoint
from anchorline.train.model.faster_rcnn import OUTPUTS, FasterRCNN, check_own_proposals
from anchorline.train.model.ops import SUPPRESSED
from anchorline.train.model.roi_heads import select_detections
from anchorline.train.model.rpn import Proposals
from anchorline.train.predict import TorchDetector


def load_rpn(
    path: Path, device: str = "cpu", pre_nms: int | None = None, post_nms: int | None = None
) -> TorchDetector:
    """The RPN of a ``model.safetensors``, whatever its task, as a detector of the one class ``object``.

    ``pre_nms`` candidates per level and ``post_nms`` proposals an image; by default the model's own
    numbers. Raises ``ArtefactError``.
    """
    model, contract = load_checkpoint(path)
    check_own_proposals(path, contract, "proposals")
    s = model.settings
    model.settings = dataclasses.replace(
        s, rpn_pre_nms=pre_nms or s.rpn_pre_nms, rpn_post_nms=post_nms or s.rpn_post_nms
    )
    contract = dataclasses.replace(contract, task="proposals", outputs=OUTPUTS["proposals"])
    return TorchDetector(model, contract, device)


class StoredProposalDetector(TorchDetector):
    """Fast R-CNN alone: classifies stored proposals, one entry an image, of frames in the same order."""

    def __init__(
        self,
        model: FasterRCNN,
        contract: Contract,
        proposals: Sequence[ImageProposals],
        device: str = "cpu",
    ) -> None:
        super().__init__(model, contract, device)
        self.proposals, self.next = proposals, 0

    @classmethod
    def open(
        cls, path: Path, proposals: Sequence[ImageProposals], device: str = "cpu"
    ) -> StoredProposalDetector:
        """The detection head in a ``model.safetensors``, on ``proposals``; raises ``ArtefactError``."""
        return cls(*load_checkpoint(path), proposals, device)

    @torch.inference_mode()
    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of the next frames; raises ``DataError`` where they are not those of the proposals."""
        given = self.proposals[self.next : self.next + len(frames)]
        self.next += len(frames)
        for frame, each in zip(frames, given, strict=True):
            if frame.shape[:2] != each.size:
                raise DataError(
                    f"image {each.id!r} is {frame.shape[0]}x{frame.shape[1]}, its stored proposals are of "
                    f"{each.size[0]}x{each.size[1]}; expected the images of the proposals in their order"
                )
        inputs, placements = self.prepare(frames)
        was_training = self.model.training
        self.model.eval()
        images, sizes = (torch.from_numpy(array).to(self.device) for array in inputs.values())
        on_canvas = [boxes_to_canvas(each.boxes, p) for each, p in zip(given, placements, strict=True)]
        proposals = _pad(on_canvas, [each.scores for each in given], self.device)
        features = self.model.features(images, sizes)
        logits, deltas = self.model.roi_heads(features[: self.model.pooled_levels], proposals.boxes)
        found = select_detections(logits, deltas, proposals, sizes, self.model.settings)
        self.model.train(was_training)
        values = (found.boxes, found.scores, found.labels, found.num_detections)
        outputs = {
            name: value.cpu().numpy() for name, value in zip(self.contract.outputs, values, strict=True)
        }
        return to_detections(outputs, placements, self.contract)


def _pad(
    boxes: Sequence[NDArray[np.float32]], scores: Sequence[NDArray[np.float32]], device: torch.device
) -> Proposals:
    """Proposals of several images in as many slots as the fullest needs, at least one."""
    slots = max([1, *(len(each) for each in boxes)])
    joined = Proposals(torch.zeros(len(boxes), slots, 4), torch.full((len(boxes), slots), SUPPRESSED))
    for i, (image_boxes, image_scores) in enumerate(zip(boxes, scores, strict=True)):
        joined.boxes[i, : len(image_boxes)] = torch.from_numpy(image_boxes)
        joined.scores[i, : len(image_boxes)] = torch.from_numpy(image_scores)
    return Proposals(joined.boxes.to(device), joined.scores.to(device))
