"""Reading files and streams with PyAV: damage is known frame by frame, and threads decode."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.errors import DataError, SettingsError
from anchorline.runtime.pipeline.stream_reader import FALLBACK_FPS

_BAD_PACKETS = 64  # in a row before the rest of a damaged stream is given up
_TURNS = {90: cv2.ROTATE_90_COUNTERCLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_CLOCKWISE}


def check_pyav() -> None:
    """Raise ``SettingsError`` where PyAV is not installed."""
    _pyav()


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise SettingsError(
            f"the decoder pyav needs PyAV ({error}); pip install 'anchorline[video]'"
        ) from error
    return av


class AvReader:
    """A video file or a network stream as a ``Reader``.

    ``stall`` bounds the seconds that opening and each read of a URL may take. For a ``live`` stream
    ``time_s`` counts from the first frame, and it ends where the stream breaks off. A file's damaged
    frames are counted in ``warnings``. Frames come upright. Raises ``DataError`` for what cannot be
    opened or has no frame.
    """

    def __init__(
        self, where: str | Path, stall: float | None = None, name: str = "", live: bool = False
    ) -> None:
        av = _pyav()
        self._name = name or str(where)
        self._live, self._stall = live, math.inf if stall is None else stall
        self._errors = av.FFmpegError
        options = {"rtsp_transport": "tcp"} if str(where).startswith("rtsp") else {}
        try:
            self._container = av.open(
                str(where), timeout=None if stall is None else (stall, stall), options=options
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(
                f"{self._name}: cannot be read as a video ({reason}); check that it is there and whole"
            ) from None
        self._damaged = self._delivered = 0
        self._ended = False
        if not self._container.streams.video:
            self.close()
            raise DataError(f"{self._name}: holds no video; expected a video file or stream")
        stream = self._container.streams.video[0]
        stream.thread_type = "SLICE" if self._live else "AUTO"  # frame threads would hold frames back
        self.frame_count: int | None = stream.frames or None
        rate = stream.average_rate or stream.guessed_rate
        self.fps: float = float(rate) if rate else FALLBACK_FPS
        # Where the video begins: not at 0 in a transport stream, or in what was cut out of a longer one.
        self._begin = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
        self._frames = self._decoded()
        self._first = next(self._frames, None)
        if self._first is None:
            self.close()
            raise DataError(
                f"{self._name}: no frame of this video can be decoded; it may be damaged or empty"
            )
        self.size: tuple[int, int] = (self._first[1].shape[0], self._first[1].shape[1])

    def __iter__(self) -> Iterator[tuple[int, float, NDArray[np.uint8]]]:
        begun = time.monotonic()
        timed, self._first = self._first, None
        while timed is not None:
            time_s, frame = timed
            if self._live or time_s is None:
                time_s = time.monotonic() - begun if self._live else self._delivered / self.fps
            yield self._delivered, time_s if self._delivered or not self._live else 0.0, frame
            self._delivered += 1
            timed = next(self._frames, None)
        self._ended = True

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the part of the video read so far, one line each."""
        found = []
        if not self._live and self._ended and self.frame_count and self._delivered < self.frame_count:
            found.append(
                f"{self._name}: {self._delivered} of the {self.frame_count} frames that its header promises "
                "could be read; the video is cut off or damaged"
            )
        if self._damaged:
            found.append(f"{self._name}: damaged frames: {self._damaged}; the picture may be wrong there")
        return found

    def close(self) -> None:
        """Close the file or connection. Safe to call twice."""
        self._container.close()

    def _decoded(self) -> Iterator[tuple[float | None, NDArray[np.uint8]]]:
        """Each frame's time and pixels, past damaged packets: a camera's may lack what came before."""
        good, bad = time.monotonic(), 0
        for packet in self._packets():
            try:
                frames = packet.decode()
            except EOFError:
                return
            except self._errors:
                frames = []
                bad += 1
                self._damaged += 1
            else:
                bad = 0
            for frame in frames:
                self._damaged += bool(frame.is_corrupt)
                yield self._place(frame), self._upright(frame)
                good = time.monotonic()
            if time.monotonic() - good > self._stall if self._live else bad >= _BAD_PACKETS:
                return

    def _packets(self) -> Iterator[Any]:
        """Packets until the end, or until the file or connection fails."""
        try:
            yield from self._container.demux(video=0)
        except EOFError:
            return
        except self._errors:
            self._damaged += not self._live

    def _place(self, frame: Any) -> float | None:
        """The frame's time from the video's beginning, where it has one."""
        return None if frame.time is None else float(frame.time) - self._begin

    def _upright(self, frame: object) -> NDArray[np.uint8]:
        pixels = np.asarray(frame.to_ndarray(format="bgr24"), np.uint8)  # type: ignore[attr-defined]
        turn = _TURNS.get(round(getattr(frame, "rotation", 0)) % 360)
        return pixels if turn is None else np.asarray(cv2.rotate(pixels, turn), np.uint8)
