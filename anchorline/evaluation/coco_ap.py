"""COCO average precision over all objects and by size, computed by faster-coco-eval or pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import box_areas
from anchorline.data.dataset import LabelledImage
from anchorline.data.summary import SIZE_CLASSES
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import SettingsError

Backend = Literal["faster-coco-eval", "pycocotools"]


@dataclass(frozen=True)
class CocoFigures:
    """The AP of each class over IoU .50:.05:.95 and at IoU 0.5; NaN for a class without objects."""

    ap: list[float]
    ap50: list[float]


def coco_average_precision(
    images: Sequence[LabelledImage],
    detections: Sequence[Detections],
    num_classes: int,
    backend: Backend | None = None,
) -> list[float]:
    """AP of each class over all objects (see ``coco_figures``); the mean is COCO's headline figure."""
    return coco_figures(images, detections, num_classes, backend)["all"].ap


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
    with contextlib.redirect_stdout(io.StringIO()):  # both packages print their progress
        truth = coco_class()
        truth.dataset = _truth_records(images, num_classes)
        truth.createIndex()
        results = [record for i, each in enumerate(detections, 1) for record in _result_records(i, each)]
        found = coco_class()
        found.dataset = {**truth.dataset, "annotations": results}
        found.createIndex()
        evaluation = eval_class(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    # precision is [IoU thresholds, recall points, classes, area ranges, detection limits], -1 for "no object"
    precision = np.asarray(evaluation.eval["precision"])[..., -1]
    sizes = {size: evaluation.params.areaRngLbl.index(size) for size in ("all", *SIZE_CLASSES)}
    return {size: _figures(precision[..., index]) for size, index in sizes.items()}


def _figures(precision: NDArray[np.float64]) -> CocoFigures:
    """From the precision [IoU thresholds, recall points, classes]; the first threshold is 0.5."""
    classes = range(precision.shape[2])
    return CocoFigures(
        ap=[_mean_of_known(precision[:, :, label]) for label in classes],
        ap50=[_mean_of_known(precision[0, :, label]) for label in classes],
    )


def _mean_of_known(values: NDArray[np.float64]) -> float:
    known = values > -1
    return float(values[known].mean()) if known.any() else float("nan")


def _import_backend(backend: Backend | None) -> tuple[Any, Any]:
    """The (COCO, COCOeval) classes of the backend asked for, or of the first one installed."""
    if backend in (None, "faster-coco-eval"):
        with contextlib.suppress(ImportError):
            from faster_coco_eval import COCO, COCOeval_faster

            return COCO, COCOeval_faster
    if backend in (None, "pycocotools"):
        with contextlib.suppress(ImportError):
            from pycocotools.coco import COCO as OriginalCOCO
            from pycocotools.cocoeval import COCOeval

            return OriginalCOCO, COCOeval
    wanted = backend or "faster-coco-eval or pycocotools"
    raise SettingsError(
        f"COCO AP needs {wanted}, which is not installed; pip install {backend or 'faster-coco-eval'}"
    )


def _truth_records(images: Sequence[LabelledImage], num_classes: int) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for index, image in enumerate(images, start=1):
        ignored = image.crowd | image.difficult
        for box, area, label, crowd in zip(
            image.boxes, box_areas(image.boxes), image.labels, ignored, strict=True
        ):
            record = _record(len(annotations) + 1, index, box.tolist(), float(area), int(label))
            annotations.append({**record, "iscrowd": int(crowd)})
    return {
        "info": {},
        "images": [
            {"id": index, "height": image.size[0], "width": image.size[1]}
            for index, image in enumerate(images, 1)
        ],
        "categories": [{"id": label + 1, "name": str(label)} for label in range(num_classes)],
        "annotations": annotations,
    }


def _result_records(image_id: int, detections: Detections) -> list[dict[str, Any]]:
    rows = zip(
        detections.boxes, box_areas(detections.boxes), detections.labels, detections.scores, strict=True
    )
    return [
        {
            # Ids only have to be unique and above 0 (0 means "not matched").
            **_record((image_id << 32) + number, image_id, box.tolist(), float(area), int(label)),
            "score": float(score),
            "iscrowd": 0,
        }
        for number, (box, area, label, score) in enumerate(rows)
    ]


def _record(id: int, image_id: int, box: list[float], area: float, label: int) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    return {
        "id": id,
        "image_id": image_id,
        "category_id": label + 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": area,
    }
