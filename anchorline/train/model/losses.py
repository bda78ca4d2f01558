"""The losses, apart from the model: equation (1) of the paper, in torchvision's normalisation or its own.

All take a fixed number of sampled slots per image and a mask that says which slots are real, so
that no shape depends on the data. "The batch" is that of all processes that train together
(``distributed.mean_count``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anchorline.train.loop.distributed import mean_count


def smooth_l1(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Elementwise smooth L1: quadratic below ``beta``, linear above, shape of the inputs."""
    return F.smooth_l1_loss(prediction, target, beta=beta, reduction="none")


def rpn_losses(
    objectness: Tensor,
    deltas: Tensor,
    positive: Tensor,
    drawn: Tensor,
    targets: Tensor,
    beta: float,
    divisors: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Objectness and box loss of the sampled anchors, two scalars.

    ``objectness`` [B, S] logits, ``deltas`` and ``targets`` [B, S, 4], ``positive`` and ``drawn``
    bool [B, S]. Both are divided by the number of drawn anchors in the batch; or, where given, by the
    ``divisors`` (N_cls, N_reg) of equation (1) and the number of images. The log loss over two classes
    whose scores differ by z is the binary one of z, so both kinds of objectness come as logits.
    """
    count = drawn.sum()
    per_anchor = F.binary_cross_entropy_with_logits(
        _only(drawn, objectness), positive.to(objectness.dtype), reduction="none"
    )
    positive = positive & drawn
    per_box = smooth_l1(_only(positive, deltas), _only(positive, targets), beta)
    by_class, by_place = divisors if divisors is not None else (1, 1)
    if divisors is not None:
        count = drawn.new_full((), drawn.shape[0], dtype=torch.int64)
    count = mean_count(count)
    return _only(drawn, per_anchor).sum() / (count * by_class), per_box.sum() / (count * by_place)


def roi_losses(
    class_logits: Tensor, deltas: Tensor, labels: Tensor, drawn: Tensor, targets: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Classification and box loss of the sampled proposals, two scalars.

    ``class_logits`` [B, S, 1 + classes], background first; ``deltas`` [B, S, 1 + classes, 4], of
    which the true class's row counts; ``labels`` int64 [B, S], 0 for background; ``drawn`` bool
    [B, S]; ``targets`` [B, S, 4]. Both are divided by the number of drawn proposals in the batch.
    """
    count = mean_count(drawn.sum())
    logits = _only(drawn, class_logits)
    per_proposal = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    own = deltas.gather(2, labels[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
    positive = drawn & (labels > 0)
    per_box = smooth_l1(_only(positive, own), _only(positive, targets), beta)
    return _only(drawn, per_proposal).sum() / count, per_box.sum() / count


def _only(mask: Tensor, values: Tensor) -> Tensor:
    """``values`` [B, S, ...] in the slots of ``mask`` [B, S], 0 elsewhere.

    Applied to the inputs of a loss: a slot that does not count may hold inf or NaN, and masking the
    loss alone would still leave NaN in its gradient (0 * NaN).
    """
    mask = mask.reshape(mask.shape + (1,) * (values.dim() - mask.dim()))
    return torch.where(mask, values, torch.zeros_like(values))
