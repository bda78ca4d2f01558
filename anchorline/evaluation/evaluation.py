"""Evaluate a detector on labelled images: VOC and COCO AP by class and size, or the recall of proposals.

A detector is any function from a list of frames to a list of ``Detections``, so a checkpoint, an
ONNX file and an engine go through the same code: with their own ``batch``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import box_areas, iou_matrix
from anchorline.data.dataset import Dataset, LabelledImage, list_names
from anchorline.data.proposals import read_proposals
from anchorline.data.summary import MOST_ROWS, SIZE_CLASSES, in_size_class
from anchorline.evaluation.metrics import PrecisionRecall, coco_figures, mean_of_known, voc_curves
from anchorline.runtime.canvas import unmixed
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import DataError, SettingsError
from anchorline.runtime.io.files import plain

if TYPE_CHECKING:
    from rich.table import Table

    from anchorline.runtime.video.options import SliceOptions

PROPOSAL_COUNTS = (1, 3, 10, 30, 50, 100, 200, 300, 500, 1000)
IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))

Detect = Callable[[list[NDArray[np.uint8]]], list[Detections]]
Progress = Callable[[int, int], None]


def part_of(progress: Progress | None, start: int, total: int) -> Progress | None:
    """``progress`` for a part of the work that begins at ``start`` of ``total``."""
    return None if progress is None else lambda done, _: progress(start + done, total)


def run_detector(
    detect: Detect, dataset: Dataset, batch: int = 1, progress: Progress | None = None
) -> Iterator[Detections]:
    """The detector's own results for every image, in order, computed ``batch`` images at a time.

    Where ``detect`` is the ``batch`` of a detector with a contract it is given images of one canvas at a
    time, so that no result depends on ``batch``. Any other function gets all of them.
    """
    owner: Any = getattr(detect, "__self__", None)
    if isinstance(getattr(owner, "contract", None), Contract) and detect == getattr(owner, "batch", None):
        detect = unmixed(owner)
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


@dataclass(frozen=True)
class ClassReport:
    """The figures of one class: VOC AP at IoU 0.5 (area, 11-point), COCO AP, objects that count."""

    ap50: float
    voc07: float
    ap: float
    objects: int


@dataclass(frozen=True)
class SizeFigures:
    """One class's COCO AP at IoU 0.5 and .5:.95 over the objects of a size, and how many count."""

    ap50: float
    ap: float
    objects: int


@dataclass(frozen=True)
class SizeReport:
    """One of COCO's size classes: the mean over the classes that have such objects, and each class."""

    map50: float
    map: float
    objects: int
    per_class: dict[str, SizeFigures]


