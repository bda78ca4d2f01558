"""The stages of a detector: what each side gives there, and whether the candidate's are the reference's.

Each stage of the candidate, given the reference's inputs, must give its outputs; where one does not,
bisection names the layer. The PyTorch side lives in ``train/predict.py`` and is handed in by whoever has
it; the ONNX side is ``OnnxStages``.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.backends.onnxruntime import exact_sums, open_for_checks
from anchorline.runtime.canvas import PROPOSAL_NAMES, Placement, check_frame, to_detections
from anchorline.runtime.contract import WINOGRAD_OP, Contract, ResizeRule
from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, DataError, one_line
from anchorline.runtime.io.files import sha256_of
from anchorline.verify.compare import Tolerance, compare_detections, compare_outputs, cuts_of, summarise

# From pixels to detections. ``preprocess`` (frame to canvas) is outside the graph, ``detections`` are
# its outputs; a stage of several levels numbers its values (``fpn.0``).
ORDER = (
    "preprocess",
    "pixels",
    "backbone",
    "fpn",
    "objectness",
    "bbox_deltas",
    "proposals",
    "roi_features",
    "class_logits",
    "box_regression",
    "detections",
)
_IN_GRAPH = {*ORDER, "proposal_scores"} - {"preprocess", "detections"}
# A row for each proposal. Nothing follows from the rows of slots without one, which some files leave out.
_OF_PROPOSALS = ("roi_features", "class_logits", "box_regression")
_WEIGHTED = ("Conv", "Gemm", "MatMul", WINOGRAD_OP)
_FED = "fed/"
# A canvas may round to the next grey level, on another processor or in another number format.
_GREY_LEVELS = 1.0
# Which of several candidates of equal score enter the RPN's NMS is any runtime's own choice.
_PROPOSALS_MATCHED = 0.98
# Relative; beside it a score keeps single precision's absolute rounding.
_SAME_SCORE = 1e-6
_LAYERS_AT_ONCE = 8  # whose outputs are held in memory, on both sides

Arrays = Mapping[str, NDArray[Any]]
Frames = Sequence[NDArray[np.uint8]]


def is_stage(value: str) -> bool:
    """Whether a value of the graph has a stage's name, with the number of its level where it has levels."""
    stage, _, level = value.partition(".")
    return stage in _IN_GRAPH and (not level or level.isdecimal())


def stage_of(value: str) -> str:
    """The stage a value belongs to: ``fpn`` for ``fpn.2``, ``proposals`` for ``proposal_scores``."""
    return "proposals" if value == "proposal_scores" else value.partition(".")[0]


class BatchDetector(Protocol):
    """Frames to detections, as the runtime's ``Detector``."""

    @property
    def contract(self) -> Contract: ...
    @property
    def provider(self) -> str: ...
    @property
    def precision(self) -> str: ...
    def batch(self, frames: Frames) -> list[Detections]: ...


class StageRunner(Protocol):
    """A network whose inside can be seen.

    ``prepare`` gives the network's inputs for frames, by name, and where each frame lies on the canvas.
    ``run`` returns every stage by name (``ORDER``), float32, and the contract's outputs. A stage in ``feed``
    is still computed and returned, but what follows it is computed from the fed value, so an error is seen
    where it arises and nowhere else. ``run_layers`` returns the outputs of some of the ``layers``, those with
    weights in the order of execution. ``release`` gives back what was kept for the next run.
    """

    @property
    def layers(self) -> tuple[str, ...]: ...
    def prepare(self, frames: Frames) -> tuple[dict[str, NDArray[np.generic]], list[Placement]]: ...
    def run(self, inputs: Arrays, feed: Arrays) -> dict[str, NDArray[Any]]: ...
    def run_layers(
        self, inputs: Arrays, feed: Arrays, layers: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]: ...
    def release(self) -> None: ...


@dataclass(frozen=True)
class Subject:
    """One side of a verification: an artefact that runs. ``stages`` is None where only the whole can be run
    (an engine). A context manager, which releases what holds resources."""

    path: Path
    detector: BatchDetector
    stages: StageRunner | None = None

    def identity(self) -> dict[str, Any]:
        """Name, sha256, provider and precision, as the record states them."""
        return {
            "name": self.path.name,
            "sha256": sha256_of(self.path) if self.path.is_file() else None,
            "provider": self.detector.provider,
            "precision": self.detector.precision,
        }

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        getattr(self.detector, "close", lambda: None)()

    @property
    def inside(self) -> StageRunner:
        """The stages of a side that has them."""
        assert self.stages is not None
        return self.stages


