"""Frames in NV12, as video decoders give them: their size, their colours, and as BGR.

The arithmetic is that of OpenCV's ``COLOR_YUV2BGR_NV12``, in whole numbers with 20 binary places, and the
GPU's kernels (``tensorrt/kernels/preprocess.cu``) do the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.errors import FrameError, shown

NV12_EXPECTATION = "Expected an NV12 frame as uint8 of shape [H * 3 / 2, W] with even H and W"
MATRICES = ("bt601", "bt709")

_PLACES = 20
# FFmpeg's numbers (AVColorSpace, AVColorRange) of what a stream states: BT.709, unspecified, BT.470BG and
# SMPTE 170M, which are BT.601; and of the range from 0 to 255.
_AV_MATRICES = {1: "bt709", 2: "bt601", 5: "bt601", 6: "bt601"}
_AV_FULL = 2


class Yuv(NamedTuple):
    """From luma and the chroma pair (U, V) to grey levels: the luma of black, and factors times 2**20."""

    black: int
    luma: int
    u_to_b: int
    u_to_g: int
    v_to_g: int
    v_to_r: int


# ITU-R BT.601-7 and BT.709-6: K_r and K_b are 0.299 and 0.114, 0.2126 and 0.0722. BT.601 in the limited range
# as in OpenCV, which takes the factors with three decimals.
COLOURS = {
    "bt601": Yuv(16, 1220542, 2116026, -409993, -852492, 1673527),
    "bt601_full": Yuv(0, 1048576, 1858077, -360853, -748826, 1470104),
    "bt709": Yuv(16, 1220945, 2215014, -223607, -558796, 1879825),
    "bt709_full": Yuv(0, 1048576, 1945738, -196424, -490864, 1651297),
}


@dataclass(frozen=True)
class Nv12:
    """A frame in NV12: uint8 [H * 3 / 2, W], luma over interleaved chroma, on the host or on the GPU.

    ``matrix`` is ``bt601`` or ``bt709``, ITU-R's; HD video is BT.709. Black and white are 16 and 235 in luma,
    with ``full_range`` 0 and 255. Raises ``FrameError``.
    """

    pixels: Any
    matrix: str = "bt601"
    full_range: bool = False

    def __post_init__(self) -> None:
        if self.matrix not in MATRICES:
            raise FrameError(f"matrix is {shown(self.matrix)}; expected one of {', '.join(MATRICES)}")
        if not isinstance(self.full_range, bool):
            raise FrameError(f"full_range is {shown(self.full_range)}; expected True or False")

    @property
    def colours(self) -> str:
        """Matrix and range as one key of ``COLOURS``."""
        return f"{self.matrix}_full" if self.full_range else self.matrix

    @classmethod
    def of_video_frame(cls, frame: Any) -> Nv12:
        """A frame of PyAV (``av.VideoFrame``) with the colours that its stream states, BT.601 in the limited
        range where it states none. Raises ``FrameError`` for other colours and odd sizes."""
        matrix = _AV_MATRICES.get(int(frame.colorspace))
        if matrix is None:
            raise FrameError(
                f"the stream's colours are number {int(frame.colorspace)} of FFmpeg's; expected BT.601 or "
                "BT.709: hand over frame.to_ndarray(format='bgr24')"
            )
        if frame.width % 2 or frame.height % 2:
            raise FrameError(f"{NV12_EXPECTATION}, got a frame of {frame.height}x{frame.width}")
        return cls(frame.to_ndarray(format="nv12"), matrix, int(frame.color_range) == _AV_FULL)


def nv12_size(shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """Height and width of an NV12 frame whose pixels are so; ``FrameError`` for what is none."""
    fits = len(shape) == 2 and 0 not in shape and shape[0] % 3 == 0 and shape[1] % 2 == 0
    if dtype != "uint8" or not fits:
        raise FrameError(f"{NV12_EXPECTATION}, got {dtype} {list(shape)}")
    return shape[0] * 2 // 3, shape[1]


def frame_size(frame: Any) -> tuple[int, int]:
    """Height and width of a checked frame of the host; ``FrameError`` for an ``Nv12`` that is none."""
    if not isinstance(frame, Nv12):
        return frame.shape[0], frame.shape[1]
    if not isinstance(frame.pixels, np.ndarray):
        raise FrameError(f"{NV12_EXPECTATION}, got a {type(frame.pixels).__name__}")
    return nv12_size(frame.pixels.shape, str(frame.pixels.dtype))


def bgr_of(frame: NDArray[np.uint8] | Nv12) -> NDArray[np.uint8]:
    """A checked frame of the host as BGR [H, W, 3]."""
    if not isinstance(frame, Nv12):
        return frame
    height, width = frame_size(frame)
    if frame.colours == "bt601":
        pixels = np.ascontiguousarray(frame.pixels)
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_YUV2BGR_NV12), np.uint8)
    yuv, bgr = COLOURS[frame.colours], np.empty((height, width, 3), np.uint8)
    grey = np.maximum(frame.pixels[:height].astype(np.int32) - yuv.black, 0) * yuv.luma + (1 << _PLACES - 1)
    u, v = (frame.pixels[height:, place::2].astype(np.int32) - 128 for place in (0, 1))
    added = (yuv.u_to_b * u, yuv.u_to_g * u + yuv.v_to_g * v, yuv.v_to_r * v)
    grey, pairs = grey.reshape(-1, 2, width), bgr.reshape(-1, 2, width, 3)
    for channel, chroma in enumerate(added):  # one pair for two by two pixels
        level = grey + chroma.repeat(2, axis=1)[:, None]
        level >>= _PLACES
        np.clip(level, 0, 255, out=pairs[..., channel], casting="unsafe")
    return bgr
