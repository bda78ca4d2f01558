"""Compare two detectors' results detection by detection, by matching and not by slot.

Two correct runtimes differ by rounding: near-equal scores swap places, a score at the threshold
falls on either side, an overlap at the NMS threshold is decided either way. Swaps do not matter
here; the other two are excused and counted, everything else beyond the tolerances is a disagreement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import iou_matrix
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import SettingsError

# Which detections of two results belong together, and which differences rounding excuses.
#
# Near-equal scores swap places, a score at the threshold falls on either side, an overlap at the NMS
# threshold is decided either way: detections meet by class and overlap, never by slot.


MATCH_IOU = 0.5
NMS_TIE_IOU = 1e-3
"""How near to the NMS threshold an overlap counts as undecided."""

# Among this many detections of one class whose scores lie this near together (a network that has learnt
# nothing) rounding alone decides which are kept: their boxes are not compared.
MANY_ALIKE = 10
ALIKE_SCORES = 1e-4
SURE_SCORE = 0.9

_BORDERLINE, _NMS_TIE = "borderline", "nms tie"


@dataclass(frozen=True)
class Cuts:
    """The tolerances of a comparison and the cuts that both results went through.

    ``order_ties`` excuses a pair of equal scores whose boxes suppress each other: of two such boxes
    either may come first and win. Only for networks whose stages were seen to agree, since a box that
    is simply in the wrong place would be excused as well.
    """

    score_threshold: float
    box_tolerance_px: float
    score_tolerance: float
    nms_iou: float | None
    max_detections: int | None
    tie_iou: float = NMS_TIE_IOU
    order_ties: bool = False


@dataclass(frozen=True, eq=False)
class Alignment:
    """Which detections of two results belong together, as indices into each.

    ``pairs`` int64 [K, 2] are (reference, candidate) with the largest difference of an edge in
    ``box_errors`` [K], in pixels, and of the score in ``score_errors`` [K]; ``differing`` bool [K]
    marks the pairs beyond the tolerances. ``missed`` int64 [M] index the reference, ``extra`` int64
    [E] the candidate. What is in none of these is excused: ``borderline`` ones at a score cut and
    ``nms_ties``, on both sides together; ``excused`` bool [K] marks the pairs among the latter.
    """

    pairs: NDArray[np.int64]
    box_errors: NDArray[np.float32]
    score_errors: NDArray[np.float32]
    differing: NDArray[np.bool_]
    missed: NDArray[np.int64]
    extra: NDArray[np.int64]
    borderline: int
    nms_ties: int
    excused: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class _Side:
    """One result with its classes as numbers that mean the same on both sides."""

    detections: Detections
    classes: NDArray[np.int64]


def align(reference: Detections, candidate: Detections, cuts: Cuts) -> Alignment:
    """Match the candidate's detections one to one with the reference's of the same class."""
    ours, theirs = _sides(reference, candidate)
    pairs = _match(ours, theirs, cuts.box_tolerance_px)
    box_errors = np.abs(reference.boxes[pairs[:, 0]] - candidate.boxes[pairs[:, 1]]).max(axis=1, initial=0.0)
    score_errors = np.abs(reference.scores[pairs[:, 0]] - candidate.scores[pairs[:, 1]])
    missed, missed_excuses = _unmatched(ours, theirs, pairs[:, 0], cuts)
    extra, extra_excuses = _unmatched(theirs, ours, pairs[:, 1], cuts)
    excuses = missed_excuses + extra_excuses
    moved, rescored = box_errors > cuts.box_tolerance_px, score_errors > cuts.score_tolerance
    tied = moved & ~rescored & _suppress_each_other(reference, candidate, pairs, cuts)
    tied |= moved & ~rescored & _among_many_alike(ours, theirs, cuts)[pairs[:, 0]]
    return Alignment(
        pairs,
        box_errors,
        score_errors,
        differing=(moved | rescored) & ~tied,
        missed=np.array(missed, np.int64),
        extra=np.array(extra, np.int64),
        borderline=excuses.count(_BORDERLINE),
        nms_ties=excuses.count(_NMS_TIE) + int(tied.sum()),
        excused=tied,
    )


def _among_many_alike(own: _Side, other: _Side, cuts: Cuts) -> NDArray[np.bool_]:
    """Bool [N]: detections of ``own`` whose score many others of their class have as well, on both sides.

    None that is sure of itself: scores near 1 lie near together in a network that has learnt a lot.
    """
    scores = own.detections.scores
    here = _near(own, own, ALIKE_SCORES) >= MANY_ALIKE
    there = _near(own, other, ALIKE_SCORES + cuts.score_tolerance) >= MANY_ALIKE // 2
    return np.asarray(here & there & (scores < SURE_SCORE), np.bool_)


def _near(own: _Side, other: _Side, within: float) -> NDArray[np.int64]:
    """Int [N]: how many of ``other`` have the class and, nearly, the score of each of ``own``."""
    near = np.abs(own.detections.scores[:, None] - other.detections.scores[None]) <= within
    near &= own.classes[:, None] == other.classes[None]
    return np.asarray(near.sum(axis=1), np.int64)


def _suppress_each_other(
    reference: Detections, candidate: Detections, pairs: NDArray[np.int64], cuts: Cuts
) -> NDArray[np.bool_]:
    """Bool [K]: pairs of which each box would have suppressed the other, where such ties are excused."""
    if not cuts.order_ties or cuts.nms_iou is None:
        return np.zeros(len(pairs), np.bool_)
    overlaps = iou_matrix(reference.boxes[pairs[:, 0]], candidate.boxes[pairs[:, 1]]).diagonal()
    return np.asarray(overlaps > cuts.nms_iou, np.bool_)


def _sides(a: Detections, b: Detections) -> tuple[_Side, _Side]:
    """Both results with comparable classes: by name where both have names, else by label."""
    if not (a.class_names and b.class_names):
        return _Side(a, a.labels), _Side(b, b.labels)
    number = {name: index for index, name in enumerate(dict.fromkeys([*a.class_names, *b.class_names]))}
    own, other = (np.array([number[name] for name in each.names], dtype=np.int64) for each in (a, b))
    return _Side(a, own), _Side(b, other)


def _match(ours: _Side, theirs: _Side, box_tolerance_px: float) -> NDArray[np.int64]:
    """Pairs of indices [K, 2] into both sides, each used once; the nearest pair is taken first."""
    a, b = ours.detections, theirs.detections
    distance = np.abs(a.boxes[:, None] - b.boxes[None]).max(axis=2, initial=0.0)
    # Boxes within the tolerance count as equal: also those without area, whose IoU is 0.
    overlap = np.maximum(iou_matrix(a.boxes, b.boxes), distance <= box_tolerance_px)
    cost = (1.0 - overlap) + np.abs(a.scores[:, None] - b.scores[None])
    same_class = ours.classes[:, None] == theirs.classes[None]
    rows, columns = np.nonzero(same_class & (overlap >= MATCH_IOU))
    free_a, free_b = np.ones(len(a), dtype=np.bool_), np.ones(len(b), dtype=np.bool_)
    pairs = []
    for index in np.argsort(cost[rows, columns], kind="stable"):
        row, column = rows[index], columns[index]
        if free_a[row] and free_b[column]:
            free_a[row] = free_b[column] = False
            pairs.append((row, column))
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def _unmatched(
    own: _Side, other: _Side, matched: NDArray[np.int64], cuts: Cuts
) -> tuple[list[int], list[str]]:
    """Detections of ``own`` without a partner: the indices of those without excuse, and the excuses."""
    without_excuse, excuses = [], []
    undecided = _among_many_alike(own, other, cuts)
    for index in np.setdiff1d(np.arange(len(own.detections)), matched):
        excuse = _NMS_TIE if undecided[index] else _excuse(own, other, int(index), cuts)
        if excuse is None:
            without_excuse.append(int(index))
        else:
            excuses.append(excuse)
    return without_excuse, excuses


def _excuse(own: _Side, other: _Side, index: int, cuts: Cuts) -> str | None:
    """Why rounding alone may have kept a detection in one result and not in the other."""
    score = own.detections.scores[index]
    if score <= cuts.score_threshold + cuts.score_tolerance:
        return _BORDERLINE
    full = cuts.max_detections is not None and len(other.detections) >= cuts.max_detections
    if full and score <= other.detections.scores.min() + cuts.score_tolerance:
        return _BORDERLINE
    if cuts.nms_iou is not None:
        # Whatever could have suppressed it stands in either result, with a score at least as high.
        box = own.detections.boxes[index : index + 1]
        for side in (own, other):
            rival = (side.classes == own.classes[index]) & (
                side.detections.scores >= score - cuts.score_tolerance
            )
            overlaps = iou_matrix(box, side.detections.boxes[rival])
            if (np.abs(overlaps - cuts.nms_iou) <= cuts.tie_iou).any():
                return _NMS_TIE
    return None


@dataclass(frozen=True)
class Comparison:
    """How the results for one image (or, summed up, for many) agree.

    ``matched`` pairs, some of which may differ by more than the tolerances (``differing``);
    ``missed`` detections of the reference and ``extra`` ones of the candidate, without the excused
    ``borderline`` ones at a score cut and ``nms_ties``; errors in pixels and score over the matched
    pairs. ``first_disagreement`` is one line, None when the two agree. ``alignment`` tells which
    detections these are; None for a sum over images.
    """

    matched: int = 0
    differing: int = 0
    missed: int = 0
    extra: int = 0
    borderline: int = 0
    nms_ties: int = 0
    max_box_error: float = 0.0
    mean_box_error: float = 0.0
    max_score_error: float = 0.0
    first_disagreement: str | None = None
    alignment: Alignment | None = field(default=None, repr=False, compare=False)

    @property
    def wrong(self) -> int:
        """How many detections disagree: missed, extra, or beyond the tolerances."""
        return self.differing + self.missed + self.extra

    @property
    def agrees(self) -> bool:
        """Whether every detection has its partner within the tolerances, or is excused."""
        return self.first_disagreement is None


@dataclass(frozen=True)
class ComparisonSummary:
    """The comparisons of many images: totals, and where the first disagreement is.

    ``allowed`` detections may be missed, extra or differing before the whole counts as disagreeing.
    """

    images: int
    disagreeing_images: int
    total: Comparison
    allowed: int = 0

    @property
    def agrees(self) -> bool:
        """Whether no more detections disagree than are allowed."""
        return self.total.wrong <= self.allowed

    @property
    def first_disagreement(self) -> str | None:
        """The first image that disagrees, and how; None when all agree."""
        return self.total.first_disagreement

    def brief(self) -> str:
        """The figures in one line, without those that are 0."""
        total = self.total
        counts = ((total.wrong, "not alike"), (total.borderline + total.nms_ties, "excused as ties"))
        others = "".join(f", {count} {what}" for count, what in counts if count)
        errors = f"; boxes within {total.max_box_error:.2g} px, scores within {total.max_score_error:.2g}"
        return f"{total.matched} matched{others}{errors if total.matched else ''}"

    def describe(self) -> str:
        """The verdict and the figures in one line."""
        total = self.total
        excused = total.borderline + total.nms_ties
        return (
            f"{'agrees' if self.agrees else 'differs'} on {self.images} images: {total.matched} detections "
            f"matched, {total.missed} missed, {total.extra} extra, {excused} excused as ties, boxes within "
            f"{total.max_box_error:.2g} px, scores within {total.max_score_error:.2g}"
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dict of all figures with ``agrees``."""
        figures = asdict(self.total)
        del figures["alignment"]
        return {
            "agrees": self.agrees,
            "images": self.images,
            "disagreeing_images": self.disagreeing_images,
            **figures,
        }


