"""Frames of any size to the network's input batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import Placement, place, to_canvas
from anchorline.runtime.contract import Contract
from anchorline.runtime.errors import FrameError

_EXPECTATION = "Expected a frame as uint8 BGR array of shape [H, W, 3]"


def check_frame(frame: object) -> NDArray[np.uint8]:
    """Return ``frame`` if it is uint8 [H, W, 3] with at least one pixel; else raise ``FrameError``."""
    if frame is None:
        raise FrameError(f"{_EXPECTATION}, got None; an image or video that could not be read gives None")
    if not isinstance(frame, np.ndarray):
        raise FrameError(f"{_EXPECTATION}, got a {type(frame).__name__}; convert it with numpy.asarray")
    got = f"got {frame.dtype} {list(frame.shape)}"
    if frame.ndim == 2 or (frame.ndim == 3 and frame.shape[2] == 1):
        raise FrameError(f"{_EXPECTATION}, {got}; convert grey with cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR)")
    if frame.ndim == 3 and frame.shape[2] == 4:
        raise FrameError(f"{_EXPECTATION}, {got}; drop the alpha channel with frame[:, :, :3]")
    if frame.ndim != 3 or frame.shape[2] != 3:
        raise FrameError(f"{_EXPECTATION}, {got}; give one frame, channels last (several go to batch)")
    if frame.size == 0:
        raise FrameError(f"{_EXPECTATION}, {got}; the frame has no pixels, check the crop or the reader")
    if frame.dtype != np.uint8:
        raise FrameError(f"{_EXPECTATION}, {got}; scale it to 0..255 and convert with astype(numpy.uint8)")
    return frame


class Preprocessor:
    """Lays frames onto canvases, into a batch that is allocated once and used again."""

    def __init__(self, contract: Contract) -> None:
        self._canvas = contract.canvas
        self._resize = contract.resize
        self._images = np.empty((0, *contract.canvas, 3), np.dtype(contract.input_dtype))

    def __call__(
        self, frames: Sequence[NDArray[np.uint8]]
    ) -> tuple[NDArray[np.generic], NDArray[np.float32], list[Placement]]:
        """Place checked frames of any sizes.

        Returns ``images`` [B, H, W, 3] in the contract's input dtype (overwritten by the next call),
        ``image_sizes`` float32 [B, 2], the valid (height, width) of each, and the placements.
        """
        if len(self._images) < len(frames):
            self._images = np.empty((len(frames), *self._images.shape[1:]), self._images.dtype)
        images = self._images[: len(frames)]
        placements = [place((f.shape[0], f.shape[1]), self._canvas, self._resize) for f in frames]
        for frame, placement, canvas in zip(frames, placements, images, strict=True):
            to_canvas(frame, placement, canvas)
        return images, np.array([p.valid for p in placements], np.float32), placements
