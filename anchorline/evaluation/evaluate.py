"""Evaluate a detector on labelled images: VOC AP (area and 11-point) and COCO AP, by class and size.

A detector is any function from a list of frames to a list of ``Detections``, so a checkpoint, an
ONNX file and an engine go through the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import box_areas
from anchorline.data.dataset import Dataset, LabelledImage, list_names
from anchorline.data.summary import SIZE_CLASSES, in_size_class
from anchorline.evaluation.coco_ap import CocoFigures, coco_figures
from anchorline.evaluation.voc_ap import PrecisionRecall, voc_curves
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import DataError, SettingsError

if TYPE_CHECKING:
    from rich.table import Table

Detect = Callable[[list[NDArray[np.uint8]]], list[Detections]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ClassReport:
    """The figures of one class: VOC AP at IoU 0.5 (area, 11-point), COCO AP, objects that count."""

    ap50: float
    voc07: float
    ap: float
    objects: int


@dataclass(frozen=True)
class SizeFigures:
    """COCO AP at IoU 0.5 and .5:.95 over the objects of one size class, and how many count."""

    ap50: float
    ap: float
    objects: int

    def to_json(self) -> dict[str, Any]:
        return {"ap50": _number(self.ap50), "ap": _number(self.ap), "objects": self.objects}


@dataclass(frozen=True)
class SizeReport:
    """One of COCO's size classes: the mean over the classes that have such objects, and each class."""

    map50: float
    map: float
    objects: int
    per_class: dict[str, SizeFigures]

    def to_json(self) -> dict[str, Any]:
        return {
            "map50": _number(self.map50),
            "map": _number(self.map),
            "objects": self.objects,
            "per_class": {name: each.to_json() for name, each in self.per_class.items()},
        }


