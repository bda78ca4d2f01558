"""Ground truth of a batch in fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Boxes of B images padded to M slots.

    ``boxes`` float32 [B, M, 4] xyxy on the canvas; ``labels`` int64 [B, M], 0 for the first class
    name and -1 in empty slots, whose boxes are zero. M is at least 1. ``seeds``, one for each image,
    make the random draws of the losses depend on the image alone, not on what else is in its batch.
    """

    boxes: Tensor
    labels: Tensor
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
        return Targets(self.boxes.to(device), self.labels.to(device), self.seeds)

    @classmethod
    def pad(
        cls, boxes: Sequence[Tensor], labels: Sequence[Tensor], seeds: tuple[int, ...] | None = None
    ) -> Targets:
        """Join images: ``boxes`` a list of [N_i, 4], ``labels`` a list of [N_i]."""
        slots = max([1, *(len(b) for b in boxes)])
        padded = torch.zeros(len(boxes), slots, 4)
        padded_labels = torch.full((len(boxes), slots), -1, dtype=torch.int64)
        for i, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
            padded[i, : len(image_boxes)] = image_boxes
            padded_labels[i, : len(image_labels)] = image_labels
        return cls(padded, padded_labels, seeds)
