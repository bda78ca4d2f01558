"""Labelled scenes made from a seed: objects of five shapes among clutter, in any colour and texture.

Only the outline tells the class: colours and textures are drawn from one palette for objects, for
the distractors between them and for the background. Scene ``i`` of ``synthetic:N`` depends on the
seed and ``i`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import clip_labelled_boxes
from anchorline.data.dataset import Dataset, LabelledImage, from_frames
from anchorline.runtime.io.errors import SettingsError

CLASS_NAMES = ("arrow", "cross", "heart", "ring", "star")
NO_OBJECT = -1
SCENE_SIZE = (240, 320)
SMALLEST_SIDE = 64
MIN_VISIBLE = 0.35
"""An object of which a smaller share than this shows is not part of a scene's ground truth."""
TEXTURE_SIDE = 64
# As a share of the image's shorter side: objects of 24 to 90 pixels in an image 240 high.
RADIUS_RANGE = (0.055, 0.18)

_SCENE_STREAM, _POSED_STREAM = 1, 2
_VARIED_SEED = 7
# Sizes that fill a canvas, that leave most of it empty, and extreme shapes.
_VARIED_SIZES = ((240, 320), (480, 640), (64, 512), (512, 64), (100, 100), (360, 203), (33, 47), (600, 900))
_PLACING_TRIES = 12
_FRACTION_BITS = 4
_SAMPLES = 2  # masks are drawn at twice the size and averaged down
_SHADOW_STRENGTH = 0.4
_CURVE_POINTS = 40
_CIRCLE = np.linspace(0.0, 2.0 * np.pi, _CURVE_POINTS, endpoint=False)

Contours = list[NDArray[np.float64]]
"""The outline of a shape: closed contours [K, 2] within the unit circle; areas enclosed twice are holes."""
Colours = NDArray[np.float32]
Image = NDArray[np.float32]
Scene = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]


def object_contours(label: int) -> Contours:
    """The outline of an object class; ``label`` indexes ``CLASS_NAMES``."""
    name, t = CLASS_NAMES[label], _CIRCLE
    if name == "arrow":
        upper = np.array([(-1.0, -0.26), (0.05, -0.26), (0.05, -0.72), (1.0, 0.0)])
        return [np.concatenate([upper, upper[2::-1] * (1, -1)])]
    if name == "cross":
        corner = np.array([(1.0, -0.3), (1.0, 0.3), (0.3, 0.3)])
        quarter_turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return [np.concatenate([corner @ turn.T for turn in quarter_turns])]
    if name == "heart":
        x = 16.0 * np.sin(t) ** 3
        y = -(13.0 * np.cos(t) - 5.0 * np.cos(2 * t) - 2.0 * np.cos(3 * t) - np.cos(4 * t)) - 2.5
        return [np.stack([x, y], axis=1) / 16.5]
    if name == "ring":
        return [_curve(t), 0.55 * _curve(t)]
    points = np.arange(10)
    return [_curve(points * (np.pi / 5.0) - np.pi / 2.0, np.where(points % 2 == 0, 1.0, 0.42))]


def _distractor_contours(rng: np.random.Generator) -> Contours:
    """The outline of a random shape that belongs to no class."""
    kind, t = int(rng.integers(5)), _CIRCLE
    if kind == 0:  # a disc
        return [_curve(t) * (1.0, rng.uniform(0.45, 1.0))]
    if kind == 1:  # half a disc
        return [_curve(np.linspace(0.0, np.pi * rng.uniform(0.9, 1.2), _CURVE_POINTS))]
    if kind == 2:  # a bar
        side = rng.uniform(0.2, 0.7)
        return [np.array([(-0.7, -side), (0.7, -side), (0.7, side), (-0.7, side)])]
    if kind == 3:  # a triangle
        return [_curve(np.arange(3) * (2.0 * np.pi / 3.0) + rng.uniform(-0.35, 0.35, 3))]
    radii = 0.75 + 0.12 * np.sin(2 * t + rng.uniform(0, 6.3)) + 0.1 * np.sin(3 * t + rng.uniform(0, 6.3))
    return [_curve(t, radii)]  # a blob


def _curve(angles: NDArray[np.floating], radii: NDArray[np.float64] | float = 1.0) -> NDArray[np.float64]:
    """Points [K, 2] at these angles and distances from the middle."""
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def enclosed_area(contours: Contours) -> float:
    """The area of a shape: its outer contour less its holes."""
    areas = []
    for x, y in (contour.T for contour in contours):
        areas.append(0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))))
    return areas[0] - sum(areas[1:])


def random_colours(rng: np.random.Generator, count: int) -> Colours:
    """BGR colours [count, 3] in grey levels: any hue, from pale to strong, neither black nor white."""
    hsv = rng.uniform((0, 50, 70), (180, 225, 250), (1, count, 3)).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0].astype(np.float32)


