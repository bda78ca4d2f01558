"""Laying a frame onto the canvas, the padded fixed-size input of the network, and the way back.

Training and inference both use these functions, so the network sees the same pixels in both. Box
edges are continuous (the first pixel spans 0 to 1), as are OpenCV's pixel centres in a linear
resize, so boxes move with one factor per axis and no offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.contract import ResizeRule


@dataclass(frozen=True)
class Placement:
    """Where a frame lies on its canvas: ``source`` and ``valid`` are its (height, width) in pixels
    before and after the resize; it occupies the top left ``valid`` corner of the canvas."""

    source: tuple[int, int]
    valid: tuple[int, int]

    @property
    def scale_y(self) -> float:
        """Canvas pixels for one source pixel, vertically."""
        return self.valid[0] / self.source[0]

    @property
    def scale_x(self) -> float:
        """Canvas pixels for one source pixel, horizontally."""
        return self.valid[1] / self.source[1]


def place(source_size: tuple[int, int], canvas: tuple[int, int], resize: ResizeRule) -> Placement:
    """Choose the largest scale at which a frame of ``source_size`` fits ``canvas`` and ``resize``.

    All sizes are (height, width) in pixels. Scaled sides are rounded down as torchvision does
    (``GeneralizedRCNNTransform``), in exact arithmetic, so a frame that fits exactly fills the
    canvas to the last pixel; no side falls below one pixel.
    """
    height, width = source_size
    bounds = [Fraction(canvas[0], height), Fraction(canvas[1], width)]
    if resize.shorter_side is not None:
        bounds.append(Fraction(resize.shorter_side, min(height, width)))
    if resize.longer_side is not None:
        bounds.append(Fraction(resize.longer_side, max(height, width)))
    scale = min(bounds)
    return Placement(
        source=(height, width),
        valid=(max(1, int(height * scale)), max(1, int(width * scale))),
    )


def to_canvas(
    frame: NDArray[np.uint8], placement: Placement, out: NDArray[np.uint8] | NDArray[np.float32]
) -> None:
    """Resize ``frame`` (uint8 [H, W, 3]) bilinearly into the top left of ``out`` and zero the rest.

    ``out`` is the canvas [CH, CW, 3], uint8 or float32, and may hold anything before. For float32
    the frame is converted first, so the resize does not round to whole grey levels.
    """
    height, width = placement.valid
    if frame.strides[1:] != (3, 1) or frame.strides[0] < 0:
        frame = np.ascontiguousarray(frame)  # OpenCV cannot read mirrored or channel-reversed views
    inner = out[:height, :width]
    if placement.valid == placement.source:
        inner[...] = frame
    else:
        pixels = frame if out.dtype == np.uint8 else frame.astype(np.float32)
        cv2.resize(pixels, (width, height), dst=inner, interpolation=cv2.INTER_LINEAR)
    out[height:] = 0
    out[:height, width:] = 0


def boxes_to_canvas(boxes: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """Boxes [N, 4] xyxy in source pixels, as float32 [N, 4] in canvas pixels."""
    return (boxes * _factors(placement)).astype(np.float32)


def boxes_to_source(boxes: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """Boxes [N, 4] xyxy in canvas pixels, as float32 [N, 4] in source pixels, clipped to the frame."""
    height, width = placement.source
    limits = np.array([width, height, width, height], np.float64)
    return np.clip(boxes / _factors(placement), 0.0, limits).astype(np.float32)


def _factors(placement: Placement) -> NDArray[np.float64]:
    return np.array([placement.scale_x, placement.scale_y, placement.scale_x, placement.scale_y])
