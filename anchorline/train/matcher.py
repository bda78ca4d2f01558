"""Which ground-truth box an anchor or a proposal stands for (Faster R-CNN, section 3.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor

BACKGROUND = -1
IGNORED = -2

# Of a candidate's own area, this share has to lie in one ignore region for it not to count as background.
IGNORED_SHARE = 0.5


def match(
    iou: Tensor,
    present: Tensor,
    *,
    positive_iou: float,
    negative_iou: float,
    keep_best_of_each_box: bool,
    background_iou: float = 0.0,
) -> Tensor:
    """Assign a ground-truth index, ``BACKGROUND`` or ``IGNORED`` to each candidate: int64 [B, N].

    ``iou`` [B, N, M] holds the overlaps of N candidates with M ground-truth slots of which
    ``present`` [B, M] are real. A candidate is positive from ``positive_iou``, background below
    ``negative_iou``, ignored between, and ignored below ``background_iou``. With
    ``keep_best_of_each_box`` the candidates that overlap a box the most are positive however small their
    IoU, and keep the box they overlap best (as torchvision's ``Matcher`` with
    ``allow_low_quality_matches``). Unlike there, a box that no candidate touches claims none: its best IoU
    of 0 would otherwise make every far candidate positive.
    """
    iou = torch.where(present[:, None, :], iou, torch.full_like(iou, -1.0))
    if iou.shape[2] == 0:
        return torch.full(iou.shape[:2], BACKGROUND, dtype=torch.int64, device=iou.device)
    best_iou, best_box = iou.max(dim=2)
    matches = torch.where(best_iou >= positive_iou, best_box, torch.full_like(best_box, IGNORED))
    matches = torch.where(best_iou < negative_iou, torch.full_like(matches, BACKGROUND), matches)
    if background_iou > 0:
        matches = torch.where(best_iou < background_iou, torch.full_like(matches, IGNORED), matches)
    if keep_best_of_each_box:
        best_of_box = iou.amax(dim=1, keepdim=True)
        is_best = ((iou == best_of_box) & (best_of_box > 0)).any(dim=2)
        matches = torch.where(is_best, best_box, matches)
    return matches


def ignore_covered(matches: Tensor, coverage: Tensor) -> Tensor:
    """``matches`` [B, N] with background that an ignore region covers turned into ``IGNORED``.

    ``coverage`` [B, N, I] holds the shares of each candidate's own area in I ignore regions (IoA, as
    pycocotools measures overlaps with crowds); from ``IGNORED_SHARE`` in one of them on, a candidate is
    covered. What is positive for an object stays positive.
    """
    covered = (coverage >= IGNORED_SHARE).any(dim=2)
    return torch.where((matches == BACKGROUND) & covered, torch.full_like(matches, IGNORED), matches)
