"""The confusion matrix of a detector: which class an object has, and which class was detected there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.evaluation.dataset import Dataset
from anchorline.evaluation.matching import match_image
from anchorline.runtime.detections import Detections

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
