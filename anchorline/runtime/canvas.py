"""Laying a frame onto the canvas, the padded fixed-size input of the network, and the way back.

Training and inference both use these functions, so the network sees the same pixels in both. Box
edges are continuous (the first pixel spans 0 to 1), as are OpenCV's pixel centres in a linear
resize, so boxes move with one factor per axis and no offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.antialiased_resize import resize_antialiased
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.float_resize import resize_float

COARSEST_STRIDE = 32


@dataclass(frozen=True)
class Placement:
    """Where a frame lies on its canvas: ``source`` and ``valid`` are its (height, width) in pixels
    before and after the resize; it occupies the top left ``valid`` corner of the canvas.
    ``interpolation`` is the contract's: how the pixels between are found."""

    source: tuple[int, int]
    valid: tuple[int, int]
    interpolation: str = "bilinear"

    @property
    def scale_y(self) -> float:
        """Canvas pixels for one source pixel, vertically."""
        return self.valid[0] / self.source[0]

    @property
    def scale_x(self) -> float:
        """Canvas pixels for one source pixel, horizontally."""
        return self.valid[1] / self.source[1]


def place(source_size: tuple[int, int], canvas: tuple[int, int], resize: ResizeRule) -> Placement:
    """Scale a frame of ``source_size`` as ``resize`` says or, where that does not fit, to fit ``canvas``.

    All sizes are (height, width) in pixels. Scaled sides are rounded as ``resize`` says, and no side falls
    below one pixel. To fit the canvas they are rounded down after exact arithmetic, so that such a frame
    fills the canvas to the last pixel.
    """
    height, width = source_size
    valid = _scaled_by_rule(height, width, resize)
    if valid is None or valid[0] > canvas[0] or valid[1] > canvas[1]:
        scale = min(Fraction(canvas[0], height), Fraction(canvas[1], width))
        valid = (int(height * scale), int(width * scale))
    fitted = (max(1, valid[0]), max(1, valid[1]))
    return Placement(source=(height, width), valid=fitted, interpolation=resize.interpolation)


def _scaled_by_rule(height: int, width: int, resize: ResizeRule) -> tuple[int, int] | None:
    """The size that ``resize`` alone asks for; ``None`` when it sets no bound.

        In double precision, as in torchvision's ``GeneralizedRCNNTransform`` and
        ``torch.nn.functional.interpolate``: 97 x 97 at a shorter side of 800 becomes 799 x 799 there. To the
    X"""
    scales = []
    if resize.shorter_side is not None:
        scales.append(resize.shorter_side / min(height, width))
    if resize.longer_side is not None:
        scales.append(resize.longer_side / max(height, width))
    if not scales:
        return None
    extra = 0.5 if resize.rounding == "nearest" else 0.0
    return int(height * min(scales) + extra), int(width * min(scales) + extra)


def padded(size: tuple[int, int]) -> tuple[int, int]:
    """The smallest canvas for ``size``, (height, width): multiples of a backbone's coarsest stride."""
    return -(-size[0] // COARSEST_STRIDE) * COARSEST_STRIDE, -(-size[1] // COARSEST_STRIDE) * COARSEST_STRIDE


def to_canvas(
    frame: NDArray[np.uint8], placement: Placement, out: NDArray[np.uint8] | NDArray[np.float32]
) -> None:
    """Resize ``frame`` (uint8 [H, W, 3]) into the top left of ``out`` and zero the rest.

    ``out`` is the canvas [CH, CW, 3], uint8 or float32, and may hold anything before. Bilinearly, a float32
    canvas is filled as PyTorch resizes (see ``float_resize``), without rounding to whole grey levels.
    """
    height, width = placement.valid
    if frame.strides[1:] != (3, 1) or frame.strides[0] < 0:
        frame = np.ascontiguousarray(frame)  # OpenCV cannot read mirrored or channel-reversed views
    inner = out[:height, :width]
    if placement.valid == placement.source:
        inner[...] = frame
    elif placement.interpolation == "antialiased":
        resize_antialiased(frame, inner)
    elif out.dtype == np.float32:
        resize_float(frame, cast("NDArray[np.float32]", inner))
    else:
        cv2.resize(frame, (width, height), dst=inner, interpolation=cv2.INTER_LINEAR)
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
