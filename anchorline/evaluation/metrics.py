"""What detections are worth against labelled objects: VOC and COCO average precision, matches, confusions.

VOC after the devkit's VOCevaldet.m, with two deliberate differences: box widths are x2 - x1 (boxes have
continuous edges here), and the 11-point precision compares recall in whole numbers, so that 3 of 10
objects is a recall of 0.3. COCO by faster-coco-eval or pycocotools.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import box_areas, intersection_matrix, iou_matrix
from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.data.summary import SIZE_CLASSES
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import SettingsError

Backend = Literal["faster-coco-eval", "pycocotools"]
_BACKENDS = {
    "faster-coco-eval": ("faster_coco_eval:COCO", "faster_coco_eval:COCOeval_faster"),
    "pycocotools": ("pycocotools.coco:COCO", "pycocotools.cocoeval:COCOeval"),
}

BACKGROUND = "background"
_MOST_CONFUSED = 1000  # classes; the matrix grows with their square
_FALSE_POSITIVE, _TRUE_POSITIVE, _IGNORED = 0, 1, 2


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """The curve of one class and the two averages read from it.

    ``recall``, ``precision`` and ``scores`` float64 [K] go down the ranked detections; ``objects``
    is the number of objects that count. ``area`` is the AP of VOC 2010 and later (all points),
    ``eleven_point`` that of VOC 2007; both are NaN when there is no object to find.
    """

    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    scores: NDArray[np.float64]
    objects: int
    area: float
    eleven_point: float

    @property
    def reached(self) -> float:
        """The recall that all of the detections together reach."""
        if not self.objects:
            return float("nan")
        return float(self.recall[-1]) if len(self.recall) else 0.0

    def to_json(self) -> dict[str, Any]:
        """The curve without the points between two objects found, on which neither average depends."""
        rises = np.diff(self.recall, prepend=0.0) > 0
        if self.objects and len(rises):
            rises[-1] = True
        return {
            "objects": self.objects,
            "ap50": self.area,
            "voc07": self.eleven_point,
            "recall": self.recall[rises].tolist(),
            "precision": self.precision[rises].tolist(),
            "scores": self.scores[rises].tolist(),
        }


def voc_curves(
    images: Sequence[LabelledImage],
    detections: Sequence[Detections],
    num_classes: int,
    iou_threshold: float = 0.5,
) -> list[PrecisionRecall]:
    """The curve of every class; ``detections[i].labels`` mean the same classes as ``images[i].labels``.

    Difficult and crowd objects are neither to be found nor counted against a detection that hits them.
    """
    pairs_of: list[list[tuple[LabelledImage, Detections]]] = [[] for _ in range(num_classes)]
    for image, each in zip(images, detections, strict=True):
        for label in np.union1d(image.labels, each.labels).tolist():
            pairs_of[label].append((image, each))
    curves = []
    for label, pairs in enumerate(pairs_of):
        boxes = [image.boxes[image.labels == label] for image, _ in pairs]
        ignored = [image.ignored[image.labels == label] for image, _ in pairs]
        found = [each[each.labels == label] for _, each in pairs]
        found_boxes, scores = [each.boxes for each in found], [each.scores for each in found]
        curves.append(average_precision(boxes, ignored, found_boxes, scores, iou_threshold))
    return curves


def average_precision(
    truth_boxes: Sequence[NDArray[np.floating]],
    truth_ignored: Sequence[NDArray[np.bool_]],
    boxes: Sequence[NDArray[np.floating]],
    scores: Sequence[NDArray[np.floating]],
    iou_threshold: float = 0.5,
) -> PrecisionRecall:
    """AP of one class over a data set; each argument holds one array per image.

    Detections are taken in falling order of score. Each looks at the one object of its image that it
    overlaps most: below ``iou_threshold`` it is a false positive; an ignored object makes it not
    count; an object found before makes it a false positive; else it is a true positive.
    """
    objects = int(sum((~ignored).sum() for ignored in truth_ignored))
    every_score = np.concatenate([np.zeros(0), *(np.asarray(each, dtype=np.float64) for each in scores)])
    of_images = zip(truth_boxes, truth_ignored, boxes, scores, strict=True)
    outcomes = [_outcomes(*image, iou_threshold) for image in of_images]
    every_outcome = np.concatenate([np.zeros(0, dtype=np.int64), *outcomes])
    ranked = np.argsort(-every_score, kind="stable")
    ranked = ranked[every_outcome[ranked] != _IGNORED]
    hits = np.cumsum(every_outcome[ranked] == _TRUE_POSITIVE)
    precision = hits / np.arange(1, len(ranked) + 1)
    if not objects:
        nothing = np.full(len(ranked), np.nan)
        return PrecisionRecall(nothing, precision, every_score[ranked], 0, np.nan, np.nan)
    recall = hits / objects
    # The area under the curve after precision is made to fall monotonically.
    envelope = np.maximum.accumulate(np.append(precision, 0.0)[::-1])[::-1]
    area = np.sum(np.diff(np.concatenate([[0.0], recall, [1.0]])) * envelope)
    best = [precision[10 * hits >= tenth * objects].max(initial=0.0) for tenth in range(11)]
    return PrecisionRecall(recall, precision, every_score[ranked], objects, float(area), float(np.mean(best)))


def _outcomes(
    truth_boxes: NDArray[np.floating],
    truth_ignored: NDArray[np.bool_],
    boxes: NDArray[np.floating],
    scores: NDArray[np.floating],
    iou_threshold: float,
) -> NDArray[np.int64]:
    """The outcome [N] of each detection of one class in one image."""
    outcome = np.full(len(boxes), _FALSE_POSITIVE, dtype=np.int64)
    if not len(boxes) or not len(truth_boxes):
        return outcome
    overlaps = iou_matrix(boxes, truth_boxes)
    best = overlaps.argmax(axis=1)
    found = np.zeros(len(truth_boxes), dtype=np.bool_)
    for index in np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable"):
        target = best[index]
        if overlaps[index, target] < iou_threshold:
            continue
        if truth_ignored[target]:
            outcome[index] = _IGNORED
        elif not found[target]:
            outcome[index] = _TRUE_POSITIVE
            found[target] = True
    return outcome


@dataclass(frozen=True)
class CocoFigures:
    """The AP of each class over IoU .50:.05:.95 and at IoU 0.5; NaN for a class without objects."""

    ap: list[float]
    ap50: list[float]


def coco_figures(
    images: Sequence[LabelledImage],
    detections: Sequence[Detections],
    num_classes: int,
    backend: Backend | None = None,
) -> dict[str, CocoFigures]:
    """The figures over ``all`` objects and over those of each size class, ``small`` to ``large``.

    ``detections[i].labels`` mean the same classes as ``images[i].labels``. At most 100 detections of
    an image count. Crowd objects follow COCO's rule; difficult ones, which COCO does not know, are
    treated the same way. Objects of other sizes, and detections of other sizes that hit nothing, are
    left out of a size class. ``backend`` None takes the first one installed.
    """
    coco_class, eval_class = _import_backend(backend)
    # Classes without objects have no figures, and the backends' work grows with classes x images.
    present = sorted({label for image in images for label in image.labels.tolist()})
    objects = _coco_records(
        "iscrowd", ((each.boxes, each.labels, each.ignored.astype(int)) for each in images)
    )
    results = _coco_records("score", ((each.boxes, each.labels, each.scores) for each in detections))
    described = {
        "info": {},
        "images": [
            {"id": number, "height": image.size[0], "width": image.size[1]}
            for number, image in enumerate(images, 1)
        ],
        "categories": [{"id": label + 1, "name": str(label)} for label in present],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # both packages print their progress
        sides = []
        for records in (objects, results):
            sides.append(coco_class())
            sides[-1].dataset = {**described, "annotations": records}
            sides[-1].createIndex()
        evaluation = eval_class(*sides, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    # precision is [IoU thresholds, recall points, classes, area ranges, detection limits], -1 for "no object"
    precision = np.array(evaluation.eval["precision"])[..., -1]
    precision[precision < 0] = np.nan
    figures = {}
    for size in ("all", *SIZE_CLASSES):
        of_size = precision[..., evaluation.params.areaRngLbl.index(size)]
        figures[size] = CocoFigures(*([math.nan] * num_classes for _ in range(2)))
        for place, label in enumerate(present):
            figures[size].ap[label] = mean_of_known(of_size[:, :, place])
            figures[size].ap50[label] = mean_of_known(of_size[0, :, place])
    return figures


def mean_of_known(values: Sequence[float] | NDArray[np.float64]) -> float:
    """The mean without the NaN of what has no objects; NaN where nothing else is there."""
    every = np.asarray(values, dtype=np.float64)
    known = every[~np.isnan(every)]
    return float(known.mean()) if len(known) else float("nan")


def _import_backend(backend: Backend | None) -> tuple[Any, Any]:
    """The (COCO, COCOeval) classes of the backend asked for, or of the first one installed."""
    for name, classes in _BACKENDS.items():
        if backend in (None, name):
            with contextlib.suppress(ImportError):
                return resolve_name(classes[0]), resolve_name(classes[1])
    wanted = backend or " or ".join(_BACKENDS)
    raise SettingsError(
        f"COCO AP needs {wanted}, which is not installed; pip install {backend or 'faster-coco-eval'}"
    )


def _coco_records(
    key: str, images: Iterable[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[Any]]]
) -> list[dict[str, Any]]:
    """Annotations or results: the boxes and labels of every image and, under ``key``, a value of each."""
    records: list[dict[str, Any]] = []
    for image_id, (boxes, labels, values) in enumerate(images, start=1):
        rows = zip(boxes.tolist(), labels.tolist(), values.tolist(), strict=True)
        for (x1, y1, x2, y2), label, value in rows:
            record = {
                "id": len(records) + 1,  # 0 would mean "not matched"
                "image_id": image_id,
                "category_id": label + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                key: value,
            }
            records.append(record)
    return records


@dataclass(frozen=True, eq=False)
class ImageMatches:
    """Indices into the detections and the objects of one image."""

    pairs: NDArray[np.int64]  # [P, 2]: (detection, object)
    missed: NDArray[np.int64]  # [M]: objects without a detection
    false_positives: NDArray[np.int64]  # [F]: detections without an object, the best scored first


def match_image(
    image: LabelledImage,
    detections: Detections,
    min_score: float,
    iou_threshold: float = 0.5,
    any_class: bool = False,
) -> ImageMatches:
    """Match the detections from ``min_score`` on with the objects of their class, or of ``any_class``.

    In falling order of score each detection takes the free object that it overlaps most, if by
    ``iou_threshold`` or more; among equal overlaps one of its own class. A difficult object that is
    covered as well, and a crowd that holds that share of the detection, make a detection without an
    object count neither way, and are never missed themselves.
    """
    same_class = detections.labels[:, None] == image.labels[None, :]
    allowed = same_class | any_class
    overlaps = iou_matrix(detections.boxes, image.boxes)
    common, areas = intersection_matrix(detections.boxes, image.boxes), box_areas(detections.boxes)[:, None]
    inside = np.divide(common, areas, out=np.zeros_like(common), where=areas > 0)
    on_ignored = np.where(image.crowd, inside, np.where(image.difficult, overlaps, -1.0))
    excused = np.where(allowed, on_ignored, -1.0).max(axis=1, initial=-1.0) >= iou_threshold
    overlaps = np.where(allowed, overlaps, -1.0)
    free = ~image.ignored
    pairs, false_positives = [], []
    for index in np.argsort(-detections.scores, kind="stable"):
        if detections.scores[index] < min_score:
            break
        candidates = np.where(free, overlaps[index], -1.0)
        ranked = np.lexsort((~same_class[index], -candidates))
        if len(ranked) and candidates[ranked[0]] >= iou_threshold:
            pairs.append((index, ranked[0]))
            free[ranked[0]] = False
        elif not excused[index]:
            false_positives.append(index)
    return ImageMatches(
        pairs=np.array(pairs, dtype=np.int64).reshape(-1, 2),
        missed=np.flatnonzero(free),
        false_positives=np.array(false_positives, dtype=np.int64),
    )


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """Which class an object has, and which class was detected there.

    ``counts`` int64 [C + 1, C + 1]: rows are the objects' classes, columns the detected ones. The last row
    holds detections where there is no object, the last column objects that were missed. Detections count
    from ``min_score`` on, and match an object of any class from ``iou_threshold`` on.
    """

    names: tuple[str, ...]
    counts: NDArray[np.int64]
    min_score: float
    iou_threshold: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``background`` as the last name of rows and columns."""
        return {
            "names": [*self.names, BACKGROUND],
            "rows": "the class of the object",
            "columns": "the class detected",
            "counts": self.counts.tolist(),
            "min_score": self.min_score,
            "iou_threshold": self.iou_threshold,
        }


