"""Detection by detection: both artefacts, whole, on the same images, and what accuracy that costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.data.dataset import Dataset, list_names
from anchorline.evaluation.evaluation import (
    Progress,
    part_of,
    report_detections,
    run_detector,
)
from anchorline.evaluation.metrics import mean_of_known
from anchorline.evaluation.pictures import PAIR, Panel, contact_sheet, draw_pair
from anchorline.runtime.canvas import PROPOSAL_NAMES
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import ArtefactError
from anchorline.verify.compare import Comparison, ComparisonSummary, Tolerance, compare_outputs, summarise
from anchorline.verify.stages import Subject

WORST_IMAGES = 8

# Okabe and Ito's, as BGR: told apart by colour-blind readers, in the words of the titles.
MISSED_COLOUR = (0, 94, 213)  # vermilion
EXTRA_COLOUR = (233, 180, 86)  # sky blue
DIFFERING_COLOUR = (66, 228, 240)  # yellow

_NAME_LENGTH = 40
_PERCENTILES = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
_CONFIDENT = 0.5


@dataclass(frozen=True)
class Accuracy:
    """What labelled data says of both sides, for one class or all: AP50 and the recall at IoU 0.5."""

    ap50: tuple[float, float]
    recall: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        figures = {}
        for name, pair in (("ap50", self.ap50), ("recall", self.recall)):
            reference, candidate = pair
            figures[name] = {"reference": reference, "candidate": candidate, "delta": candidate - reference}
        return figures


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
        figures = {**self.summary.to_json(), "passed": self.passed}
        for key, name in (("box_error_px", "box_errors"), ("score_error", "score_errors")):
            each = [getattr(one.aligned, name) for one in self.comparisons]
            every = np.concatenate([*each, np.zeros(0 if any(map(len, each)) else 1, np.float32)])
            figures[key] = {name: float(np.percentile(every, p)) for name, p in _PERCENTILES.items()}
        return {**figures, "per_class": self._per_class(), "accuracy": self.accuracy, "loss": self.loss}

    def write_worst(self, dataset: Dataset, path: Path, count: int = WORST_IMAGES) -> list[str]:
        """Write the ``count`` images that differ most side by side, the reference left, the worst first.

        Missed boxes are vermilion (left), extra ones sky blue (right), those beyond the tolerances yellow
        (on both sides); what agrees or is excused is thin and grey. Returns the names of the images; where
        none differ nothing is written.
        """
        each = zip(self.names, dataset, self.reference, self.candidate, self.comparisons, strict=True)
        rows = sorted((row for row in each if row[-1].wrong), key=lambda row: severity(row[-1]), reverse=True)
        pairs, titles = [], []
        for name, image, reference, candidate, one in rows[:count]:
            differing = one.aligned.pairs[one.aligned.differing]
            panels = []
            for side, moved, alone, colour in (
                (reference, differing[:, 0], one.aligned.missed, MISSED_COLOUR),
                (candidate, differing[:, 1], one.aligned.extra, EXTRA_COLOUR),
            ):
                quiet = np.setdiff1d(np.arange(len(side)), np.concatenate([moved, alone]))
                marked = [(side[moved], DIFFERING_COLOUR), (side[alone], colour)]
                panels.append(Panel(side.boxes[quiet], marked))
            pairs.append(draw_pair(image.load(), *panels))
            short = name if len(name) <= _NAME_LENGTH else f"...{name[3 - _NAME_LENGTH :]}"
            titles.append(
                f"{short}: {one.missed} missed (vermilion), {one.extra} extra (blue), {one.differing} differ "
                f"(yellow); boxes to {one.max_box_error:.2g} px, scores to {one.max_score_error:.2g}"
            )
        if pairs:
            contact_sheet(pairs, path, 1, titles, PAIR)
        return [row[0] for row in rows[:count]]

    def _per_class(self) -> dict[str, dict[str, int]]:
        kinds = ("matched", "differing", "missed", "extra")
        counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(kinds, 0))
        for ours, theirs, one in zip(self.reference, self.candidate, self.comparisons, strict=True):
            found = one.aligned
            matched, differing = found.pairs[:, 0], found.pairs[found.differing, 0]
            for kind, indices in zip(kinds, (matched, differing, found.missed, found.extra), strict=True):
                side = theirs if kind == "extra" else ours
                for index in indices:
                    counts[side.names[index]][kind] += 1
        return dict(counts)


def check_detections(
    reference: Subject,
    candidate: Subject,
    dataset: Dataset,
    tolerance: Tolerance,
    progress: Progress | None = None,
    order_ties: bool = False,
) -> DetectionCheck:
    """Run both on every image, one at a time, and compare; ``order_ties`` as in ``compare.Cuts``.

    An image on which the candidate fails counts as one without detections, and as a loss.
    """
    contract = reference.detector.contract
    failures: list[str] = []

    def guarded(frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        try:
            return candidate.detector.batch(frames)
        except ArtefactError as error:
            failures.append(f"the candidate failed: {error}")
            own = candidate.detector.contract
            names = own.names if own.task == "detections" else PROPOSAL_NAMES
            return [Detections.empty(names, size=(frame.shape[0], frame.shape[1])) for frame in frames]

    total = 2 * len(dataset)
    ours = list(run_detector(reference.detector.batch, dataset, 1, part_of(progress, 0, total)))
    theirs = list(run_detector(guarded, dataset, 1, part_of(progress, len(dataset), total)))
    each = compare_outputs(ours, theirs, contract, tolerance, order_ties=order_ties)
    image_names = tuple(image.id for image in dataset)
    loss, accuracy = failures[0] if failures else None, None
    if loss is None and contract.task == "detections":
        # Classes meet by name, whatever their order.
        other_names = sorted(set(contract.names) ^ set(candidate.detector.contract.names))
        if other_names:
            loss = f"the class names differ: only one side has {list_names(other_names)}"
        elif dataset.has_labels:
            accuracy = _accuracy(dataset, ours, theirs)
    # Of the detections that an application would act on some may differ.
    wrong = sum(
        int((one.aligned.wrong_scores(*sides) >= _CONFIDENT).sum())
        for one, *sides in zip(each, ours, theirs, strict=True)
    )
    confident = sum(int((one.scores >= _CONFIDENT).sum()) for one in ours)
    if loss is None and wrong > round((1.0 - tolerance.confident) * confident):
        loss = f"{wrong} of {confident} detections with a score of at least {_CONFIDENT} are not alike"
    if accuracy is not None:
        mean = accuracy["mean"]
        for label, (before, after), limit in (
            ("mAP50", mean.ap50, tolerance.map50_drop),
            ("recall", mean.recall, tolerance.recall_drop),
        ):
            if loss is None and before - after > limit:  # a gain is no loss
                loss = f"{label} falls from {before:.4f} to {after:.4f}"
    summary = summarise(each, tolerance.matched, image_names)
    return DetectionCheck(image_names, tuple(each), tuple(ours), tuple(theirs), summary, accuracy, loss)


def _accuracy(
    dataset: Dataset, ours: Sequence[Detections], theirs: Sequence[Detections]
) -> dict[str, Accuracy]:
    """By class name, and under ``mean``."""
    a, b = (report_detections(side, dataset, "") for side in (ours, theirs))
    recalls = [mean_of_known([curve.reached for curve in side.curves.values()]) for side in (a, b)]
    found = {"mean": Accuracy((a.map50, b.map50), (recalls[0], recalls[1]))}
    for name in dataset.names:
        one, other = a.curves[name], b.curves[name]
        found[name] = Accuracy((one.area, other.area), (one.reached, other.reached))
    return found


def severity(comparison: Comparison) -> tuple[int, int, float, float]:
    """A key to sort by, larger where two results differ more: detections that have no partner count
    first, then those that moved, then by how much."""
    unmatched = comparison.missed + comparison.extra
    return unmatched, comparison.differing, comparison.max_box_error, comparison.max_score_error
