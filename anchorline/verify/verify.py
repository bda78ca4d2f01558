"""Verification, the whole of it: stages, detections, traps, verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.data.dataset import Dataset
from anchorline.evaluation.evaluate import Progress
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import DataError, SettingsError
from anchorline.verify.compare import ComparisonSummary, compare_all
from anchorline.verify.detection_check import DetectionCheck, SideBySide, check_detections, write_side_by_side
from anchorline.verify.report import VerifyReport
from anchorline.verify.stage_check import (
    Frames,
    LayerResult,
    StageResult,
    check_stages,
    first_differing_layer,
)
from anchorline.verify.stages import Subject
from anchorline.verify.tolerances import Tolerance, detection_cuts, on_canvas, tolerance_for
from anchorline.verify.traps import Compare, largest_batch, run_traps, traps

# Images whose stages are compared: enough to see a fault, few enough to hold every map in memory.
_STAGE_IMAGES = 3
_CHOICES = ("proposals", "detections")
WORST_IMAGES = 8

# Of the detections of a network whose stages all agree: a near-tie among the proposals can give one of them
# another box. Seen: 2 of 214 on a ResNet-50 with drawn weights.
TIED_SHARE = 0.02
# Those of an ONNX file; its stages always run on onnxruntime's CPU provider.
_GPU_PROVIDERS = ("cuda", "tensorrt", "tensorrt-rtx")


def verify(
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
    _check_comparable(reference, candidate, dataset)
    limits = tolerance or tolerance_for(ours.precision, theirs.precision)
    batches = _stage_batches(dataset, (ours.contract, theirs.contract))
    stages, note, layer = _look_inside(reference, candidate, batches, limits, bisect)
    # Where each stage does the same with the same inputs, near-equal scores are left to rounding.
    sound = stages is not None and all(stage.passed for stage in stages)
    if sound:
        limits = _with_ties(limits)
    chosen = [
        t for t in traps(largest_batch(theirs.contract)) if which_traps is None or t.name in which_traps
    ]
    runs = 2 * len(dataset)
    detections = check_detections(
        reference, candidate, dataset, limits, _part(progress, 0, runs + len(chosen)), sound
    )
    results = run_traps(
        *(chosen, ours, theirs, _trap_comparison(ours.contract, limits, sound)),
        progress=_part(progress, runs, runs + len(chosen)),
        settle=_same_stages(reference, candidate, limits) if sound else None,
    )
    return VerifyReport(
        reference=reference.identity(),
        candidate=candidate.identity(),
        data=dataset.spec,
        tolerance=dataclasses.asdict(limits),
        detections=detections,
        traps=tuple(results),
        stages=stages,
        stages_note=note,
        layer=layer,
        notes=() if stages is None else _elsewhere(reference, candidate),
    )


def _same_stages(
    reference: Subject, candidate: Subject, limits: Tolerance
) -> Callable[[NDArray[np.uint8]], bool]:
    """Whether every stage does the same for a frame, each given what the reference's gave it.

    The choices, of proposals and detections, are left out on a frame of one colour: the maps are constant
    there, so whole rows of anchors share a score, and the images have shown how the candidate chooses.
    """

    def same(frame: NDArray[np.uint8]) -> bool:
        stages = check_stages(reference, candidate, [[frame]], limits)
        _release(reference, candidate)
        blank = bool((frame == frame[0, 0]).all())
        return all(stage.passed or (blank and stage.name in _CHOICES) for stage in stages)

    return same


def _release(*sides: Subject) -> None:
    for side in sides:
        if side.stages is not None:
            side.stages.release()


def _with_ties(limits: Tolerance) -> Tolerance:
    """Room for proposals that changed places far upstream, and so for boxes that no excuse explains."""
    share = 1.0 - TIED_SHARE
    return dataclasses.replace(
        limits,
        matched=min(limits.matched, share),
        confident=min(limits.confident, share),
        traps=min(limits.traps, share),
    )


def _check_comparable(reference: Subject, candidate: Subject, dataset: Dataset) -> None:
    tasks = [side.detector.contract.task for side in (reference, candidate)]
    if tasks[0] != tasks[1]:
        raise SettingsError(
            f"{reference.path} gives {tasks[0]}, {candidate.path} gives {tasks[1]}; expected one task, "
            "export one of them again with --task"
        )
    if not len(dataset):
        raise DataError(f"{dataset.spec}: has no images; expected at least one to compare on")


def _elsewhere(*sides: Subject) -> tuple[str, ...]:
    """What to know where the detections come from another processor than the stages."""
    return tuple(
        f"{side.path.name}: its stages ran on the CPU, its detections and traps on {side.detector.provider}"
        for side in sides
        if side.detector.provider in _GPU_PROVIDERS
    )


def _part(progress: Progress | None, start: int, total: int) -> Progress | None:
    """``progress`` for a part of the work that begins at ``start`` of ``total``."""
    return None if progress is None else lambda done, _: progress(start + done, total)


def _trap_comparison(contract: Contract, limits: Tolerance, order_ties: bool) -> Compare:
    """How the traps compare two lists of results."""
    cuts = detection_cuts(contract, limits, order_ties)
    cuts["score_threshold"] = max(cuts["score_threshold"], limits.trap_score)

    def prepared(side: list[Detections]) -> list[Detections]:
        return [on_canvas(each[each.scores >= limits.trap_score], contract) for each in side]

    def compare(ours: list[Detections], theirs: list[Detections]) -> ComparisonSummary:
        return compare_all(prepared(ours), prepared(theirs), **cuts, required_share=limits.traps)

    return compare


def write_worst_images(report: DetectionCheck, dataset: Dataset, path: Path) -> bool:
    """Write the images on which the two differ most side by side; False where none differ."""
    rows = [
        SideBySide(
            report.names[index],
            dataset.images[index].load(),
            report.reference[index],
            report.candidate[index],
            report.comparisons[index],
        )
        for index in report.worst(WORST_IMAGES)
    ]
    if rows:
        write_side_by_side(path, rows)
    return bool(rows)


def _look_inside(
    reference: Subject, candidate: Subject, batches: Sequence[Frames], limits: Tolerance, bisect: bool
) -> tuple[tuple[StageResult, ...] | None, str | None, LayerResult | None]:
    for side in (reference, candidate):
        if side.stages is None:
            return None, f"{side.path.name} shows its outputs only; compared end to end", None
    stages = tuple(check_stages(reference, candidate, batches, limits))
    inside = [stage.name for stage in stages if not stage.passed and stage.name != "preprocess"]
    layer = first_differing_layer(reference, candidate, batches[-1], limits) if bisect and inside else None
    _release(reference, candidate)
    return stages, None, layer


def _stage_batches(dataset: Dataset, contracts: Sequence[Contract]) -> list[Frames]:
    """One image alone, then, where both models take batches, two of different shape together.

    The second of them fills a part of the canvas only, so that what happens in the padding counts. Of a
    single image, which may be all there is time for, the two together.
    """
    frames = [image.load() for image in dataset.images[:_STAGE_IMAGES]]
    part = _narrow(frames[-1])
    if any(contract.max_batch == 1 for contract in contracts):
        return [[frames[0]], [part]]
    if len(frames) == 1:
        return [[frames[0], part]]
    return [[frames[0]], [frames[min(1, len(frames) - 1)], part]]


def _narrow(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The left half of a frame, which leaves much of a canvas empty."""
    return np.ascontiguousarray(frame[:, : max(1, frame.shape[1] // 2)])
