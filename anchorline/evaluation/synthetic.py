"""Labelled scenes made from a seed: objects of five shapes among clutter, in any colour and texture.

Only the outline tells the class: colours and textures are drawn from one palette for objects, for
the distractors between them and for the background. Scene ``i`` of ``synthetic:N`` depends on the
seed and ``i`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from anchorline.evaluation.boxes import clip_labelled_boxes
from anchorline.evaluation.dataset import Dataset, LabelledImage
from anchorline.evaluation.synthetic_shapes import CLASS_NAMES
from anchorline.evaluation.synthetic_sprites import (
    NO_OBJECT,
    Placed,
    Pose,
    paint,
    place,
    random_shape,
    visible_fractions,
)
from anchorline.evaluation.synthetic_textures import (
    background,
    camera_image,
    contrasting_colour,
    light_field,
    mean_colours,
    surface_texture,
)
from anchorline.runtime.errors import SettingsError

__all__ = ["CLASS_NAMES", "MIN_VISIBLE", "SCENE_SIZE", "Scene", "generate_scene", "synthetic_dataset"]

SCENE_SIZE = (240, 320)
MIN_VISIBLE = 0.35
"""An object of which a smaller share than this shows is not part of a scene's ground truth."""

# As a share of the image's shorter side: objects of 24 to 90 pixels in an image 240 high.
RADIUS_RANGE = (0.055, 0.18)
SMALLEST_SIDE = 64

_SCENE_STREAM = 1
_PLACING_TRIES = 12

Scene = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]


def generate_scene(seed: int, size: tuple[int, int] = SCENE_SIZE, index: int = 0) -> Scene:
    """Scene ``index`` of a seed: image uint8 BGR [H, W, 3], boxes float32 [N, 4], labels int64 [N].

    ``size`` is (height, width) in pixels, at least 64 each. Boxes are tight around the whole object,
    clipped to the image. Two to six objects are laid out; one that would show less than
    ``MIN_VISIBLE`` of itself is taken out of the scene.
    """
    rng, layers = _lay_out(seed, size, index)
    image = background(rng, size)
    shadow = (rng.uniform(-3.0, 3.0), rng.uniform(1.0, 3.0))
    for placed in layers:
        colour = contrasting_colour(rng, _colour_under(image, placed))
        paint(image, placed, surface_texture(rng, colour), shadow)
    image *= light_field(rng, size)
    boxes, labels = _truth(layers, size)
    return camera_image(rng, image, blur=rng.uniform(0.0, 0.9), noise=rng.uniform(2.0, 8.0)), boxes, labels


def synthetic_dataset(
    count: int, seed: int = 0, size: tuple[int, int] = SCENE_SIZE, spec: str = ""
) -> Dataset:
    """``count`` scenes of a seed; the ground truth is worked out now, pixels are drawn when loaded."""
    images = []
    for index in range(count):
        _, layers = _lay_out(seed, size, index)
        boxes, labels = _truth(layers, size)
        plain = np.zeros(len(labels), dtype=np.bool_)
        load = partial(_load_scene, seed, size, index)
        images.append(
            LabelledImage(f"scene-{seed}-{index:06d}", size, boxes, labels, plain, plain.copy(), load)
        )
    return Dataset(spec or f"synthetic:{count}@{seed}", CLASS_NAMES, tuple(images))


def random_radius(rng: np.random.Generator, size: tuple[int, int]) -> float:
    """A radius in pixels; every octave of sizes is as likely as the next."""
    low, high = np.log(RADIUS_RANGE)
    return float(np.exp(rng.uniform(low, high)) * min(size))


def check_size(size: tuple[int, int]) -> None:
    """Raise ``SettingsError`` for a scene too small to hold an object one can make out."""
    if min(size) < SMALLEST_SIDE:
        raise SettingsError(
            f"scene size is {size[0]}x{size[1]}; expected at least {SMALLEST_SIDE} pixels a side"
        )


def _load_scene(seed: int, size: tuple[int, int], index: int) -> NDArray[np.uint8]:
    return generate_scene(seed, size, index)[0]


def _lay_out(seed: int, size: tuple[int, int], index: int) -> tuple[np.random.Generator, list[Placed]]:
    """The shapes of a scene from back to front, and the generator to go on drawing with."""
    check_size(size)
    rng = np.random.Generator(np.random.PCG64([_SCENE_STREAM, seed, index]))
    labels = [int(label) for label in rng.integers(len(CLASS_NAMES), size=rng.integers(2, 7))]
    labels += [NO_OBJECT] * int(rng.integers(2, 7))
    rng.shuffle(labels)
    poses: list[Pose] = []
    for _ in labels:
        poses.append(_free_pose(rng, size, poses))
    layers = [place(random_shape(rng, label), pose) for label, pose in zip(labels, poses, strict=True)]
    shown = visible_fractions(layers, size)
    kept = [p for p, share in zip(layers, shown, strict=True) if p.label == NO_OBJECT or share >= MIN_VISIBLE]
    return rng, kept


def _free_pose(rng: np.random.Generator, size: tuple[int, int], others: Sequence[Pose]) -> Pose:
    """A random pose that overlaps the others only so far; the last try stands when none is free."""
    height, width = size
    radius = random_radius(rng, size)
    closeness = rng.uniform(0.55, 1.0)
    angle = rng.uniform(0.0, 2.0 * np.pi)
    x = y = 0.0
    for _ in range(_PLACING_TRIES):
        inset = 0.4 * radius
        x, y = rng.uniform(inset, width - inset), rng.uniform(inset, height - inset)
        if all(np.hypot(x - o.x, y - o.y) >= closeness * (radius + o.radius) for o in others):
            break
    return Pose(x, y, radius, angle)


def _truth(layers: Sequence[Placed], size: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Boxes [N, 4] and labels [N] of the objects among the shapes."""
    objects = [placed for placed in layers if placed.label != NO_OBJECT]
    boxes = np.array([placed.box for placed in objects], dtype=np.float64).reshape(-1, 4)
    labels = np.array([placed.label for placed in objects], dtype=np.int64)
    clipped, kept, _ = clip_labelled_boxes(boxes, size)
    return clipped, labels[kept]


def _colour_under(image: NDArray[np.float32], placed: Placed) -> NDArray[np.float32]:
    """The mean colour [1, 3] of the image where the shape will lie."""
    height, width = image.shape[:2]
    x1, y1, x2, y2 = np.clip(np.rint(placed.box), 0, [width, height, width, height]).astype(int)
    return mean_colours(image[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)], cells=1)
