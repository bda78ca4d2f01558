"""The images that tend to break a detector: nothing to see, too much, too small, too large, too thin."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.evaluation.synthetic import SCENE_SIZE, generate_scene
from anchorline.evaluation.synthetic_shapes import CLASS_NAMES
from anchorline.evaluation.synthetic_sprites import Pose, paint, place, random_shape
from anchorline.evaluation.synthetic_textures import (
    background,
    camera_image,
    contrasting_colour,
    mean_colours,
    surface_texture,
)

LARGEST_SIZE = (3000, 4000)
"""Height and width of the largest image: a 12-megapixel photograph, 36 MB."""
THIN = (8, 2000)
"""The short and the long side of the very thin images."""

_TRAP_STREAM = 2
_CROWD_CELLS = (5, 8)
_CROWD_CELL = 64  # pixels
_NARROWEST_SCENE = 64

Frame = NDArray[np.uint8]


def empty_image(seed: int) -> Frame:
    """A background with camera noise and no object [240, 320, 3]."""
    return _drawn(seed, SCENE_SIZE, [])


def one_object(seed: int) -> Frame:
    """One large object in the middle [240, 320, 3]."""
    height, width = SCENE_SIZE
    return _drawn(seed, SCENE_SIZE, [Pose(width / 2, height / 2, height / 4, angle=0.3)])


def crowd(seed: int) -> Frame:
    """Forty objects [320, 512, 3] that overlap their neighbours, so that NMS has something to decide."""
    rng = np.random.default_rng(seed)
    rows, columns = _CROWD_CELLS
    poses = []
    for cell in range(rows * columns):
        x, y = ((index + rng.uniform(0.3, 0.7)) * _CROWD_CELL for index in (cell % columns, cell // columns))
        radius = _CROWD_CELL * rng.uniform(0.4, 0.75)
        poses.append(Pose(x, y, radius, rng.uniform(0.0, 2.0 * np.pi)))
    return _drawn(seed, (rows * _CROWD_CELL, columns * _CROWD_CELL), poses)


def mixed_images(seed: int) -> tuple[Frame, Frame, Frame]:
    """Three scenes: landscape, portrait and small, so that each fills another part of its canvas."""
    height, width = SCENE_SIZE
    sizes = (SCENE_SIZE, (2 * width, height), (height // 2, height // 2))
    first, second, third = (generate_scene(seed, size, index)[0] for index, size in enumerate(sizes))
    return first, second, third


def smallest_image() -> Frame:
    """One pixel."""
    return np.array([[[40, 120, 200]]], np.uint8)


def largest_image(seed: int) -> Frame:
    """A scene blown up to ``LARGEST_SIZE``."""
    scene = generate_scene(seed)[0]
    return np.asarray(cv2.resize(scene, LARGEST_SIZE[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)


def thin_images(seed: int) -> tuple[Frame, Frame]:
    """A strip cut from the middle of a scene, lying [8, 2000, 3] and standing [2000, 8, 3]."""
    short, long = THIN
    top = (_NARROWEST_SCENE - short) // 2
    strip = generate_scene(seed, (_NARROWEST_SCENE, long))[0][top : top + short]
    return strip.copy(), np.ascontiguousarray(strip.transpose(1, 0, 2))


def uniform_image(value: int) -> Frame:
    """Every pixel of [240, 320, 3] at ``value``."""
    return np.full((*SCENE_SIZE, 3), value, np.uint8)


def noise_image(seed: int) -> Frame:
    """Every channel of every pixel of [240, 320, 3] at random."""
    return np.random.default_rng(seed).integers(0, 256, (*SCENE_SIZE, 3), dtype=np.uint8)


def _drawn(seed: int, size: tuple[int, int], poses: Sequence[Pose]) -> Frame:
    """A scene with an object of a random class at each pose."""
    rng = np.random.Generator(np.random.PCG64([_TRAP_STREAM, seed]))
    image = background(rng, size)
    around = mean_colours(image, cells=1)
    for pose in poses:
        placed = place(random_shape(rng, int(rng.integers(len(CLASS_NAMES)))), pose)
        paint(image, placed, surface_texture(rng, contrasting_colour(rng, around)), shadow=(1.0, 2.0))
    return camera_image(rng, image, blur=0.5, noise=4.0)
