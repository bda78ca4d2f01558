"""COCO's size classes of objects, by the area of their boxes in square pixels of the source image."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

SIZE_CLASSES: dict[str, tuple[float, float]] = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, math.inf),
}
"""From and to. COCO's annotations measure the area of the mask; here it is always that of the box."""


def in_size_class(areas: NDArray[np.floating], name: str) -> NDArray[np.bool_]:
    """Which of the areas [N] belong to a size class, both bounds included.

    As in COCO's evaluation, so a box of exactly 32 x 32 pixels is small and medium.
    """
    low, high = SIZE_CLASSES[name]
    return np.asarray((areas >= low) & (areas <= high))


def size_class_counts(areas: NDArray[np.floating]) -> dict[str, int]:
    """How many of the areas [N] each size class holds; a box on a bound counts in the larger class only."""
    return {name: int(((areas >= low) & (areas < high)).sum()) for name, (low, high) in SIZE_CLASSES.items()}