def contrasting_colour(rng: np.random.Generator, others: Colours, least: float = 90.0) -> Colours:
    """A random colour at least ``least`` grey levels (BGR distance) from ``others`` [K, 3], if any is."""
    colours = random_colours(rng, 10)
    distances = np.linalg.norm(colours[:, None] - others[None], axis=2).min(axis=1)
    far_enough = np.flatnonzero(distances >= least)
    return np.asarray(colours[far_enough[0] if len(far_enough) else distances.argmax()])


def surface_texture(rng: np.random.Generator, colour: Colours) -> Image:
    """A texture [TEXTURE_SIDE, TEXTURE_SIDE, 3] around a colour: plain, stripes, checks, dots or marble."""
    y, x = np.mgrid[:TEXTURE_SIDE, :TEXTURE_SIDE] - (TEXTURE_SIDE - 1) / 2
    # The second colour stays near the first, so that the outline, not the pattern, makes the shape.
    second = np.clip(colour * rng.uniform(0.55, 0.8) + rng.uniform(-25, 25, 3), 0, 255)
    angle, period = rng.uniform(0, np.pi), rng.uniform(9.0, 18.0)
    along = (x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period)
    across = (y * np.cos(angle) - x * np.sin(angle)) * (2 * np.pi / period)
    kind = int(rng.integers(5))
    if kind == 0:
        mix = (x * np.cos(angle) + y * np.sin(angle)) / (2 * TEXTURE_SIDE) + 0.5
    elif kind == 1:
        mix = np.clip(2 * np.sin(along), -1, 1) * 0.5 + 0.5
    elif kind == 2:
        mix = np.clip(4 * np.sin(along) * np.sin(across), -1, 1) * 0.5 + 0.5
    elif kind == 3:
        mix = np.clip(3 * (np.sin(along) + np.sin(across) - 0.7), 0, 1)
    else:
        mix = crop_noise(rng, (TEXTURE_SIDE, TEXTURE_SIDE), cell=8) * 0.5 + 0.5
    weight = np.clip(mix, 0, 1)[..., None].astype(np.float32)
    return np.asarray(colour + (second - colour).astype(np.float32) * weight, dtype=np.float32)


