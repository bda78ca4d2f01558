"""Balanced sampling of positives and negatives (Faster R-CNN, section 3.1.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    positive: Tensor, negative: Tensor, size: int, positive_fraction: float, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw up to ``size`` candidates per image at random, without replacement.

    ``positive`` and ``negative`` are bool [B, N]. At most ``int(size * positive_fraction)`` are
    positive; negatives fill the rest as far as there are any. Returns ``indices`` int64 [B, S] and
    ``drawn`` bool [B, S] with S = min(size, N): slots where ``drawn`` is false hold no sample.
    Positives come first. ``noise`` [B, N] from 0 to below 1 decides the draw; without it PyTorch's
    global generator does.
    """
    if noise is None:
        noise = torch.rand(positive.shape, device=positive.device)
    most_positive = int(size * positive_fraction)
    # A negative priority is never drawn; positives (1..2) go before negatives (0..1).
    priority = torch.where(negative, noise, torch.full_like(noise, -1.0))
    chosen_positive = _best(torch.where(positive, noise, torch.full_like(noise, -1.0)), most_positive)
    priority = torch.where(chosen_positive, noise + 1.0, priority)
    values, indices = priority.topk(min(size, priority.shape[1]), dim=1)
    return indices, values >= 0


def _best(priority: Tensor, count: int) -> Tensor:
    """Bool [B, N]: the ``count`` highest entries of ``priority`` [B, N] that are not negative."""
    values, indices = priority.topk(min(count, priority.shape[1]), dim=1)
    chosen = torch.zeros_like(priority, dtype=torch.bool)
    return chosen.scatter(1, indices, values >= 0)
