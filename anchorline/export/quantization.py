"""Quantise an exported model to 8-bit integers, and publish it only if it loses no more than allowed.

Without PyTorch. The steps: look at model and images, find the layers (``integer_graph.py``), measure the
ranges of their inputs and outputs and what each costs (``calibration.py``), and give the most costly back to
float until the result holds.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from anchorline import __version__
from anchorline.data.dataset import FORMS, Dataset, LabelledImage, images_or_video, load_datasets
from anchorline.evaluation.evaluation import (
    PROPOSAL_COUNTS,
    Detect,
    Progress,
    proposal_recall,
    report_detections,
    run_detector,
)
from anchorline.export.calibration import METHODS, Sensitivity, measure_ranges, measure_sensitivity
from anchorline.export.functions import save_model
from anchorline.export.integer_graph import (
    TARGETS,
    WEIGHT_BITS,
    Layer,
    Range,
    find_layers,
    name_nodes,
    observed_tensors,
    quantized,
)
from anchorline.runtime.canvas import is_large
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, DataError, ParityError, SettingsError, check_choice
from anchorline.runtime.io.files import atomic_path
from anchorline.runtime.model_file import read_onnx
from anchorline.verify.compare import TOLERANCES, compare_outputs
from anchorline.verify.stages import onnx_subject
from anchorline.verify.verification import VerifyReport, verify_subjects, write_not_executed, write_record

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")

# More images hardly move a range: they are for the accuracy, which is measured on all.
RANGE_IMAGES = 128
SENSITIVITY_IMAGES = 2
# With more than this share of the layers in float, the file is not worth having.
MOST_FLOAT = 0.5
# ``anchorline verify`` tries everything; here it is done for several models in a row.
VERIFY_IMAGES = 8
VERIFY_TRAPS = ("empty image", "all 255", "mixed sizes in a batch")

CONFIDENT = 0.5
_FEW = 0.5  # share of the images
_FAR_MEAN = 90.0  # grey levels; day and night are about as far apart
_FLAT = 10.0  # grey levels; blood cells on a bright field have 20, street scenes 60
_INTEGER_OPS = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "QGemm")
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
        floats = len(self.float_layers)
        return (
            f"int8 for {self.target}, {len(self.layers) - floats} layers in integers and "
            f"{floats + len(self.last_layers)} in float, {before:.1f} MB became {after:.1f} MB; "
            f"{self.loss.describe()} on {self.images} images; "
            f"{self.verification.describe() if self.verification else 'not verified'}"
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
        """A rich table: the layers that went back to float, and the most costly of the others."""
        from rich.markup import escape
        from rich.table import Table

        floats = [layer for layer in self.layers if layer.name in self.float_layers]
        integer = [layer for layer in self.layers if layer.name not in self.float_layers]
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
        for kind, layers in (("float", floats), ("integers", integer[:_SHOWN])):
            for layer in layers:
                effect = "-" if layer.effect is None else f"{layer.effect:.2%}"
                table.add_row(escape(layer.name), kind, f"{layer.sqnr_db:.1f}", effect)
        return table


def quantize_onnx(
    model: str | Path,
    out: str | Path,
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
    model, out = Path(model), Path(out)
    _check(model, out, target, max_drop, method)
    contract = read_onnx(model).contract
    names = contract.names if contract.task == "detections" else None
    return quantize_dataset(
        *(model, out, calibration_data(calibrate, names, limit)),
        target=target,
        max_drop=max_drop,
        method=method,
        verify=verify,
        progress=progress,
        warn=warn,
    )


def quantize_dataset(
    model: Path,
    out: Path,
    dataset: Dataset,
    *,
    target: str = "cpu",
    max_drop: float = 0.01,
    method: str = "mse",
    verify: bool = True,
    progress: Progress | None = None,
    warn: Callable[[Sequence[str]], None] = lambda lines: None,
) -> QuantizeResult:
    """As ``quantize_onnx``, on images that were opened already, whose names are the model's."""
    with Detector(model, "cpu") as detector:
        contract = detector.contract
        proto = read_float_model(model, contract)
        layers = find_layers(proto.graph)
        usable = [layer for layer in layers if not layer.last]
        if not usable:
            raise ArtefactError(f"{model}: has no layers to quantise; export the model again")
        record: dict[str, Any] = {
            "for": target,
            "weight_bits": WEIGHT_BITS[target],
            "data": dataset.spec,
            "images": len(dataset),
            "method": method,
            "last_layers": [layer.name for layer in layers if layer.last],
            "max_drop": max_drop,
            "by": f"anchorline {__version__}",
        }
        images = evenly(dataset.images, RANGE_IMAGES)
        steps = _Steps(progress, len(images) + len(usable) + 2 * len(dataset))
        sums = np.zeros((3, 3))
        inputs = _inputs(detector, images, sums)
        ranges = measure_ranges(proto, observed_tensors(proto, usable), inputs, len(images), method, steps)
        meter = LossMeter(dataset, detector.batch, contract, steps)
        warnings = _warnings(sums, contract, meter.reference)
        warn(warnings)
        some = 1 if is_large(contract) else SENSITIVITY_IMAGES
        few = list(_inputs(detector, evenly(dataset.images, some), np.zeros_like(sums)))
        forms = _Forms(proto, usable, ranges, contract, record)
        costs = measure_sensitivity(proto, forms.form(0), usable, few, steps)
        forms.order = [cost.name for cost in costs]
        with atomic_path(out) as draft:
            trial, tries = _settle(forms, meter, steps, model, draft, verify)
            if not trial.holds:
                differs = f", and differs in {trial.report.reason}" if trial.report else ""
                raise ParityError(
                    f"{out}: {trial.loss.describe()}{differs}, with the {len(trial.floats)} most costly of "
                    f"{len(costs)} layers in float; a drop of {max_drop:g} is allowed. The file was not "
                    "published; allow more with --max-drop, or calibrate on more images"
                )
            contract = forms.save(len(trial.floats), trial.loss, draft)
            sizes = (model.stat().st_size, draft.stat().st_size)
            if trial.report is None:
                write_not_executed(draft, "quantised with --no-verify", model)
            else:
                write_record(draft, trial.report)
    return QuantizeResult(
        path=out,
        contract=contract,
        target=target,
        data=dataset.spec,
        images=len(dataset),
        method=method,
        loss=trial.loss,
        tries=tries,
        layers=tuple(costs),
        float_layers=trial.floats,
        last_layers=tuple(record["last_layers"]),
        sizes=sizes,
        verification=trial.report,
        warnings=warnings,
    )


