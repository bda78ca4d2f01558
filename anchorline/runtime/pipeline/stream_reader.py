"""Reading webcams and network streams with OpenCV."""

from __future__ import annotations

import contextlib
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
_FAILURES_AT_THE_END = 300  # in a row: ten seconds of damage, or a moment where the connection is gone


class StreamReader:
    """A webcam (by number) or a network stream (by URL) as a ``Reader``.

    Ends when the stream ends, breaks off, or delivers nothing for ``stall`` seconds; the last is
    FFmpeg's own time limit and does not hold for webcams. ``time_s`` counts from the first frame; where
    it is not ``live``, it is the frame's place in the video.
    ``warnings`` say where a video that is not live ends too soon. Raises ``DataError`` where nothing
    can be opened within that time.
    """

    def __init__(self, where: str | int, stall: float, name: str, live: bool = True) -> None:
        self._live, self._stall, self._name = live, stall, name
        self._capture = cv2.VideoCapture()
        with quiet_opencv(), contextlib.suppress(cv2.error):
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
            yield index, self._time(index, start) if index else 0.0, frame
            index += 1
            frame = self._next_frame()
        promised = 0 if self._live else int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if index < promised:
            self.warnings.append(
                f"{self._name}: {index} of the {promised} frames that its header promises could be read; "
                "the connection broke off or the video is damaged"
            )

    def close(self) -> None:
        """Let go of the camera. Safe to call twice."""
        self._capture.release()

    def _time(self, index: int, start: float) -> float:
        if self._live:
            return time.monotonic() - start
        milliseconds = float(self._capture.get(cv2.CAP_PROP_POS_MSEC))
        return milliseconds / 1000.0 if milliseconds > 0 else index / self.fps

    def _next_frame(self) -> NDArray[np.uint8] | None:
        """Grab until a frame comes: a packet that cannot be decoded fails as a lost connection does."""
        until = time.monotonic() + self._stall
        with quiet_opencv(), contextlib.suppress(cv2.error):  # OpenCV's own trouble is a lost connection too
            for _ in range(_FAILURES_AT_THE_END):
                picture = self._capture.retrieve()[1] if self._capture.grab() else None
                if picture is not None and picture.size:
                    return three_channels(picture)
                if time.monotonic() > until:
                    break
        return None
