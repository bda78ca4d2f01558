"""Detection by detection: both artefacts, whole, on the same images, and what accuracy that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.data.dataset import Dataset, list_names
from anchorline.evaluation.evaluate import (
    EvaluationReport,
    Progress,
    report_detections,
    run_detector,
    to_dataset_labels,
)
from anchorline.evaluation.pictures import Pixels, fit_panel, outline, pair, pair_sheet, to_panel
from anchorline.runtime.canvas import PROPOSAL_NAMES
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.drawing import draw
from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.verify.compare import Comparison, ComparisonSummary, compare_detections, summarise
from anchorline.verify.material import has_labels
from anchorline.verify.stages import BatchDetector, Subject
from anchorline.verify.tolerances import Tolerance, detection_cuts, on_canvas

# The images on which two detectors differ most, as a contact sheet: reference left, candidate right.


MAX_ROWS = 12

# Okabe and Ito's, as BGR: told apart by colour-blind readers, in the words of the titles.
MISSED_COLOUR = (0, 94, 213)  # vermilion
EXTRA_COLOUR = (233, 180, 86)  # sky blue
DIFFERING_COLOUR = (66, 228, 240)  # yellow

_NAME_LENGTH = 40


@dataclass(frozen=True, eq=False)
class SideBySide:
    """An image (uint8 BGR [H, W, 3]) with both results and the ``compare_detections`` of the two."""

    name: str
    frame: NDArray[np.uint8]
    reference: Detections
    candidate: Detections
    comparison: Comparison


def severity(comparison: Comparison) -> tuple[int, int, float, float]:
    """A key to sort by, larger where two results differ more: detections that have no partner count
    first, then those that moved, then by how much."""
    unmatched = comparison.missed + comparison.extra
    return unmatched, comparison.differing, comparison.max_box_error, comparison.max_score_error


def write_side_by_side(
    path: str | Path, rows: Sequence[SideBySide], max_rows: int = MAX_ROWS
) -> list[SideBySide]:
    """Write the ``max_rows`` rows that differ most, the worst first; returns them.

    Missed boxes are vermilion (left), extra ones sky blue (right), those beyond the tolerances yellow
    (on both sides); what agrees or is excused is thin and grey. Raises ``SettingsError`` without rows
    and for a comparison without alignment, which is one of several images.
    """
    if not rows or max_rows < 1:
        raise SettingsError(f"{len(rows)} images for {max_rows} rows side by side; expected at least 1 each")
    worst = sorted(rows, key=lambda row: severity(row.comparison), reverse=True)[:max_rows]
    pair_sheet([_picture(row) for row in worst], [_title(row) for row in worst], path, columns=1)
    return worst


def _picture(row: SideBySide) -> Pixels:
    alignment = row.comparison.alignment
    if alignment is None:
        raise SettingsError(
            f"{row.name}: its comparison is a sum over images; give what compare_detections returns"
        )
    small, scale = fit_panel(row.frame)
    differing = alignment.pairs[alignment.differing]
    left = _panel(small, scale, row.reference, differing[:, 0], alignment.missed, MISSED_COLOUR)
    right = _panel(small, scale, row.candidate, differing[:, 1], alignment.extra, EXTRA_COLOUR)
    return pair(left, right)


def _panel(
    small: Pixels,
    scale: float,
    detections: Detections,
    differing: NDArray[np.int64],
    alone: NDArray[np.int64],
    colour: tuple[int, int, int],
) -> Pixels:
    """The image with one side's detections; those without a partner on top."""
    picture = small.copy()
    quiet = np.setdiff1d(np.arange(len(detections)), np.concatenate([differing, alone]))
    outline(picture, detections.boxes[quiet], scale)
    for rows, shade in ((differing, DIFFERING_COLOUR), (alone, colour)):
        outline(picture, detections.boxes[rows], scale, shade, thickness=2)
        picture = draw(picture, to_panel(detections[rows], scale), colour=shade)
    return picture


def _title(row: SideBySide) -> str:
    figures = row.comparison
    name = row.name if len(row.name) <= _NAME_LENGTH else f"...{row.name[3 - _NAME_LENGTH :]}"
    return (
        f"{name}: {figures.missed} missed (vermilion), {figures.extra} extra (blue), {figures.differing} "
        f"differ (yellow); boxes to {figures.max_box_error:.2g} px, scores to {figures.max_score_error:.2g}"
    )