def compare_detections(
    reference: Detections,
    candidate: Detections,
    *,
    score_threshold: float = 0.05,
    box_tolerance_px: float = 0.05,
    score_tolerance: float = 1e-4,
    nms_iou: float | None = None,
    max_detections: int | None = None,
    tie_iou: float = NMS_TIE_IOU,
    order_ties: bool = False,
) -> Comparison:
    """Match the candidate's detections one to one with the reference's of the same class and compare.

    Pairs overlap by at least ``MATCH_IOU`` (or coincide within the tolerance); the nearest in overlap
    and score pair up first. Classes are compared by name, by label where one side has no names.
    The tolerances are the largest difference of a box edge, in pixels, and of a score. The detectors'
    own settings say what rounding may decide: ``score_threshold`` drops lower scores, ``nms_iou``
    suppresses, ``max_detections`` bounds the number (None: no such cut); ``tie_iou`` is how near to
    ``nms_iou`` an overlap counts as undecided, ``order_ties`` as in ``alignment.Cuts``.
    """
    cuts = Cuts(
        score_threshold, box_tolerance_px, score_tolerance, nms_iou, max_detections, tie_iou, order_ties
    )
    found = align(reference, candidate, cuts)
    return Comparison(
        matched=len(found.pairs),
        differing=int(found.differing.sum()),
        missed=len(found.missed),
        extra=len(found.extra),
        borderline=found.borderline,
        nms_ties=found.nms_ties,
        max_box_error=float(found.box_errors.max(initial=0.0)),
        mean_box_error=float(found.box_errors.mean()) if len(found.pairs) else 0.0,
        max_score_error=float(found.score_errors.max(initial=0.0)),
        first_disagreement=_describe_first(reference, candidate, found),
        alignment=found,
    )


