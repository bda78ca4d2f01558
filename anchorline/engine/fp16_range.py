"""What half precision can hold: weights, activations on sample frames, and a simulation of the rounding."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from anchorline.data.dataset import images_or_video
from anchorline.engine.graph import (
    FLOAT,
    HALF,
    check_exported,
    element_types,
    forget,
    fresh_name,
    insert_after,
    read_model,
    refill,
    tensor_names,
)
from anchorline.runtime.backends.onnxruntime import open_for_checks
from anchorline.runtime.canvas import Preprocessor, check_frame
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import ArtefactError, SettingsError, one_line

# float16 ends at 65504, its smallest normal number is 6.1e-5, and below that digits are lost one by
# one. onnxruntime's CPU provider computes float16 in float32 and shows neither; hence magnitudes are
# measured in float32, and what half precision makes of them is worked out or really rounded.
LARGEST = float(np.finfo(np.float16).max)
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)
# Other images have larger activations than the samples: these may use half of the range.
MARGIN = 2.0
# A weight tensor of which rounding takes more than this share (of its norm) lies among the subnormals;
# rounding a normal number costs 0.0005 at most.
WORST_ROUNDING = 0.01
SAMPLES = 4  # each costs two passes of the network on the CPU

Sample = Mapping[str, NDArray[np.generic]]


def network_inputs(frames: Iterable[NDArray[np.uint8]], contract: Contract) -> list[Sample]:
    """Each frame (BGR uint8 [H, W, 3], any size) laid onto the canvas, as a batch of one by input name."""
    preprocess = Preprocessor(contract)
    samples: list[Sample] = []
    for frame in frames:
        inputs, _ = preprocess([check_frame(frame)])
        samples.append({name: values.copy() for name, values in inputs.items()})  # it uses its batch again
    return samples


def sample_inputs(model: Path, sources: Sequence[str | Path], count: int = SAMPLES) -> list[Sample]:
    """``count`` images at even distances out of ``sources`` (images, folders, a video), for ``model``."""
    contract = check_exported(read_model(model), str(model))
    images = images_or_video(sources, contract.names).images
    chosen = images[:: max(1, len(images) // count)][:count]
    return network_inputs((image.load() for image in chosen), contract)


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
    observed = copy.deepcopy(model)
    graph, used = observed.graph, tensor_names(observed.graph)
    results, reductions = [], {}
    for name in names:
        three = [fresh_name(f"{name}_{what}", used) for what in ("max", "min", "sum")]
        reductions[name] = [
            helper.make_node(operator, [name], [result], keepdims=0)
            for operator, result in zip(("ReduceMax", "ReduceMin", "ReduceSum"), three, strict=True)
        ]
        results += three
    insert_after(graph, reductions)
    refill(graph.output, (helper.make_tensor_value_info(result, FLOAT, []) for result in results))
    try:
        # In the order of the graph and without an arena: a third of the memory.
        session = open_for_checks(observed.SerializeToString(), arena=False, in_order=True)
    except ImportError as error:
        raise SettingsError(
            f"checking activations on samples needs onnxruntime ({error}); pip install 'anchorline[cpu]', "
            "or build without samples"
        ) from error
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise ArtefactError(
            f"onnxruntime cannot load the model to check its activations ({one_line(error)[:300]}); "
            "samples need the exported file, not one lowered for TensorRT"
        ) from error
    wanted = [tensor.name for tensor in session.get_inputs()]
    values = []
    for index, sample in enumerate(samples):
        if set(wanted) != set(sample):
            raise SettingsError(
                f"sample {index} has the tensors {', '.join(sample) or 'none'}; expected {', '.join(wanted)}"
            )
        try:
            values.append(session.run(results, dict(sample)))
        except Exception as error:
            raise SettingsError(
                f"sample {index} does not fit the model ({one_line(error)[:300]}); expected inputs as the "
                "contract says"
            ) from error
    found = np.array(values).reshape(len(samples), len(names), 3)
    magnitudes = np.abs(found[..., :2]).max(axis=2)
    # The maxima pass over NaN; the sum does not.
    magnitudes[~np.isfinite(found).all(axis=2)] = np.inf
    return dict(zip(names, magnitudes.max(axis=0).tolist(), strict=True))


def simulate_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 graph whose numbers are those of the mixed graph ``model`` (from ``to_precision``).

    onnxruntime's CPU provider computes a float16 graph in float32, which hides rounding between fused
    layers and overflow. Here each half-precision weight and activation passes through float16 and back
    (onnxruntime keeps such pairs of casts), sums run in float32 as in tensor cores, and a value beyond
    float16's range becomes infinite, as in the engine. Inputs, outputs and tensor names stay.
    """
    simulated = copy.deepcopy(model)
    graph, types = simulated.graph, element_types(model)
    used, rounding = tensor_names(graph), {}
    for tensor in graph.initializer:
        if tensor.data_type == HALF:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in graph.node:
        for place, name in enumerate(node.output):
            if types.get(name) != HALF:
                continue
            exact, rounded = fresh_name(f"{name}_exact", used), fresh_name(f"{name}_rounded", used)
            if node.op_type == "Cast":  # the rounding follows as a node of its own
                refill(node.attribute, [helper.make_attribute("to", FLOAT)])
            node.output[place] = exact
            rounding[exact] = [
                helper.make_node("Cast", [exact], [rounded], to=HALF),
                helper.make_node("Cast", [rounded], [name], to=FLOAT),
            ]
    insert_after(graph, rounding)
    forget(graph, {name for name, kind in types.items() if kind == HALF})
    return simulated
