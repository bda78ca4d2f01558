"""The outlines of the generated scenes: five object classes, and shapes that are no object.

A shape is a list of closed contours, each float64 [K, 2] within the unit circle; areas enclosed
twice are holes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Contours = list[NDArray[np.float64]]

CLASS_NAMES = ("arrow", "cross", "heart", "ring", "star")

_CURVE_POINTS = 40


def object_contours(label: int) -> Contours:
    """The outline of an object class; ``label`` indexes ``CLASS_NAMES``."""
    return _OBJECTS[CLASS_NAMES[label]]()


def distractor_contours(rng: np.random.Generator) -> Contours:
    """The outline of a random shape that belongs to no class."""
    return _DISTRACTORS[int(rng.integers(len(_DISTRACTORS)))](rng)


def enclosed_area(contours: Contours) -> float:
    """The area of a shape: its outer contour less its holes."""
    outer, *holes = (_polygon_area(contour) for contour in contours)
    return outer - sum(holes)


def _polygon_area(points: NDArray[np.float64]) -> float:
    x, y = points.T
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))


def _arrow() -> Contours:
    points = [
        (-1.0, -0.26),
        (0.05, -0.26),
        (0.05, -0.72),
        (1.0, 0.0),
        (0.05, 0.72),
        (0.05, 0.26),
        (-1.0, 0.26),
    ]
    return [np.array(points)]


def _cross() -> Contours:
    arm = 0.3
    corner = [(1.0, -arm), (1.0, arm), (arm, arm)]
    quarter_turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return [np.concatenate([np.array(corner) @ turn.T for turn in quarter_turns])]


def _heart() -> Contours:
    t = np.linspace(0.0, 2.0 * np.pi, _CURVE_POINTS, endpoint=False)
    x = 16.0 * np.sin(t) ** 3
    y = -(13.0 * np.cos(t) - 5.0 * np.cos(2 * t) - 2.0 * np.cos(3 * t) - np.cos(4 * t)) - 2.5
    return [np.stack([x, y], axis=1) / 16.5]


def _ring() -> Contours:
    outer = _ellipse(1.0, 1.0)
    return [outer, 0.55 * outer]


def _star() -> Contours:
    angles = np.arange(10) * (np.pi / 5.0) - np.pi / 2.0
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return [radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)]


def _ellipse(a: float, b: float) -> NDArray[np.float64]:
    t = np.linspace(0.0, 2.0 * np.pi, _CURVE_POINTS, endpoint=False)
    return np.stack([a * np.cos(t), b * np.sin(t)], axis=1)


def _disc(rng: np.random.Generator) -> Contours:
    return [_ellipse(1.0, rng.uniform(0.45, 1.0))]


def _half_disc(rng: np.random.Generator) -> Contours:
    t = np.linspace(0.0, np.pi * rng.uniform(0.9, 1.2), _CURVE_POINTS)
    return [np.stack([np.cos(t), np.sin(t)], axis=1)]


def _bar(rng: np.random.Generator) -> Contours:
    side = rng.uniform(0.2, 0.7)
    return [np.array([(-0.7, -side), (0.7, -side), (0.7, side), (-0.7, side)])]


def _triangle(rng: np.random.Generator) -> Contours:
    angles = np.arange(3) * (2.0 * np.pi / 3.0) + rng.uniform(-0.35, 0.35, 3)
    return [np.stack([np.cos(angles), np.sin(angles)], axis=1)]


def _blob(rng: np.random.Generator) -> Contours:
    t = np.linspace(0.0, 2.0 * np.pi, _CURVE_POINTS, endpoint=False)
    radii = 0.75 + 0.12 * np.sin(2 * t + rng.uniform(0, 6.3)) + 0.1 * np.sin(3 * t + rng.uniform(0, 6.3))
    return [radii[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)]


_OBJECTS: dict[str, Callable[[], Contours]] = {
    "arrow": _arrow,
    "cross": _cross,
    "heart": _heart,
    "ring": _ring,
    "star": _star,
}
_DISTRACTORS = (_disc, _half_disc, _bar, _triangle, _blob)
