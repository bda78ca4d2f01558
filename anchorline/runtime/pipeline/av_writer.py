"""Writing H.264 with PyAV, whose FFmpeg has an encoder for it; OpenCV's wheels have none."""

from __future__ import annotations

import contextlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.video import VideoWriter

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