_PERCENTILES = (50, 95, 99, 100)
_CONFIDENT = 0.5


@dataclass(frozen=True)
class Accuracy:
    """What labelled data says of both sides, for one class or all: AP50 and the recall at IoU 0.5."""

    ap50: tuple[float, float]
    recall: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        return {"ap50": _pair(self.ap50), "recall": _pair(self.recall)}


@dataclass(frozen=True)
class DetectionCheck:
    """The comparison on every image, with the results themselves for a picture of the worst.

    ``accuracy`` by class name, and under ``mean``; None where the images carry no labels. ``loss`` says
    what is lost beyond the tolerance: confident detections, or accuracy.
    """

    names: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    reference: tuple[Detections, ...]
    candidate: tuple[Detections, ...]
    summary: ComparisonSummary
    accuracy: dict[str, Accuracy] | None
    loss: str | None

    @property
    def passed(self) -> bool:
        return self.summary.agrees and self.loss is None

    @property
    def detail(self) -> str:
        """One line: the figures, and what is wrong."""
        reason = self.loss or (None if self.summary.agrees else self.summary.first_disagreement)
        return f"{self.summary.brief()}; {reason}" if reason else self.summary.brief()

    def to_json(self) -> dict[str, Any]:
        return {
            **self.summary.to_json(),
            "passed": self.passed,
            "box_error_px": self._percentiles("box_errors"),
            "score_error": self._percentiles("score_errors"),
            "per_class": self._per_class(),
            "accuracy": self.accuracy and {name: each.to_json() for name, each in self.accuracy.items()},
            "loss": self.loss,
        }

    def worst(self, count: int) -> list[int]:
        """Indices of the images with the most disagreement, without those that agree."""
        order = sorted(range(len(self.comparisons)), key=lambda index: severity(self.comparisons[index]))[
            ::-1
        ]
        return [index for index in order[:count] if self.comparisons[index].wrong]

    def _percentiles(self, field: str) -> dict[str, float]:
        errors = [getattr(one.alignment, field) for one in self.comparisons if one.alignment is not None]
        every = np.concatenate(errors) if errors else np.zeros(0)
        return {f"p{p}" if p < 100 else "max": _percentile(every, p) for p in _PERCENTILES}

    def _per_class(self) -> dict[str, dict[str, int]]:
        counts: dict[str, dict[str, int]] = {}
        for ours, theirs, one in zip(self.reference, self.candidate, self.comparisons, strict=True):
            assert one.alignment is not None
            parts = (
                ("matched", ours, one.alignment.pairs[:, 0]),
                ("differing", ours, one.alignment.pairs[one.alignment.differing, 0]),
                ("missed", ours, one.alignment.missed),
                ("extra", theirs, one.alignment.extra),
            )
            for kind, side, indices in parts:
                for index in indices.tolist():
                    row = counts.setdefault(
                        side.names[index], dict.fromkeys(("matched", "differing", "missed", "extra"), 0)
                    )
                    row[kind] += 1
        return counts


def check_detections(
    reference: Subject,
    candidate: Subject,
    dataset: Dataset,
    tolerance: Tolerance,
    progress: Progress | None = None,
    order_ties: bool = False,
) -> DetectionCheck:
    """Run both on every image, one at a time, and compare; ``order_ties`` as in ``alignment.Cuts``.

    An image on which the candidate fails counts as one without detections, and as a loss.
    """
    total = 2 * len(dataset)
    guarded = _Guarded(candidate.detector)
    ours = list(run_detector(reference.detector.batch, dataset, 1, _offset(progress, 0, total)))
    theirs = list(run_detector(guarded.batch, dataset, 1, _offset(progress, len(dataset), total)))
    contract = reference.detector.contract
    cuts = detection_cuts(contract, tolerance, order_ties)
    each = [
        compare_detections(on_canvas(a, contract), on_canvas(b, contract), **cuts)
        for a, b in zip(ours, theirs, strict=True)
    ]
    names = tuple(image.id for image in dataset)
    summary = summarise(zip(names, each, strict=True), tolerance.matched)
    accuracy = None
    loss = guarded.failure or _other_names(contract, candidate.detector.contract)
    if loss is None and has_labels(dataset) and contract.task == "detections":
        accuracy = _accuracy(dataset, ours, theirs)
    loss = loss or _confident_loss(each, ours, theirs, tolerance)
    if loss is None and accuracy is not None:
        loss = _loss(accuracy, tolerance)
    return DetectionCheck(names, tuple(each), tuple(ours), tuple(theirs), summary, accuracy, loss)


