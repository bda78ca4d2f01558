"""Verification, the whole of it: stages, detections and traps of two artefacts, the verdict, the record."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anchorline.data.dataset import Dataset, list_names
from anchorline.evaluation.evaluation import Progress, part_of, report_detections, run_detector
from anchorline.evaluation.metrics import mean_of_known
from anchorline.evaluation.pictures import PAIR, Panel, contact_sheet, draw_pair
from anchorline.runtime.canvas import PROPOSAL_NAMES
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import ArtefactError, DataError, ParityError, SettingsError
from anchorline.runtime.io.files import plain, sha256_of, write_json
from anchorline.verify.compare import (
    Comparison,
    ComparisonSummary,
    Tolerance,
    compare_outputs,
    summarise,
    tolerance_for,
)
from anchorline.verify.stages import LayerResult, StageResult, Subject, check_stages, first_differing_layer
from anchorline.verify.traps import Trap, TrapResult, largest_batch, run_traps, traps

if TYPE_CHECKING:
    from rich.table import Table

# Of the detections of a network whose stages all agree: a near-tie among the proposals can give one of them
# another box. Seen: 2 of 214 on a ResNet-50 with drawn weights.
_TIED_SHARE = 0.02
# Images whose stages are compared: enough to see a fault, few enough to hold every map in memory.
_STAGE_IMAGES = 3
_CHOICES = ("proposals", "detections")
_GPU_PROVIDERS = ("cuda", "tensorrt", "tensorrt-rtx")  # of an ONNX file; its stages always run on the CPU
_CONFIDENT = 0.5
_PERCENTILES = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
# Okabe and Ito's, as BGR: told apart by colour-blind readers, in the words of the titles.
MISSED_COLOUR = (0, 94, 213)  # vermilion
EXTRA_COLOUR = (233, 180, 86)  # sky blue
DIFFERING_COLOUR = (66, 228, 240)  # yellow
_NAME_LENGTH = 40


@dataclass(frozen=True)
class Accuracy:
    """What labelled data says of both sides, for one class or all: AP50 and the recall at IoU 0.5."""

    ap50: tuple[float, float]
    recall: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        return {
            name: {"reference": reference, "candidate": candidate, "delta": candidate - reference}
            for name, (reference, candidate) in vars(self).items()
        }


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
            figures[key] = {label: float(np.percentile(every, p)) for label, p in _PERCENTILES.items()}
        return {**figures, "per_class": self._per_class(), "accuracy": self.accuracy, "loss": self.loss}

    def write_worst(self, dataset: Dataset, path: Path, count: int = 8) -> list[str]:
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
                names = (theirs if kind == "extra" else ours).names
                for index in indices:
                    counts[names[index]][kind] += 1
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


@dataclass(frozen=True)
class VerifyReport:
    """Everything a verification found.

    ``reference`` and ``candidate`` are the subjects' identities, ``tolerance`` the limits in force.
    ``stages`` is None with the reason in ``stages_note`` where a side shows only its whole; ``layer`` is
    the result of a bisection, None when none was asked for or nothing differs.
    """

    reference: dict[str, Any]
    candidate: dict[str, Any]
    data: str
    tolerance: dict[str, Any]
    stages: tuple[StageResult, ...] | None = field(default=None, kw_only=True)
    stages_note: str | None = field(default=None, kw_only=True)
    layer: LayerResult | None = field(default=None, kw_only=True)
    detections: DetectionCheck
    traps: tuple[TrapResult, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every stage, every trap and the detections hold."""
        return not self._faults()

    @property
    def first_divergence(self) -> str | None:
        """The first stage that differs; without one, ``detections`` or the first trap that failed."""
        return next(iter(self._faults()), None)

    @property
    def reason(self) -> str | None:
        """The first divergence and what was seen there, in one line; None when all holds."""
        layer = f", first in layer {self.layer.layer}" if self.layer and self.layer.layer else ""
        return next((f"{name}: {detail}{layer}" for name, detail in self._faults().items()), None)

    def _faults(self) -> dict[str, str]:
        """What differs, in order, and what was seen there."""
        faults = {stage.name: stage.detail for stage in self.stages or () if not stage.passed}
        if not self.detections.passed:
            faults.setdefault("detections", self.detections.detail)
        return faults | {f"trap: {trap.name}": trap.detail for trap in self.traps if not trap.passed}

    def describe(self) -> str:
        """The verdict in one line."""
        if not self.passed:
            return f"differs in {self.reason}"
        compared = sum(stage.compared for stage in self.stages or ())
        inside = f"{compared} stages hold, " if compared else ""
        traps = f", {len(self.traps)} traps hold" if self.traps else ""
        return f"{inside}{self.detections.summary.brief()}{traps}"

    def to_json(self) -> dict[str, Any]:
        """The plain dict that ``anchorline verify --json`` and the record beside the artefact hold."""
        written = {"candidate": "artefact", "layer": "bisect"}
        figures = {written.get(name, name): plain(value) for name, value in vars(self).items()}
        return {"passed": self.passed, "first_divergence": self.first_divergence, **figures}

    def render(self) -> Table:
        """One row for each stage, the detections, and each trap."""
        from rich.markup import escape
        from rich.table import Table

        sides = [
            f"{side['name']} ({side['provider']}, {side['precision']})"
            for side in (self.reference, self.candidate)
        ]
        verdict = "the numbers held" if self.passed else f"they differ; {self.reason}"
        table = Table(
            *("", "", "what was found"),
            title=escape(f"{sides[0]} and {sides[1]} on {self.data}"),
            caption=escape("\n".join([verdict, *self.notes])),
            caption_justify="left",
        )

        def add(name: str, passed: bool | None, detail: str) -> None:
            mark = "-" if passed is None else "[green]ok[/]" if passed else "[bold red]differs[/]"
            table.add_row(name, mark, escape(detail))

        for stage in self.stages or ():
            add(stage.name, stage.passed if stage.compared else None, stage.detail)
        if self.stages is None:
            add("stages", None, self.stages_note or "not compared")
        table.add_section()
        add(f"{self.detections.summary.images} images", self.detections.passed, self.detections.detail)
        for name, each in (self.detections.accuracy or {}).items():
            ap50, recall = ("{:.4f} and {:.4f}".format(*pair) for pair in (each.ap50, each.recall))
            table.add_row(f"  {escape(name)}", "", f"AP50 {ap50}, recall {recall}")
        table.add_section()
        for trap in self.traps:
            brief = trap.comparison.brief() if trap.passed and trap.comparison else trap.detail
            add(trap.name, trap.passed, brief)
        return table


