"""Quantise an exported model to 8-bit integers, and publish it only if it loses no more than allowed.

Without PyTorch. The steps, each in a module of its own: look at model and images
(``quantizing_checks.py``), find the layers (``quantizing_layers.py``), measure the ranges of their inputs
and outputs (``quantizing_ranges.py``), write the graph (``quantizing_graph.py``), see what each layer costs
(``quantizing_sensitivity.py``), and give the most costly back to float until the result holds
(``quantizing_search.py``, ``quantizing_loss.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from anchorline.evaluation.dataset import LabelledImage
from anchorline.evaluation.evaluate import Progress
from anchorline.evaluation.verify.record import write_not_executed, write_record
from anchorline.export.quantizing_checks import (
    ImageStatistics,
    calibration_data,
    detection_warnings,
    evenly,
    read_float_model,
)
from anchorline.export.quantizing_graph import TARGETS, Range, observed_tensors, quantized
from anchorline.export.quantizing_layers import find_layers
from anchorline.export.quantizing_loss import LossMeter
from anchorline.export.quantizing_ranges import METHODS, measure_ranges
from anchorline.export.quantizing_report import QuantizeResult
from anchorline.export.quantizing_search import Job, Steps, Versions, contract_of, settle
from anchorline.export.quantizing_sensitivity import Sensitivity, measure_sensitivity
from anchorline.runtime.detector import Detector
from anchorline.runtime.errors import ArtefactError, SettingsError
from anchorline.runtime.files import atomic_path

# More images hardly move a range: they are for the accuracy, which is measured on all.
RANGE_IMAGES = 128
SENSITIVITY_IMAGES = 2
LARGE_CANVAS = 500_000  # pixels; one image is enough there


def quantize_onnx(
    model: Path,
    out: Path,
    calibrate: Sequence[str],
    *,
    target: str = "cpu",
    max_drop: float = 0.01,
    limit: int | None = None,
    method: str = "mse",
    verify: bool = True,
    progress: Progress | None = None,
    warn: Callable[[Sequence[str]], None] = lambda lines: None,
) -> QuantizeResult:
    """Write the exported float32 ``model`` with 8-bit integer layers to ``out``.

    ``calibrate``: specs of labelled data, or images, folders and videos; ``limit`` takes so many of their
    images. ``target`` "cpu" is for onnxruntime's CPU provider, "tensorrt" for ``anchorline build``.
    ``method`` sets the ranges (``measure_ranges``). Layers go back to float, the most costly first, until
    the result loses at most ``max_drop``: mAP50 on the images (recall for a model of proposals), or without
    labels the share of the confident detections that are alike. With ``verify`` the file is compared with
    ``model`` stage by stage before it is published, and the verdict recorded beside it. ``warn`` is told
    what speaks against the images before the long part begins.

    Raises ``ParityError`` where half of the layers in float are not enough or the comparison fails, and
    publishes nothing then; ``ArtefactError``, ``DataError`` and ``SettingsError`` for what cannot be used.
    """
    _check(model, out, target, max_drop, method)
    with Detector(model, "cpu") as detector:
        contract = detector.contract
        proto = read_float_model(model, contract)
        dataset = calibration_data(
            calibrate, contract.names if contract.task == "detections" else None, limit
        )
        layers = find_layers(proto.graph)
        usable = [layer for layer in layers if not layer.last]
        if not usable:
            raise ArtefactError(f"{model}: has no layers to quantise; export the model again")
        steps = Steps(progress)
        job = Job(model, out, target, method, max_drop, proto, detector, dataset, layers, usable, steps)
        return _quantize(job, verify, warn)


def _check(model: Path, out: Path, target: str, max_drop: float, method: str) -> None:
    if target not in TARGETS:
        raise SettingsError(f"target is {target!r}; expected one of {', '.join(TARGETS)}")
    if method not in METHODS:
        raise SettingsError(f"calibration method is {method!r}; expected one of {', '.join(METHODS)}")
    if not 0.0 <= max_drop <= 1.0:
        raise SettingsError(f"max drop is {max_drop!r}; expected a share from 0 to 1, such as 0.01")
    if model.suffix.lower() == ".safetensors":
        raise SettingsError(f"{model}: is a checkpoint; quantise the ONNX file that anchorline export makes")
    if out.suffix.lower() != ".onnx":
        raise SettingsError(f"output is {str(out)!r}; expected a file name that ends in .onnx")
    if out.exists() and model.exists() and out.samefile(model):
        raise SettingsError(f"output {str(out)!r} is the model itself; expected another file name")


def _quantize(job: Job, verify: bool, warn: Callable[[Sequence[str]], None]) -> QuantizeResult:
    """From the ranges to the published file."""
    job.steps.expect(min(RANGE_IMAGES, len(job.dataset)) + len(job.usable) + 2 * len(job.dataset))
    ranges, warnings = _ranges(job)
    meter = LossMeter(job.dataset, job.detector.batch, job.contract, job.steps.step)
    warnings = (*warnings, *detection_warnings(meter.reference))
    warn(warnings)
    full = quantized(job.proto, job.usable, ranges, job.target)
    costs = _costs(job, full)
    with atomic_path(job.out) as temporary:
        trial, tries = settle(job, meter, Versions(job, ranges, costs, full), temporary, verify)
        sizes = (job.model.stat().st_size, temporary.stat().st_size)
    if trial.report is None:
        write_not_executed(job.out, "quantised with --no-verify", job.model)
    else:
        write_record(job.out, trial.report)
    return QuantizeResult(
        path=job.out,
        contract=contract_of(job, trial.floats, trial.loss),
        target=job.target,
        data=job.dataset.spec,
        images=len(job.dataset),
        method=job.method,
        loss=trial.loss,
        tries=tries,
        layers=tuple(costs),
        float_layers=trial.floats,
        last_layers=tuple(layer.name for layer in job.layers if layer.last),
        sizes=sizes,
        verification=trial.report,
        warnings=warnings,
    )


def _ranges(job: Job) -> tuple[dict[str, Range], tuple[str, ...]]:
    """The range of every activation, and what speaks against the images that gave it."""
    images = evenly(job.dataset.images, RANGE_IMAGES)
    statistics = ImageStatistics(job.contract)
    tensors = observed_tensors(job.proto, job.usable)
    inputs = _inputs(job, images, statistics)
    ranges = measure_ranges(job.proto, tensors, inputs, len(images), job.method, job.steps.step)
    return ranges, tuple(statistics.warnings())


def _inputs(
    job: Job, images: Sequence[LabelledImage], statistics: ImageStatistics | None = None
) -> Iterator[dict[str, NDArray[Any]]]:
    """The network's inputs for one image after the other, as the runtime makes them."""
    for image in images:
        inputs, _ = job.detector.prepare([image.load()])
        if statistics is not None:
            pixels, sizes = (inputs[name] for name in job.contract.inputs)
            statistics.add(pixels[0], np.asarray(sizes[0], np.float32))
        yield inputs


def _costs(job: Job, full: onnx.ModelProto) -> list[Sensitivity]:
    """What each usable layer costs, on a few images spread over the data; in ``full`` all are integers."""
    height, width = job.contract.canvas
    count = 1 if height * width > LARGE_CANVAS else SENSITIVITY_IMAGES
    inputs = [
        {name: value.copy() for name, value in each.items()}
        for each in _inputs(job, evenly(job.dataset.images, count))
    ]
    return measure_sensitivity(job.proto, full, job.usable, inputs, job.steps.step)