def confusion_matrix(
    dataset: Dataset, detections: Sequence[Detections], min_score: float = 0.5, iou_threshold: float = 0.5
) -> ConfusionMatrix:
    """Count over the data set; labels of ``detections``, one for each image, index ``dataset.names``.

    Difficult and crowd objects count neither way, see ``match_image``. Of more than ``_MOST_CONFUSED``
    classes those are left out that neither an object nor a detection has.
    """
    kept = np.arange(len(dataset.names))
    if len(kept) > _MOST_CONFUSED:
        sides = ((image.labels, found.labels) for image, found in zip(dataset, detections, strict=True))
        kept = np.unique(
            np.concatenate([np.zeros(0, np.int64), *(labels for both in sides for labels in both)])
        )
    place = np.zeros(len(dataset.names), dtype=np.int64)
    place[kept] = np.arange(len(kept))
    background = len(kept)
    counts = np.zeros((background + 1, background + 1), dtype=np.int64)
    for image, found in zip(dataset, detections, strict=True):
        matches = match_image(image, found, min_score, iou_threshold, any_class=True)
        detected, objects = matches.pairs.T
        np.add.at(counts, (place[image.labels[objects]], place[found.labels[detected]]), 1)
        np.add.at(counts[:, background], place[image.labels[matches.missed]], 1)
        np.add.at(counts[background], place[found.labels[matches.false_positives]], 1)
    names = tuple(dataset.names[label] for label in kept)
    return ConfusionMatrix(names, counts, min_score, iou_threshold)
