"""Resizing frames as other libraries do, where OpenCV does not: Pillow's way to the last bit, and PyTorch's.

A model finds what it found in training only where its pixels are the same: Detectron2 resizes with Pillow,
torchvision with PyTorch in float32.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np
from numpy.typing import NDArray

_BITS = 22  # of Pillow's weights after the point, PRECISION_BITS of Resample.c
_HALF = _BITS // 2
_ROWS = 8  # of the result in one product
_FLOAT32_TAPS = 32  # with more, 2**8 grey levels times 2**11 a tap can add up to more than 2**24
_WIDEST = 1024  # taps of all rows in one product, so that a matrix stays small for extreme shrinking


def resize_antialiased(
    frame: NDArray[np.uint8], out: NDArray[np.uint8] | NDArray[np.float32]
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Resize ``frame`` (uint8 [H, W, 3]) into ``out`` ([height, width, 3], whole grey levels); returns it.

    As ``PIL.Image.resize(size, Resampling.BILINEAR)`` of Pillow 13 on 8-bit pixels (its src/libImaging/
    Resample.c): a triangle filter that grows wider as the picture shrinks; across and then down, rounded to
    whole grey levels after each. Where height loses more than twice the pixels that width does, as in tall
    pictures, it goes down first; Pillow up to 12 never does, so single pixels differ by one grey level.
    """
    height, width = out.shape[:2]
    if len(frame) - height > max(0, 2 * (frame.shape[1] - width)):
        rows = np.empty((height, frame.shape[1], 3), np.uint8)
        _resize_rows(frame, rows)
        frame = rows
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
    """Resize ``rows`` [n, w, 3] along the first axis into ``out`` [m, w, 3], by a few products of matrices.

    The weights go in as two halves of 11 bits, so that every sum is a whole number that a float32 holds
    exactly, and nothing is rounded but where Pillow rounds.
    """
    flat = rows.reshape(len(rows), -1)
    for outputs, inputs, weights in _blocks(len(rows), len(out)):
        high, low = np.split(weights @ flat[inputs].astype(weights.dtype), 2)
        # (high * 2**11 + low + half) >> 22, where everything in between is a whole number below 2**24.
        low *= 2.0**-_HALF
        high += np.floor(low, out=low)
        high += 2.0 ** (_HALF - 1)
        high *= 2.0**-_HALF
        np.floor(high, out=high)
        if weights.dtype == np.float64:  # thousands of weights, each rounded up, may exceed white
            np.minimum(high, 255, out=high)
        np.copyto(out[outputs], high.reshape(-1, *out.shape[1:]), casting="unsafe")


@functools.lru_cache(maxsize=32)
def _blocks(source: int, target: int) -> tuple[tuple[slice, slice, NDArray[np.floating]], ...]:
    """The products that make ``target`` rows of ``source`` ones: outputs, inputs, and their weights
    [2 * outputs, inputs], all high halves before all low ones."""
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
        blocks.append((outputs, slice(int(start), int(stop)), halves.astype(dtype)))
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


def resize_float(frame: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Resize ``frame`` (uint8 [H, W, 3]) into ``out`` (float32 [height, width, 3]), bilinearly.

    As ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``, to 0.03 grey levels for the
    usual sizes. Builds of PyTorch differ among each other by half of that: some round the place that is
    sampled once, some twice.
    """
    height, width = out.shape[:2]
    if frame.shape[0] <= 2 * height:
        _resize_by_ratios(frame.astype(np.float32), out)
        return
    # Rows that nothing samples are left alone: the others side by side, mixed after they are narrow.
    place = np.maximum(_ratio(frame.shape[0], height) * (np.arange(height) + 0.5) - 0.5, 0).astype(np.float32)
    first = place.astype(np.intp)
    sampled = frame.take(np.concatenate((first, first + 1)), axis=0, mode="clip").astype(np.float32)
    narrow = np.empty((2 * height, width, 3), np.float32)
    _resize_by_ratios(sampled, narrow)
    above, below = narrow[:height], narrow[height:]
    below -= above
    below *= (place - first.astype(np.float32))[:, None, None]
    np.add(above, below, out=out)


def _resize_by_ratios(pixels: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """OpenCV's resize, with PyTorch's ratios in single precision where OpenCV has them in double."""
    factors = [
        1.0 / _ratio(source, target) for source, target in zip(pixels.shape[:2], out.shape[:2], strict=True)
    ]
    cv2.resize(pixels, None, dst=out, fx=factors[1], fy=factors[0], interpolation=cv2.INTER_LINEAR)


def _ratio(source: int, target: int) -> float:
    return float(np.float32(source) / np.float32(target))
