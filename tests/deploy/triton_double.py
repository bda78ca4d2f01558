"""A player of Triton: it reads a model repository with Triton's own protobuf, and serves it in this process.

What it refuses is what the server refuses, as read in its sources (core: ``ensemble_utils.cc``,
``model_config_utils.cc``; the backends' ``CompareDimsSupported``): tensors that are not of the type and shape
in the configuration, batches above ``max_batch_size``, an ensemble whose parts do not fit together, an ONNX
output whose shape is stated otherwise than the graph has it. The network of the backends ``onnxruntime`` and
``openvino`` runs in onnxruntime; that of ``tensorrt`` in whatever session the test gives.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

NUMPY = {
    "TYPE_STRING": np.dtype(np.object_),
    "TYPE_UINT8": np.dtype(np.uint8),
    "TYPE_FP32": np.dtype(np.float32),
    "TYPE_INT32": np.dtype(np.int32),
    "TYPE_BOOL": np.dtype(np.bool_),
}
ONNX = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32", "tensor(int32)": "TYPE_INT32"}
Arrays = dict[str, np.ndarray]


class TritonRefusal(Exception):
    """What the server would say."""


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        if not isinstance(values, np.ndarray):
            raise TypeError("pb_utils.Tensor takes an array")
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values


class TritonError:
    def __init__(self, text: str) -> None:
        self.text = text


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self.output_tensors, self.error = output_tensors, error


class _Request:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def inputs(self) -> Sequence[Tensor]:
        return self._tensors


def pb_utils() -> types.ModuleType:
    """The module that Triton's Python backend gives to a model."""
    module = types.ModuleType("triton_python_backend_utils")

    def get_input_tensor_by_name(request: _Request, name: str) -> Tensor | None:
        return next((tensor for tensor in request.inputs() if tensor.name() == name), None)

    for each in (Tensor, TritonError, InferenceResponse, get_input_tensor_by_name):
        setattr(module, each.__name__, each)
    return module


def read_config(folder: Path) -> Any:
    """``config.pbtxt`` as the server reads it; a field that the protobuf does not have is an error."""
    config = model_config_pb2.ModelConfig()
    text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), config)
    if config.name != folder.name:
        raise TritonRefusal(f"{folder.name}: is called {config.name} in its configuration")
    return config


def _dims(value: Any) -> list[int]:
    return list(value.reshape.shape if value.HasField("reshape") else value.dims)


def _matches(found: Sequence[int], stated: Sequence[int]) -> bool:
    return len(found) == len(stated) and all(
        b in (-1, a) or a == -1 for a, b in zip(found, stated, strict=True)
    )