def compare_all(
    references: Sequence[Detections],
    candidates: Sequence[Detections],
    *,
    image_names: Sequence[str] | None = None,
    score_threshold: float = 0.05,
    box_tolerance_px: float = 0.05,
    score_tolerance: float = 1e-4,
    nms_iou: float | None = None,
    max_detections: int | None = None,
    tie_iou: float = NMS_TIE_IOU,
    order_ties: bool = False,
    required_share: float = 1.0,
) -> ComparisonSummary:
    """``compare_detections`` for each image in turn, summed up; ``image_names`` stand in the message.

    ``required_share`` of all detections must agree, by default each one.
    """
    if len(references) != len(candidates):
        raise SettingsError(f"{len(candidates)} results to compare with {len(references)}; expected one each")
    names = image_names or [f"image {number}" for number in range(1, len(references) + 1)]
    each = [
        (
            name,
            compare_detections(
                reference,
                candidate,
                score_threshold=score_threshold,
                box_tolerance_px=box_tolerance_px,
                score_tolerance=score_tolerance,
                nms_iou=nms_iou,
                max_detections=max_detections,
                tie_iou=tie_iou,
                order_ties=order_ties,
            ),
        )
        for name, reference, candidate in zip(names, references, candidates, strict=True)
    ]
    return summarise(each, required_share)


