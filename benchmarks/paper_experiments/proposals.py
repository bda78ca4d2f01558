"""Proposals of an RPN with parts of it switched off (table 2), and the dense windows of table 10."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorline.data.dataset import Dataset
from anchorline.data.proposals import ImageProposals
from anchorline.runtime.canvas import to_detections
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.train.checkpoint import load_checkpoint
from anchorline.train.data.dataset import Batch, seed_of
from anchorline.train.loop.trainer import Trainer
from anchorline.train.model import ops
from anchorline.train.model.boxes import at_least, clip_to_images, coder_of
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.roi_heads import DetectionBatch, select_detections
from anchorline.train.model.rpn import Proposals, select_proposals
from anchorline.train.model.settings import ModelSettings
from anchorline.train.predict import TorchDetector
from anchorline.train.proposing import load_rpn


@dataclass(frozen=True)
class Ablation:
    """Which parts of the RPN take part: NMS, the scores (``cls``), the regression (``reg``).

    Without scores there is neither ranking nor NMS: proposals are drawn at random. Without regression they
    are the anchors themselves.
    """

    name: str
    nms: bool = True
    cls: bool = True
    reg: bool = True


ABLATIONS = (
    Ablation("RPN"),
    Ablation("no NMS", nms=False),
    Ablation("no cls", nms=False, cls=False),
    Ablation("no reg", reg=False),
)


def ablated_proposals(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    image_sizes: Tensor,
    settings: ModelSettings,
    ablation: Ablation,
    count: int,
    noise: Tensor | None = None,
) -> Proposals:
    """At most ``count`` proposals an image from the RPN head's outputs, all levels' (section 4.1, table 2).

    Shapes as for ``select_proposals``. ``noise`` [B, A] from 0 to 1 decides the draw without ``cls``: the
    anchors with the highest values are drawn, after what is too small has gone.
    """
    if not ablation.reg:
        deltas = [torch.zeros_like(each) for each in deltas]
    if ablation.nms:
        return select_proposals(
            *(objectness, deltas, anchors, image_sizes, settings),
            pre_nms=settings.rpn_pre_nms,
            post_nms=count,
        )
    if not ablation.cls and noise is None:
        raise ValueError("without cls the proposals are drawn by noise [B, A]; got None")
    scores = torch.cat(tuple(objectness), dim=1).sigmoid() if ablation.cls else noise
    assert scores is not None
    decoded = coder_of(settings).decode(torch.cat(tuple(deltas), dim=1), torch.cat(tuple(anchors)))
    return _best(decoded, scores, image_sizes, settings, count)


def dense_windows(anchors: Tensor, image_sizes: Tensor, settings: ModelSettings) -> Proposals:
    """All anchors [A, 4], clipped to each image, as proposals [B, A]: a dense sliding window (table 10).

    What lies outside the image has the score of an unused slot.
    """
    boxes = clip_to_images(
        anchors.expand(len(image_sizes), -1, -1), image_sizes, settings.box_edges == "inclusive"
    )
    there = at_least(boxes, max(settings.rpn_min_side * settings.frame_scale, 1e-3))
    scores = torch.where(there, 1.0, torch.tensor(ops.SUPPRESSED, device=boxes.device))
    return Proposals(torch.where(there[..., None], boxes, torch.zeros_like(boxes)), scores)


class DenseTrainer(Trainer):
    """Trains the one-stage detector."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Fast R-CNN's two losses with dense windows as the proposals."""
        model = self.model
        features = model.features(batch.images, batch.image_sizes)
        windows = dense_windows(torch.cat(model.anchors(features)), batch.image_sizes, model.settings)
        return model.detection_losses(features, windows, batch.targets, self.settings.training)


