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
from anchorline.verify.compare import Tolerance, compare_detections, compare_outputs, cuts_of, summarise
from anchorline.verify.stages import ORDER, Arrays, StageRunner, Subject, is_stage, stage_of

# A canvas may round to the next grey level, on another processor or in another number format.
_GREY_LEVELS = 1.0
# Which of several candidates of equal score enter the RPN's NMS is any runtime's own choice.
_PROPOSALS_MATCHED = 0.98
# Relative; beside it a score keeps single precision's absolute rounding.
_SAME_SCORE = 1e-6
# Layers whose outputs are held in memory at one time, on both sides.
CHUNK = 8

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
            "tolerance_used": self.used,
            "detail": self.detail,
        }


@dataclass(frozen=True)
class TensorError:
    """How far two tensors are apart, relative to the reference: the root mean square of the difference
    by that of the reference, and the largest difference by the largest magnitude. ``reason`` says in
    words what no number says (another shape, values that are not finite)."""

    value: str
    rms: float
    peak: float
    reason: str | None = None

    def share_of(self, tolerance: Tolerance) -> float:
        """How much of the tolerance is used up: above 1 the tensors differ."""
        return max(self.rms / tolerance.stage_rms, self.peak / tolerance.stage_peak)

    def describe(self) -> str:
        return self.reason or f"rms {self.rms:.2g}, peak {self.peak:.2g} ({self.value})"


@dataclass(frozen=True)
class LayerResult:
    """The first layer that differs (None: none of those that both sides have), and how."""

    layer: str | None
    detail: str
    compared: int


def tensor_error(value: str, reference: NDArray[Any], candidate: NDArray[Any], images: int) -> TensorError:
    """Compare two tensors of the same name; the worst of the ``images`` in the batch counts."""
    reason, rms, peak = None, 0.0, 0.0
    if reference.shape != candidate.shape:
        reason = f"{value} has the shape {list(candidate.shape)}, expected {list(reference.shape)}"
        return TensorError(value, np.inf, np.inf, reason)
    for sides in zip(reference.reshape(images, -1), candidate.reshape(images, -1), strict=True):
        ours, theirs = (values.astype(np.float32) for values in sides)
        for side, values in (("the reference's ", ours), ("", theirs)):
            broken = values.size - int(np.isfinite(values).sum())
            if broken:
                reason = f"{side}{value} has {broken} values that are not finite (an overflow)"
                return TensorError(value, np.inf, np.inf, reason)
        difference = theirs - ours
        # Where the reference is all zero (a black image) nothing is there to be relative to.
        rms = max(rms, _rms(difference) / (_rms(ours) or 1.0))
        peak = max(peak, _largest(difference) / (_largest(ours) or 1.0))
    return TensorError(value, rms, peak)


def _rms(values: NDArray[np.float32]) -> float:
    """In float64, in which the squares of large values do not overflow; 0 for no values."""
    return float(np.sqrt(np.square(values, dtype=np.float64).mean())) if values.size else 0.0


def _largest(values: NDArray[np.float32]) -> float:
    return float(np.abs(values).max(initial=0.0))


def check_stages(
    reference: Subject, candidate: Subject, batches: Sequence[Frames], tolerance: Tolerance
) -> list[StageResult]:
    """All stages in order, each with its worst case over the ``batches``; what only one side has is said.

    Both subjects have ``stages``. Where the canvases themselves differ in size nothing else is compared.
    """
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
    inputs, placements = _canvases(reference, frames)
    preprocess = _check_canvas(ours, theirs, inputs, _canvases(candidate, frames)[0])
    if ours.canvas != theirs.canvas:
        return [preprocess]
    own_inputs, other_inputs = _same_inputs(inputs, ours, theirs)
    expected = reference.inside.run(own_inputs, {})
    fed = {name: value for name, value in expected.items() if is_stage(name)}
    found = _run_fed(candidate.inside, other_inputs, fed)
    rows = {"preprocess": preprocess}
    for name in fed:
        stage = stage_of(name)
        if name in found and stage != "proposals":  # those are a choice of boxes, not a tensor
            error = tensor_error(name, expected[name], found[name], len(frames))
            used = error.share_of(tolerance)
            if stage not in rows or used > rows[stage].used:
                rows[stage] = StageResult(stage, used <= 1.0, used, error.describe())
    if all(name in side for name in ("proposals", "proposal_scores") for side in (expected, found)):
        rows["proposals"] = _check_proposals(expected, found, ours, placements, tolerance)
    rows["detections"] = _check_outputs(expected, found, (ours, theirs), placements, tolerance)
    for side, own, other in (("reference", expected, found), ("candidate", found, expected)):
        for name in own:
            if is_stage(name) and name not in other:
                stage, text = stage_of(name), f"only the {side} has {name}"
                row = rows.get(stage)
                rows[stage] = (
                    StageResult(stage, True, 0.0, text, compared=False)
                    if row is None
                    else dataclasses.replace(row, detail=f"{row.detail}; {text}")
                )
    return list(rows.values())


def _canvases(subject: Subject, frames: Frames) -> tuple[dict[str, NDArray[Any]], list[Placement]]:
    """The network's inputs for ``frames``, as the subject prepares them, and where each frame lies."""
    inputs, placements = subject.inside.prepare([check_frame(frame) for frame in frames])
    return {name: value.copy() for name, value in inputs.items()}, placements


