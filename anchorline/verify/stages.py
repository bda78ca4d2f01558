"""The stages of a detector: where two sides are compared, and what each side gives there.

The PyTorch side lives in ``train/predict.py`` and is handed in by whoever has it; the ONNX side is
``OnnxStages``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.backends.onnxruntime import exact_sums, open_for_checks
from anchorline.runtime.canvas import Placement
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, one_line
from anchorline.runtime.io.files import sha256_of

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
_WEIGHTED = ("Conv", "Gemm", "MatMul")
_FED = "fed/"

Arrays = Mapping[str, NDArray[Any]]


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
    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]: ...


class StageRunner(Protocol):
    """A network whose inside can be seen.

    ``prepare`` gives the network's inputs for frames, by name, as this side makes them, and where each
    frame lies on the canvas. ``run`` executes it on the contract's inputs and returns every stage by name
    (``ORDER``), float32, and the contract's outputs. A stage in ``feed`` is still computed and
    returned, but what follows it is computed from the fed value, so an error is seen where it arises and
    nowhere else. ``run_layers`` returns the outputs of some of the ``layers``, those with weights in the
    order of execution. ``release`` gives back what was kept for the next run.
    """

    @property
    def layers(self) -> tuple[str, ...]: ...
    def prepare(
        self, frames: Sequence[NDArray[np.uint8]]
    ) -> tuple[dict[str, NDArray[np.generic]], list[Placement]]: ...
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
        close = getattr(self.detector, "close", None)
        if close is not None:
            close()

    @property
    def inside(self) -> StageRunner:
        """The stages of a side that has them."""
        assert self.stages is not None
        return self.stages


def onnx_subject(path: Path, provider: str = "cpu") -> Subject:
    """An exported ONNX file, its inside on onnxruntime's CPU provider; raises ``ArtefactError``.

    A graph without the stages' names, as the first versions wrote it, is compared as a whole.
    """
    detector = Detector(path, provider)
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
        """All stages and outputs; a stage in ``feed`` is replaced for what follows it."""
        values = self._infer(inputs, feed, [*self.stages, *self.contract.outputs], keep=True)
        return {n: v.astype(np.float32, copy=False) if is_stage(n) else v for n, v in values.items()}

    def run_layers(
        self, inputs: Arrays, feed: Arrays, layers: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        """The outputs of ``layers``."""
        value_of = {layer: self._layer_values[layer] for layer in layers if layer in self._layer_values}
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