class _Guarded:
    """A detector whose ``ArtefactError`` is kept in ``failure``, the first one, and ends nothing."""

    def __init__(self, detector: BatchDetector) -> None:
        self._detector = detector
        self.failure: str | None = None

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        try:
            return self._detector.batch(frames)
        except ArtefactError as error:
            self.failure = self.failure or f"the candidate failed: {error}"
            contract = self._detector.contract
            names = contract.names if contract.task == "detections" else PROPOSAL_NAMES
            return [Detections.empty(names, size=(frame.shape[0], frame.shape[1])) for frame in frames]


def _other_names(ours: Contract, theirs: Contract) -> str | None:
    """What the candidate calls otherwise: classes meet by name, whatever their order."""
    differing = sorted(set(ours.names) ^ set(theirs.names))
    if not differing or ours.task == "proposals":
        return None
    return f"the class names differ: only one side has {list_names(differing)}"


def _confident_loss(
    each: Sequence[Comparison], ours: Sequence[Detections], theirs: Sequence[Detections], tolerance: Tolerance
) -> str | None:
    """Whether too many of the detections that an application would act on are not alike."""
    total = wrong = 0
    for one, reference, candidate in zip(each, ours, theirs, strict=True):
        assert one.alignment is not None
        differing = one.alignment.pairs[one.alignment.differing, 0]
        lost = np.concatenate((reference.scores[differing], reference.scores[one.alignment.missed]))
        wrong += int((lost >= _CONFIDENT).sum() + (candidate.scores[one.alignment.extra] >= _CONFIDENT).sum())
        total += int((reference.scores >= _CONFIDENT).sum())
    if wrong <= round((1.0 - tolerance.confident) * total):
        return None
    return f"{wrong} of {total} detections with a score of at least {_CONFIDENT} are not alike"


def _accuracy(
    dataset: Dataset, ours: Sequence[Detections], theirs: Sequence[Detections]
) -> dict[str, Accuracy]:
    a, b = (
        report_detections([to_dataset_labels(each, dataset) for each in side], dataset, "")
        for side in (ours, theirs)
    )
    per_class = {
        name: Accuracy((a.per_class[name].ap50, b.per_class[name].ap50), (_recall(a, name), _recall(b, name)))
        for name in dataset.names
    }
    recalls = [_mean_recall(side) for side in (a, b)]
    return {"mean": Accuracy((a.map50, b.map50), (recalls[0], recalls[1])), **per_class}


def _recall(report: EvaluationReport, name: str) -> float:
    """The recall that all of the detections together reach."""
    curve = report.curves[name]
    if not curve.objects:
        return float("nan")
    return float(curve.recall[-1]) if len(curve.recall) else 0.0


def _mean_recall(report: EvaluationReport) -> float:
    values = [_recall(report, name) for name in report.curves]
    finite = [value for value in values if not np.isnan(value)]
    return float(np.mean(finite)) if finite else float("nan")


def _loss(accuracy: dict[str, Accuracy], tolerance: Tolerance) -> str | None:
    """What the candidate loses beyond the tolerance, over all classes; a gain is no loss."""
    mean = accuracy["mean"]
    for label, values, limit in (
        ("mAP50", mean.ap50, tolerance.map50_drop),
        ("recall", mean.recall, tolerance.recall_drop),
    ):
        if values[0] - values[1] > limit:
            return f"{label} falls from {values[0]:.4f} to {values[1]:.4f}"
    return None


def _offset(progress: Progress | None, start: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(start + done, total)


def _percentile(values: Any, percent: int) -> float:
    return float(np.percentile(values, percent)) if len(values) else 0.0


def _pair(values: tuple[float, float]) -> dict[str, float | None]:
    reference, candidate = (None if np.isnan(v) else float(v) for v in values)
    delta = None if reference is None or candidate is None else candidate - reference
    return {"reference": reference, "candidate": candidate, "delta": delta}
