"""What goes into a quantisation, whether model and images fit each other, and what it costs in the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from anchorline.data.dataset import Dataset
from anchorline.data.specs import FORMS, load_datasets
from anchorline.evaluation.evaluate import (
    Detect,
    Progress,
    report_detections,
    run_detector,
    to_dataset_labels,
)
from anchorline.evaluation.recall import PROPOSAL_COUNTS, proposal_recall
from anchorline.export.quantize.graph import name_nodes
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import ArtefactError, DataError, SettingsError
from anchorline.verify.compare import compare_all
from anchorline.verify.material import has_labels, images_or_video
from anchorline.verify.tolerances import TOLERANCES, detection_cuts, on_canvas

T = TypeVar("T")

CONFIDENT = 0.5
_FEW = 0.5  # share of the images
_FAR_MEAN = 90.0  # grey levels; day and night are about as far apart
_FLAT = 10.0  # grey levels; blood cells on a bright field have 20, street scenes 60
_INTEGER_OPS = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "QGemm")


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
    if contract.precision != "fp32" or halves:
        precision = "fp16" if halves else contract.precision
        raise ArtefactError(f"{path}: its precision is {precision}, expected fp32; {remedy}")
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
    paths = [spec for spec in specs if Path(spec).exists()]
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
    images = evenly(dataset.images, limit or len(dataset))
    return Dataset(dataset.spec, dataset.names, tuple(images), dataset.category_ids)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """``count`` of ``items`` at even distances, all of them where there are not more."""
    step = len(items) / min(count, len(items))
    return [items[int(index * step)] for index in range(min(count, len(items)))]


class ImageStatistics:
    """Mean and contrast of the images as the network gets them, gathered one by one."""

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._count = 0
        self._sum, self._squares = np.zeros(3), np.zeros(3)

    def add(self, image: NDArray[np.generic], size: NDArray[np.float32]) -> None:
        """One canvas [H, W, 3] in BGR, and the (height, width) that the image fills."""
        height, width = (int(side) for side in size)
        pixels = image[:height:4, :width:4].reshape(-1, 3).astype(np.float64)
        self._count += len(pixels)
        self._sum += pixels.sum(axis=0)
        self._squares += np.square(pixels).sum(axis=0)

    def warnings(self) -> list[str]:
        """What speaks against these images being like those the model was trained on."""
        mean = self._sum / self._count
        contrast = float(np.sqrt(np.maximum(self._squares / self._count - mean**2, 0.0)).mean())
        expected = np.array(self._contract.mean)
        if self._contract.channel_order == "rgb":
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
        return found


def detection_warnings(results: Sequence[Detections]) -> list[str]:
    """Whether the float model finds hardly anything in the images."""
    empty = sum(1 for each in results if not (each.scores >= CONFIDENT).any())
    if empty <= _FEW * len(results):
        return []
    return [
        f"in {empty} of {len(results)} calibration images the float model finds nothing with a score of at "
        f"least {CONFIDENT:g}; are they like what it was trained on?"
    ]


# What quantisation costs in the result.


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
        return {**asdict(self), "drop": self.drop}


class LossMeter:
    """Compares detectors with the float model on the same images.

    Where the images have labels: mAP50, or for proposals the recall at IoU 0.5. Else the share of the
    detections with a score of at least 0.5 that are alike in both, by the int8 row of
    ``verify/tolerances.py``.
    """

    def __init__(
        self, dataset: Dataset, detect: Detect, contract: Contract, progress: Progress | None = None
    ) -> None:
        self._dataset, self._contract = dataset, contract
        self.reference = list(run_detector(detect, dataset, 1, progress))
        figure = self._figure(self.reference) if has_labels(dataset) else float("nan")
        self._labelled = None if np.isnan(figure) else figure

    def measure(self, detect: Detect, progress: Progress | None = None) -> Loss:
        """Run ``detect`` on every image and compare."""
        found = list(run_detector(detect, self._dataset, 1, progress))
        if self._labelled is None:
            return Loss("agreement", 1.0, self._agreement(found))
        name = "mAP50" if self._contract.task == "detections" else "recall"
        return Loss(name, self._labelled, self._figure(found))

    def _figure(self, results: Sequence[Detections]) -> float:
        if self._contract.task == "proposals":
            return proposal_recall(self._dataset.images, results).recall[max(PROPOSAL_COUNTS)][0.5]
        own = [to_dataset_labels(each, self._dataset) for each in results]
        return report_detections(own, self._dataset, "").map50

    def _agreement(self, results: Sequence[Detections]) -> float:
        cuts = detection_cuts(self._contract, TOLERANCES["int8"])
        cuts["score_threshold"] = CONFIDENT
        sides = (
            [on_canvas(each[each.scores >= CONFIDENT], self._contract) for each in side]
            for side in (self.reference, results)
        )
        total = compare_all(*sides, **cuts).total
        every = total.matched + total.missed + total.extra
        return 1.0 if not every else 1.0 - total.wrong / every
