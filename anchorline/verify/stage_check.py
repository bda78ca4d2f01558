"""Stage by stage: each stage of the candidate, given the reference's inputs, must give its outputs.

Where one does not, bisection names the layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import Placement, check_frame, to_detections
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import ArtefactError, DataError
from anchorline.verify.compare import Comparison, compare_detections, summarise
from anchorline.verify.stages import (
    ORDER,
    Arrays,
    StageRunner,
    Subject,
    TensorError,
    is_stage,
    stage_of,
    tensor_error,
    worst_of,
)
from anchorline.verify.tolerances import Tolerance, detection_cuts, on_canvas, proposal_cuts

# A canvas may round to the next grey level, on another processor or in another number format.
_GREY_LEVELS = 1.0
# Which of several candidates of equal score enter the RPN's NMS is any runtime's own choice.
_PROPOSALS_MATCHED = 0.98
# Relative; beside it a score keeps single precision's absolute rounding.
_SAME_SCORE = 1e-6

Frames = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True)
class StageResult:
    """One stage: ``used`` is the share of the tolerance used up (above 1 it differs), infinite where no
    number says how far apart the two are; ``detail`` is one line. A stage that only one side has is not
    ``compared``, and passes."""

    name: str
    passed: bool
    used: float
    detail: str
    compared: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "compared": self.compared,
            "tolerance_used": self.used if np.isfinite(self.used) else None,
            "detail": self.detail,
        }


def canvas_inputs(subject: Subject, frames: Frames) -> tuple[dict[str, NDArray[Any]], list[Placement]]:
    """The network's inputs for ``frames``, as the subject prepares them, and where each frame lies."""
    assert subject.stages is not None
    inputs, placements = subject.stages.prepare([check_frame(frame) for frame in frames])
    return {name: value.copy() for name, value in inputs.items()}, placements


def check_stages(
    reference: Subject, candidate: Subject, batches: Sequence[Frames], tolerance: Tolerance
) -> list[StageResult]:
    """All stages in order, each with its worst case over the ``batches``; what only one side has is said.

    Both subjects have ``stages``. Where the canvases themselves differ in size nothing else is compared.
    """
    assert reference.stages is not None
    assert candidate.stages is not None
    worst: dict[str, StageResult] = {}
    for frames in batches:
        for result in _check_batch(reference, candidate, frames, tolerance):
            if result.name not in worst or result.used > worst[result.name].used:
                worst[result.name] = result
    return [worst[name] for name in ORDER if name in worst]


def _check_batch(
    reference: Subject, candidate: Subject, frames: Frames, tolerance: Tolerance
) -> list[StageResult]:
    ours, theirs = reference.detector.contract, candidate.detector.contract
    assert reference.stages is not None
    assert candidate.stages is not None
    inputs, placements = canvas_inputs(reference, frames)
    other_inputs, _ = canvas_inputs(candidate, frames)
    preprocess = _check_canvas(ours, theirs, inputs, other_inputs)
    if ours.canvas != theirs.canvas:
        return [preprocess]
    inputs, other_inputs = same_inputs(inputs, ours, theirs)
    expected = reference.stages.run(inputs, {})
    fed = {name: value for name, value in expected.items() if is_stage(name)}
    found = _run_fed(candidate.stages, other_inputs, fed)
    results = [preprocess, *_check_tensors(expected, found, len(frames), tolerance)]
    if all(name in side for name in ("proposals", "proposal_scores") for side in (expected, found)):
        results.append(_check_proposals(expected, found, ours, placements, tolerance))
    results.append(_check_outputs(expected, found, ours, theirs, placements, tolerance))
    return _with_unshared(results, expected, found)


def _with_unshared(results: Sequence[StageResult], expected: Arrays, found: Arrays) -> list[StageResult]:
    """``results`` and, said in words, what one side has and the other lacks."""
    rows = {result.name: result for result in results}
    for side, own, other in (("reference", expected, found), ("candidate", found, expected)):
        for value in own:
            if not is_stage(value) or value in other:
                continue
            stage, text = stage_of(value), f"only the {side} has {value}"
            row = rows.get(stage)
            rows[stage] = (
                StageResult(stage, True, 0.0, text, compared=False)
                if row is None
                else dataclasses.replace(row, detail=f"{row.detail}; {text}")
            )
    return list(rows.values())