def summarise(
    comparisons: Iterable[tuple[str, Comparison]], required_share: float = 1.0
) -> ComparisonSummary:
    """Sum up comparisons given as (image name, comparison); ``required_share`` of all must agree.

    Where it is below 1, one detection may always differ, unless not a single one has its partner.
    """
    each = list(comparisons)
    disagreeing = [(name, one.first_disagreement) for name, one in each if not one.agrees]
    parts = [one for _, one in each]
    matched = sum(one.matched for one in parts)
    total = Comparison(
        matched=matched,
        differing=sum(one.differing for one in parts),
        missed=sum(one.missed for one in parts),
        extra=sum(one.extra for one in parts),
        borderline=sum(one.borderline for one in parts),
        nms_ties=sum(one.nms_ties for one in parts),
        max_box_error=max((one.max_box_error for one in parts), default=0.0),
        mean_box_error=sum(one.mean_box_error * one.matched for one in parts) / max(matched, 1),
        max_score_error=max((one.max_score_error for one in parts), default=0.0),
        first_disagreement=f"{disagreeing[0][0]}: {disagreeing[0][1]}" if disagreeing else None,
    )
    share = round(1.0 - required_share, 9)  # 1 - 0.95 is a little more than 0.05
    allowed = math.ceil(share * (total.matched + total.missed + total.extra)) if total.matched else 0
    return ComparisonSummary(len(each), len(disagreeing), total, allowed)


def _describe_first(reference: Detections, candidate: Detections, alignment: Alignment) -> str | None:
    """One line on the disagreement of the highest score."""
    found: list[tuple[float, str]] = []
    for index in alignment.missed:
        found.append((float(reference.scores[index]), f"missed {_shown(reference, index)}"))
    for index in alignment.extra:
        found.append((float(candidate.scores[index]), f"extra {_shown(candidate, index)}"))
    for ours, theirs in alignment.pairs[alignment.differing]:
        text = f"{_shown(reference, ours)} became {_shown(candidate, theirs)}"
        found.append((float(reference.scores[ours]), text))
    return max(found, key=lambda each: each[0])[1] if found else None


def _shown(detections: Detections, index: int) -> str:
    box = ", ".join(f"{edge:.3f}" for edge in detections.boxes[index].tolist())
    return f"{detections.names[index]} {detections.scores[index]:.5f} at [{box}]"
