"""Quantise an exported model to 8-bit integers, and publish it only if it loses no more than allowed.

Without PyTorch. The steps: look at model and images (``checks.py``), find the layers and write the graph
(``graph.py``), measure the ranges of their inputs and outputs (``ranges.py``), see what each layer costs
(``sensitivity.py``), and give the most costly back to float until the result holds (``search.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from anchorline.data.dataset import LabelledImage
from anchorline.evaluation.evaluate import Progress
from anchorline.export.quantize.checks import (
    ImageStatistics,
    Loss,
    LossMeter,
    calibration_data,
    detection_warnings,
    evenly,
    read_float_model,
)
from anchorline.export.quantize.graph import TARGETS, Range, find_layers, observed_tensors, quantized
from anchorline.export.quantize.ranges import METHODS, measure_ranges
from anchorline.export.quantize.search import Job, Steps, Versions, contract_of, settle
from anchorline.export.quantize.sensitivity import Sensitivity, measure_sensitivity
from anchorline.runtime.contract import Contract
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.runtime.io.files import atomic_path
from anchorline.verify.report import VerifyReport, write_not_executed, write_record

if TYPE_CHECKING:
    from rich.table import Table


# What a quantisation did: shown as a table, written as JSON.


_SHOWN = 12  # of the integer layers; --json has all


@dataclass(frozen=True)
class QuantizeResult:
    """The published file and its contract, what it loses, and what every layer costs.

    ``last_layers`` are float by rule, ``float_layers`` because they cost too much; ``sizes`` are the bytes
    of the float file and of this one; ``tries`` how often the loss was measured.
    """

    path: Path
    contract: Contract
    target: str
    data: str
    images: int
    method: str
    loss: Loss
    tries: int
    layers: tuple[Sensitivity, ...]
    float_layers: tuple[str, ...]
    last_layers: tuple[str, ...]
    sizes: tuple[int, int]
    verification: VerifyReport | None
    warnings: tuple[str, ...]

    def describe(self) -> str:
        """One line: what it is and what it costs."""
        before, after = (size / 1e6 for size in self.sizes)
        integer = len(self.layers) - len(self.float_layers)
        floats = len(self.float_layers) + len(self.last_layers)
        verdict = "not verified" if self.verification is None else self.verification.describe()
        return (
            f"int8 for {self.target}, {integer} layers in integers and {floats} in float, "
            f"{before:.1f} MB became {after:.1f} MB; {self.loss.describe()} "
            f"on {self.images} images; {verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "for": self.target,
            "data": self.data,
            "images": self.images,
            "method": self.method,
            "loss": self.loss.to_json(),
            "tries": self.tries,
            "float_layers": list(self.float_layers),
            "last_layers": list(self.last_layers),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "bytes": {"float": self.sizes[0], "int8": self.sizes[1]},
            "verified": None if self.verification is None else self.verification.passed,
            "warnings": list(self.warnings),
        }

    def render(self) -> Table:
        """The layers that went back to float, and the most costly of the others."""
        return layer_table(self.layers, self.float_layers)


def layer_table(layers: Sequence[Sensitivity], floats: Collection[str]) -> Table:
    """A rich table of the most costly layers."""
    from rich.markup import escape
    from rich.table import Table

    shown = [layer for layer in layers if layer.name in floats]
    integer = [layer for layer in layers if layer.name not in floats]
    rest = len(integer) - _SHOWN
    more = f"\nand {rest} layers that cost less" if rest > 0 else ""
    table = Table(
        title="what each layer costs in integers, the most costly first",
        caption=f"SNR: signal to rounding noise; effect: how far it alone moves scores and boxes{more}",
        caption_justify="left",
    )
    table.add_column("layer", overflow="fold")
    for column in ("computes in", "SNR, dB", "effect"):
        table.add_column(column, justify="right")
    for layer in [*shown, *integer[:_SHOWN]]:
        effect = "-" if layer.effect is None else f"{layer.effect:.2%}"
        kind = "float" if layer.name in floats else "integers"
        table.add_row(escape(layer.name), kind, f"{layer.sqnr_db:.1f}", effect)
    return table


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
