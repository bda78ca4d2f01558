"""Which objects of an image were found, which were missed, and which detections are false."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import box_areas, intersection_matrix, iou_matrix
from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.runtime.detections import Detections


@dataclass(frozen=True, eq=False)
class ImageMatches:
    """Indices into the detections and the objects of one image.

    ``pairs`` int64 [P, 2] are (detection, object); ``missed`` [M] are objects without a detection,
    ``false_positives`` [F] detections without an object, the best scored first.
    """

    pairs: NDArray[np.int64]
    missed: NDArray[np.int64]
    false_positives: NDArray[np.int64]


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
    ignored = image.difficult | image.crowd
    same_class = detections.labels[:, None] == image.labels[None, :]
    allowed = same_class | any_class
    overlaps = np.where(allowed, iou_matrix(detections.boxes, image.boxes), -1.0)
    ignored_overlaps = np.where(allowed, _ignored_overlaps(image, detections), -1.0)
    covers_ignored = ignored_overlaps.max(axis=1, initial=-1.0) >= iou_threshold
    free = ~ignored
    pairs, false_positives = [], []
    for index in np.argsort(-detections.scores, kind="stable"):
        if detections.scores[index] < min_score:
            break
        candidates = np.where(free, overlaps[index], -1.0)
        ranked = np.lexsort((~same_class[index], -candidates))
        if len(ranked) and candidates[ranked[0]] >= iou_threshold:
            pairs.append((index, ranked[0]))
            free[ranked[0]] = False
        elif not covers_ignored[index]:
            false_positives.append(index)
    return ImageMatches(
        pairs=np.array(pairs, dtype=np.int64).reshape(-1, 2),
        missed=np.flatnonzero(free),
        false_positives=np.array(false_positives, dtype=np.int64),
    )


def _ignored_overlaps(image: LabelledImage, detections: Detections) -> NDArray[np.float64]:
    """How far [N, M] a detection lies on an ignored object: the IoU, for a crowd its own share inside."""
    overlaps = iou_matrix(detections.boxes, image.boxes)
    common = intersection_matrix(detections.boxes, image.boxes)
    areas = box_areas(detections.boxes)[:, None]
    inside = np.divide(common, areas, out=np.zeros_like(common), where=areas > 0)
    return np.where(image.crowd, inside, np.where(image.difficult, overlaps, -1.0))


# The confusion matrix of a detector: which class an object has, and which class was detected there.


BACKGROUND = "background"


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """``counts`` int64 [C + 1, C + 1]: rows are the objects' classes, columns the detected ones.

    The last row holds detections where there is no object, the last column objects that were missed.
    Detections count from ``min_score`` on, and match an object of any class from ``iou_threshold`` on.
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

    Difficult and crowd objects count neither way, see ``matching.match_image``.
    """
    background = len(dataset.names)
    shape = (background + 1, background + 1)
    counts = np.zeros(shape, dtype=np.int64)
    for image, found in zip(dataset, detections, strict=True):
        matches = match_image(image, found, min_score, iou_threshold, any_class=True)
        detected, objects = matches.pairs.T
        missed, false_positives = image.labels[matches.missed], found.labels[matches.false_positives]
        rows = [image.labels[objects], missed, np.full(len(false_positives), background)]
        columns = [found.labels[detected], np.full(len(missed), background), false_positives]
        cells = np.ravel_multi_index((np.concatenate(rows), np.concatenate(columns)), shape)
        counts += np.bincount(cells, minlength=counts.size).reshape(shape)
    return ConfusionMatrix(dataset.names, counts, min_score, iou_threshold)
