"""Colours, surface textures, backgrounds, light and noise of the generated scenes."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

TEXTURE_SIDE = 64

Colour = NDArray[np.float32]
Colours = NDArray[np.float32]
Image = NDArray[np.float32]


def random_colours(rng: np.random.Generator, count: int) -> Colours:
    """BGR colours [count, 3] in grey levels: any hue, from pale to strong, neither black nor white."""
    hsv = rng.uniform((0, 50, 70), (180, 225, 250), (1, count, 3)).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0].astype(np.float32)


def contrasting_colour(rng: np.random.Generator, others: Colours, least: float = 90.0) -> Colour:
    """A random colour at least ``least`` grey levels (BGR distance) from ``others`` [K, 3], if any is."""
    colours = random_colours(rng, 10)
    distances = np.linalg.norm(colours[:, None] - others[None], axis=2).min(axis=1)
    far_enough = np.flatnonzero(distances >= least)
    return np.asarray(colours[far_enough[0] if len(far_enough) else distances.argmax()])


def surface_texture(rng: np.random.Generator, colour: Colour) -> Image:
    """A texture [TEXTURE_SIDE, TEXTURE_SIDE, 3] around a colour: plain, stripes, checks, dots or marble."""
    y, x = _texture_grid()
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
    height, width = size
    coarse = rng.standard_normal((height // cell + 3, width // cell + 3), dtype=np.float32)
    grown = cv2.resize(coarse, None, fx=cell, fy=cell, interpolation=cv2.INTER_CUBIC)
    return np.asarray(grown[cell : cell + height, cell : cell + width], dtype=np.float32)


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
def _texture_grid() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    y, x = np.mgrid[:TEXTURE_SIDE, :TEXTURE_SIDE] - (TEXTURE_SIDE - 1) / 2
    return y, x


@lru_cache(maxsize=1)
def _grain_bank() -> Image:
    """A sheet of sensor noise drawn once; frames take random pieces, far cheaper than fresh noise."""
    rng = np.random.Generator(np.random.PCG64(20240))
    return rng.standard_normal((480, 640, 3), dtype=np.float32)


def mean_colours(image: Image, cells: int) -> Colours:
    """The mean colours [cells * cells, 3] of the parts of an image."""
    return np.asarray(cv2.resize(image, (cells, cells), interpolation=cv2.INTER_AREA).reshape(-1, 3))
