"""The inside of an ONNX file, for verification: the graph with its stages as outputs and as inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.evaluation.verify.stages import is_stage
from anchorline.runtime.canvas import Placement
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.errors import ArtefactError
from anchorline.runtime.onnxruntime_backend import exact_sums, open_for_checks

Prepare = Callable[[Sequence[NDArray[np.uint8]]], tuple[dict[str, NDArray[np.generic]], list[Placement]]]

_WEIGHTED = ("Conv", "Gemm", "MatMul")
_FED = "fed/"


class OnnxStages:
    """Runs an exported ONNX file in onnxruntime as a ``StageRunner``.

    ``prepare`` is that of the detector which runs the file. The file is read once and never changed:
    sessions run edited copies. A layer is named by its weight (``backbone.body.0.0`` for
    ``model.backbone.body.0.0.weight``), with ``#2`` and so on where a weight is used several times.
    Raises ``ArtefactError`` for a file that is no ONNX or not ours.
    """

    def __init__(self, path: Path, prepare: Prepare, provider: str = "CPUExecutionProvider") -> None:
        import onnx

        try:
            self._model = onnx.load(path)
        except Exception as error:  # protobuf's own kinds, and the file system's
            raise ArtefactError(f"{path}: cannot be read as ONNX ({error}); export it again") from None
        text = {p.key: p.value for p in self._model.metadata_props}.get(CONTRACT_KEY)
        if text is None:
            raise ArtefactError(f"{path}: has no anchorline contract; export it with anchorline export")
        self.contract = Contract.from_json(text, where=str(path))
        self.prepare, self._path, self._provider = prepare, path, provider
        made = [name for node in self._model.graph.node for name in node.output]
        self.stages = tuple(name for name in made if is_stage(name))
        self._layer_values = _layer_values(self._model)
        self.layers = tuple(self._layer_values)
        self._sessions: dict[tuple[frozenset[str], tuple[str, ...]], Any] = {}

    def run(
        self, inputs: Mapping[str, NDArray[Any]], feed: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """All stages and outputs; a stage in ``feed`` is replaced for what follows it."""
        wanted = [*self.stages, *self.contract.outputs]
        values = self._infer(inputs, feed, wanted, keep=True)
        return {n: v.astype(np.float32, copy=False) if is_stage(n) else v for n, v in values.items()}

    def run_layers(
        self, inputs: Mapping[str, NDArray[Any]], feed: Mapping[str, NDArray[Any]], layers: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        """The outputs of ``layers``."""
        value_of = {layer: self._layer_values[layer] for layer in layers if layer in self._layer_values}
        values = self._infer(inputs, feed, list(dict.fromkeys(value_of.values())), keep=False)
        return {layer: values[value].astype(np.float32) for layer, value in value_of.items()}

    def release(self) -> None:
        """Close the sessions that were kept: each holds all weights and the largest batch's maps."""
        self._sessions.clear()

    def _infer(
        self,
        inputs: Mapping[str, NDArray[Any]],
        feed: Mapping[str, NDArray[Any]],
        wanted: Sequence[str],
        *,
        keep: bool,
    ) -> dict[str, NDArray[Any]]:
        fed = {name: value for name, value in feed.items() if name in self.stages}
        key = (frozenset(fed), tuple(wanted))
        arrays = {name: inputs[name] for name in self.contract.inputs}
        arrays.update({f"{_FED}{name}": value.astype(np.float32, copy=False) for name, value in fed.items()})
        try:
            session = self._sessions.get(key) or self._open(fed, wanted)
            if keep:
                self._sessions[key] = session
            values = session.run(list(wanted), arrays)
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            reason = " ".join(str(error).split())[:300]
            raise ArtefactError(f"{self._path}: onnxruntime cannot run its stages ({reason})") from error
        return dict(zip(wanted, values, strict=True))

    def _open(self, fed: Iterable[str], wanted: Sequence[str]) -> Any:
        model = opened_up(self._model, sorted(fed), wanted)
        # An arena grows in doublings and keeps them; every stage of a large canvas is an output here.
        return open_for_checks(
            model.SerializeToString(), provider=self._provider, arena=False, config=exact_sums(self.contract)
        )


def opened_up(model: Any, fed: Sequence[str], wanted: Sequence[str]) -> Any:
    """A copy of ``model`` (onnx.ModelProto) that delivers the values ``wanted`` and takes those ``fed``.

    A fed value ``x`` becomes the float32 input ``fed/x``, cast to x's own type, for all nodes that read
    x; x itself is still computed.
    """
    import onnx

    edited = onnx.ModelProto()
    edited.CopyFrom(model)
    graph = edited.graph
    reading = {name: f"{_FED}{name}/cast" for name in fed}
    for node in graph.node:
        node.input[:] = [reading.get(name, name) for name in node.input]
    casts = []
    for name in fed:
        graph.input.append(onnx.helper.make_tensor_value_info(f"{_FED}{name}", onnx.TensorProto.FLOAT, None))
        # CastLike needs no knowledge of the type; its second input is the value that is replaced.
        casts.append((name, onnx.helper.make_node("CastLike", [f"{_FED}{name}", name], [reading[name]])))
    _insert_after_producers(graph, casts)
    there = {value.name for value in graph.output}
    del graph.output[:]
    graph.output.extend(
        next(v for v in model.graph.output if v.name == name)
        if name in there
        else onnx.ValueInfoProto(name=name)
        for name in wanted
    )
    return edited


def _insert_after_producers(graph: Any, casts: Sequence[tuple[str, Any]]) -> None:
    """Put each cast behind the node that makes its value, as ONNX wants nodes in order."""
    waiting = dict(casts)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        nodes += [waiting.pop(name) for name in node.output if name in waiting]
    del graph.node[:]
    graph.node.extend(nodes)


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
