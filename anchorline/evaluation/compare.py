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

from anchorline.evaluation.alignment import NMS_TIE_IOU, Alignment, Cuts, align
from anchorline.runtime.detections import Detections
from anchorline.runtime.errors import SettingsError


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
