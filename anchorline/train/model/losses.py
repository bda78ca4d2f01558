"""The losses, apart from the model: equation (1) of the paper, in torchvision's normalisation or its own.

They take S sampled slots per image, of which those ``drawn`` (bool [B, S]) are real. "The batch" is that of
all processes that train together (``distributed.mean_count``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anchorline.train.loop.distributed import mean_count


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

    ``objectness`` [B, S] logits (the log loss over two classes whose scores differ by z is the binary one
    of z), ``deltas`` and ``targets`` [B, S, 4], ``positive`` bool [B, S]; ``beta`` is where smooth L1 turns
    linear. Both are divided by the number of drawn anchors in the batch; or, where given, by the ``divisors``
    (N_cls, N_reg) of equation (1) and the number of images.
    """
    per_anchor = F.binary_cross_entropy_with_logits(
        _only(drawn, objectness), positive.to(objectness.dtype), reduction="none"
    )
    box_loss = _box_loss(positive & drawn, deltas, targets, beta)
    count, (by_class, by_place) = drawn.sum(), divisors or (1, 1)
    if divisors is not None:
        count = torch.full_like(count, drawn.shape[0])
    count = mean_count(count)
    return _only(drawn, per_anchor).sum() / (count * by_class), box_loss / (count * by_place)


def roi_losses(
    class_logits: Tensor, deltas: Tensor, labels: Tensor, drawn: Tensor, targets: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Classification and box loss of the sampled proposals, two scalars.

    ``class_logits`` [B, S, 1 + classes], background first; ``deltas`` [B, S, 1 + classes, 4], of which the
    true class's row counts; ``labels`` int64 [B, S], 0 for background; ``targets`` [B, S, 4]. Both are
    divided by the number of drawn proposals in the batch.
    """
    count = mean_count(drawn.sum())
    logits = _only(drawn, class_logits)
    per_proposal = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    own = deltas.gather(2, labels[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
    box_loss = _box_loss(drawn & (labels > 0), own, targets, beta)
    return _only(drawn, per_proposal).sum() / count, box_loss / count


def _box_loss(positive: Tensor, deltas: Tensor, targets: Tensor, beta: float) -> Tensor:
    prediction, target = _only(positive, deltas), _only(positive, targets)
    return F.smooth_l1_loss(prediction, target, beta=beta, reduction="none").sum()


def _only(mask: Tensor, values: Tensor) -> Tensor:
    """``values`` [B, S, ...] in the slots of ``mask`` [B, S], 0 elsewhere.

    Applied to the inputs of a loss: a slot that does not count may hold inf or NaN, and masking the
    loss alone would still leave NaN in its gradient (0 * NaN).
    """
    mask = mask.reshape(mask.shape + (1,) * (values.dim() - mask.dim()))
    return torch.where(mask, values, 0.0)