def onnx_subject(
    path: Path,
    provider: str = "cpu",
    canvas: tuple[int, int] | None = None,
    resize: ResizeRule | None = None,
) -> Subject:
    """An exported ONNX file, its inside on onnxruntime's CPU provider; raises ``ArtefactError``.

    One for frames of any size is held to the ``canvas`` (height, width) or takes another ``resize`` rule,
    where there is one. A graph without the stages' names, as the first versions wrote it, is compared as a
    whole.
    """
    detector = Detector(path, provider, canvas=canvas, resize=resize)
    inside = OnnxStages(path, detector)
    return Subject(path, detector, inside if inside.stages else None)


class OnnxStages:
    """Runs the ONNX file of a ``detector`` in onnxruntime as a ``StageRunner``.

    The file is read once and never changed: sessions run edited copies. A layer is named by its weight
    (``backbone.body.0.0`` for ``model.backbone.body.0.0.weight``), with ``#2`` and so on where a weight is
    used several times.
    """

    def __init__(self, path: Path, detector: Detector) -> None:
        import onnx

        self._path, self._model = path, onnx.load(path)
        self.contract, self.prepare = detector.contract, detector.prepare
        made = [name for node in self._model.graph.node for name in node.output]
        self.stages = tuple(name for name in made if is_stage(name))
        self._layer_values = _layer_values(self._model)
        self.layers = tuple(self._layer_values)
        self._sessions: dict[tuple[frozenset[str], tuple[str, ...]], Any] = {}

    def run(self, inputs: Arrays, feed: Arrays) -> dict[str, NDArray[Any]]:
        values = self._infer(inputs, feed, [*self.stages, *self.contract.outputs], keep=True)
        return {n: v.astype(np.float32, copy=False) if is_stage(n) else v for n, v in values.items()}

    def run_layers(
        self, inputs: Arrays, feed: Arrays, layers: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        value_of = {layer: self._layer_values[layer] for layer in layers}
        values = self._infer(inputs, feed, list(dict.fromkeys(value_of.values())), keep=False)
        return {layer: values[value].astype(np.float32) for layer, value in value_of.items()}

    def release(self) -> None:
        """Close the sessions that were kept: each holds all weights and the largest batch's maps."""
        self._sessions.clear()

    def _infer(
        self, inputs: Arrays, feed: Arrays, wanted: Sequence[str], *, keep: bool
    ) -> dict[str, NDArray[Any]]:
        fed = {name: value for name, value in feed.items() if name in self.stages}
        key = (frozenset(fed), tuple(wanted))
        arrays = {name: inputs[name] for name in self.contract.inputs}
        arrays.update({f"{_FED}{name}": value.astype(np.float32, copy=False) for name, value in fed.items()})
        try:
            session = self._sessions.get(key)
            if session is None:
                model = opened_up(self._model, sorted(fed), wanted).SerializeToString()
                config = exact_sums(self.contract)
                # An arena grows in doublings and keeps them; every stage of a large canvas is an output here.
                session = open_for_checks(model, arena=False, config=config)
            if keep:
                self._sessions[key] = session
            values = session.run(list(wanted), arrays)
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            reason = one_line(error)[:300]
            raise ArtefactError(f"{self._path}: onnxruntime cannot run its stages ({reason})") from error
        return dict(zip(wanted, values, strict=True))


def opened_up(model: Any, fed: Sequence[str], wanted: Sequence[str]) -> Any:
    """A copy of ``model`` (onnx.ModelProto) that delivers the values ``wanted`` and takes those ``fed``.

    A fed value ``x`` becomes the float32 input ``fed/x``, cast to x's own type, for all nodes that read
    x; x itself is still computed.
    """
    import onnx

    edited = onnx.ModelProto()
    edited.CopyFrom(model)
    graph = edited.graph
    casts = {}
    for name in fed:
        graph.input.append(onnx.helper.make_tensor_value_info(f"{_FED}{name}", onnx.TensorProto.FLOAT, None))
        # CastLike needs no knowledge of the type; its second input is the value that is replaced.
        casts[name] = onnx.helper.make_node("CastLike", [f"{_FED}{name}", name], [f"{_FED}{name}/cast"])
    nodes = []
    for node in graph.node:
        node.input[:] = [f"{_FED}{name}/cast" if name in casts else name for name in node.input]
        # Each cast behind the node that makes its value, as ONNX wants nodes in order.
        nodes += [node, *(casts[name] for name in node.output if name in casts)]
    del graph.node[:]
    graph.node.extend(nodes)
    outputs = {value.name: value for value in model.graph.output}
    del graph.output[:]
    graph.output.extend(outputs.get(name) or onnx.ValueInfoProto(name=name) for name in wanted)
    return edited


def _layer_values(model: Any) -> dict[str, str]:
    """The output value of each layer with weights, in order; behind the batch norm where one follows."""
    normed = {n.input[0]: n.output[0] for n in model.graph.node if n.op_type == "BatchNormalization"}
    weights = {tensor.name for tensor in model.graph.initializer}
    runs: Counter[str] = Counter()
    found = {}
    for node in model.graph.node:
        if node.op_type not in _WEIGHTED:
            continue
        weight = next((name for name in node.input[1:] if name in weights), None)
        if weight is None:
            continue
        layer = weight.removeprefix("model.").removesuffix(".weight")
        runs[layer] += 1
        name = layer if runs[layer] == 1 else f"{layer}#{runs[layer]}"
        found[name] = normed.get(node.output[0], node.output[0])
    return found


@dataclass(frozen=True)
class StageResult:
    """One stage, as JSON gives it: ``tolerance_used`` is the share of the tolerance used up (above 1 it
    differs), infinite where no number says how far apart the two are; ``detail`` is one line. A stage that
    only one side has is not ``compared``, and passes."""

    name: str
    passed: bool
    compared: bool = field(default=True, kw_only=True)
    tolerance_used: float
    detail: str


@dataclass(frozen=True)
class LayerResult:
    """The first layer that differs (None: none of those that both sides have), and how."""

    layer: str | None
    detail: str
    compared: int


def tensor_error(
    value: str, reference: NDArray[Any], candidate: NDArray[Any], images: int
) -> tuple[float, float, str]:
    """How far two tensors of a name are apart, relative to the reference; of the ``images`` the worst counts.

    The root mean square of the difference by that of the reference, the largest difference by the largest
    magnitude, and both in words. Infinite where no number says it: another shape, values not finite.
    """
    if reference.shape != candidate.shape:
        reason = f"{value} has the shape {list(candidate.shape)}, expected {list(reference.shape)}"
        return np.inf, np.inf, reason
    rms = peak = 0.0
    for sides in zip(reference.reshape(images, -1), candidate.reshape(images, -1), strict=True):
        ours, theirs = (values.astype(np.float32) for values in sides)
        for side, values in (("the reference's ", ours), ("", theirs)):
            broken = values.size - int(np.isfinite(values).sum())
            if broken:
                reason = f"{side}{value} has {broken} values that are not finite (an overflow)"
                return np.inf, np.inf, reason
        # Where the reference is all zero (a black image) nothing is there to be relative to.
        rms = max(rms, _rms(theirs - ours) / (_rms(ours) or 1.0))
        peak = max(peak, _largest(theirs - ours) / (_largest(ours) or 1.0))
    return rms, peak, f"rms {rms:.2g}, peak {peak:.2g} ({value})"


def _rms(values: NDArray[np.float32]) -> float:
    """In float64, in which the squares of large values do not overflow; 0 for no values."""
    return float(np.sqrt(np.square(values, dtype=np.float64).mean())) if values.size else 0.0


def _largest(values: NDArray[np.float32]) -> float:
    return float(np.abs(values).max(initial=0.0))


def _share_used(rms: float, peak: float, tolerance: Tolerance) -> float:
    """How much of the tolerance two tensors use up: above 1 they differ."""
    return max(rms / tolerance.stage_rms, peak / tolerance.stage_peak)


def check_stages(
    reference: Subject, candidate: Subject, batches: Sequence[Frames], tolerance: Tolerance
) -> list[StageResult]:
    """All stages in order, each with its worst case over the ``batches``; what only one side has is said.

    Both subjects have ``stages``. Where the canvases themselves differ in size nothing else is compared.
    """
    worst: dict[str, StageResult] = {}
    for frames in batches:
        for result in _check_batch(reference, candidate, frames, tolerance):
            if result.name not in worst or result.tolerance_used > worst[result.name].tolerance_used:
                worst[result.name] = result
    return [worst[name] for name in ORDER if name in worst]


def _check_batch(
    reference: Subject, candidate: Subject, frames: Frames, tolerance: Tolerance
) -> list[StageResult]:
    ours, theirs = reference.detector.contract, candidate.detector.contract
    inputs, placements = _canvases(reference, frames)
    others = _canvases(candidate, frames)[0]
    preprocess = _check_canvas(ours, theirs, inputs, others)
    if inputs[ours.inputs[0]].shape != others[theirs.inputs[0]].shape:
        return [preprocess]
    own_inputs, other_inputs = _same_inputs(inputs, ours, theirs)
    expected = reference.inside.run(own_inputs, {})
    fed = {name: value for name, value in expected.items() if is_stage(name)}
    found, _ = _run_fed(candidate.inside, other_inputs, fed)
    rows = {"preprocess": preprocess}
    for name in fed:
        stage = stage_of(name)
        if name in found and stage != "proposals":  # those are a choice of boxes, not a tensor
            pair = (expected[name], found[name])
            if name in _OF_PROPOSALS:
                pair = _in_filled_slots(pair, expected, joined=name == "roi_features")
            rms, peak, detail = tensor_error(name, *pair, len(frames))
            used = _share_used(rms, peak, tolerance)
            if stage not in rows or used > rows[stage].tolerance_used:
                rows[stage] = StageResult(stage, used <= 1.0, used, detail)
    if all(name in side for name in ("proposals", "proposal_scores") for side in (expected, found)):
        rows["proposals"] = _check_proposals(expected, found, ours, placements, tolerance)
    rows["detections"] = _check_outputs(expected, found, (ours, theirs), placements, tolerance)
    for side, own, other in (("reference", expected, found), ("candidate", found, expected)):
        for name in own:
            if is_stage(name) and name not in other:
                stage, text = stage_of(name), f"only the {side} has {name}"
                if stage in rows:
                    rows[stage] = dataclasses.replace(rows[stage], detail=f"{rows[stage].detail}; {text}")
                else:
                    rows[stage] = StageResult(stage, True, 0.0, text, compared=False)
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


def _run_fed(
    stages: StageRunner, inputs: Arrays, feed: Arrays
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """The stages given ``feed``, or as much of it as fits, and what that was.

    A stage of another shape takes nothing in. Where something does not fit, RoI features are not fed: the
    proposals decide how many rows they have.
    """
    failure = None
    try:
        found = stages.run(inputs, feed)
    except ArtefactError as error:
        failure, found = error, stages.run(inputs, {})
    unfit = {name for name, value in feed.items() if name in found and found[name].shape != value.shape}
    if failure is not None:
        unfit |= feed.keys() & {"roi_features"}
        if not unfit:
            raise failure
    elif not unfit:
        return found, dict(feed)
    fitting = {name: value for name, value in feed.items() if name not in unfit}
    return stages.run(inputs, fitting), fitting


def _in_filled_slots(
    pair: tuple[NDArray[Any], NDArray[Any]], stages: Arrays, *, joined: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both sides' rows of proposals, up to the last slot that one fills in some image; those of others are 0.

    Rows are [B, R, ...] or, ``joined``, [B * R, ...], on either side of any R that is large enough; what has
    another shape stays as it is.
    """
    if "proposal_scores" not in stages:
        return pair
    filled = stages["proposal_scores"] > -1.0
    filled = filled[:, : np.flatnonzero(filled.any(axis=0)).max(initial=-1) + 1]

    def taken(values: NDArray[Any]) -> NDArray[Any]:
        rows = values
        if joined and len(values) % len(filled) == 0:
            rows = values.reshape(len(filled), -1, *values.shape[1:])
        rows = rows[:, : filled.shape[1]]
        if rows.shape[:2] != filled.shape:
            return values
        return np.where(filled.reshape(*filled.shape, *[1] * (rows.ndim - 2)), rows, 0)

    ours, theirs = map(taken, pair)
    return ours, theirs


def _check_canvas(ours: Contract, theirs: Contract, inputs: Arrays, other: Arrays) -> StageResult:
    shapes = [side[name].shape[1:3] for side, name in ((other, theirs.inputs[0]), (inputs, ours.inputs[0]))]
    if shapes[0] != shapes[1]:
        found, expected = (f"{height}x{width}" for height, width in shapes)
        return _broken("preprocess", f"the canvas is {found}, expected {expected}")
    sizes = inputs[ours.inputs[1]], other[theirs.inputs[1]]
    if not np.array_equal(*sizes):
        detail = f"a frame fills {sizes[1].tolist()} of the canvas, expected {sizes[0].tolist()}"
        return _broken("preprocess", detail)
    images = inputs[ours.inputs[0]].astype(np.float32), other[theirs.inputs[0]].astype(np.float32)
    if not np.isfinite(images[1]).all():
        return _broken("preprocess", "the canvas has values that are not finite")
    levels = _largest(images[0] - images[1])
    detail = f"canvas within {levels:.2g} grey levels"
    return StageResult("preprocess", levels <= _GREY_LEVELS, levels / _GREY_LEVELS, detail)


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
        tied = _shared_scores(wrong_scores, expected, index)
        matched, total = matched + alike, total + alike + one.wrong - tied
        excused += one.borderline + one.nms_ties + tied
        worst, reason = max(worst, one.max_box_error), reason or one.first_disagreement
    share = matched / total if total else 1.0
    used = (1.0 - share) / (1.0 - _PROPOSALS_MATCHED)
    detail = f"{share:.2%} of {total} proposals matched, boxes within {worst:.2g} px"
    if excused:
        detail += f", {excused} excused as ties"
    if used > 1.0 and reason:
        detail += f"; {reason}"
    return StageResult("proposals", used <= 1.0, used, detail)


def _proposals_of(values: Arrays, index: int) -> Detections:
    """One image's proposals as detections of one class, on the canvas."""
    scores = values["proposal_scores"][index]
    there = scores > -1.0
    labels = np.zeros(int(there.sum()), np.int64)
    boxes, scores = values["proposals"][index][there], np.clip(scores[there], 0.0, 1.0)
    return Detections(boxes, scores, labels, PROPOSAL_NAMES)


def _shared_scores(scores: NDArray[np.float64], values: Arrays, index: int) -> int:
    """How many of the scores of wrong proposals are those of another anchor of the image as well.

    Which of them enter the NMS is any runtime's own choice. On a picture without content, whose maps are
    constant, whole rows of anchors share a score.
    """
    logits = [each[index].ravel() for name, each in values.items() if stage_of(name) == "objectness"]
    every = np.concatenate([np.zeros(0), *logits]).astype(np.float64)
    objectness = np.sort(1.0 / (1.0 + np.exp(-every)))
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
    own = ours.run(inputs, {})
    feed = {name: value for name, value in own.items() if is_stage(name)}
    shared = [layer for layer in ours.layers if layer in theirs.layers]
    for start in range(0, len(shared), _LAYERS_AT_ONCE):
        chunk = shared[start : start + _LAYERS_AT_ONCE]
        expected = ours.run_layers(inputs, {}, chunk)
        try:
            if not start:
                _, feed = _run_fed(theirs, other_inputs, feed)
            found = theirs.run_layers(other_inputs, feed, chunk)
        except ArtefactError as failure:
            reason = f"its layers cannot be run with the reference's stages: {failure}"
            return LayerResult(None, reason, start)
        for number, layer in enumerate(chunk, start=start + 1):
            pair = (expected[layer], found[layer])
            if len(pair[0]) > len(frames):  # a layer of the head
                pair = _in_filled_slots(pair, own, joined=True)
            rms, peak, detail = tensor_error(layer, *pair, len(frames))
            if _share_used(rms, peak, tolerance) > 1.0:
                return LayerResult(layer, detail, number)
    return LayerResult(None, f"{len(shared)} layers agree; the fault lies between layers", len(shared))
