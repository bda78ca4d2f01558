"""Compare two detectors' results detection by detection, by matching and not by slot.

Two correct runtimes differ by rounding: near-equal scores swap places, a score at the threshold
falls on either side, an overlap at the NMS threshold is decided either way. Swaps do not matter
here; the other two are excused and counted, everything else beyond the tolerances is a disagreement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.evaluation.boxes import iou_matrix
from anchorline.runtime.detections import Detections
from anchorline.runtime.errors import SettingsError

MATCH_IOU = 0.5
NMS_TIE_IOU = 1e-3
"""How near to the NMS threshold an overlap counts as undecided."""

_BORDERLINE, _NMS_TIE = "borderline", "nms tie"


@dataclass(frozen=True)
class _Cuts:
    """The tolerances of a comparison and the cuts that both results went through."""

    score_threshold: float
    box_tolerance_px: float
    score_tolerance: float
    nms_iou: float | None
    max_detections: int | None


@dataclass(frozen=True, eq=False)
class _Side:
    """One result with its classes as numbers that mean the same on both sides."""

    detections: Detections
    classes: NDArray[np.int64]


@dataclass(frozen=True)
class Comparison:
    """How the results for one image (or, summed up, for many) agree.

    ``matched`` pairs, some of which may differ by more than the tolerances (``differing``);
    ``missed`` detections of the reference and ``extra`` ones of the candidate, without the excused
    ``borderline`` ones at a score cut and ``nms_ties``; errors in pixels and score over the matched
    pairs. ``first_disagreement`` is one line, None when the two agree.
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

    @property
    def agrees(self) -> bool:
        """Whether every detection has its partner within the tolerances, or is excused."""
        return self.first_disagreement is None


@dataclass(frozen=True)
class ComparisonSummary:
    """The comparisons of many images: totals, and where the first disagreement is."""

    images: int
    disagreeing_images: int
    total: Comparison

    @property
    def agrees(self) -> bool:
        """Whether all images agree."""
        return self.disagreeing_images == 0

    @property
    def first_disagreement(self) -> str | None:
        """The first image that disagrees, and how; None when all agree."""
        return self.total.first_disagreement

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
        return {
            "agrees": self.agrees,
            "images": self.images,
            "disagreeing_images": self.disagreeing_images,
            **asdict(self.total),
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
) -> Comparison:
    """Match the candidate's detections one to one with the reference's of the same class and compare.

    Pairs overlap by at least ``MATCH_IOU`` (or coincide within the tolerance); the nearest in overlap
    and score pair up first. Classes are compared by name, by label where one side has no names.
    The tolerances are the largest difference of a box edge, in pixels, and of a score. The detectors'
    own settings say what rounding may decide: ``score_threshold`` drops lower scores, ``nms_iou``
    suppresses, ``max_detections`` bounds the number (None: no such cut).
    """
    cuts = _Cuts(score_threshold, box_tolerance_px, score_tolerance, nms_iou, max_detections)
    ours, theirs = _sides(reference, candidate)
    pairs = _match(ours, theirs, box_tolerance_px)
    box_errors = np.abs(reference.boxes[pairs[:, 0]] - candidate.boxes[pairs[:, 1]]).max(axis=1, initial=0.0)
    score_errors = np.abs(reference.scores[pairs[:, 0]] - candidate.scores[pairs[:, 1]])
    differing = (box_errors > box_tolerance_px) | (score_errors > score_tolerance)
    missed, missed_excuses = _unmatched(ours, theirs, pairs[:, 0], cuts)
    extra, extra_excuses = _unmatched(theirs, ours, pairs[:, 1], cuts)
    excuses = missed_excuses + extra_excuses
    return Comparison(
        matched=len(pairs),
        differing=int(differing.sum()),
        missed=len(missed),
        extra=len(extra),
        borderline=excuses.count(_BORDERLINE),
        nms_ties=excuses.count(_NMS_TIE),
        max_box_error=float(box_errors.max(initial=0.0)),
        mean_box_error=float(box_errors.mean()) if len(pairs) else 0.0,
        max_score_error=float(score_errors.max(initial=0.0)),
        first_disagreement=_describe_first(reference, candidate, pairs[differing], missed, extra),
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
) -> ComparisonSummary:
    """``compare_detections`` for each image in turn, summed up; ``image_names`` stand in the message."""
    if len(references) != len(candidates):
        raise SettingsError(f"{len(candidates)} results to compare with {len(references)}; expected one each")
    names = image_names or [f"image {number}" for number in range(1, len(references) + 1)]
    return summarise(
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
            ),
        )
        for name, reference, candidate in zip(names, references, candidates, strict=True)
    )


def summarise(comparisons: Iterable[tuple[str, Comparison]]) -> ComparisonSummary:
    """Sum up comparisons given as (image name, comparison)."""
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
    return ComparisonSummary(len(each), len(disagreeing), total)


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
    own: _Side, other: _Side, matched: NDArray[np.int64], cuts: _Cuts
) -> tuple[list[int], list[str]]:
    """Detections of ``own`` without a partner: the indices of those without excuse, and the excuses."""
    without_excuse, excuses = [], []
    for index in np.setdiff1d(np.arange(len(own.detections)), matched):
        excuse = _excuse(own, other, int(index), cuts)
        if excuse is None:
            without_excuse.append(int(index))
        else:
            excuses.append(excuse)
    return without_excuse, excuses


def _excuse(own: _Side, other: _Side, index: int, cuts: _Cuts) -> str | None:
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
            if (np.abs(overlaps - cuts.nms_iou) <= NMS_TIE_IOU).any():
                return _NMS_TIE
    return None


def _describe_first(
    reference: Detections,
    candidate: Detections,
    differing: NDArray[np.int64],
    missed: list[int],
    extra: list[int],
) -> str | None:
    """One line on the disagreement of the highest score."""
    found: list[tuple[float, str]] = []
    for index in missed:
        found.append((float(reference.scores[index]), f"missed {_shown(reference, index)}"))
    for index in extra:
        found.append((float(candidate.scores[index]), f"extra {_shown(candidate, index)}"))
    for ours, theirs in differing:
        text = f"{_shown(reference, ours)} became {_shown(candidate, theirs)}"
        found.append((float(reference.scores[ours]), text))
    return max(found, key=lambda each: each[0])[1] if found else None


def _shown(detections: Detections, index: int) -> str:
    box = ", ".join(f"{edge:.3f}" for edge in detections.boxes[index].tolist())
    return f"{detections.names[index]} {detections.scores[index]:.5f} at [{box}]"