@dataclass(frozen=True)
class EvaluationReport:
    """What a detector reaches on a data set. Means are over the classes that have objects.

    ``map50`` is VOC's area AP at IoU 0.5, ``voc07`` the 11-point one, ``map`` COCO's AP .5:.95; a
    figure is NaN where there is no object to find. ``per_size`` are COCO's figures for ``small``,
    ``medium`` and ``large`` objects; ``curves`` the precision-recall curves at IoU 0.5 by class name;
    ``detections`` what the detector found in each image, with labels that index the data's names.
    ``data`` is the spec; ``model`` (name and sha256) and ``slices`` are for whoever opened the model to say.
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
    data: str = ""
    model: Mapping[str, str] | None = None
    slices: SliceOptions | None = None

    def to_json(self) -> dict[str, Any]:
        """The plain dict that ``anchorline evaluate --json`` writes; NaN becomes None."""
        skipped = ("curves", "detections")
        return {name: plain(value) for name, value in vars(self).items() if name not in skipped}

    def rows(self) -> list[tuple[str, list[float]]]:
        """Of each class, then the mean: objects, AP50, VOC07, AP, and by size objects, AP50, AP."""
        rows = []
        for name, each in self.per_class.items():
            figures = [each.objects, each.ap50, each.voc07, each.ap]
            for size in self.per_size.values():
                of_class = size.per_class[name]
                figures += [of_class.objects, of_class.ap50, of_class.ap]
            rows.append((name, figures))
        objects = sum(each.objects for each in self.per_class.values())
        means = [objects, self.map50, self.voc07, self.map]
        for size in self.per_size.values():
            means += [size.objects, size.map50, size.map]
        return [*rows, ("mean", means)]

    def render(self) -> Table:
        """A rich table: one row per class and the mean; the last columns are COCO AP by size."""
        from rich.markup import escape
        from rich.table import Table

        *classes, means = self.rows()
        cut = f", the first {MOST_ROWS} of {len(classes)} classes" if len(classes) > MOST_ROWS else ""
        table = Table(title=f"{self.images} images, {self.provider}, {self.precision}{cut}")
        table.add_column("class")
        for column in ("objects", "AP50", "VOC07", "AP", *self.per_size):
            table.add_column(column, justify="right")
        for name, (objects, *figures) in [*classes[:MOST_ROWS], means]:
            shown = ["-" if np.isnan(each) else f"{each:.3f}" for each in (*figures[:3], *figures[5::3])]
            table.add_row(escape(name), f"{objects:.0f}", *shown)
        table.rows[-1].style = "bold"
        table.rows[-2].end_section = True
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
    return report_detections(
        list(run_detector(detect, dataset, batch, progress)), dataset, provider, precision
    )


def report_detections(
    detections: Sequence[Detections], dataset: Dataset, provider: str, precision: str = "fp32"
) -> EvaluationReport:
    """The report for a detector's own results on the data set; raises ``DataError`` as ``evaluate`` does."""
    names = dataset.names
    found = tuple(_to_dataset_labels(each, dataset) for each in detections)
    curves = voc_curves(dataset.images, found, len(names))
    coco = coco_figures(dataset.images, found, len(names))
    per_size = {}
    for size in SIZE_CLASSES:
        counts = np.zeros(len(names), dtype=np.int64)  # objects of each class that are to be found
        for image in dataset:
            counted = in_size_class(box_areas(image.boxes), size) & ~image.ignored
            counts += np.bincount(image.labels[counted], minlength=len(names))
        figures = map(SizeFigures, coco[size].ap50, coco[size].ap, counts.tolist())
        per_size[size] = SizeReport(
            map50=mean_of_known(coco[size].ap50),
            map=mean_of_known(coco[size].ap),
            objects=int(counts.sum()),
            per_class=dict(zip(names, figures, strict=True)),
        )
    return EvaluationReport(
        map50=mean_of_known([each.area for each in curves]),
        voc07=mean_of_known([each.eleven_point for each in curves]),
        map=mean_of_known(coco["all"].ap),
        per_class={
            name: ClassReport(curve.area, curve.eleven_point, ap, curve.objects)
            for name, curve, ap in zip(names, curves, coco["all"].ap, strict=True)
        },
        per_size=per_size,
        images=len(dataset),
        provider=provider,
        precision=precision,
        curves=dict(zip(names, curves, strict=True)),
        detections=found,
        data=dataset.spec,
    )


def _to_dataset_labels(detections: Detections, dataset: Dataset) -> Detections:
    """The same detections with the data set's labels; those of foreign classes are left out."""
    names = detections.class_names or dataset.names
    to_labels = _labels_by_name(names, dataset.names, dataset.spec)
    if len(detections) and int(detections.labels.max()) >= len(names):
        raise DataError(
            f"a detection has label {int(detections.labels.max())} and no class names; "
            f"expected a label below {len(names)}, the number of classes in {dataset.spec}"
        )
    labels = to_labels[detections.labels]
    known = labels >= 0
    return Detections(detections.boxes[known], detections.scores[known], labels[known], dataset.names)


@lru_cache(maxsize=1)  # the names are those of all images
def _labels_by_name(names: tuple[str, ...], wanted: tuple[str, ...], spec: str) -> NDArray[np.int64]:
    """The data's label of each of a detector's ``names``, -1 for one that the data has not."""
    known = {*names}
    if unknown := [name for name in wanted if name not in known]:
        raise DataError(
            f"{spec}: the data has the class {unknown[0]!r}, the model knows only {list_names(names)}; "
            "evaluate it on data of its own classes"
        )
    index = {name: label for label, name in enumerate(wanted)}
    return np.array([index.get(name, -1) for name in names], dtype=np.int64)


