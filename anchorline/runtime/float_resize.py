"""Bilinear resizing in float32 with PyTorch's arithmetic, for models whose source library resizes so.

As ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``. OpenCV's float resize
differs from it by up to 0.003 grey levels, since it computes the sampling places in double precision
where PyTorch computes them in single; a detector's scores then differ by four times as much as
rounding alone explains.
"""

from __future__ import annotations

import functools
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

_STRIP = 32  # rows at a time, so that what lies between two steps stays in the processor's cache
_NO_MAP = np.empty(0, np.uint16)  # cv2.remap's second map holds fractions, and these are whole pixels
_REMAP_LIMIT = 32767  # pixels a side, cv2.remap's coordinates being 16-bit numbers


def resize_float(frame: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Resize ``frame`` (uint8 [H, W, 3]) into ``out`` (float32 [height, width, 3])."""
    height, width = out.shape[:2]
    upper, lower, down = _taps(frame.shape[0], height)
    left, right, across = _columns(frame.shape[1], width)
    for top in range(0, height, _STRIP):
        strip = slice(top, min(top + _STRIP, height))
        above, below = frame.take(upper[strip], axis=0), frame.take(lower[strip], axis=0)
        weights = down[strip, None]
        near = _mixed(_pick(above, left), _pick(below, left), weights)
        far = _mixed(_pick(above, right), _pick(below, right), weights)
        far -= near
        far *= across
        np.add(near.reshape(-1, width, 3), far.reshape(-1, width, 3), out=out[strip])


def _mixed(
    first: NDArray[np.uint8], second: NDArray[np.uint8], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """``first + (second - first) * weights``; pixels [n, W, 3] to [n, 3 W]."""
    start = first.reshape(len(first), -1).astype(np.float32)
    mixed = second.reshape(len(second), -1).astype(np.float32)
    mixed -= start
    mixed *= weights
    mixed += start
    return mixed


def _pick(rows: NDArray[np.uint8], places: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The columns at ``places``, which are as ``_columns`` gives them."""
    if places.ndim == 1:
        return rows.take(places, axis=1)
    picked = cv2.remap(rows, places[: len(rows)], _NO_MAP, cv2.INTER_NEAREST)
    return cast("NDArray[np.uint8]", picked)


@functools.lru_cache(maxsize=64)
def _columns(
    source: int, target: int
) -> tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.float32]]:
    """The two columns to mix, and the second one's weight, repeated for each channel.

    As coordinates [rows, target, (x, y)] for ``cv2.remap``, which gathers pixels much faster than NumPy;
    beyond its limit as plain indices.
    """
    left, right, across = _taps(source, target)
    weights = np.repeat(across, 3)
    if max(source, target) > _REMAP_LIMIT:
        return left, right, weights
    maps = []
    for columns in (left, right):
        places = np.empty((_STRIP, target, 2), np.int16)
        places[..., 0], places[..., 1] = columns, np.arange(_STRIP)[:, None]
        maps.append(places)
    return maps[0], maps[1], weights


@functools.lru_cache(maxsize=64)
def _taps(source: int, target: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """For each of ``target`` places the two of ``source`` pixels to mix, and the second one's weight."""
    scale = np.float32(source) / np.float32(target)
    # In double precision and then rounded once: a fused multiply-add of single-precision numbers.
    centres = np.arange(target, dtype=np.float64) + 0.5
    place = np.maximum((float(scale) * centres - 0.5).astype(np.float32), np.float32(0))
    first = np.minimum(place.astype(np.intp), source - 1)
    second = np.minimum(first + 1, source - 1)
    return first, second, np.clip(place - first, 0, 1).astype(np.float32)