def verify_subjects(
    reference: Subject,
    candidate: Subject,
    dataset: Dataset,
    *,
    bisect: bool = False,
    which_traps: Sequence[str] | None = None,
    tolerance: Tolerance | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare ``candidate`` with ``reference`` on the images of ``dataset``.

    ``tolerance`` is by default that of the less exact precision of the two. With ``bisect`` the first
    differing layer is looked for when a stage differs. ``which_traps`` (names) is for callers without the
    time for all of them (``verify/traps.py``). ``progress`` counts each image twice, and the traps.
    Raises ``SettingsError`` for two different tasks, ``DataError`` for data without images.
    """
    ours, theirs = reference.detector, candidate.detector
    if ours.contract.task != theirs.contract.task:
        raise SettingsError(
            f"{reference.path} gives {ours.contract.task}, {candidate.path} gives {theirs.contract.task}; "
            "expected one task, export one of them again with --task"
        )
    if not len(dataset):
        raise DataError(f"{dataset.spec}: has no images; expected at least one to compare on")
    limits = tolerance or tolerance_for(ours.precision, theirs.precision)
    closed = [side.path.name for side in (reference, candidate) if side.stages is None]
    stages, layer = (None, None) if closed else _look_inside(reference, candidate, dataset, limits, bisect)
    # Where each stage does the same with the same inputs, near-equal scores are left to rounding, and there
    # is room for proposals that changed places far upstream, and so for boxes that no excuse explains.
    sound = stages is not None and all(stage.passed for stage in stages)
    if sound:
        shares = ("matched", "confident", "traps")
        room = {name: min(getattr(limits, name), 1.0 - _TIED_SHARE) for name in shares}
        limits = dataclasses.replace(limits, **room)
    every = traps(largest_batch(theirs.contract))
    chosen = [trap for trap in every if which_traps is None or trap.name in which_traps]
    runs = 2 * len(dataset)
    total = runs + len(chosen)
    return VerifyReport(
        reference=reference.identity(),
        candidate=candidate.identity(),
        data=dataset.spec,
        tolerance=dataclasses.asdict(limits),
        detections=check_detections(
            reference, candidate, dataset, limits, part_of(progress, 0, total), order_ties=sound
        ),
        traps=tuple(_run_traps(reference, candidate, chosen, limits, sound, part_of(progress, runs, total))),
        stages=stages,
        stages_note=f"{closed[0]} shows its outputs only; compared end to end" if closed else None,
        layer=layer,
        notes=tuple(
            f"{side.path.name}: its stages ran on the CPU, its detections and traps on {each.provider}"
            for side, each in ((reference, ours), (candidate, theirs))
            if each.provider in _GPU_PROVIDERS and not closed
        ),
    )


def _look_inside(
    reference: Subject, candidate: Subject, dataset: Dataset, limits: Tolerance, bisect: bool
) -> tuple[tuple[StageResult, ...], LayerResult | None]:
    """Every stage, on one image alone, then, where both models take batches, on two together.

    The second of them fills a part of the canvas only, so that what happens in the padding counts. Of a
    single image, which may be all there is time for, the two together.
    """
    frames = [image.load() for image in dataset.images[:_STAGE_IMAGES]]
    last = frames[-1]
    left_half = np.ascontiguousarray(last[:, : max(1, last.shape[1] // 2)])
    if 1 in (reference.detector.contract.max_batch, candidate.detector.contract.max_batch):
        batches = [frames[:1], [left_half]]
    else:
        batches = [frames[:1], [frames[1], left_half]] if len(frames) > 1 else [[last, left_half]]
    stages = tuple(check_stages(reference, candidate, batches, limits))
    layer = None
    if bisect and any(not stage.passed and stage.name != "preprocess" for stage in stages):
        layer = first_differing_layer(reference, candidate, batches[-1], limits)
    for side in (reference, candidate):
        side.inside.release()
    return stages, layer


def _run_traps(
    reference: Subject,
    candidate: Subject,
    chosen: Sequence[Trap],
    limits: Tolerance,
    sound: bool,
    progress: Progress | None,
) -> list[TrapResult]:
    one, other = reference.detector, candidate.detector

    def compare(ours: list[Detections], theirs: list[Detections]) -> ComparisonSummary:
        least = limits.trap_score
        each = compare_outputs(ours, theirs, one.contract, limits, order_ties=sound, least_score=least)
        return summarise(each, limits.traps)

    def settle(frame: NDArray[np.uint8]) -> bool:
        """Whether every stage does the same for a frame, each given what the reference's gave it.

        The choices, of proposals and detections, are left out on a frame of one colour: the maps are
        constant there, so whole rows of anchors share a score, and the images have shown how the
        candidate chooses.
        """
        found = check_stages(reference, candidate, [[frame]], limits)
        for side in (reference, candidate):
            side.inside.release()
        blank = bool((frame == frame[0, 0]).all())
        return all(stage.passed or (blank and stage.name in _CHOICES) for stage in found)

    return run_traps(chosen, one, other, compare, progress, settle if sound else None)


# The record beside an artefact, ``<artefact>.verify.json``: what it was compared with, and the verdict. It is
# keyed by the SHA-256 of both files, so a record that outlives its artefact is known for stale.


def record_path(artefact: Path) -> Path:
    """Where the record of ``artefact`` lies."""
    return artefact.with_name(f"{artefact.name}.verify.json")


def write_record(artefact: Path, report: VerifyReport) -> Path:
    """Write what a verification of ``artefact`` found; returns the record's path."""
    figures = report.to_json()
    figures["artefact"].update(_key(artefact))
    return _write(artefact, {**figures, "not_executed": None})


def settle(artefact: Path, report: VerifyReport, sides: str) -> None:
    """Record what a verification of a new ``artefact`` found, in the draft that both are published from
    (``files.atomic_path``); raises ``ParityError``, so that nothing is, where ``sides`` differ."""
    if not report.passed:
        raise ParityError(
            f"{artefact}: {sides} disagree in {report.reason}; the file was not published, --no-verify "
            "publishes it all the same"
        )
    write_record(artefact, report)


def write_not_executed(artefact: Path, reason: str, reference: Path | None = None) -> Path:
    """Record that ``artefact`` was not verified, and why: told not to, or it does not run here."""
    keys = {"artefact": _key(artefact), "reference": reference and _key(reference)}
    return _write(artefact, {"passed": None, **keys, "not_executed": reason})


def write_tuned(artefact: Path, reference: Path, text: str) -> Path:
    """Record that ``artefact`` differs from ``reference`` on purpose; ``text`` says what it keeps."""
    keys = {"artefact": _key(artefact), "reference": _key(reference)}
    return _write(artefact, {"passed": True, **keys, "not_executed": None, "tuned": text})


def _key(path: Path) -> dict[str, str]:
    return {"name": path.name, "sha256": sha256_of(path)}


def _write(artefact: Path, figures: dict[str, Any]) -> Path:
    from anchorline import __version__

    path = record_path(artefact)
    stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_json(path, {**figures, "date": stamp, "anchorline": __version__})
    return path