@dataclass(frozen=True)
class EvaluationReport:
    """What a detector reaches on a data set. Means are over the classes that have objects.

    ``map50`` is VOC's area AP at IoU 0.5, ``voc07`` the 11-point one, ``map`` COCO's AP .5:.95; a
    figure is NaN where there is no object to find. ``per_size`` are COCO's figures for ``small``,
    ``medium`` and ``large`` objects; ``curves`` the precision-recall curves at IoU 0.5 by class name;
    ``detections`` what the detector found in each image, with labels that index the data's names.
    """

    map50: float
    voc07: float
    map: float
    per_class: dict[str, ClassReport]
    per_size: dict[str, SizeReport]
    images: int
    provider: str
    precision: str
    curves: dict[str, PrecisionRecall]
    detections: tuple[Detections, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The plain dict that ``anchorline evaluate --json`` writes; NaN becomes None."""
        per_class = {
            name: {
                "ap50": _number(each.ap50),
                "voc07": _number(each.voc07),
                "ap": _number(each.ap),
                "objects": each.objects,
            }
            for name, each in self.per_class.items()
        }
        return {
            "map50": _number(self.map50),
            "voc07": _number(self.voc07),
            "map": _number(self.map),
            "per_class": per_class,
            "per_size": {size: each.to_json() for size, each in self.per_size.items()},
            "images": self.images,
            "provider": self.provider,
            "precision": self.precision,
        }

    def render(self) -> Table:
        """A rich table: one row per class and the mean; the last columns are COCO AP by size."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=f"{self.images} images, {self.provider}, {self.precision}")
        table.add_column("class")
        for column in ("objects", "AP50", "VOC07", "AP", *self.per_size):
            table.add_column(column, justify="right")
        for name, each in self.per_class.items():
            by_size = [size.per_class[name].ap for size in self.per_size.values()]
            table.add_row(
                escape(name), str(each.objects), *map(_shown, (each.ap50, each.voc07, each.ap, *by_size))
            )
        table.add_section()
        objects = sum(each.objects for each in self.per_class.values())
        means = (self.map50, self.voc07, self.map, *(size.map for size in self.per_size.values()))
        table.add_row("mean", str(objects), *map(_shown, means), style="bold")
        return table


def evaluate(
    detect: Detect,
    dataset: Dataset,
    batch: int = 1,
    progress: Progress | None = None,
    *,
    provider: str,
    precision: str = "fp32",
) -> EvaluationReport:
    """Run ``detect`` over the data set, ``batch`` images at a time, and report its accuracy.

    ``progress`` is called with (images done, images in all) after each batch. Class names of the
    detections and of the data set are matched by name: a class of the data that the detector does
    not know is a ``DataError``, detections of a class the data does not have are left out.
    """
    return report_detections(detect_all(detect, dataset, batch, progress), dataset, provider, precision)


def detect_all(
    detect: Detect, dataset: Dataset, batch: int = 1, progress: Progress | None = None
) -> list[Detections]:
    """The detections of every image, in order, with labels that index ``dataset.names``."""
    return [to_dataset_labels(each, dataset) for each in run_detector(detect, dataset, batch, progress)]


def run_detector(
    detect: Detect, dataset: Dataset, batch: int = 1, progress: Progress | None = None
) -> Iterator[Detections]:
    """The detector's own results for every image, in order, computed ``batch`` images at a time."""
    if batch < 1:
        raise SettingsError(f"batch is {batch}; expected at least 1")
    if not len(dataset):
        raise DataError(f"{dataset.spec}: has no images; expected at least one to evaluate")
    for start in range(0, len(dataset), batch):
        frames = [image.load() for image in dataset.images[start : start + batch]]
        results = detect(frames)
        if len(results) != len(frames):
            raise SettingsError(f"the detector returned {len(results)} results for {len(frames)} frames")
        yield from results
        if progress is not None:
            progress(start + len(frames), len(dataset))


def report_detections(
    detections: Sequence[Detections], dataset: Dataset, provider: str, precision: str = "fp32"
) -> EvaluationReport:
    """The report for detections whose labels index ``dataset.names`` (see ``detect_all``)."""
    curves = voc_curves(dataset.images, detections, len(dataset.names))
    coco = coco_figures(dataset.images, detections, len(dataset.names))
    per_class = {
        name: ClassReport(curve.area, curve.eleven_point, ap, curve.objects)
        for name, curve, ap in zip(dataset.names, curves, coco["all"].ap, strict=True)
    }
    return EvaluationReport(
        map50=_mean([each.ap50 for each in per_class.values()]),
        voc07=_mean([each.voc07 for each in per_class.values()]),
        map=_mean([each.ap for each in per_class.values()]),
        per_class=per_class,
        per_size={size: _size_report(size, coco[size], dataset) for size in SIZE_CLASSES},
        images=len(dataset),
        provider=provider,
        precision=precision,
        curves=dict(zip(dataset.names, curves, strict=True)),
        detections=tuple(detections),
    )


def _size_report(size: str, coco: CocoFigures, dataset: Dataset) -> SizeReport:
    counts = _objects_of_size(size, dataset.images, len(dataset.names))
    per_class = {
        name: SizeFigures(ap50, ap, count)
        for name, ap50, ap, count in zip(dataset.names, coco.ap50, coco.ap, counts, strict=True)
    }
    return SizeReport(_mean(coco.ap50), _mean(coco.ap), sum(counts), per_class)


def _objects_of_size(size: str, images: Sequence[LabelledImage], num_classes: int) -> list[int]:
    """How many objects of each class are to be found in a size class."""
    counts = np.zeros(num_classes, dtype=np.int64)
    for image in images:
        counted = in_size_class(box_areas(image.boxes), size) & ~(image.difficult | image.crowd)
        counts += np.bincount(image.labels[counted], minlength=num_classes)
    return [int(count) for count in counts]


def to_dataset_labels(detections: Detections, dataset: Dataset) -> Detections:
    """The same detections with the data set's labels; those of foreign classes are left out."""
    names = detections.class_names or dataset.names
    for name in dataset.names:
        if name not in names:
            raise DataError(
                f"{dataset.spec}: the data has the class {name!r}, the model knows only {list_names(names)}; "
                "evaluate it on data of its own classes"
            )
    index = {name: label for label, name in enumerate(dataset.names)}
    to_dataset = np.array([index.get(name, -1) for name in names], dtype=np.int64)
    if len(detections) and int(detections.labels.max()) >= len(names):
        raise DataError(
            f"a detection has label {int(detections.labels.max())} and no class names; "
            f"expected a label below {len(names)}, the number of classes in {dataset.spec}"
        )
    labels = to_dataset[detections.labels]
    known = labels >= 0
    return Detections(detections.boxes[known], detections.scores[known], labels[known], dataset.names)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if not np.isnan(value)]
    return float(np.mean(finite)) if finite else float("nan")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _shown(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"