def _check(model: Path, out: Path, target: str, max_drop: float, method: str) -> None:
    check_choice("target", target, TARGETS)
    check_choice("calibration method", method, METHODS)
    if not 0.0 <= max_drop <= 1.0:
        raise SettingsError(f"max drop is {max_drop!r}; expected a share from 0 to 1, such as 0.01")
    if model.suffix.lower() == ".safetensors":
        raise SettingsError(f"{model}: is a checkpoint; quantise the ONNX file that anchorline export makes")
    if out.suffix.lower() != ".onnx":
        raise SettingsError(f"output is {str(out)!r}; expected a file name that ends in .onnx")
    if out.exists() and model.exists() and out.samefile(model):
        raise SettingsError(f"output {str(out)!r} is the model itself; expected another file name")


def read_float_model(path: Path, contract: Contract) -> onnx.ModelProto:
    """The graph of a float32 export, each node with a name; ``contract`` is its own.

    The file has been opened by onnxruntime before. Raises ``ArtefactError`` for a model that is quantised
    already or in half precision.
    """
    model = onnx.load(path)
    remedy = "quantise the float32 file that anchorline export wrote"
    if contract.precision == "int8" or any(node.op_type in _INTEGER_OPS for node in model.graph.node):
        raise ArtefactError(f"{path}: is quantised already; {remedy}")
    halves = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    precision = "fp16" if halves else contract.precision
    if precision != "fp32":
        raise ArtefactError(f"{path}: its precision is {precision}, expected fp32; {remedy}")
    if contract.winograd:
        raise ArtefactError(
            f"{path}: its convolutions are in Winograd's form, for fp32; export it without --winograd"
        )
    name_nodes(model.graph)
    return model


