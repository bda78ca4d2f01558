"""Where labels go: one after another, each where it hides least of those before it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_HIDDEN = 0.2  # a plate of which more than this share lies under others cannot be read well
_CROWDED = 0.25  # a plate that would hide more than this share of its own object goes beside it
_RANK = 1.0  # square pixels of overlap that one place lower in the order is worth
_ON_SMALL = 100.0  # the same for a place on an object that it would hide


def place_labels(
    boxes: NDArray[np.floating], sizes: NDArray[np.integer], frame_size: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Corners (x, y) int64 [N, 2] of plates of ``sizes`` (width, height) [N, 2], and which can be read.

    ``boxes`` [N, 4] are xyxy, the most important first; ``frame_size`` is (height, width). Of the
    places at its box a plate takes the one where earlier plates cover least of it, by preference
    above the box, and always inside the frame. It counts as readable where at most a fifth is covered.
    """
    left, top, right, bottom = _places(boxes, sizes, frame_size)
    preference = _preferences(boxes, sizes, (left, top, right, bottom))
    cost = preference.copy()
    limits = (_HIDDEN * sizes.prod(axis=1)).tolist()
    corners = np.zeros((len(boxes), 2), np.int64)
    readable = np.zeros(len(boxes), bool)
    for row, limit in enumerate(limits):
        place = int(cost[row].argmin())
        corners[row] = left[row, place], top[row, place]
        readable[row] = cost[row, place] - preference[row, place] <= limit
        if readable[row]:  # the others are not drawn; it covers the places of those that follow
            wide = np.minimum(right[row + 1 :], right[row, place])
            wide -= np.maximum(left[row + 1 :], left[row, place])
            high = np.minimum(bottom[row + 1 :], bottom[row, place])
            high -= np.maximum(top[row + 1 :], top[row, place])
            cost[row + 1 :] += wide.clip(0) * high.clip(0)
    return corners, readable


def _places(
    boxes: NDArray[np.floating], sizes: NDArray[np.integer], frame_size: tuple[int, int]
) -> tuple[NDArray[np.float32], ...]:
    """The edges x1, y1, x2 and y2 of every plate at every place, float32 [N, P] each, the best first."""
    x1, y1, x2, y2 = np.round(boxes.T).astype(np.float32)
    wide, high = sizes.T.astype(np.float32)
    above, middle = y1 - high, np.floor((x1 + x2 - wide) / 2)
    corners = (
        (x1, above), (x2 - wide, above), (x1, y1), (x1, y2), (x2 - wide, y2), (x1, y2 - high),
        (x2, y1), (x1 - wide, y1), (middle, above), (middle, y2), (x2, y2 - high), (x1 - wide, y2 - high),
    )  # fmt: skip
    height, width = frame_size
    x = np.stack([corner[0] for corner in corners], axis=1)
    y = np.stack([corner[1] for corner in corners], axis=1)
    x = np.maximum(np.minimum(x, width - wide[:, None]), 0)
    y = np.maximum(np.minimum(y, height - high[:, None]), 0)
    return x, y, x + wide[:, None], y + high[:, None]


def _preferences(
    boxes: NDArray[np.floating], sizes: NDArray[np.integer], edges: tuple[NDArray[np.float32], ...]
) -> NDArray[np.float32]:
    """What each place costs before anything else is placed, float32 [N, P]."""
    left, top, right, bottom = edges
    x1, y1, x2, y2 = np.round(boxes.T)[:, :, None]
    on_its_object = (left < x2) & (right > x1) & (top < y2) & (bottom > y1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    is_small = np.prod(sizes, axis=1) > _CROWDED * areas
    cost = np.where(on_its_object & is_small[:, None], _ON_SMALL, 0.0)
    return np.asarray(cost + np.arange(left.shape[1]) * _RANK, np.float32)
