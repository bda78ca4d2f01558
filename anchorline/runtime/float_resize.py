"""Bilinear resizing in float32 with PyTorch's arithmetic, for models whose source library resizes so.

As ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``. OpenCV's float resize
differs from it by up to 0.003 grey levels, since it computes the sampling places in double precision
where PyTorch computes them in single; a detector's scores then differ by four times as much as
rounding alone explains.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray


def resize_float(frame: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Resize ``frame`` (uint8 [H, W, 3]) into ``out`` (float32 [height, width, 3])."""
    upper, lower, down = _taps(frame.shape[0], out.shape[0])
    left, right, across = _taps(frame.shape[1], out.shape[1])
    rows, below = frame[upper].astype(np.float32), frame[lower].astype(np.float32)
    below -= rows
    below *= down[:, None, None]
    rows += below
    pixels, beside = rows.take(left, axis=1), rows.take(right, axis=1)
    beside -= pixels
    beside *= across[None, :, None]
    np.add(pixels, beside, out=out)


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