def _same_inputs(
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


def _check_canvas(ours: Contract, theirs: Contract, inputs: Arrays, other: Arrays) -> StageResult:
    if ours.canvas != theirs.canvas:
        found, expected = (f"{h}x{w}" for h, w in (theirs.canvas, ours.canvas))
        return _broken("preprocess", f"the canvas is {found}, expected {expected}")
    sizes = inputs[ours.inputs[1]], other[theirs.inputs[1]]
    if not np.array_equal(*sizes):
        detail = f"a frame fills {sizes[1].tolist()} of the canvas, expected {sizes[0].tolist()}"
        return _broken("preprocess", detail)
    images = inputs[ours.inputs[0]].astype(np.float32), other[theirs.inputs[0]].astype(np.float32)
    if not np.isfinite(images[1]).all():
        return _broken("preprocess", "the canvas has values that are not finite")
    levels = _largest(images[0] - images[1])
    return StageResult(
        "preprocess", levels <= _GREY_LEVELS, levels / _GREY_LEVELS, f"canvas within {levels:.2g} grey levels"
    )


def _check_proposals(
    expected: Arrays, found: Arrays, contract: Contract, placements: Sequence[Placement], tolerance: Tolerance
) -> StageResult:
    cuts = cuts_of(contract, tolerance, "proposals")
    matched, total, excused, worst, reason = 0, 0, 0, 0.0, None
    for index in range(len(placements)):
        try:
            ours, theirs = (_proposals_of(values, index) for values in (expected, found))
        except DataError as error:  # such as a box that is NaN
            return _broken("proposals", str(error))
        one = compare_detections(ours, theirs, cuts)
        # Pairs that moved and were excused say nothing: where most scores are nearly 0 they would
        # outnumber, and hide, the ones that differ.
        alike = int((~one.aligned.differing & ~one.aligned.excused).sum())
        wrong_scores = one.aligned.wrong_scores(ours, theirs).astype(np.float64)
        tied = _shared_scores(wrong_scores, _objectness(expected, index))
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


def _proposals_of(values: Arrays, index: int) -> Detections:
    """One image's proposals as detections of one class, on the canvas."""
    scores = values["proposal_scores"][index]
    there = scores > -1.0
    labels = np.zeros(int(there.sum()), np.int64)
    return Detections(
        values["proposals"][index][there], np.clip(scores[there], 0.0, 1.0), labels, ("object",)
    )


def _objectness(values: Arrays, index: int) -> NDArray[np.float64]:
    """One image's objectness as a score, of every anchor, rising."""
    logits = [each[index].ravel() for name, each in values.items() if stage_of(name) == "objectness"]
    every = np.concatenate([np.zeros(0), *logits]).astype(np.float64)
    return np.sort(1.0 / (1.0 + np.exp(-every)))


def _shared_scores(scores: NDArray[np.float64], objectness: NDArray[np.float64]) -> int:
    """How many of the scores of wrong proposals are those of another anchor as well.

    Which of them enter the NMS is any runtime's own choice. On a picture without content, whose maps are
    constant, whole rows of anchors share a score.
    """
    same = np.maximum(_SAME_SCORE * np.minimum(scores, 1.0 - scores), np.finfo(np.float32).eps)
    sharing = np.searchsorted(objectness, scores + same, "right") - np.searchsorted(objectness, scores - same)
    return int((sharing > 1).sum())


def _check_outputs(
    expected: Arrays,
    found: Arrays,
    contracts: tuple[Contract, Contract],
    placements: Sequence[Placement],
    tolerance: Tolerance,
) -> StageResult:
    """The graph's own outputs, made from the reference's class logits, box regression and proposals."""
    try:
        reference, candidate = (
            to_detections(values, placements, contract)
            for values, contract in zip((expected, found), contracts, strict=True)
        )
    except ArtefactError as error:  # such as a label without a name
        return _broken("detections", str(error))
    each = compare_outputs(reference, candidate, contracts[0], tolerance)
    summary = summarise(each, tolerance.matched)
    wrong, reason = summary.total.wrong, summary.first_disagreement
    total = summary.total.matched + summary.total.missed + summary.total.extra
    detail = f"{total - wrong} of {total} detections alike"
    used = wrong / (summary.allowed + 1) if summary.agrees else float(wrong + 1)
    return StageResult("detections", summary.agrees, used, f"{detail}; {reason}" if reason else detail)


def _broken(stage: str, detail: str) -> StageResult:
    return StageResult(stage, False, np.inf, detail)


def first_differing_layer(
    reference: Subject, candidate: Subject, frames: Frames, tolerance: Tolerance
) -> LayerResult:
    """Compare layer after layer on ``frames``, every stage of the candidate fed by the reference.

    A fault shows in the layer where it is and in those behind it of the same stage, so the first counts.
    """
    ours, theirs = reference.inside, candidate.inside
    inputs, other_inputs = _same_inputs(
        _canvases(reference, frames)[0], reference.detector.contract, candidate.detector.contract
    )
    feed = {name: value for name, value in ours.run(inputs, {}).items() if is_stage(name)}
    there = set(theirs.layers)
    shared = [layer for layer in ours.layers if layer in there]
    for start in range(0, len(shared), CHUNK):
        chunk = shared[start : start + CHUNK]
        expected = ours.run_layers(inputs, {}, chunk)
        try:
            found = theirs.run_layers(other_inputs, feed, chunk)
        except ArtefactError as failure:
            return LayerResult(
                None, f"its layers cannot be run with the reference's stages: {failure}", start
            )
        for number, layer in enumerate(chunk, start=start + 1):
            error = tensor_error(layer, expected[layer], found[layer], len(frames))
            if error.share_of(tolerance) > 1.0:
                return LayerResult(layer, error.describe(), number)
    return LayerResult(None, f"{len(shared)} layers agree; the fault lies between layers", len(shared))
