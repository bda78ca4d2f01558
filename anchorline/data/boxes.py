"""Boxes of labelled data and metrics: xyxy in pixels with continuous edges (width = x2 - x1)."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.errors import DataError

# Why a labelled box cannot be used.
ZERO_AREA, OUTSIDE = "zero area", "outside the image"
REVERSED = "reversed (xmax below xmin or ymax below ymin)"

_LARGEST_FRACTION = 1.5  # of an image's side, with room for boxes beyond its edge


def count_fractions(boxes: NDArray[np.floating], where: str) -> Counter[str]:
    """A remark on the boxes [N, 4] with an area that seem to be in 0..1, as fractions of the image, not in
    pixels; raises ``DataError`` where all of them are."""
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
    fractions = int((abs(boxes) <= _LARGEST_FRACTION).all(axis=1).sum())
    if fractions and fractions == len(boxes):
        raise DataError(
            f"{where}: all boxes ({fractions}) lie between 0 and 1, as fractions of the image; expected "
            "pixels: multiply them by the width and height of their image"
        )
    text = "boxes between 0 and 1, as fractions of the image, read as pixels"
    return Counter({text: fractions} if fractions else {})


def box_areas(boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Areas [N] of boxes [N, 4] in square pixels."""
    boxes = boxes.astype(np.float64)
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def intersection_matrix(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Common areas [N, M] of boxes ``a`` [N, 4] and ``b`` [M, 4] in square pixels."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    top_left = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom_right = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.asarray(np.clip(bottom_right - top_left, 0.0, None).prod(axis=2))


def iou_matrix(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Intersection over union [N, M] of boxes ``a`` [N, 4] and ``b`` [M, 4]; 0 where both areas are 0."""
    inter = intersection_matrix(a, b)
    union = box_areas(a)[:, None] + box_areas(b)[None, :] - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def clip_labelled_boxes(
    boxes: NDArray[np.float64], size: tuple[int, int], empty_side: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.bool_], Counter[str]]:
    """Clip annotated boxes to the image and name the ones that cannot be used.

    ``boxes`` [N, 4] are as annotated, ``size`` is the image's (height, width). ``empty_side`` is the
    side of a box that covers nothing: 0 pixels with continuous edges, 1 where a format's inclusive
    pixel indices were turned into edges. Returns the clipped boxes that are kept [K, 4], the mask
    [N] of the kept ones, and how many were dropped for each reason.
    """
    height, width = size
    sides = boxes[:, 2:] - boxes[:, :2]
    exact = np.clip(boxes, 0.0, [width, height, width, height])
    clipped = exact.astype(np.float32)
    backwards = (sides < empty_side).any(axis=1)
    empty = ~backwards & (sides == empty_side).any(axis=1)
    outside = ~backwards & ~empty & (exact[:, 2:] <= exact[:, :2]).any(axis=1)
    empty |= ~backwards & ~outside & (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)  # nothing in float32
    kept = ~(backwards | empty | outside)
    reasons = {REVERSED: backwards, ZERO_AREA: empty, OUTSIDE: outside}
    dropped = Counter({reason: int(mask.sum()) for reason, mask in reasons.items() if mask.any()})
    return clipped[kept], kept, dropped
