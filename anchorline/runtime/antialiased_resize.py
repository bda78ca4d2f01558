"""Pillow's antialiased bilinear resize, to the last bit, for models whose source library resizes so.

As ``PIL.Image.resize(size, Resampling.BILINEAR)`` on 8-bit pixels (Pillow, src/libImaging/Resample.c), which
is what Detectron2 does: a triangle filter that grows wider as the picture shrinks, with weights of 22 bits
after the point; first across, then down, rounded to whole grey levels after each. (Pillow 13 goes down first
for pictures that shrink and are more than about twice as tall as wide, which moves single pixels by one grey
level.)

Each pass is a few products with small matrices, some rows of the result at a time. The weights go in as two
halves of 11 bits, so that every sum is a whole number that a float32 holds exactly: products in float32 are
what NumPy does fastest, and nothing is rounded but where Pillow rounds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

_BITS = 22  # PRECISION_BITS of Resample.c
_HALF = _BITS // 2
_ROWS = 8  # of the result in one product
_FLOAT32_TAPS = 32  # with more, 2**8 grey levels times 2**11 a tap can add up to more than 2**24
_WIDEST = 1024  # taps of all rows in one product, so that a matrix stays small for extreme shrinking


@dataclass(frozen=True)
class _Block:
    """Some rows of the result: ``weights`` [2 * rows, inputs], all high halves before all low ones."""

    outputs: slice
    inputs: slice
    weights: NDArray[np.floating]


def resize_antialiased(
    frame: NDArray[np.uint8], out: NDArray[np.uint8] | NDArray[np.float32]
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Resize ``frame`` (uint8 [H, W, 3]) into ``out`` ([height, width, 3], whole grey levels); returns it."""
    height, width = out.shape[:2]
    if frame.shape[1] != width:
        columns = np.empty((width, len(frame), 3), np.uint8)
        _resize_rows(np.asarray(cv2.transpose(frame), np.uint8), columns)
        frame = np.asarray(cv2.transpose(columns), np.uint8)
    if len(frame) != height:
        _resize_rows(frame, out)
    else:
        out[...] = frame
    return out


def _resize_rows(rows: NDArray[np.uint8], out: NDArray[np.uint8] | NDArray[np.float32]) -> None:
    """Resize ``rows`` [n, w, 3] along the first axis into ``out`` [m, w, 3]."""
    flat = rows.reshape(len(rows), -1)
    for block in _blocks(len(rows), len(out)):
        sums = block.weights @ flat[block.inputs].astype(block.weights.dtype)
        high, low = np.split(sums, 2)
        # (high * 2**11 + low + half) >> 22, where everything in between is a whole number below 2**24.
        low *= 2.0**-_HALF
        high += np.floor(low, out=low)
        high += 2.0 ** (_HALF - 1)
        high *= 2.0**-_HALF
        np.floor(high, out=high)
        if block.weights.dtype == np.float64:  # thousands of weights, each rounded up, may exceed white
            np.minimum(high, 255, out=high)
        np.copyto(out[block.outputs], high.reshape(-1, *out.shape[1:]), casting="unsafe")


@functools.lru_cache(maxsize=32)
def _blocks(source: int, target: int) -> tuple[_Block, ...]:
    """The products that make ``target`` rows of ``source`` ones."""
    first, weights = _weights(source, target)
    taps = weights.shape[1]
    dtype = np.float32 if taps <= _FLOAT32_TAPS else np.float64
    count = min(_ROWS, max(1, _WIDEST // taps))
    blocks = []
    for top in range(0, target, count):
        outputs = slice(top, min(top + count, target))
        start, stop = first[top], min(first[outputs.stop - 1] + taps, source)
        matrix = np.zeros((outputs.stop - top, stop - start + taps), np.int64)
        columns = first[outputs, None] - start + np.arange(taps)
        np.put_along_axis(matrix, columns, weights[outputs], axis=1)
        matrix = matrix[:, : stop - start]  # beyond the last pixel all weights are 0
        halves = np.concatenate((matrix >> _HALF, matrix & (2**_HALF - 1)))
        blocks.append(_Block(outputs, slice(int(start), int(stop)), halves.astype(dtype)))
    return tuple(blocks)


def _weights(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each of ``target`` places the first of the ``source`` pixels it is made of, and their weights.

    [target] and [target, taps], of which the weights of a place are whole numbers that add up to about 2**22.
    ``precompute_coeffs`` and ``normalize_coeffs_8bpc`` of Resample.c, in the same order of operations.
    """
    scale = source / target
    reach = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    first = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + reach + 0.5).astype(np.int64), source)
    places = first[:, None] + np.arange(int((last - first).max()))
    distances = np.abs((places - centres[:, None] + 0.5) * (1.0 / reach))
    weights = np.where((places < last[:, None]) & (distances < 1.0), 1.0 - distances, 0.0)
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # adds one after the other, as the C code does
    return first, (weights * 2.0**_BITS + 0.5).astype(np.int64)