def background(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    """A background [H, W, 3]: soft patches of three colours, fine grain and a tangle of lines."""
    height, width = size
    # The patches are soft: a quarter of the size is enough for them.
    small = (height // 4 + 1, width // 4 + 1)
    colours = 0.85 * random_colours(rng, 1)
    for _ in range(2):  # patches that differ, so that no one colour stands for the background
        colours = np.concatenate([colours, 0.85 * contrasting_colour(rng, colours)[None]])
    patches = np.tile(colours[0], (*small, 1))
    for colour, cell in zip(colours[1:], (16, 8), strict=True):
        weight = np.clip(0.3 + 0.9 * crop_noise(rng, small, cell), 0, 0.9)[..., None]
        patches += (colour - patches) * weight
    image = np.asarray(cv2.resize(patches, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
    coarse, fine = rng.uniform(6.0, 18.0), rng.uniform(3.0, 9.0)
    grain = coarse * crop_noise(rng, size, cell=8) + fine * crop_noise(rng, size, cell=2)
    image += grain[..., None]
    _draw_lines(rng, image)
    return image


def light_field(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    """Light [H, W, 1] as a factor per pixel: a gradient across the image and a soft spot."""
    y, x = np.meshgrid(np.linspace(-1, 1, 24), np.linspace(-1, 1, 32), indexing="ij")
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.28)
    gradient = (x * np.cos(angle) + y * np.sin(angle)) * strength
    spot_x, spot_y = rng.uniform(-1, 1, 2)
    spot = rng.uniform(0, 0.3) * np.exp(-2 * (x - spot_x) ** 2 - 2 * (y - spot_y) ** 2)
    light = (rng.uniform(0.85, 1.05) + gradient + spot).astype(np.float32)
    return np.asarray(cv2.resize(light, (size[1], size[0])), dtype=np.float32)[..., None]


def camera_image(rng: np.random.Generator, image: Image, blur: float, noise: float) -> NDArray[np.uint8]:
    """What a camera makes of the scene: blur (sigma in pixels), noise (sigma in grey levels), 8 bits."""
    if blur > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), blur).astype(np.float32, copy=False)
    bank = _grain_bank()
    height, width = image.shape[:2]
    tiles_y, tiles_x = -(-height // (bank.shape[0] // 2)), -(-width // (bank.shape[1] // 2))
    grain = np.tile(bank, (tiles_y, tiles_x, 1)) if tiles_y * tiles_x > 1 else bank
    top = int(rng.integers(grain.shape[0] - height + 1))
    left = int(rng.integers(grain.shape[1] - width + 1))
    noisy = image + np.float32(noise) * grain[top : top + height, left : left + width]
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def crop_noise(rng: np.random.Generator, size: tuple[int, int], cell: int) -> Image:
    """Smooth noise [H, W] of about unit spread whose features are ``cell`` pixels wide."""
    coarse = rng.standard_normal((size[0] // cell + 3, size[1] // cell + 3), dtype=np.float32)
    grown = cv2.resize(coarse, None, fx=cell, fy=cell, interpolation=cv2.INTER_CUBIC)
    return np.asarray(grown[cell:, cell:][: size[0], : size[1]], dtype=np.float32)


def _draw_lines(rng: np.random.Generator, image: Image) -> None:
    """Curves and straight lines in the colours objects may have."""
    height, width = image.shape[:2]
    thickest = max(2, min(height, width) // 60)
    for _ in range(int(rng.integers(3, 8))):
        start, bend, end = (rng.uniform(-0.1, 1.1, 2) * (width, height) for _ in range(3))
        t = np.linspace(0, 1, 24)[:, None]
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        points = [np.rint(curve * 8).astype(np.int32)]
        colour = tuple(random_colours(rng, 1)[0].tolist())
        thickness = int(rng.integers(1, thickest + 1))
        cv2.polylines(image, points, False, colour, thickness, cv2.LINE_8, 3)


@lru_cache(maxsize=1)
def _grain_bank() -> Image:
    """A sheet of sensor noise drawn once; frames take random pieces, far cheaper than fresh noise."""
    rng = np.random.Generator(np.random.PCG64(20240))
    return rng.standard_normal((480, 640, 3), dtype=np.float32)


def mean_colours(image: Image, cells: int) -> Colours:
    """The mean colours [cells * cells, 3] of the parts of an image."""
    return np.asarray(cv2.resize(image, (cells, cells), interpolation=cv2.INTER_AREA).reshape(-1, 3))


@dataclass(frozen=True, eq=False)
class Shape:
    """What is laid into a scene, before it has a place or a surface."""

    label: int  # the object class or NO_OBJECT
    contours: Contours  # in the unit circle
    stretch: float  # the ratio of width to height
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
    """A shape at a pose: its contours and tight box in pixels with continuous edges."""

    label: int
    contours: Contours
    transform: NDArray[np.float64]  # [2, 3], from the unit circle to pixels
    box: tuple[float, float, float, float]


def random_shape(rng: np.random.Generator, label: int) -> Shape:
    """A shape of the class ``label``, or a random distractor for ``NO_OBJECT``, slightly deformed."""
    contours = _distractor_contours(rng) if label == NO_OBJECT else object_contours(label)
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
    inside = (right - left, bottom - top)
    patch, mask = image[top:bottom, left:right], _mask(placed, window)
    moved = np.array([[1, 0, shadow[0]], [0, 1, shadow[1]]])
    shade = cv2.blur(cv2.warpAffine(mask, moved, inside), (3, 3))
    patch *= 1.0 - _SHADOW_STRENGTH / 255.0 * shade[..., None].astype(np.float32)
    to_unit = np.array([[2.0 / TEXTURE_SIDE, 0.0, -1.0], [0.0, 2.0 / TEXTURE_SIDE, -1.0], [0.0, 0.0, 1.0]])
    matrix = placed.transform @ to_unit
    matrix[:, 2] -= (left, top)
    surface = cv2.warpAffine(texture, matrix, inside, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    alpha = (mask * np.float32(1 / 255.0))[..., None]
    patch += (surface.astype(np.float32, copy=False) - patch) * alpha


def visible_fractions(layers: Sequence[Placed], size: tuple[int, int]) -> list[float]:
    """The share of each shape that shows; parts outside the image are hidden, later layers lie on top."""
    owner = np.zeros(size, np.int16)  # of each pixel: 0 is none, 1 the first layer
    for number, placed in enumerate(layers, start=1):
        window = _window(placed, size, 0)
        if window is not None:
            left, top, right, bottom = window
            owner[top:bottom, left:right][_mask(placed, window) > 127] = number
    pixels = np.bincount(owner.ravel(), minlength=len(layers) + 1).tolist()[1:]
    areas = [max(enclosed_area(placed.contours), 1e-6) for placed in layers]
    return [min(1.0, shown / area) for shown, area in zip(pixels, areas, strict=True)]


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


def generate_scene(seed: int, size: tuple[int, int] = SCENE_SIZE, index: int = 0) -> Scene:
    """Scene ``index`` of a seed: image uint8 BGR [H, W, 3], boxes float32 [N, 4], labels int64 [N].

    ``size`` is (height, width) in pixels, at least 64 each. Boxes are tight around the whole object,
    clipped to the image. Two to six objects are laid out; one that would show less than
    ``MIN_VISIBLE`` of itself is taken out of the scene.
    """
    rng, layers, boxes, labels = _lay_out(seed, size, index)
    image = background(rng, size)
    shadow = (rng.uniform(-3.0, 3.0), rng.uniform(1.0, 3.0))
    for placed in layers:
        x1, y1, x2, y2 = np.clip(np.rint(placed.box), 0, [*size[::-1], *size[::-1]]).astype(int)
        under = mean_colours(image[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)], cells=1)
        paint(image, placed, surface_texture(rng, contrasting_colour(rng, under)), shadow)
    image *= light_field(rng, size)
    return camera_image(rng, image, blur=rng.uniform(0.0, 0.9), noise=rng.uniform(2.0, 8.0)), boxes, labels


def posed_scene(seed: int, size: tuple[int, int], poses: Sequence[Pose]) -> NDArray[np.uint8]:
    """An image uint8 BGR [H, W, 3] with an object of a random class at each pose, none left out."""
    rng = np.random.Generator(np.random.PCG64([_POSED_STREAM, seed]))
    image = background(rng, size)
    around = mean_colours(image, cells=1)
    for pose in poses:
        placed = place(random_shape(rng, int(rng.integers(len(CLASS_NAMES)))), pose)
        paint(image, placed, surface_texture(rng, contrasting_colour(rng, around)), shadow=(1.0, 2.0))
    return camera_image(rng, image, blur=0.5, noise=4.0)


def synthetic_dataset(
    count: int, seed: int = 0, size: tuple[int, int] = SCENE_SIZE, spec: str = ""
) -> Dataset:
    """``count`` scenes of a seed; the ground truth is worked out now, pixels are drawn when loaded."""
    images = []
    for index in range(count):
        *_, boxes, labels = _lay_out(seed, size, index)
        plain, id = np.zeros(len(labels), dtype=np.bool_), f"scene-{seed}-{index:06d}"
        load = partial(_scene_pixels, seed, size, index)
        images.append(LabelledImage(id, size, boxes, labels, plain, plain, load))
    return Dataset(spec or f"synthetic:{count}@{seed}", CLASS_NAMES, tuple(images))


def scenes(names: tuple[str, ...], count: int = len(_VARIED_SIZES)) -> Dataset:
    """Scenes of varied sizes without labels: a model of any classes can look at them."""
    frames = []
    for index in range(count):
        height, width = _VARIED_SIZES[index % len(_VARIED_SIZES)]
        # Sides too small for the generator are cut out of a larger scene.
        size = max(height, SMALLEST_SIDE), max(width, SMALLEST_SIDE)
        scene = generate_scene(_VARIED_SEED, size, index)[0]
        frames.append(np.ascontiguousarray(scene[:height, :width]))
    return from_frames(f"{count} generated scenes", names, frames)


def _scene_pixels(seed: int, size: tuple[int, int], index: int) -> NDArray[np.uint8]:
    return generate_scene(seed, size, index)[0]


def random_radius(rng: np.random.Generator, size: tuple[int, int]) -> float:
    """A radius in pixels; every octave of sizes is as likely as the next."""
    return float(np.exp(rng.uniform(*np.log(RADIUS_RANGE))) * min(size))


def check_size(size: tuple[int, int]) -> None:
    """Raise ``SettingsError`` for a scene too small to hold an object one can make out."""
    if min(size) < SMALLEST_SIDE:
        raise SettingsError(
            f"scene size is {size[0]}x{size[1]}; expected at least {SMALLEST_SIDE} pixels a side"
        )


def _lay_out(
    seed: int, size: tuple[int, int], index: int
) -> tuple[np.random.Generator, list[Placed], NDArray[np.float32], NDArray[np.int64]]:
    """The generator to go on drawing with, the shapes of a scene from back to front, and the boxes [N, 4] and
    labels [N] of the objects among them."""
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
    objects = [placed for placed in kept if placed.label != NO_OBJECT]
    whole = np.array([placed.box for placed in objects]).reshape(-1, 4)
    boxes, inside, _ = clip_labelled_boxes(whole, size)
    return rng, kept, boxes, np.array([placed.label for placed in objects], dtype=np.int64)[inside]


def _free_pose(rng: np.random.Generator, size: tuple[int, int], others: Sequence[Pose]) -> Pose:
    """A random pose that overlaps the others only so far; the last try stands when none is free."""
    height, width = size
    radius = random_radius(rng, size)
    closeness = rng.uniform(0.55, 1.0)
    angle = rng.uniform(0.0, 2.0 * np.pi)
    x = y = 0.0
    inset = 0.4 * radius
    for _ in range(_PLACING_TRIES):
        x, y = rng.uniform(inset, width - inset), rng.uniform(inset, height - inset)
        if all(np.hypot(x - o.x, y - o.y) >= closeness * (radius + o.radius) for o in others):
            break
    return Pose(x, y, radius, angle)
