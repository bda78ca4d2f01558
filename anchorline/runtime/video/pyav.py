"""Reading files and streams and writing H.264 with PyAV: damage is known frame by frame, threads decode."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.errors import DataError, SettingsError
from anchorline.runtime.video.files import VideoWriter
from anchorline.runtime.video.readers import FALLBACK_FPS

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


# Writing H.264 with PyAV, whose FFmpeg has an encoder for it; OpenCV's wheels have none.


_CODEC = "libx264"
_THREADS = 4  # each holds frames in memory, and there may be many cameras
_TICKS = 90_000  # a second; time stamps are whole numbers of these


class AvVideoWriter(VideoWriter):
    """An mp4 file of H.264 frames, each at its own time: a camera that drops frames keeps its pace.

    ``write`` takes the frame's ``time_s``; without it frames follow each other at ``fps``. The rest
    is as in ``VideoWriter``.
    """

    def _open_encoder(self, size: tuple[int, int], fps: float) -> bool:
        import av

        self._container: Any = None
        self._is_broken = False
        self._fps = Fraction(fps).limit_denominator(100_000)
        self._first_time: float | None = None
        self._last_tick = -1
        try:
            self._container = av.open(str(self._temporary), "w", format="mp4")
            stream = self._container.add_stream(_CODEC, rate=self._fps)
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            stream.options = {"preset": "veryfast", "crf": "23"}
            stream.codec_context.time_base = Fraction(1, _TICKS)
            stream.codec_context.thread_count = _THREADS
            stream.codec_context.open()
        except (av.FFmpegError, ValueError, OSError):
            return False
        self._stream = stream
        return True

    def _encode(self, frame: NDArray[np.uint8], time_s: float | None) -> bool:
        import av

        picture = av.VideoFrame.from_ndarray(frame, format="bgr24")
        picture.pts = self._tick(time_s)
        picture.time_base = Fraction(1, _TICKS)
        try:
            for packet in self._stream.encode(picture):
                self._container.mux(packet)
        except (av.FFmpegError, OSError):
            self._is_broken = True
            return False
        return True

    def _tick(self, time_s: float | None) -> int:
        """The frame's time stamp: after that of the one before, whatever the source says."""
        if time_s is None:
            time_s = float(self.frames / self._fps)
        if self._first_time is None:
            self._first_time = time_s
        self._last_tick = max(self._last_tick + 1, round((time_s - self._first_time) * _TICKS))
        return self._last_tick

    def _release(self) -> None:
        import av

        container, self._container = self._container, None
        if container is None:
            return
        # After a failed write FFmpeg's writer must not be touched again but to be closed. What goes
        # wrong here leaves a file that lacks frames, and the check says so.
        with contextlib.suppress(av.FFmpegError, OSError):
            for packet in [] if self._is_broken else self._stream.encode(None):
                container.mux(packet)
        with contextlib.suppress(av.FFmpegError, OSError):
            container.close()


def open_writer(path: Path, size: tuple[int, int], fps: float) -> VideoWriter:
    """A writer of H.264 where PyAV is installed with an encoder for it, else OpenCV's."""
    return (AvVideoWriter if has_h264() else VideoWriter)(path, size, fps)


def has_h264() -> bool:
    """Whether PyAV is installed with an encoder for H.264."""
    try:
        import av
    except ImportError:
        return False
    return _CODEC in av.codecs_available
