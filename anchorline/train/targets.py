"""Ground truth of a batch in fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The label of an ignore region among the objects of an image, on its way through the transforms.
IGNORE_LABEL = -2

# The label of an image's first stored proposal on that way; that of the one at index i is lower by i.
PROPOSAL_LABEL = -3


@dataclass(frozen=True)
class Targets:
    """Boxes of B images padded to M slots, and regions to ignore padded to I slots.

    ``boxes`` float32 [B, M, 4] xyxy on the canvas; ``labels`` int64 [B, M], 0 for the first class
    name and -1 in empty slots, whose boxes are zero. M is at least 1. ``ignored`` float32 [B, I, 4]
    are regions whose content is neither object nor background, such as crowds; empty slots are zero
    and so cover nothing, and I is 0 where no image has such a region. ``seeds``, one for each image,
    make the random draws of the losses depend on the image alone, not on what else is in its batch.
    """

    boxes: Tensor
    labels: Tensor
    ignored: Tensor
    seeds: tuple[int, ...] | None = None

    @property
    def present(self) -> Tensor:
        """Bool [B, M]: which slots hold an object."""
        return self.labels >= 0

    def boxes_at(self, index: Tensor) -> Tensor:
        """The boxes [B, S, 4] in slots ``index`` int64 [B, S]."""
        return self.boxes.gather(1, index[..., None].expand(-1, -1, 4))

    def noise(self, stream: int, count: int) -> Tensor | None:
        """Uniform draws [B, count] from each image's seed and ``stream``; None without seeds."""
        if self.seeds is None:
            return None
        generators = [torch.Generator().manual_seed(seed ^ stream) for seed in self.seeds]
        return torch.stack([torch.rand(count, generator=each) for each in generators]).to(self.boxes.device)

    def to(self, device: torch.device) -> Targets:
        return Targets(self.boxes.to(device), self.labels.to(device), self.ignored.to(device), self.seeds)

    @classmethod
    def pad(
        cls,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        seeds: tuple[int, ...] | None = None,
        ignored: Sequence[Tensor] | None = None,
    ) -> Targets:
        """Join images: ``boxes`` a list of [N_i, 4], ``labels`` of [N_i], ``ignored`` of [I_i, 4]."""
        padded = _padded(boxes, least=1)
        padded_labels = torch.full(padded.shape[:2], -1, dtype=torch.int64)
        for i, image_labels in enumerate(labels):
            padded_labels[i, : len(image_labels)] = image_labels
        regions = [each[:0] for each in boxes] if ignored is None else ignored
        return cls(padded, padded_labels, _padded(regions, least=0), seeds)


def _padded(boxes: Sequence[Tensor], least: int) -> Tensor:
    """Float32 [B, M, 4] of B times [N_i, 4], with zeros in empty slots; M is ``least`` or more."""
    padded = torch.zeros(len(boxes), max([least, *(len(each) for each in boxes)]), 4)
    for i, image_boxes in enumerate(boxes):
        padded[i, : len(image_boxes)] = image_boxes
    return padded
