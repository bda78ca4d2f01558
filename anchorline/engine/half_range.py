"""What half precision can hold: weights that are too large or too small for it, and activations.

float16 ends at 65504, its smallest normal number is 6.1e-5, and below that digits are lost one by
one. onnxruntime's CPU provider computes float16 in float32 and shows neither; hence magnitudes are
measured in float32, and what half precision makes of them is worked out or really rounded
(``half_simulation.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from anchorline.engine.graph_tools import copy_of, fresh_name, replace_nodes, tensor_names
from anchorline.runtime.errors import ArtefactError, SettingsError
from anchorline.runtime.onnxruntime_backend import open_for_checks

LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)
# Other images have larger activations than the samples: these may use half of the range.
MARGIN = 2.0
# A weight tensor of which rounding takes more than this share (of its norm) lies among the subnormals;
# rounding a normal number costs 0.0005 at most.
WORST_ROUNDING = 0.01


Sample = Mapping[str, NDArray[np.generic]]


def largest_weight(values: NDArray[np.generic]) -> float:
    """The largest magnitude; infinite when a value is not a number."""
    largest = float(np.abs(values).max(initial=0.0))
    return float("inf") if np.isnan(largest) else largest


def overflows(magnitude: float) -> bool:
    """Whether a number of this ``magnitude`` becomes infinite when rounded to half precision."""
    with np.errstate(over="ignore"):
        return not np.isfinite(np.float16(np.float32(magnitude)))


def rounding_loss(values: NDArray[np.generic]) -> float:
    """Norm of what rounding to half precision takes away, as a share of the norm of ``values``."""
    exact = values.astype(np.float64)
    with np.errstate(over="ignore"):
        lost = exact - values.astype(np.float16).astype(np.float64)
    norm = float(np.linalg.norm(exact))
    return float(np.linalg.norm(lost)) / norm if norm > 0 else 0.0


def largest_activations(
    model: onnx.ModelProto, tensors: Iterable[str], samples: Sequence[Sample]
) -> dict[str, float]:
    """The largest magnitude of each float32 tensor over all ``samples``, on onnxruntime's CPU provider.

    Infinite when a value is infinite or not a number. The maxima are taken inside the graph, each as
    soon as its tensor is there, so the memory needed is nearly that of a plain run.
    """
    names = sorted(set(tensors))
    if not names or not samples:
        return {}
    observed, outputs = _observed(model, names)
    session = _session(observed)
    largest = np.zeros(len(names), np.float32)
    for index, sample in enumerate(samples):
        found = np.array(_run(session, outputs, sample, index), np.float32).reshape(len(names), 3)
        magnitudes = np.abs(found[:, :2]).max(axis=1)
        # The maxima pass over NaN; the sum does not.
        magnitudes[~np.isfinite(found).all(axis=1)] = np.inf
        largest = np.maximum(largest, magnitudes)
    return {name: float(value) for name, value in zip(names, largest, strict=True)}


def _observed(model: onnx.ModelProto, names: Sequence[str]) -> tuple[onnx.ModelProto, list[str]]:
    """``model`` with three scalar outputs for each tensor, its maximum, minimum and sum, and no others.

    Each is taken as soon as the tensor is there, so that it need not be kept until the end.
    """
    observed = copy_of(model)
    graph = observed.graph
    used, wanted = tensor_names(graph), set(names)
    results: dict[str, list[str]] = {}
    nodes: list[onnx.NodeProto] = []

    def observe(name: str) -> None:
        if name in wanted and name not in results:
            results[name] = [fresh_name(f"{name}_{what}", used) for what in ("max", "min", "sum")]
            for operator, result in zip(("ReduceMax", "ReduceMin", "ReduceSum"), results[name], strict=True):
                nodes.append(helper.make_node(operator, [name], [result], keepdims=0))

    for value in graph.input:
        observe(value.name)
    for node in graph.node:
        nodes.append(node)
        for name in node.output:
            observe(name)
    replace_nodes(graph, nodes)
    del graph.output[:]
    outputs = [result for name in names for result in results[name]]
    graph.output.extend(helper.make_tensor_value_info(result, TensorProto.FLOAT, []) for result in outputs)
    return observed, outputs


def _session(model: onnx.ModelProto) -> Any:
    try:
        # In the order of the graph and without an arena: a third of the memory.
        return open_for_checks(model.SerializeToString(), arena=False, in_order=True)
    except ImportError as error:
        raise SettingsError(
            f"checking activations on samples needs onnxruntime ({error}); pip install 'anchorline[cpu]', "
            "or build without samples"
        ) from error
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise ArtefactError(
            f"onnxruntime cannot load the model to check its activations ({_reason(error)}); "
            "samples need the exported file, not one lowered for TensorRT"
        ) from error


def _run(session: Any, outputs: list[str], sample: Sample, index: int) -> list[NDArray[np.generic]]:
    wanted = [tensor.name for tensor in session.get_inputs()]
    if set(wanted) != set(sample):
        raise SettingsError(
            f"sample {index} has the tensors {', '.join(sample) or 'none'}; expected {', '.join(wanted)}"
        )
    try:
        return list(session.run(outputs, dict(sample)))
    except Exception as error:
        raise SettingsError(
            f"sample {index} does not fit the model ({_reason(error)}); expected inputs as the contract says"
        ) from error


def _reason(error: Exception) -> str:
    message = " ".join(str(error).split())
    return message if len(message) <= 300 else message[:297] + "..."