class DenseDetector(TorchDetector):
    """The one-stage detector: every dense window of a frame is classified and regressed by class."""

    @classmethod
    def open(cls, path: Path, device: str) -> DenseDetector:
        return cls(*load_checkpoint(path), device)

    @torch.inference_mode()
    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of several frames."""
        inputs, placements = self.prepare(frames)
        self.model.eval()
        images, sizes = (torch.from_numpy(array).to(self.device) for array in inputs.values())
        found = self._detect(images, sizes)
        values = (found.boxes, found.scores, found.labels, found.num_detections)
        outputs = {
            name: value.cpu().numpy() for name, value in zip(self.contract.outputs, values, strict=True)
        }
        return to_detections(outputs, placements, self.contract)

    def _detect(self, images: Tensor, sizes: Tensor) -> DetectionBatch:
        model = self.model
        features = model.features(images, sizes)
        windows = dense_windows(torch.cat(model.anchors(features)), sizes, model.settings)
        logits, deltas = model.roi_heads(features[: model.pooled_levels], windows.boxes)
        return select_detections(logits, deltas, windows, sizes, model.settings)


class AblatedRPN(TorchDetector):
    """An RPN with parts switched off, as a detector of the one class ``object``.

    Frames come in the order of the data set: the draw without scores depends on ``seed`` and the frame's
    number alone.
    """

    def __init__(
        self,
        model: FasterRCNN,
        contract: Contract,
        ablation: Ablation,
        count: int,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        super().__init__(model, contract, device)
        self.ablation, self.count, self.seed, self.next = ablation, count, seed, 0

    @classmethod
    def open(cls, path: Path, ablation: Ablation, count: int, seed: int, device: str) -> AblatedRPN:
        """The RPN in a ``model.safetensors``; raises ``ArtefactError``."""
        rpn = load_rpn(path, device)
        return cls(rpn.model, rpn.contract, ablation, count, seed, device)

    @torch.inference_mode()
    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Proposals of the next frames."""
        inputs, placements = self.prepare(frames)
        self.model.eval()
        images, sizes = (torch.from_numpy(array).to(self.device) for array in inputs.values())
        features = self.model.features(images, sizes)
        objectness, deltas = self.model.rpn.head(features)
        anchors, noise = self.model.anchors(features), None
        if not self.ablation.cls:
            noise = self._noise(len(frames), sum(len(level) for level in anchors))
        proposals = ablated_proposals(
            *(objectness, deltas, anchors, sizes, self.model.settings, self.ablation, self.count, noise)
        )
        values = (proposals.boxes, proposals.scores.clamp(min=0.0), proposals.present.sum(dim=1))
        outputs = {
            name: value.cpu().numpy() for name, value in zip(self.contract.outputs, values, strict=True)
        }
        return to_detections(outputs, placements, self.contract)

    def _noise(self, frames: int, anchors: int) -> Tensor:
        drawn = []
        for _ in range(frames):
            generator = torch.Generator().manual_seed(seed_of(self.seed, 0, self.next))
            drawn.append(torch.rand(anchors, generator=generator))
            self.next += 1
        return torch.stack(drawn).to(self.device)


def best_of(data: Dataset, proposals: Sequence[Detections], count: int) -> list[ImageProposals]:
    """The ``count`` best proposals of each image of ``data``, for ``StoredProposalDetector``."""
    kept = []
    for image, each in zip(data, proposals, strict=True):
        order = np.argsort(-each.scores, kind="stable")[:count]
        kept.append(ImageProposals(image.id, image.size, each.boxes[order], each.scores[order]))
    return kept


def _best(
    boxes: Tensor, scores: Tensor, image_sizes: Tensor, settings: ModelSettings, count: int
) -> Proposals:
    """The ``count`` best of ``boxes`` [B, A, 4] after clipping, without NMS."""
    boxes = clip_to_images(boxes, image_sizes, settings.box_edges == "inclusive")
    there = at_least(boxes, settings.rpn_min_side * settings.frame_scale)
    scores = torch.where(there, scores, torch.full_like(scores, ops.SUPPRESSED))
    scores, index = scores.topk(min(count, scores.shape[1]), dim=1)
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return Proposals(
        torch.where((scores > ops.SUPPRESSED)[..., None], boxes, torch.zeros_like(boxes)), scores
    )
