"""Which objects of an image were found, which were missed, and which detections are false."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anchorline.evaluation.boxes import box_areas, intersection_matrix, iou_matrix
from anchorline.evaluation.dataset import LabelledImage
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