def calibration_data(specs: Sequence[str], names: tuple[str, ...] | None, limit: int | None) -> Dataset:
    """The images of ``specs``: labelled data as for ``evaluate``, or images, folders and videos.

    ``names`` are the classes that labels may have (None: any), ``limit`` takes so many images at even
    distances. Raises ``DataError`` for what is missing, empty or has other classes.
    """
    if limit is not None and limit < 1:
        raise SettingsError(f"limit is {limit}; expected at least 1 image")
    if not specs:
        raise DataError(f"no calibration images given; expected {FORMS}, or a folder of images")
    paths = [spec for spec in specs if os.path.exists(spec)]
    if paths and len(paths) < len(specs):
        raise SettingsError(
            f"calibration data {', '.join(specs)}: expected all labelled or all without labels"
        )
    if paths:
        dataset = images_or_video(paths, names or ("object",))
    elif ":" not in specs[0]:
        raise DataError(f"calibration data {specs[0]!r}: no such file or folder; expected {FORMS}, or images")
    else:
        dataset = load_datasets(specs, names)
    if not len(dataset):
        raise DataError(f"{dataset.spec}: has no images; expected at least one to calibrate on")
    return dataclasses.replace(dataset, images=tuple(evenly(dataset.images, limit or len(dataset))))


def evenly(items: Sequence[T], count: int) -> list[T]:
    """``count`` of ``items`` at even distances, all of them where there are not more."""
    count = min(count, len(items))
    return [items[int(index * (len(items) / count))] for index in range(count)]


@dataclass(frozen=True)
class Loss:
    """``measure`` ("mAP50", "recall" or "agreement") of the float model and of the quantised one."""

    measure: str
    reference: float
    candidate: float

    @property
    def drop(self) -> float:
        """How much is lost; a gain is no loss."""
        return max(0.0, self.reference - self.candidate)

    def describe(self) -> str:
        return f"{self.measure} {self.reference:.4f} in float, {self.candidate:.4f} in int8"

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "drop": self.drop}


class LossMeter:
    """Compares detectors with the float model on the same images.

    Where the images have labels: mAP50, or for proposals the recall at IoU 0.5. Else the share of the
    detections with a score of at least 0.5 that are alike in both, by the int8 row of
    ``verify/compare.py``.
    """

    def __init__(
        self, dataset: Dataset, detect: Detect, contract: Contract, progress: Progress | None = None
    ) -> None:
        self.dataset, self._contract = dataset, contract
        self.reference = list(run_detector(detect, dataset, 1, progress))
        figure = self._figure(self.reference) if dataset.has_labels else float("nan")
        self._labelled = None if np.isnan(figure) else figure

    def measure(self, detect: Detect, progress: Progress | None = None) -> Loss:
        """Run ``detect`` on every image and compare."""
        found = list(run_detector(detect, self.dataset, 1, progress))
        if self._labelled is None:
            return Loss("agreement", 1.0, self._agreement(found))
        name = "mAP50" if self._contract.task == "detections" else "recall"
        return Loss(name, self._labelled, self._figure(found))

    def _figure(self, results: Sequence[Detections]) -> float:
        if self._contract.task == "proposals":
            return proposal_recall(self.dataset.images, results).recall[max(PROPOSAL_COUNTS)][0.5]
        return report_detections(results, self.dataset, "").map50

    def _agreement(self, results: Sequence[Detections]) -> float:
        each = compare_outputs(
            self.reference, results, self._contract, TOLERANCES["int8"], least_score=CONFIDENT
        )
        every = sum(one.matched + one.missed + one.extra for one in each)
        return 1.0 - sum(one.wrong for one in each) / every if every else 1.0


@dataclass(frozen=True)
class Trial:
    """A model with some layers in float: what it loses, and how it compares with the float model.

    ``report`` is None where that was not asked for, or the loss was too much already.
    """

    floats: tuple[str, ...]
    loss: Loss
    report: VerifyReport | None
    holds: bool


