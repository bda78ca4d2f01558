"""What is tried, and what is left of it after each round: successive halving, without a clock or a model.

Every round measures what is left on twice as many images as the one before and keeps the better half, so
that most of the time goes to what may be chosen. On few images the accuracy is uncertain: a candidate goes
for what it lacks beyond ``uncertainty`` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from anchorline.runtime.io.errors import SettingsError

SCALES = (1.0, 0.85, 0.7, 0.6, 0.5)
PROPOSALS = (1000, 600, 300, 150, 100, 50)
FIRST_IMAGES = 8
FINALISTS = 4


@dataclass(frozen=True, order=True)
class Way:
    """How a file is run: the arguments of ``Detector``. ``precision`` is fp32, bf16 or int8 (a file of its
    own)."""

    provider: str
    precision: str
    threads: int

    def __str__(self) -> str:
        return f"{self.provider} {self.precision}, {self.threads} thread{'s' * (self.threads != 1)}"


@dataclass(frozen=True)
class Candidate:
    """Settings and a way to run them. ``scale`` multiplies the sides of the file's resize rule; with
    ``winograd`` the convolutions that gain by it are in that form (``export/winograd.py``)."""

    scale: float
    proposals: int
    pre_nms: int
    way: Way
    winograd: bool = False

    @property
    def key(self) -> str:
        """It in one word, for files."""
        way, form = self.way, "/winograd" * self.winograd
        counts = f"{self.scale:g}/{self.proposals}/{self.pre_nms}"
        return f"{counts}/{way.provider}/{way.precision}/{way.threads}{form}"

    def describe(self) -> str:
        """It in words."""
        form = ", in Winograd's form" * self.winograd
        counts = f"{self.proposals} proposals of {self.pre_nms} a level"
        return f"scale {self.scale:g}, {counts}, {self.way}{form}"


@dataclass(frozen=True)
class Figures:
    """Of a candidate on the first ``images``, with so many ``objects`` of each class: ``map50``, and its time
    a frame (frame to boxes) as a ``share`` of the parent's, measured frame by frame beside it, and in ``ms``.
    """

    images: int
    objects: tuple[int, ...]
    map50: float
    share: float
    ms: float

    @property
    def uncertainty(self) -> float:
        """Of ``map50``: the standard error of the mean over the classes of a share of so many objects, at its
        widest. Rare classes make most of it."""
        there = [count for count in self.objects if count]
        return 0.5 * math.sqrt(sum(1 / count for count in there)) / len(there) if there else 0.5


@dataclass(frozen=True)
class Goal:
    """The fastest that loses at most ``max_drop`` (a share of mAP50), or with ``budget_ms`` the most accurate
    that takes at most so many milliseconds a frame."""

    max_drop: float = 0.005
    budget_ms: float | None = None

    def holds(self, figures: Figures, parent: Figures) -> bool:
        """Whether the figures reach the goal, taken as they are."""
        if self.budget_ms is not None:
            return figures.ms <= self.budget_ms
        return figures.map50 >= parent.map50 - self.max_drop

    def rank(self, figures: Figures, parent: Figures, doubt: float) -> tuple[bool, float, float]:
        """A key to sort by, the best first; within ``doubt`` of the goal counts as reaching it."""
        if self.budget_ms is not None:
            late = figures.ms > self.budget_ms * 1.05
            return (late, figures.ms, -figures.map50) if late else (late, -figures.map50, figures.share)
        short = figures.map50 < parent.map50 - self.max_drop - doubt
        return (short, -figures.map50, figures.share) if short else (short, figures.share, -figures.map50)

    def describe(self) -> str:
        if self.budget_ms is not None:
            return f"the most accurate within {self.budget_ms:g} ms a frame"
        return f"the fastest that loses at most {100 * self.max_drop:g} points of mAP50"


Measure = Callable[[Candidate, int], Figures]
Round = tuple[int, dict[Candidate, Figures]]  # on how many images; what was found


def parse_budget(text: str) -> float:
    """Milliseconds of ``33ms``, ``33`` or ``0.033s``; else ``SettingsError``."""
    number, unit = text.strip().lower(), 1.0
    for suffix, factor in (("ms", 1.0), ("s", 1000.0)):
        if number.endswith(suffix):
            number, unit = number.removesuffix(suffix).strip(), factor
            break
    try:
        found = float(number) * unit
    except ValueError:
        found = math.nan
    if not 0 < found < 1e7:
        raise SettingsError(f"budget is {text!r}; expected a time for a frame, such as 33ms")
    return found


def candidates(parent: Candidate, way: Way, free: bool) -> list[Candidate]:
    """The grid below ``parent``, run by ``way``: scales where its canvas is ``free``, proposals, and before
    the NMS as many of each level as the parent or as are kept."""
    counts = [parent.proposals, *(count for count in PROPOSALS if count < parent.proposals)]
    return list(
        dict.fromkeys(
            Candidate(scale, count, pre_nms, way, parent.winograd)
            for scale in (SCALES if free else SCALES[:1])
            for count in counts
            for pre_nms in (parent.pre_nms, min(parent.pre_nms, count))
        )
    )


def halving(
    pool: Sequence[Candidate], parent: Candidate, images: int, goal: Goal, measure: Measure
) -> Iterator[Round]:
    """Round after round, the last on all ``images``; the parent takes part in each."""
    pool = [each for each in pool if each != parent]
    count = min(FIRST_IMAGES, images)
    while True:
        own = measure(parent, count)
        found = {parent: own, **{each: measure(each, count) for each in pool}}
        yield count, found
        if count == images:
            return
        pool = better_half(pool, found, own, goal)
        count = images if len(pool) <= FINALISTS else min(images, 2 * count)


def better_half(
    pool: Sequence[Candidate], found: dict[Candidate, Figures], parent: Figures, goal: Goal
) -> list[Candidate]:
    """At most half of ``pool``, in its order: first those that nothing dominates, by how well they reach the
    goal. Those that miss it beyond doubt go as well, but for ``FINALISTS`` that show the way there."""
    doubt = parent.uncertainty
    every = [found[each] for each in pool]

    def rank(each: Candidate) -> tuple[bool, tuple[bool, float, float]]:
        return is_dominated(found[each], every, doubt), goal.rank(found[each], parent, doubt)

    ranked = sorted(pool, key=rank)
    reaching = sum(not missed for _, (missed, *_) in map(rank, ranked))
    kept = {*ranked[: max(FINALISTS, min(reaching, -(-len(pool) // 2)))]}
    return [each for each in pool if each in kept]


def is_dominated(figures: Figures, others: Sequence[Figures], doubt: float = 0.0) -> bool:
    """Whether one of ``others`` is faster and more accurate by more than ``doubt``."""
    return any(
        other.share <= figures.share
        and other.map50 >= figures.map50 + doubt
        and (other.share, other.map50) != (figures.share, figures.map50)
        for other in others
    )


def frontier(found: dict[Candidate, Figures]) -> list[Candidate]:
    """Those that no other beats in both time and accuracy, the fastest first."""
    kept = [each for each, own in found.items() if not is_dominated(own, [*found.values()])]
    return sorted(kept, key=lambda each: found[each].share)


def choose(found: dict[Candidate, Figures], parent: Candidate, goal: Goal) -> Candidate | None:
    """The best that reaches the goal; None where nothing does."""
    own = found[parent]
    reached = [each for each in found if goal.holds(found[each], own)]
    return min(reached, key=lambda each: goal.rank(found[each], own, 0.0), default=None)