def session_of(path: Path) -> Any:
    """The network on one thread, as the detector has it in tests: sums have one order, and nothing spins."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Model:
    """One folder of the repository."""

    def __init__(self, folder: Path, session: Any = None) -> None:
        self.config = read_config(folder)
        self.batched = self.config.max_batch_size > 0
        self.batches: list[int] = []  # the sizes of those that it ran
        self._python: Any = None
        self._session = session
        if not any(version.name.isdecimal() for version in folder.iterdir() if version.is_dir()):
            raise TritonRefusal(f"{folder.name}: has no version")
        for value in (*self.config.input, *self.config.output):
            if not value.dims or any(size < 1 and size != -1 for size in value.dims):
                raise TritonRefusal(f"{value.name}: dims are {list(value.dims)}")
        if self.config.backend == "python":
            self._python = self._load(folder / "1" / "model.py")
        elif self.config.platform != "ensemble":
            file = folder / "1" / self.config.default_model_filename
            if not file.is_file():
                raise TritonRefusal(f"{file}: missing")
            if session is None:
                self._session = session_of(file)
                self._check_graph()

    def _load(self, path: Path) -> Any:
        spec = importlib.util.spec_from_file_location(f"triton_{self.config.name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["triton_python_backend_utils"] = pb_utils()
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        # The server prints it so, with the names of the protobuf.
        text = json_format.MessageToJson(self.config, preserving_proto_field_name=True)
        model.initialize({"model_config": text, "model_name": self.config.name})
        return model

    def _check_graph(self) -> None:
        """The backends compare what the configuration states with the graph: outputs to the letter."""
        for stated, values, exact in (
            (self.config.input, self._session.get_inputs(), False),
            (self.config.output, self._session.get_outputs(), True),
        ):
            graph = {value.name: value for value in values}
            if {each.name for each in stated} != set(graph):
                raise TritonRefusal(f"tensors are {sorted(graph)}")
            for each in stated:
                shape = [size if isinstance(size, int) else -1 for size in graph[each.name].shape]
                full = [-1, *_dims(each)] if self.batched else _dims(each)
                same = len(shape) == len(full) and all(
                    size == own or (not exact and size == -1) for size, own in zip(shape, full, strict=True)
                )
                kind = model_config_pb2.DataType.Name(each.data_type)
                if not same or ONNX[graph[each.name].type] != kind:
                    raise TritonRefusal(
                        f"{each.name}: the graph has {shape}, the configuration {full} {kind}"
                    )

    def check(self, arrays: Mapping[str, np.ndarray], stated: Any) -> int:
        """The batch of tensors as they go between models; ``TritonRefusal`` where one is not as stated."""
        if set(arrays) != {value.name for value in stated}:
            raise TritonRefusal(f"{self.config.name}: tensors are {sorted(arrays)}")
        batch = 1
        for value in stated:
            found, kind = arrays[value.name], model_config_pb2.DataType.Name(value.data_type)
            shape = list(found.shape)
            if self.batched:
                batch, shape = shape[0], shape[1:]
            if found.dtype != NUMPY[kind] or not _matches(shape, value.dims):
                raise TritonRefusal(
                    f"{self.config.name} {value.name}: {found.dtype} {list(found.shape)}, stated {kind} "
                    f"{list(value.dims)}"
                )
        if self.batched and batch > self.config.max_batch_size:
            raise TritonRefusal(f"batch size {batch} exceeds {self.config.max_batch_size}")
        return batch

    def run(self, requests: Sequence[Arrays]) -> list[Arrays | TritonRefusal]:
        """What each request is answered; with dynamic batching those of equal shapes are joined."""
        for request in requests:
            self.check(request, self.config.input)
        if self._python is not None:
            answers = self._run_python(requests)
        elif self.config.HasField("dynamic_batching"):
            answers = self._run_joined(requests)
        else:
            answers = [self._run_network(request) for request in requests]
        for answer in answers:
            if isinstance(answer, dict):
                self.check(answer, self.config.output)
        return answers

    def _run_python(self, requests: Sequence[Arrays]) -> list[Arrays | TritonRefusal]:
        given = [_Request([Tensor(*each) for each in request.items()]) for request in requests]
        answers = self._python.execute(given)
        assert len(answers) == len(requests)
        return [
            TritonRefusal(answer.error.text)
            if answer.error
            else {tensor.name(): tensor.as_numpy().copy() for tensor in answer.output_tensors}
            for answer in answers
        ]

    def _run_joined(self, requests: Sequence[Arrays]) -> list[Arrays | TritonRefusal]:
        waiting = dict(enumerate(requests))
        answers: dict[int, Arrays | TritonRefusal] = {}
        while waiting:
            shapes, chosen, count = None, [], 0
            for number, request in waiting.items():
                own = {name: array.shape[1:] for name, array in request.items()}
                size = len(next(iter(request.values())))
                if shapes in (None, own) and count + size <= self.config.max_batch_size:
                    shapes, count = own, count + size
                    chosen.append(number)
            joined = {
                name: np.concatenate([waiting[number][name] for number in chosen]) for name in shapes or ()
            }
            result, start = self._run_network(joined), 0
            for number in chosen:
                size = len(next(iter(waiting.pop(number).values())))
                answers[number] = {name: array[start : start + size] for name, array in result.items()}
                start += size
        return [answers[number] for number in range(len(requests))]

    def _run_network(self, arrays: Arrays) -> Arrays:
        self.batches.append(len(next(iter(arrays.values()))))
        values = self._session.run([value.name for value in self.config.output], arrays)
        found: Arrays = {}
        for stated, array in zip(self.config.output, values, strict=True):
            shape = list(array.shape)
            found[stated.name] = array
            if stated.HasField("reshape"):  # the graph's shape becomes that of the interface
                assert _matches(shape, [-1, *stated.reshape.shape])
                found[stated.name] = array.reshape(shape[0], *stated.dims)
        return found


class Triton:
    """A server over the repository ``models``; ``session`` runs a network of the backend ``tensorrt``."""

    def __init__(self, models: Path, session: Any = None) -> None:
        self.models: dict[str, Model] = {}
        for folder in sorted(models.iterdir()):
            tensorrt = read_config(folder).backend == "tensorrt"
            self.models[folder.name] = Model(folder, session if tensorrt else None)
        for model in self.models.values():
            if model.config.platform == "ensemble":
                self._check_ensemble(model)

    def _check_ensemble(self, ensemble: Model) -> None:
        known: dict[str, tuple[str, list[int], list[int]]] = {}

        def agree(name: str, value: Any, model: Model) -> None:
            dims = list(value.dims)
            full = [-1, *dims] if model.batched else dims
            kind = model_config_pb2.DataType.Name(value.data_type)
            before = known.setdefault(name, (kind, dims, full))
            if before[0] != kind or not (_matches(before[1], dims) or _matches(before[2], full)):
                raise TritonRefusal(f"ensemble tensor {name}: {before} and {(kind, dims, full)}")

        for value in (*ensemble.config.input, *ensemble.config.output):
            agree(value.name, value, ensemble)
        for step in ensemble.config.ensemble_scheduling.step:
            model = self.models[step.model_name]
            most = model.config.max_batch_size
            if most and most < ensemble.config.max_batch_size:
                raise TritonRefusal(f"{step.model_name}: takes batches of {most}")
            for mapping, stated in (
                (step.input_map, model.config.input),
                (step.output_map, model.config.output),
            ):
                values = {value.name: value for value in stated}
                if not set(mapping) <= set(values):
                    raise TritonRefusal(f"{step.model_name}: has no {sorted(set(mapping) - set(values))}")
                for own, shared in mapping.items():
                    agree(shared, values[own], model)
            if set(step.input_map) != {value.name for value in model.config.input}:
                raise TritonRefusal(f"{step.model_name}: an input is not mapped")

    def infer(self, name: str, requests: Sequence[Arrays]) -> list[Arrays | TritonRefusal]:
        """The answers to requests that are there at the same time."""
        ensemble = self.models[name]
        for request in requests:
            ensemble.check(request, ensemble.config.input)
        pools: list[Arrays | TritonRefusal] = [dict(request) for request in requests]
        for step in ensemble.config.ensemble_scheduling.step:
            alive = [pool for pool in pools if isinstance(pool, dict)]
            given = [{own: pool[shared] for own, shared in step.input_map.items()} for pool in alive]
            answers = iter(self.models[step.model_name].run(given) if given else ())
            for number, pool in enumerate(pools):
                if not isinstance(pool, dict):
                    continue
                answer = next(answers)
                if isinstance(answer, dict):
                    pool.update({shared: answer[own] for own, shared in step.output_map.items()})
                else:
                    pools[number] = answer
        found: list[Arrays | TritonRefusal] = []
        for pool in pools:
            if isinstance(pool, dict):
                pool = {value.name: pool[value.name] for value in ensemble.config.output}
                ensemble.check(pool, ensemble.config.output)
            found.append(pool)
        return found