@dataclass
class _Steps:
    """Counts images and layers; ``total`` grows as it turns out what has to be done."""

    progress: Progress | None
    total: int
    done: int = 0

    def __call__(self, *_: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _inputs(
    detector: Detector, images: Sequence[LabelledImage], sums: NDArray[np.float64]
) -> Iterator[dict[str, NDArray[Any]]]:
    """The network's inputs for one image after the other, as the runtime makes them.

    Adds to ``sums``, by channel, how many pixels there are, their sum and that of their squares.
    """
    for image in images:
        inputs = {name: value.copy() for name, value in detector.prepare([image.load()])[0].items()}
        canvases, sizes = (inputs[name] for name in detector.contract.inputs)
        height, width = (int(side) for side in sizes[0])
        pixels = canvases[0, :height:4, :width:4].reshape(-1, 3).astype(np.float64)
        sums += [[len(pixels)] * 3, pixels.sum(axis=0), np.square(pixels).sum(axis=0)]
        yield inputs


@dataclass
class _Forms:
    """The model with integer ``layers`` but for the first so many in ``order``, which are the most costly.

    ``contract`` is that of the float model, whose source gets ``record``.
    """

    proto: onnx.ModelProto
    layers: Sequence[Layer]
    ranges: dict[str, Range]
    contract: Contract
    record: dict[str, Any]
    order: list[str] = field(default_factory=list)
    _made: dict[int, onnx.ModelProto] = field(default_factory=dict)

    def form(self, floats: int) -> onnx.ModelProto:
        """Making one takes seconds, and the last one tried is often the chosen one."""
        if floats not in self._made:
            kept = [layer for layer in self.layers if layer.name not in self.order[:floats]]
            self._made = {floats: quantized(self.proto, kept, self.ranges, self.record["for"])}
        return self._made[floats]

    def save(self, floats: int, loss: Loss | None, path: Path) -> Contract:
        """Write the form to ``path``; returns its contract."""
        form = self.form(floats)
        record = {**self.record, "float_layers": self.order[:floats], "loss": loss and loss.to_json()}
        source = {**self.contract.source, "quantised": record}
        contract = dataclasses.replace(self.contract, precision="int8", source=source)
        for entry in form.metadata_props:
            if entry.key == CONTRACT_KEY:
                entry.value = contract.to_json()
        onnx.checker.check_model(form)
        save_model(form, path)
        return contract


def _settle(
    forms: _Forms, meter: LossMeter, steps: _Steps, model: Path, path: Path, verify: bool
) -> tuple[Trial, int]:
    """Write to ``path`` the form with the fewest float layers that holds; it, and how many were tried.

    It holds where the loss is within the record's ``max_drop`` and, with ``verify``, it agrees with the float
    ``model`` within the tolerances of int8.
    """
    tries = 0

    def attempt(floats: int) -> Trial:
        nonlocal tries
        steps.total += len(meter.dataset) if tries else 0
        tries += 1
        forms.save(floats, None, path)
        with Detector(path, "cpu") as detector:
            loss = meter.measure(detector.batch, steps)
        holds, report = loss.drop <= forms.record["max_drop"], None
        if verify and holds:
            some = meter.dataset.first(VERIFY_IMAGES)
            with onnx_subject(model) as reference, onnx_subject(path) as candidate:
                report = verify_subjects(reference, candidate, some, which_traps=VERIFY_TRAPS)
            holds = report.passed
        return Trial(tuple(forms.order[:floats]), loss, report, holds)

    return fewest_float(int(MOST_FLOAT * len(forms.order)), attempt), tries


def fewest_float(most: int, attempt: Callable[[int], Trial]) -> Trial:
    """The trial with the fewest float layers that holds, or the last one where none of up to ``most`` does.

    ``attempt(number)`` tries that many. Doubling, then halving the gap: some ten trials for a hundred
    layers. Where more float layers do harm, as they seldom do, it may not be the fewest.
    """
    number, fails = 0, -1
    while not (trial := attempt(number)).holds:
        if number >= most:
            return trial
        fails, number = number, min(max(1, 2 * number), most)
    while number - fails > 1:
        middle = (fails + number) // 2
        between = attempt(middle)
        if between.holds:
            number, trial = middle, between
        else:
            fails = middle
    return trial


def _warnings(
    sums: NDArray[np.float64], contract: Contract, results: Sequence[Detections]
) -> tuple[str, ...]:
    """What speaks against images with such ``sums`` and ``results`` of the float model being like those that
    it was trained on."""
    count, total, squares = sums
    mean = total / count
    contrast = float(np.sqrt(np.maximum(squares / count - mean**2, 0.0)).mean())
    expected = np.array(contract.mean)
    if contract.channel_order == "rgb":
        expected = expected[::-1]
    far = int(np.abs(mean - expected).argmax())
    found = []
    if abs(mean[far] - expected[far]) > _FAR_MEAN:
        found.append(
            f"the calibration images have a mean of {mean[far]:.0f} grey levels in "
            f"{('blue', 'green', 'red')[far]}, the model was made for {expected[far]:.0f}; are they like "
            "what it will see?"
        )
    if contrast < _FLAT:
        found.append(
            f"the calibration images have a contrast of {contrast:.1f} grey levels (standard deviation); "
            "are they real images?"
        )
    empty = sum(1 for each in results if not (each.scores >= CONFIDENT).any())
    if empty > _FEW * len(results):
        found.append(
            f"in {empty} of {len(results)} calibration images the float model finds nothing with a score of "
            f"at least {CONFIDENT:g}; are they like what it was trained on?"
        )
    return tuple(found)