def _run_fed(stages: StageRunner, inputs: Arrays, feed: Arrays) -> dict[str, NDArray[Any]]:
    """The stages given ``feed``, or as much of it as fits: a stage of another shape takes nothing in."""
    try:
        return stages.run(inputs, feed)
    except ArtefactError:
        shapes = {name: value.shape for name, value in stages.run(inputs, {}).items()}
        fitting = {name: value for name, value in feed.items() if value.shape == shapes.get(name)}
        if len(fitting) == len(feed):
            raise
        return stages.run(inputs, fitting)


def same_inputs(
    inputs: Arrays, ours: Contract, theirs: Contract
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """The reference's inputs for both sides, each under its own names and in its own number format.

    Where one side takes whole grey levels, the other gets them as well.
    """
    images, sizes = (inputs[name] for name in ours.inputs)
    if "uint8" in (ours.input_dtype, theirs.input_dtype):
        images = np.rint(images)
    own, other = (
        dict(zip(side.inputs, (images.astype(side.input_dtype), sizes), strict=True))
        for side in (ours, theirs)
    )
    return own, other


def _check_canvas(ours: Contract, theirs: Contract, inputs: Arrays, other: Arrays) -> StageResult:
    if ours.canvas != theirs.canvas:
        shown = [f"{h}x{w}" for h, w in (theirs.canvas, ours.canvas)]
        return _broken("preprocess", f"the canvas is {shown[0]}, expected {shown[1]}")
    sizes = inputs[ours.inputs[1]], other[theirs.inputs[1]]
    if not np.array_equal(*sizes):
        detail = (
            f"a frame fills {other[theirs.inputs[1]].tolist()} of the canvas, expected {sizes[0].tolist()}"
        )
        return _broken("preprocess", detail)
    images = inputs[ours.inputs[0]].astype(np.float32), other[theirs.inputs[0]].astype(np.float32)
    if not np.isfinite(images[1]).all():
        return _broken("preprocess", "the canvas has values that are not finite")
    levels = float(np.abs(images[0] - images[1]).max(initial=0.0))
    return StageResult(
        "preprocess", levels <= _GREY_LEVELS, levels / _GREY_LEVELS, f"canvas within {levels:.2g} grey levels"
    )


def _check_tensors(expected: Arrays, found: Arrays, images: int, tolerance: Tolerance) -> list[StageResult]:
    """Every stage that is a tensor, not a choice of boxes."""
    errors: dict[str, TensorError] = {
        name: tensor_error(name, value, found[name], images)
        for name, value in expected.items()
        if is_stage(name) and name in found and stage_of(name) != "proposals"
    }
    results = []
    for stage, error in worst_of(errors, tolerance).items():
        used = error.share_of(tolerance)
        results.append(StageResult(stage, used <= 1.0, used, error.describe()))
    return results


def _check_proposals(
    expected: Arrays, found: Arrays, contract: Contract, placements: Sequence[Placement], tolerance: Tolerance
) -> StageResult:
    cuts = proposal_cuts(contract, tolerance)
    matched, total, excused, worst, reason = 0, 0, 0, 0.0, None
    for index in range(len(placements)):
        try:
            ours, theirs = (_as_detections(values, index) for values in (expected, found))
        except DataError as error:  # such as a box that is NaN
            return _broken("proposals", str(error))
        one = compare_detections(ours, theirs, **cuts)
        alike, tied = _alike(one), _tied(one, ours, theirs, _objectness(expected, index))
        matched, total = matched + alike, total + alike + one.wrong - tied
        excused += one.borderline + one.nms_ties + tied
        worst, reason = max(worst, one.max_box_error), reason or one.first_disagreement
    share = matched / total if total else 1.0
    used = (1.0 - share) / (1.0 - _PROPOSALS_MATCHED)
    detail = f"{share:.2%} of {total} proposals matched, boxes within {worst:.2g} px"
    if excused:
        detail += f", {excused} excused as ties"
    return StageResult(
        "proposals", used <= 1.0, used, detail if used <= 1.0 or not reason else f"{detail}; {reason}"
    )


def _alike(comparison: Comparison) -> int:
    """Pairs within the tolerances. Those that moved and were excused say nothing: where most scores are
    nearly 0 they would outnumber, and hide, the ones that differ."""
    found = comparison.alignment
    assert found is not None
    return int((~found.differing & ~found.excused).sum())


def _objectness(values: Arrays, index: int) -> NDArray[np.float64]:
    """One image's objectness as a score, of every anchor, rising."""
    logits = [each[index].ravel() for name, each in values.items() if stage_of(name) == "objectness"]
    if not logits:
        return np.zeros(0)
    return np.sort(1.0 / (1.0 + np.exp(-np.concatenate(logits).astype(np.float64))))


def _tied(
    comparison: Comparison, ours: Detections, theirs: Detections, objectness: NDArray[np.float64]
) -> int:
    """How many of the wrong proposals have the very score of another anchor.

    Which of them enter the NMS is any runtime's own choice. On a picture without content, whose maps are
    constant, whole rows of anchors share a score.
    """
    found = comparison.alignment
    assert found is not None
    differing = found.pairs[found.differing, 0]
    wrong = np.concatenate((ours.scores[differing], ours.scores[found.missed], theirs.scores[found.extra]))
    scores = wrong.astype(np.float64)
    same = np.maximum(_SAME_SCORE * np.minimum(scores, 1.0 - scores), np.finfo(np.float32).eps)
    sharing = np.searchsorted(objectness, scores + same, "right") - np.searchsorted(objectness, scores - same)
    return int((sharing > 1).sum())


def _as_detections(values: Arrays, index: int) -> Detections:
    """One image's proposals as detections of one class, on the canvas."""
    scores = values["proposal_scores"][index]
    there = scores > -1.0
    boxes = values["proposals"][index][there]
    return Detections(
        boxes, np.clip(scores[there], 0.0, 1.0), np.zeros(int(there.sum()), np.int64), ("object",)
    )


def _check_outputs(
    expected: Arrays,
    found: Arrays,
    ours: Contract,
    theirs: Contract,
    placements: Sequence[Placement],
    tolerance: Tolerance,
) -> StageResult:
    """The graph's own outputs, made from the reference's class logits, box regression and proposals."""
    try:
        reference, candidate = (
            to_detections(values, placements, contract)
            for values, contract in ((expected, ours), (found, theirs))
        )
    except ArtefactError as error:  # such as a label without a name
        return _broken("detections", str(error))
    cuts = detection_cuts(ours, tolerance)
    each = [
        compare_detections(on_canvas(a, ours), on_canvas(b, ours), **cuts)
        for a, b in zip(reference, candidate, strict=True)
    ]
    summary = summarise(((f"image {n}", one) for n, one in enumerate(each, start=1)), tolerance.matched)
    wrong, allowed, reason = summary.total.wrong, summary.allowed, summary.first_disagreement
    total = summary.total.matched + summary.total.missed + summary.total.extra
    detail = f"{total - wrong} of {total} detections alike"
    used = wrong / (allowed + 1) if summary.agrees else float(wrong + 1)
    return StageResult("detections", summary.agrees, used, f"{detail}; {reason}" if reason else detail)


def _broken(stage: str, detail: str) -> StageResult:
    return StageResult(stage, False, float("inf"), detail)


# Down to the layer: the first layer with weights whose output differs.


# Layers whose outputs are held in memory at one time, on both sides.
CHUNK = 8


@dataclass(frozen=True)
class LayerResult:
    """The first layer that differs (None: none of those that both sides have), and how."""

    layer: str | None
    detail: str
    compared: int

    def to_json(self) -> dict[str, Any]:
        return {"layer": self.layer, "detail": self.detail, "compared": self.compared}


def first_differing_layer(
    reference: Subject, candidate: Subject, frames: Frames, tolerance: Tolerance
) -> LayerResult:
    """Compare layer after layer on ``frames``, every stage of the candidate fed by the reference.

    A fault shows in the layer where it is and in those behind it of the same stage, so the first counts.
    """
    assert reference.stages is not None
    assert candidate.stages is not None
    inputs, other_inputs = same_inputs(
        canvas_inputs(reference, frames)[0], reference.detector.contract, candidate.detector.contract
    )
    feed = {name: value for name, value in reference.stages.run(inputs, {}).items() if is_stage(name)}
    there = set(candidate.stages.layers)
    shared = [layer for layer in reference.stages.layers if layer in there]
    for start in range(0, len(shared), CHUNK):
        chunk = shared[start : start + CHUNK]
        expected = reference.stages.run_layers(inputs, {}, chunk)
        try:
            found = candidate.stages.run_layers(other_inputs, feed, chunk)
        except ArtefactError as failure:
            return LayerResult(
                None, f"its layers cannot be run with the reference's stages: {failure}", start
            )
        for number, layer in enumerate(chunk, start=start + 1):
            error = tensor_error(layer, expected[layer], found[layer], len(frames))
            if error.share_of(tolerance) > 1.0:
                return LayerResult(layer, error.describe(), number)
    return LayerResult(None, f"{len(shared)} layers agree; the fault lies between layers", len(shared))
