"""Reading webcams and network streams with OpenCV."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.errors import DataError
from anchorline.runtime.opencv_log import quiet_opencv
from anchorline.runtime.video import three_channels

FALLBACK_FPS = 25.0
_MAX_FPS = 1000.0


class StreamReader:
    """A webcam (by number) or a network stream (by URL) as a ``Reader``.

    Ends when the stream ends, breaks off, or delivers nothing for ``stall`` seconds; the last is
    FFmpeg's own time limit and does not hold for webcams. ``time_s`` counts from the first frame; where
    it is not ``live``, at the stated rate.
    Raises ``DataError`` where nothing can be opened within that time.
    """

    def __init__(self, where: str | int, stall: float, name: str, live: bool = True) -> None:
        self._live = live
        self._capture = cv2.VideoCapture()
        with quiet_opencv():
            if isinstance(where, int):
                self._capture.open(where)
                # One frame in the driver's buffer, where it can be set: the next one is then a fresh one.
                self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            else:
                limit = math.ceil(stall * 1000)
                settings = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
                self._capture.open(where, cv2.CAP_FFMPEG, settings)
        first = self._next_frame() if self._capture.isOpened() else None
        if first is None:
            opened = self._capture.isOpened()
            self.close()
            reason = "opens but delivers no frame" if opened else "cannot be opened"
            raise DataError(f"{name}: {reason}; check the address and that the camera is on")
        self._first: NDArray[np.uint8] | None = first
        self.size: tuple[int, int] = (first.shape[0], first.shape[1])
        stated = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.fps = stated if math.isfinite(stated) and 0 < stated <= _MAX_FPS else FALLBACK_FPS
        self.warnings: list[str] = []

    def __iter__(self) -> Iterator[tuple[int, float, NDArray[np.uint8]]]:
        start, index = time.monotonic(), 0
        frame, self._first = self._first, None
        while frame is not None:
            elapsed = time.monotonic() - start if self._live else index / self.fps
            yield index, elapsed if index else 0.0, frame
            index += 1
            frame = self._next_frame()

    def close(self) -> None:
        """Let go of the camera. Safe to call twice."""
        self._capture.release()

    def _next_frame(self) -> NDArray[np.uint8] | None:
        with quiet_opencv():
            done = self._capture.grab()
            picture = self._capture.retrieve()[1] if done else None
        return three_channels(picture) if picture is not None and picture.size else None
