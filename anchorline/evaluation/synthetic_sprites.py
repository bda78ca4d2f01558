"""Shapes laid into a scene: their pose, their outline in pixels, painting, and what stays visible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.evaluation.synthetic_shapes import (
    Contours,
    distractor_contours,
    enclosed_area,
    object_contours,
)
from anchorline.evaluation.synthetic_textures import TEXTURE_SIDE, Image

NO_OBJECT = -1

_FRACTION_BITS = 4
_SAMPLES = 2  # masks are drawn at twice the size and averaged down
_SHADOW_STRENGTH = 0.4


@dataclass(frozen=True, eq=False)
class Shape:
    """What is laid into a scene, before it has a place or a surface.

    ``label`` is the object class or ``NO_OBJECT``; ``contours`` lie in the unit circle; ``stretch``
    is the ratio of width to height and ``shear`` the slant.
    """

    label: int
    contours: Contours
    stretch: float
    shear: float


@dataclass(frozen=True)
class Pose:
    """Where a shape lies: centre and radius in pixels, angle in radians."""

    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True, eq=False)
class Placed:
    """A shape at a pose: its contours and tight box in pixels with continuous edges.

    ``transform`` [2, 3] takes the unit circle to pixels.
    """

    label: int
    contours: Contours
    transform: NDArray[np.float64]
    box: tuple[float, float, float, float]


def random_shape(rng: np.random.Generator, label: int) -> Shape:
    """A shape of the class ``label``, or a random distractor for ``NO_OBJECT``, slightly deformed."""
    contours = distractor_contours(rng) if label == NO_OBJECT else object_contours(label)
    return Shape(label, contours, stretch=rng.uniform(0.82, 1.22), shear=rng.uniform(-0.15, 0.15))


def place(shape: Shape, pose: Pose) -> Placed:
    """The shape's outline and tight box in pixels."""
    cos, sin = np.cos(pose.angle), np.sin(pose.angle)
    root = float(np.sqrt(shape.stretch))
    deformed = np.array([[root, shape.shear], [0.0, 1.0 / root]])
    linear = pose.radius * np.array([[cos, -sin], [sin, cos]]) @ deformed
    contours = [points @ linear.T + (pose.x, pose.y) for points in shape.contours]
    (x1, y1), (x2, y2) = contours[0].min(axis=0), contours[0].max(axis=0)
    transform = np.concatenate([linear, [[pose.x], [pose.y]]], axis=1)
    return Placed(shape.label, contours, transform, (float(x1), float(y1), float(x2), float(y2)))


def paint(image: Image, placed: Placed, texture: Image, shadow: tuple[float, float]) -> None:
    """Lay a shape with its texture, and its soft shadow ``shadow`` pixels (x, y) away, over the image.

    ``texture`` float32 [TEXTURE_SIDE, TEXTURE_SIDE, 3] covers the square around the unit circle.
    ``image`` float32 [H, W, 3] is changed in place.
    """
    margin = 2 + int(np.ceil(max(abs(shadow[0]), abs(shadow[1]))))
    window = _window(placed, image.shape[:2], margin)
    if window is None:
        return
    left, top, right, bottom = window
    patch = image[top:bottom, left:right]
    mask = _mask(placed, window)
    moved = np.array([[1, 0, shadow[0]], [0, 1, shadow[1]]])
    shade = cv2.blur(cv2.warpAffine(mask, moved, (right - left, bottom - top)), (3, 3))
    patch *= 1.0 - _SHADOW_STRENGTH / 255.0 * shade[..., None].astype(np.float32)
    alpha = (mask * np.float32(1 / 255.0))[..., None]
    patch += (_surface(placed, texture, window) - patch) * alpha


def visible_fractions(layers: Sequence[Placed], size: tuple[int, int]) -> list[float]:
    """The share of each shape that shows; parts outside the image are hidden, later layers lie on top."""
    owner = np.full(size, -1, np.int16)
    windows = [_window(placed, size, 0) for placed in layers]
    for index, (placed, window) in enumerate(zip(layers, windows, strict=True)):
        if window is not None:
            left, top, right, bottom = window
            owner[top:bottom, left:right][_mask(placed, window) > 127] = index
    fractions = []
    for index, (placed, window) in enumerate(zip(layers, windows, strict=True)):
        left, top, right, bottom = window or (0, 0, 0, 0)
        visible = np.count_nonzero(owner[top:bottom, left:right] == index)
        fractions.append(min(1.0, visible / max(enclosed_area(placed.contours), 1e-6)))
    return fractions


def _window(placed: Placed, size: tuple[int, int], margin: int) -> tuple[int, int, int, int] | None:
    """The pixels (left, top, right, bottom) that the sprite touches, or None when it is outside."""
    x1, y1, x2, y2 = placed.box
    left, top = max(0, int(np.floor(x1)) - margin), max(0, int(np.floor(y1)) - margin)
    right = min(size[1], int(np.ceil(x2)) + margin)
    bottom = min(size[0], int(np.ceil(y2)) + margin)
    return (left, top, right, bottom) if left < right and top < bottom else None


def _mask(placed: Placed, window: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """How much of each pixel in the window the shape covers, 0 to 255."""
    left, top, right, bottom = window
    mask = np.zeros((_SAMPLES * (bottom - top), _SAMPLES * (right - left)), np.uint8)
    # OpenCV's whole coordinates are pixel centres, half a (fine) pixel from the edges used here.
    points = [(contour - (left, top)) * _SAMPLES - 0.5 for contour in placed.contours]
    fixed = [np.rint(contour * (1 << _FRACTION_BITS)).astype(np.int32) for contour in points]
    cv2.fillPoly(mask, fixed, 255, cv2.LINE_8, _FRACTION_BITS)
    return np.asarray(cv2.resize(mask, (right - left, bottom - top), interpolation=cv2.INTER_AREA), np.uint8)


def _surface(placed: Placed, texture: Image, window: tuple[int, int, int, int]) -> Image:
    """The texture as it lies in the window [h, w, 3]."""
    left, top, right, bottom = window
    to_unit = np.array([[2.0 / TEXTURE_SIDE, 0.0, -1.0], [0.0, 2.0 / TEXTURE_SIDE, -1.0], [0.0, 0.0, 1.0]])
    matrix = placed.transform @ to_unit
    matrix[:, 2] -= (left, top)
    warped = cv2.warpAffine(
        texture,
        matrix,
        (right - left, bottom - top),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )
    return np.asarray(warped, dtype=np.float32)
