"""Compare two detectors' results detection by detection, by matching and not by slot.

Two correct runtimes differ by rounding: near-equal scores swap places, a score at the threshold falls on
either side, an overlap at the NMS threshold is decided either way. Detections meet by class and overlap,
never by slot, so swaps do not matter; the other two are excused and counted, everything else beyond the
tolerances is a disagreement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import iou_matrix
from anchorline.runtime.canvas import boxes_to_canvas, place
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import SettingsError

MATCH_IOU = 0.5
# Among this many detections of one class whose scores lie this near together (a network that has learnt
# nothing) rounding alone decides which are kept: their boxes are not compared.
MANY_ALIKE = 10
ALIKE_SCORES = 1e-4
SURE_SCORE = 0.9


@dataclass(frozen=True)
class Tolerance:
    """How far two artefacts of one precision may be apart; docs/verify.md says where the limits come from."""

    # What one stage adds, given the reference's inputs: the root mean square by that of the stage, and the
    # largest difference by the largest magnitude.
    stage_rms: float
    stage_peak: float
    box_px: float  # of a matched pair of detections, in canvas pixels
    score: float
    tie_iou: float  # how near to the NMS threshold an overlap counts as undecided
    matched: float  # the smallest share of all detections that must be alike (ties excused)
    confident: float  # of those with a score of at least 0.5
    traps: float  # of those in the traps
    trap_score: float  # that count there: far from any training data many boxes are undecided
    map50_drop: float  # what labelled data may lose
    recall_drop: float


# By precision, from the most to the least exact.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 1e-3, 0.05, 1e-4, 1e-3, 1.0, 1.0, 1.0, 0.0, 0.001, 0.001),
    "fp16": Tolerance(0.05, 0.05, 2.0, 0.02, 0.02, 0.95, 0.99, 0.95, 0.5, 0.003, 0.005),
    "bf16": Tolerance(0.3, 0.3, 8.0, 0.1, 0.05, 0.85, 0.95, 0.85, 0.5, 0.01, 0.01),
    "int8": Tolerance(0.75, 1.0, 16.0, 0.25, 0.1, 0.75, 0.9, 0.75, 0.5, 0.02, 0.02),
}


def tolerance_for(*precisions: str) -> Tolerance:
    """The tolerance of the least exact of ``precisions``; an unknown one counts as int8."""
    order = list(TOLERANCES)
    return TOLERANCES[max((p if p in order else "int8" for p in precisions), key=order.index)]


@dataclass(frozen=True)
class Cuts:
    """The tolerances of a comparison, and the detectors' own settings, which say what rounding may decide.

    ``order_ties`` excuses a pair of equal scores whose boxes suppress each other: either may come first and
    win. Only for networks whose stages were seen to agree, since a box that is simply in the wrong place
    would be excused as well.
    """

    score_threshold: float = 0.05  # lower scores are dropped
    box_tolerance_px: float = 0.05  # the largest difference of an edge
    score_tolerance: float = 1e-4
    nms_iou: float | None = None  # above it boxes suppress each other; None: no such cut
    max_detections: int | None = None
    tie_iou: float = 1e-3  # how near to nms_iou an overlap counts as undecided
    order_ties: bool = False


@dataclass(frozen=True, eq=False)
class Alignment:
    """Which detections of two results belong together, as indices into each; those in none are excused."""

    pairs: NDArray[np.int64]  # [K, 2]: (reference, candidate)
    box_errors: NDArray[np.float32]  # [K]: the largest difference of an edge, in pixels
    score_errors: NDArray[np.float32]  # [K]
    differing: NDArray[np.bool_]  # [K]: beyond the tolerances
    excused: NDArray[np.bool_]  # [K]: beyond them as well, but a tie
    missed: NDArray[np.int64]  # [M], of the reference
    extra: NDArray[np.int64]  # [E], of the candidate

    def wrong_scores(self, reference: Detections, candidate: Detections) -> NDArray[np.float32]:
        """The score of every detection that is not alike: that of the reference where it has one."""
        differing = reference.scores[self.pairs[self.differing, 0]]
        return np.concatenate((differing, reference.scores[self.missed], candidate.scores[self.extra]))


@dataclass(frozen=True)
class Comparison:
    """How the results for one image (or, summed up, for many) agree.

    ``matched`` pairs, some of them ``differing`` beyond the tolerances; ``missed`` detections of the
    reference and ``extra`` ones of the candidate, without the excused ``borderline`` ones at a score cut
    and ``nms_ties``; errors in pixels and score over the pairs. ``first_disagreement`` is one line, None
    when the two agree. ``alignment`` tells which detections these are; None for a sum over images.
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

    @property
    def aligned(self) -> Alignment:
        """The alignment, of a comparison that has one."""
        assert self.alignment is not None
        return self.alignment


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
        total, excused = self.total, self.total.borderline + self.total.nms_ties
        return (
            f"{'agrees' if self.agrees else 'differs'} on {self.images} images: {total.matched} detections "
            f"matched, {total.missed} missed, {total.extra} extra, {excused} excused "
            f"as ties, boxes within {total.max_box_error:.2g} px, scores within {total.max_score_error:.2g}"
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dict of all figures with ``agrees``."""
        figures = {name: value for name, value in vars(self.total).items() if name != "alignment"}
        counts = {"images": self.images, "disagreeing_images": self.disagreeing_images}
        return {"agrees": self.agrees, **counts, **figures}


def cuts_of(contract: Contract, tolerance: Tolerance, task: str | None = None) -> Cuts:
    """The cuts of what a model delivers; for proposals no score threshold, and the RPN's NMS."""
    own = contract.thresholds
    if (task or contract.task) == "proposals":
        least, nms_iou, most = 0.0, own.rpn_nms_iou, own.max_proposals
    else:
        least, nms_iou, most = own.score, own.nms_iou, own.max_detections
    return Cuts(least, tolerance.box_px, tolerance.score, nms_iou, most, tolerance.tie_iou)


def compare_detections(
    reference: Detections, candidate: Detections, cuts: Cuts | None = None, **changes: Any
) -> Comparison:
    """Match the candidate's detections one to one with the reference's of the same class and compare.

    Pairs overlap by at least ``MATCH_IOU`` (or coincide within the tolerance); the nearest in overlap
    and score pair up first. Classes are compared by name, by label where one side has no names.
    ``changes`` are fields of ``cuts``, as in ``nms_iou=0.5``.
    """
    cuts = dataclasses.replace(cuts or Cuts(), **changes)
    ours, theirs = _with_common_labels(reference, candidate)
    pairs = _match(ours, theirs, cuts.box_tolerance_px)
    own, other = ours.boxes[pairs[:, 0]], theirs.boxes[pairs[:, 1]]
    box_errors = np.abs(own - other).max(axis=1, initial=0.0)
    score_errors = np.abs(ours.scores[pairs[:, 0]] - theirs.scores[pairs[:, 1]])
    moved, rescored = box_errors > cuts.box_tolerance_px, score_errors > cuts.score_tolerance
    undecided = _among_many_alike(ours, theirs, cuts)[pairs[:, 0]]
    if cuts.order_ties and cuts.nms_iou is not None:
        undecided |= iou_matrix(own, other).diagonal() > cuts.nms_iou
    excused = moved & ~rescored & undecided
    differing = (moved | rescored) & ~excused
    missed, *ours_excused = _unmatched(ours, theirs, pairs[:, 0], cuts)
    extra, *theirs_excused = _unmatched(theirs, ours, pairs[:, 1], cuts)
    found = Alignment(pairs, box_errors, score_errors, differing, excused, missed, extra)
    return Comparison(
        matched=len(pairs),
        differing=int(differing.sum()),
        missed=len(missed),
        extra=len(extra),
        borderline=ours_excused[0] + theirs_excused[0],
        nms_ties=ours_excused[1] + theirs_excused[1] + int(excused.sum()),
        max_box_error=float(box_errors.max(initial=0.0)),
        mean_box_error=float(box_errors.mean()) if len(pairs) else 0.0,
        max_score_error=float(score_errors.max(initial=0.0)),
        first_disagreement=_describe_first(reference, candidate, found),
        alignment=found,
    )


def compare_all(
    references: Sequence[Detections],
    candidates: Sequence[Detections],
    *,
    image_names: Sequence[str] | None = None,
    required_share: float = 1.0,
    **cuts: Any,
) -> ComparisonSummary:
    """``compare_detections`` for each image in turn, summed up; ``image_names`` stand in the message.

    ``required_share`` of all detections must agree, by default each one.
    """
    if len(references) != len(candidates):
        raise SettingsError(f"{len(candidates)} results to compare with {len(references)}; expected one each")
    each = [compare_detections(*pair, **cuts) for pair in zip(references, candidates, strict=True)]
    return summarise(each, required_share, image_names)


def compare_outputs(
    references: Sequence[Detections],
    candidates: Sequence[Detections],
    contract: Contract,
    tolerance: Tolerance,
    *,
    order_ties: bool = False,
    least_score: float = 0.0,
) -> list[Comparison]:
    """What two detectors of one contract found in the same frames, with boxes in canvas pixels.

    There rounding has one size whatever the frame's. Scores below ``least_score`` are left out;
    ``order_ties`` as in ``Cuts``.
    """

    def on_canvas(found: Detections) -> Detections:
        assert found.size is not None
        placement = place(found.size, contract.canvas, contract.resize)
        kept = found[found.scores >= least_score]
        return dataclasses.replace(kept, boxes=boxes_to_canvas(kept.boxes, placement), size=placement.valid)

    cuts = cuts_of(contract, tolerance)
    threshold = max(cuts.score_threshold, least_score)
    cuts = dataclasses.replace(cuts, score_threshold=threshold, order_ties=order_ties)
    pairs = zip(references, candidates, strict=True)
    return [compare_detections(on_canvas(ours), on_canvas(theirs), cuts) for ours, theirs in pairs]


def summarise(
    each: Sequence[Comparison], required_share: float = 1.0, image_names: Sequence[str] | None = None
) -> ComparisonSummary:
    """Sum up the comparisons of images; ``required_share`` of all detections must agree.

    Where it is below 1, one detection may always differ, unless not a single one has its partner.
    """
    names = image_names or [f"image {number}" for number in range(1, len(each) + 1)]
    disagreeing = [
        f"{name}: {one.first_disagreement}" for name, one in zip(names, each, strict=True) if not one.agrees
    ]
    counts = ("matched", "differing", "missed", "extra", "borderline", "nms_ties")
    sums = {name: sum(getattr(one, name) for one in each) for name in counts}
    total = Comparison(
        **sums,
        max_box_error=max((one.max_box_error for one in each), default=0.0),
        mean_box_error=sum(one.mean_box_error * one.matched for one in each) / max(sums["matched"], 1),
        max_score_error=max((one.max_score_error for one in each), default=0.0),
        first_disagreement=disagreeing[0] if disagreeing else None,
    )
    share = round(1.0 - required_share, 9)  # 1 - 0.95 is a little more than 0.05
    allowed = math.ceil(share * (total.matched + total.missed + total.extra)) if total.matched else 0
    return ComparisonSummary(len(each), len(disagreeing), total, allowed)


def _with_common_labels(a: Detections, b: Detections) -> tuple[Detections, Detections]:
    """Both with labels that mean the same: by name where both have names, else as they are."""
    if not (a.class_names and b.class_names):
        return a, b
    number = {name: index for index, name in enumerate(dict.fromkeys([*a.class_names, *b.class_names]))}
    labels = [np.array([number[name] for name in each.names], np.int64) for each in (a, b)]
    return Detections(a.boxes, a.scores, labels[0]), Detections(b.boxes, b.scores, labels[1])


def _match(ours: Detections, theirs: Detections, box_tolerance_px: float) -> NDArray[np.int64]:
    """Pairs of indices [K, 2] into both sides, each used once; the nearest pair is taken first."""
    distance = np.abs(ours.boxes[:, None] - theirs.boxes[None]).max(axis=2, initial=0.0)
    # Boxes within the tolerance count as equal: also those without area, whose IoU is 0.
    overlap = np.maximum(iou_matrix(ours.boxes, theirs.boxes), distance <= box_tolerance_px)
    cost = (1.0 - overlap) + np.abs(ours.scores[:, None] - theirs.scores[None])
    rows, columns = np.nonzero((ours.labels[:, None] == theirs.labels[None]) & (overlap >= MATCH_IOU))
    taken_rows, taken_columns, pairs = set(), set(), []
    for index in np.argsort(cost[rows, columns], kind="stable"):
        row, column = int(rows[index]), int(columns[index])
        if row not in taken_rows and column not in taken_columns:
            taken_rows.add(row)
            taken_columns.add(column)
            pairs.append((row, column))
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def _unmatched(
    own: Detections, other: Detections, matched: NDArray[np.int64], cuts: Cuts
) -> tuple[NDArray[np.int64], int, int]:
    """Detections of ``own`` without a partner and excuse; how many are excused as borderline, as NMS ties."""
    alone = np.setdiff1d(np.arange(len(own)), matched)
    scores, labels = own.scores[alone], own.labels[alone]
    borderline = scores <= cuts.score_threshold + cuts.score_tolerance
    if cuts.max_detections is not None and len(other) >= cuts.max_detections:
        borderline |= scores <= other.scores.min(initial=1.0) + cuts.score_tolerance
    undecided = _among_many_alike(own, other, cuts)[alone]
    tied = np.zeros(len(alone), np.bool_)
    if cuts.nms_iou is not None:
        for side in (own, other):
            # Whatever could have suppressed one stands in either result, with a score at least as high.
            rival = labels[:, None] == side.labels[None]
            rival &= side.scores[None] >= (scores - cuts.score_tolerance)[:, None]
            near = np.abs(iou_matrix(own.boxes[alone], side.boxes) - cuts.nms_iou) <= cuts.tie_iou
            tied |= (rival & near).any(axis=1)
    borderline &= ~undecided
    tied = undecided | (tied & ~borderline)
    return alone[~(borderline | tied)], int(borderline.sum()), int(tied.sum())


def _among_many_alike(own: Detections, other: Detections, cuts: Cuts) -> NDArray[np.bool_]:
    """Bool [N]: detections of ``own`` whose score many others of their class have as well, on both sides.

    None that is sure of itself: scores near 1 lie near together in a network that has learnt a lot.
    """

    def near(side: Detections, within: float) -> NDArray[np.int64]:
        alike = np.abs(own.scores[:, None] - side.scores[None]) <= within
        return np.asarray((alike & (own.labels[:, None] == side.labels[None])).sum(axis=1), np.int64)

    here = near(own, ALIKE_SCORES) >= MANY_ALIKE
    there = near(other, ALIKE_SCORES + cuts.score_tolerance) >= MANY_ALIKE // 2
    return np.asarray(here & there & (own.scores < SURE_SCORE), np.bool_)


def _describe_first(reference: Detections, candidate: Detections, alignment: Alignment) -> str | None:
    """One line on the disagreement of the highest score."""

    def shown(detections: Detections, index: int) -> str:
        box = ", ".join(f"{edge:.3f}" for edge in detections.boxes[index].tolist())
        return f"{detections.names[index]} {detections.scores[index]:.5f} at [{box}]"

    found: list[tuple[float, str]] = []
    for index in alignment.missed:
        found.append((reference.scores[index], f"missed {shown(reference, index)}"))
    for index in alignment.extra:
        found.append((candidate.scores[index], f"extra {shown(candidate, index)}"))
    for ours, theirs in alignment.pairs[alignment.differing]:
        text = f"{shown(reference, ours)} became {shown(candidate, theirs)}"
        found.append((reference.scores[ours], text))
    return max(found, key=lambda each: each[0])[1] if found else None
