"""Pascal VOC average precision, after the VOC devkit's VOCevaldet.m.

Two differences, both deliberate: box widths are x2 - x1 (boxes have continuous edges here), and the
11-point precision compares recall in whole numbers, so that 3 of 10 objects is a recall of 0.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import iou_matrix
from anchorline.data.dataset import LabelledImage
from anchorline.runtime.detections import Detections


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
    curves = []
    for label in range(num_classes):
        of_class = [image.labels == label for image in images]
        found = [each.labels == label for each in detections]
        curves.append(
            average_precision(
                [image.boxes[mask] for image, mask in zip(images, of_class, strict=True)],
                [(image.difficult | image.crowd)[mask] for image, mask in zip(images, of_class, strict=True)],
                [each.boxes[mask] for each, mask in zip(detections, found, strict=True)],
                [each.scores[mask] for each, mask in zip(detections, found, strict=True)],
                iou_threshold,
            )
        )
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
    every_score = np.concatenate([np.asarray(s, dtype=np.float64) for s in scores] or [np.zeros(0)])
    outcomes = [
        _match_image(*image, iou_threshold)
        for image in zip(truth_boxes, truth_ignored, boxes, scores, strict=True)
    ]
    every_outcome = np.concatenate(outcomes or [np.zeros(0, dtype=np.int64)])
    ranked = np.argsort(-every_score, kind="stable")
    ranked = ranked[every_outcome[ranked] != _IGNORED]
    hits = np.cumsum(every_outcome[ranked] == _TRUE_POSITIVE)
    ranks = np.arange(1, len(ranked) + 1)
    precision = hits / ranks
    recall = hits / objects if objects else np.full(len(ranked), np.nan)
    return PrecisionRecall(
        recall=recall,
        precision=precision,
        scores=every_score[ranked],
        objects=objects,
        area=_area(recall, precision) if objects else float("nan"),
        eleven_point=_eleven_point(hits, precision, objects) if objects else float("nan"),
    )


_FALSE_POSITIVE, _TRUE_POSITIVE, _IGNORED = 0, 1, 2


def _match_image(
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


def _area(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """The area under the curve after precision is made to fall monotonically."""
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.concatenate([[0.0], precision, [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))


def _eleven_point(hits: NDArray[np.int64], precision: NDArray[np.float64], objects: int) -> float:
    """The mean of the best precision at recall 0, 0.1, ... 1 or more."""
    best = [precision[10 * hits >= tenth * objects].max(initial=0.0) for tenth in range(11)]
    return float(np.mean(best))