@dataclass(frozen=True)
class ProposalReport:
    """Recall by number of proposals and IoU, and the average recall ``ar`` (IoU .5:.95, most proposals).

    ``data``, ``model`` and ``slices`` as in ``EvaluationReport``.
    """

    recall: dict[int, dict[float, float]]
    ar: float
    objects: int
    images: int
    provider: str
    precision: str
    data: str = ""
    model: Mapping[str, str] | None = None
    slices: SliceOptions | None = None

    def to_json(self) -> dict[str, Any]:
        """``{"recall": {"100": {"0.5": ...}}, "ar", ...}``; None where there is no object."""
        return dict(plain(vars(self)))

    def render(self) -> Table:
        """A rich table: recall by number of proposals (rows) and IoU (columns)."""
        from rich.table import Table

        shown = (0.5, 0.6, 0.7, 0.8, 0.9)
        table = Table(
            title=f"{self.images} images, {self.objects} objects, {self.provider}, {self.precision}",
            caption=f"average recall (IoU .5:.95, {max(self.recall)} proposals) {self.ar:.3f}",
        )
        for column in ("proposals", *(f"IoU {iou}" for iou in shown)):
            table.add_column(column, justify="right")
        for count, by_iou in self.recall.items():
            table.add_row(str(count), *(f"{by_iou[iou]:.3f}" for iou in shown))
        return table


def evaluate_proposals(
    propose: Detect,
    dataset: Dataset,
    batch: int = 1,
    progress: Progress | None = None,
    *,
    provider: str = "",
    precision: str = "",
) -> ProposalReport:
    """Run a model that delivers proposals over the data set and report its recall."""
    found = list(run_detector(propose, dataset, batch, progress))
    report = proposal_recall(dataset.images, found, provider=provider, precision=precision)
    return dataclasses.replace(report, data=dataset.spec)


def evaluate_stored(path: Path, dataset: Dataset) -> ProposalReport:
    """The recall of the stored proposals in ``path`` on the data set; raises ``DataError``."""
    stored = [each.to_detections() for each in read_proposals(path, dataset)]
    report = proposal_recall(dataset.images, stored, provider="stored proposals")
    return dataclasses.replace(report, data=dataset.spec)


def proposal_recall(
    images: Sequence[LabelledImage],
    proposals: Sequence[Detections],
    counts: Sequence[int] = PROPOSAL_COUNTS,
    provider: str = "",
    precision: str = "",
) -> ProposalReport:
    """The share of objects that some proposal covers, whatever its class.

    Of each image the ``count`` best-scored proposals are looked at; an object counts as covered at an
    IoU threshold when one of them reaches it (one proposal may cover several). Difficult and crowd
    objects are left out.
    """
    columns = np.array(counts, dtype=np.int64)
    each_image = [np.zeros((0, len(columns)))]
    for image, each in zip(images, proposals, strict=True):
        ranked = np.argsort(-each.scores, kind="stable")[: columns.max()]
        boxes = image.boxes[~image.ignored]
        overlaps = np.zeros((len(boxes), len(ranked) + 1))  # the first column stands for no proposal at all
        overlaps[:, 1:] = iou_matrix(boxes, each.boxes[ranked])
        best_so_far = np.maximum.accumulate(overlaps, axis=1)
        each_image.append(best_so_far[:, np.minimum(columns, len(ranked))])
    best = np.concatenate(each_image)  # [objects, counts]: the IoU with the best of so many proposals
    recall = {
        count: {
            iou: float((best[:, column] >= iou).mean()) if len(best) else float("nan")
            for iou in IOU_THRESHOLDS
        }
        for column, count in enumerate(counts)
    }
    ar = float(np.mean(list(recall[max(counts)].values())))
    return ProposalReport(recall, ar, len(best), len(images), provider, precision)
