"""What a source's reader has to be, and readers for pictures, iterators, webcams and streams."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import check_frame
from anchorline.runtime.io.errors import DataError
from anchorline.runtime.io.images import read_image
from anchorline.runtime.io.native_log import quiet_opencv
from anchorline.runtime.video.figures import SourceFigures
from anchorline.runtime.video.files import VideoReader, three_channels
from anchorline.runtime.video.options import Decoder
from anchorline.runtime.video.paths import Item

# Noticing a source that is open and delivers nothing.


_LOOKS = 5  # within one stall


def watch(sources: Sequence[SourceFigures], stall: float, ended: threading.Event) -> None:
    """Report each live source that has delivered nothing for ``stall`` seconds, until ``ended``.

    Readers that can end a hanging read by themselves do so after the same time; this also sees those
    that cannot, such as a webcam's driver or an iterator of the caller's.
    """
    while not ended.wait(min(1.0, stall / _LOOKS)):
        for source in sources:
            if source.live and source.silent_for() > stall:
                source.stalled(stall)


Numbered = tuple[int, float, NDArray[np.uint8]]  # index, time in seconds, pixels


class Reader(Protocol):
    """One opening of a file, a camera or a stream; opening it is its constructor's work.

    Iterated once it yields (index, time in seconds, uint8 BGR frame [H, W, 3]) and ends where the
    stream ends or breaks off. ``size`` is the (height, width) of the first frame, ``fps`` the stated
    rate, ``warnings`` what was wrong so far. All calls come from one thread. A constructor raises
    ``DataError``.
    """

    size: tuple[int, int]
    fps: float

    @property
    def warnings(self) -> list[str]: ...

    def __iter__(self) -> Iterator[Numbered]: ...

    def close(self) -> None: ...


class ImageReader:
    """An image file as a stream of one frame."""

    fps = 1.0
    warnings: list[str] = []  # noqa: RUF012 - always empty, see Reader

    def __init__(self, path: Path) -> None:
        self._image = read_image(path)
        self.size: tuple[int, int] = (self._image.shape[0], self._image.shape[1])

    def __iter__(self) -> Iterator[Numbered]:
        yield 0, 0.0, self._image

    def close(self) -> None:
        """Nothing is open."""


class IterableReader:
    """Frames that the caller's own code delivers; ``time_s`` counts from the first one."""

    fps = 25.0
    warnings: list[str] = []  # noqa: RUF012

    def __init__(self, frames: Iterable[NDArray[np.uint8]]) -> None:
        self._frames = iter(frames)
        self._first = next(self._frames, None)
        self.size = (0, 0) if self._first is None else check_frame(self._first).shape[:2]

    def __iter__(self) -> Iterator[Numbered]:
        start, index, frame = time.monotonic(), 0, self._first
        self._first = None
        while frame is not None:
            yield index, time.monotonic() - start if index else 0.0, check_frame(frame)
            index += 1
            frame = next(self._frames, None)

    def close(self) -> None:
        """Close the generator, so that its ``finally`` runs now."""
        close = getattr(self._frames, "close", None)
        if close is not None:
            close()


def open_file(item: Item, decoder: Decoder) -> Reader:
    """The reader of an image or video file."""
    if not item.is_video:
        return ImageReader(item.path)
    if decoder == "pyav":
        from anchorline.runtime.video.pyav import AvReader

        return AvReader(item.path)
    return VideoReader(item.path)


def open_stream(where: str | int, decoder: Decoder, stall: float, name: str, live: bool = True) -> Reader:
    """The reader of a camera or a URL, which gives up when nothing comes for ``stall`` seconds."""
    if decoder == "pyav" and isinstance(where, str):
        from anchorline.runtime.video.pyav import AvReader

        return AvReader(where, stall=stall, name=name, live=live)
    return StreamReader(where, stall, name, live)


# Reading webcams and network streams with OpenCV.


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
