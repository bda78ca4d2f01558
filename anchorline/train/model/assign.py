"""What anchors and proposals are trained on: ground truth in fixed shapes, matching, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from anchorline.train.model.boxes import BoxCoder, pairwise_ioa, pairwise_iou, rows_at

# What a candidate without an object is.
BACKGROUND = -1
IGNORED = -2

# Of a candidate's own area, this share has to lie in one ignore region for it not to count as background.
IGNORED_SHARE = 0.5


@dataclass(frozen=True)
class Targets:
    """The ground truth of B images in M slots, at least one, and regions to ignore in I slots, maybe none.

    ``boxes`` float32 [B, M, 4] xyxy on the canvas; ``labels`` int64 [B, M], 0 for the first class name and -1
    in empty slots. ``ignored`` float32 [B, I, 4] are regions whose content is neither object nor background,
    such as crowds. Boxes in empty slots are zero. ``seeds``, one for each image, make the random draws of the
    losses depend on the image alone, not on what else is in its batch.
    """

    boxes: Tensor
    labels: Tensor
    ignored: Tensor
    seeds: tuple[int, ...] | None = None

    @property
    def present(self) -> Tensor:
        """Bool [B, M]: which slots hold an object."""
        return self.labels >= 0

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
        # An image more, which has one empty slot, so that there is a slot where no image has an object.
        return cls(
            pad_sequence([*boxes, torch.zeros(1, 4)], batch_first=True)[:-1],
            pad_sequence([*labels, torch.tensor([-1])], batch_first=True, padding_value=-1)[:-1],
            pad_sequence([*(ignored or [each[:0] for each in boxes])], batch_first=True),
            seeds,
        )


@dataclass(frozen=True)
class Matcher:
    """Assigns a ground-truth index, ``BACKGROUND`` or ``IGNORED`` to each candidate.

    A candidate is positive from ``positive_iou``, background below ``negative_iou``, ignored between, and
    ignored below ``background_iou``. With ``keep_best_of_each_box`` the candidates that overlap a box the
    most are positive however small their IoU, and keep the box they overlap best (as torchvision's
    ``Matcher`` with ``allow_low_quality_matches``). Unlike there, a box that no candidate touches claims
    none: its best IoU of 0 would otherwise make every far candidate positive.
    """

    positive_iou: float
    negative_iou: float
    keep_best_of_each_box: bool = False
    background_iou: float = 0.0

    def __call__(self, boxes: Tensor, targets: Targets, taking_part: Tensor | None = None) -> Tensor:
        """What each of ``boxes`` [B, N, 4] (or [1, N, 4]) stands for, int64 [B, N].

        Boxes that an ignore region covers are no background; those not ``taking_part`` (bool [B, N]) are
        ignored, and are not the best of any object either.
        """
        iou = pairwise_iou(boxes, targets.boxes)
        if taking_part is not None:
            iou = torch.where(taking_part[..., None], iou, -1.0)
        matches = self.match(iou, targets.present)
        if taking_part is not None:
            matches = torch.where(taking_part, matches, IGNORED)
        return ignore_covered(matches, pairwise_ioa(boxes, targets.ignored))

    def match(self, iou: Tensor, present: Tensor) -> Tensor:
        """The same from overlaps ``iou`` [B, N, M] with M slots of which ``present`` [B, M] are real."""
        iou = torch.where(present[:, None, :], iou, -1.0)
        if iou.shape[2] == 0:
            return torch.full(iou.shape[:2], BACKGROUND, dtype=torch.int64, device=iou.device)
        best_iou, best_box = iou.max(dim=2)
        matches = torch.where(best_iou >= self.positive_iou, best_box, IGNORED)
        matches = torch.where(best_iou < self.negative_iou, BACKGROUND, matches)
        if self.background_iou > 0:
            matches = torch.where(best_iou < self.background_iou, IGNORED, matches)
        if self.keep_best_of_each_box:
            best_of_box = iou.amax(dim=1, keepdim=True)
            is_best = ((iou == best_of_box) & (best_of_box > 0)).any(dim=2)
            matches = torch.where(is_best, best_box, matches)
        return matches


def ignore_covered(matches: Tensor, coverage: Tensor) -> Tensor:
    """``matches`` [B, N] with background that an ignore region covers turned into ``IGNORED``.

    ``coverage`` [B, N, I] holds the shares of each candidate's own area in I ignore regions; from
    ``IGNORED_SHARE`` in one of them on it is covered. What is positive for an object stays positive.
    """
    covered = (coverage >= IGNORED_SHARE).any(dim=2)
    return torch.where((matches == BACKGROUND) & covered, IGNORED, matches)


def sample(
    positive: Tensor, negative: Tensor, size: int, positive_fraction: float, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw up to ``size`` candidates per image at random, without replacement (section 3.1.3).

    ``positive`` and ``negative`` are bool [B, N]. At most ``int(size * positive_fraction)`` are positive;
    negatives fill the rest as far as there are any. Returns ``indices`` int64 [B, S], positives first, and
    ``drawn`` bool [B, S], which slots hold a sample, with S = min(size, N). ``noise`` [B, N] from 0 to below
    1 decides the draw; without it PyTorch's global generator does.
    """
    if noise is None:
        noise = torch.rand(positive.shape, device=positive.device)
    most_positive = min(int(size * positive_fraction), positive.shape[1])
    values, indices = torch.where(positive, noise, -1.0).topk(most_positive, dim=1)
    chosen = torch.zeros_like(positive).scatter(1, indices, values >= 0)
    # A negative priority is never drawn; positives (1..2) go before negatives (0..1).
    priority = torch.where(chosen, noise + 1.0, torch.where(negative, noise, -1.0))
    values, indices = priority.topk(min(size, priority.shape[1]), dim=1)
    return indices, values >= 0


@dataclass(frozen=True)
class Samples:
    """Candidates drawn for a loss, S slots per image, objects first.

    ``index`` int64 [B, S] among the candidates, and their ``boxes`` [B, S, 4]; ``labels`` int64 [B, S], 0 for
    background; ``deltas`` [B, S, 4], the regression targets (zero for background); ``drawn`` bool [B, S],
    which slots are real.
    """

    index: Tensor
    boxes: Tensor
    labels: Tensor
    deltas: Tensor
    drawn: Tensor


@dataclass(frozen=True)
class Sampler:
    """Matches candidates and draws up to ``size`` of each image.

    The images' seeds decide where they have some, with another ``stream`` for each loss.
    """

    matcher: Matcher
    size: int
    positive_fraction: float
    stream: int

    @torch.no_grad()
    def __call__(
        self, boxes: Tensor, targets: Targets, coder: BoxCoder, taking_part: Tensor | None = None
    ) -> Samples:
        """Samples of ``boxes`` [B, N, 4] (or [1, N, 4]), arguments as of the matcher."""
        matches = self.matcher(boxes, targets, taking_part)
        positive, negative = matches >= 0, matches == BACKGROUND
        noise = targets.noise(self.stream, matches.shape[1])
        index, drawn = sample(positive, negative, self.size, self.positive_fraction, noise)
        boxes = rows_at(boxes.expand(len(matches), -1, -1), index)
        positive, slot = positive.gather(1, index) & drawn, matches.gather(1, index).clamp(min=0)
        labels = torch.where(positive, targets.labels.gather(1, slot) + 1, 0)
        deltas = coder.encode(rows_at(targets.boxes, slot), boxes)
        return Samples(index, boxes, labels, torch.where(positive[..., None], deltas, 0.0), drawn)
