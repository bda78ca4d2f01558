"""Proposals of an RPN with parts of it switched off (table 2), and the dense windows of table 10."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anchorline.data.dataset import Dataset
from anchorline.data.proposals import ImageProposals
from anchorline.runtime.canvas import Placement
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.train.checkpoint import load_checkpoint
from anchorline.train.data.dataset import Batch, seed_of
from anchorline.train.loop.trainer import Trainer
from anchorline.train.model import ops
from anchorline.train.model.boxes import at_least, clip_to_images
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.rpn import RPN, AnchorScores, Proposals
from anchorline.train.predict import TorchDetector, load_rpn


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
    rpn: RPN,
    scored: AnchorScores,
    image_sizes: Tensor,
    ablation: Ablation,
    count: int,
    noise: Tensor | None = None,
) -> Proposals:
    """At most ``count`` proposals an image from the RPN head's outputs, all levels' (section 4.1, table 2).

    ``noise`` [B, A] from 0 to 1 decides the draw without ``cls``: the anchors with the highest values are
    drawn, after what is too small has gone.
    """
    if not ablation.reg:
        scored = scored._replace(deltas=[torch.zeros_like(each) for each in scored.deltas])
    if ablation.nms:
        return rpn.propose(scored, image_sizes, post_nms=count)
    if not ablation.cls and noise is None:
        raise ValueError("without cls the proposals are drawn by noise [B, A]; got None")
    scores = torch.cat([*scored.objectness], dim=1).sigmoid() if ablation.cls else noise
    assert scores is not None
    decoded = rpn.coder.decode(
        torch.cat([*scored.deltas], dim=1), torch.cat([anchors[:] for anchors in scored.anchors])
    )
    return _best(rpn, decoded, scores, image_sizes, count)


def all_anchors(rpn: RPN, features: Sequence[Tensor]) -> Tensor:
    """The anchors [A, 4] of every place of ``features``."""
    return torch.cat([anchors[:] for anchors in rpn.score(features).anchors])


def dense_windows(rpn: RPN, anchors: Tensor, image_sizes: Tensor) -> Proposals:
    """All anchors [A, 4], clipped to each image, as proposals [B, A]: a dense sliding window (table 10).

    What lies outside the image has the score of an unused slot.
    """
    boxes = clip_to_images(anchors.expand(len(image_sizes), -1, -1), image_sizes, rpn.coder.last_pixel)
    there = at_least(boxes, max(rpn.min_side, 1e-3))
    scores = torch.where(there, 1.0, torch.tensor(ops.SUPPRESSED, device=boxes.device))
    return Proposals(torch.where(there[..., None], boxes, torch.zeros_like(boxes)), scores)


class DenseTrainer(Trainer):
    """Trains the one-stage detector."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Fast R-CNN's two losses with dense windows as the proposals."""
        model = self.model
        features = model.features(batch.images, batch.image_sizes)
        windows = dense_windows(model.rpn, all_anchors(model.rpn, features), batch.image_sizes)
        return model.roi_heads.losses(features, windows, batch.targets, self.settings.training)


class DenseDetector(TorchDetector):
    """The one-stage detector: every dense window of a frame is classified and regressed by class."""

    @classmethod
    def open(cls, path: Path, device: str) -> DenseDetector:
        return cls(*load_checkpoint(path), device)

    def infer(self, images: Tensor, sizes: Tensor, placements: Sequence[Placement]) -> dict[str, Tensor]:
        """The outputs of every window."""
        features = self.model.features(images, sizes)
        windows = dense_windows(self.model.rpn, all_anchors(self.model.rpn, features), sizes)
        return vars(self.model.roi_heads(features, windows, sizes))


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

    def infer(self, images: Tensor, sizes: Tensor, placements: Sequence[Placement]) -> dict[str, Tensor]:
        """The proposals of the next frames."""
        rpn, noise = self.model.rpn, None
        scored = rpn.score(self.model.features(images, sizes))
        if not self.ablation.cls:
            noise = self._noise(len(images), sum(len(level) for level in scored.anchors))
        proposals = ablated_proposals(rpn, scored, sizes, self.ablation, self.count, noise)
        values = (proposals.boxes, proposals.scores.clamp(min=0.0), proposals.present.sum(dim=1))
        return dict(zip(self.contract.outputs, values, strict=True))

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


def _best(rpn: RPN, boxes: Tensor, scores: Tensor, image_sizes: Tensor, count: int) -> Proposals:
    """The ``count`` best of ``boxes`` [B, A, 4] after clipping, without NMS."""
    boxes = clip_to_images(boxes, image_sizes, rpn.coder.last_pixel)
    there = at_least(boxes, rpn.min_side)
    scores = torch.where(there, scores, torch.full_like(scores, ops.SUPPRESSED))
    scores, index = scores.topk(min(count, scores.shape[1]), dim=1)
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return Proposals(
        torch.where((scores > ops.SUPPRESSED)[..., None], boxes, torch.zeros_like(boxes)), scores
    )
