"""Writing mp4 files, one frame at a time: H.264 with PyAV, MPEG-4 part 2 with OpenCV alone."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import check_frame
from anchorline.runtime.io.errors import FrameError, NotCopied, OutputError, SettingsError
from anchorline.runtime.io.files import Draft, output_errors, utf8_path
from anchorline.runtime.io.native_log import ffmpeg_lines, quiet_opencv
from anchorline.runtime.video.reader import MAX_FPS

_OPENCV_CODECS = ("avc1", "mp4v")  # H.264 where this OpenCV can encode it, else MPEG-4 part 2
_CODEC = "libx264"
_THREADS = 4  # each holds frames in memory, and there may be many cameras
_TICKS = 90_000  # a second; time stamps are whole numbers of these


class VideoWriter(NotCopied):
    """An mp4 file to write frames to. A context manager.

    ``size`` is the (height, width) of the frames; odd sides are padded by one repeated row or column,
    which video codecs need. The file appears under its name when it is complete: it is removed when
    the block raises, and ``OutputError`` is raised when the closed file does not hold every frame,
    as on a full disk.
    """

    def __init__(self, path: str | Path, size: tuple[int, int], fps: float) -> None:
        self.path = Path(utf8_path(path, OutputError))
        if self.path.suffix.lower() != ".mp4":
            raise OutputError(f"{self.path}: unknown video suffix {self.path.suffix!r}; expected .mp4")
        if not (math.isfinite(fps) and 0 < fps <= MAX_FPS):
            raise SettingsError(f"frame rate is {fps!r}; expected a number above 0 and at most {MAX_FPS:g}")
        self.size = size
        self.frames = 0  # written so far
        self._padding = (size[0] % 2, size[1] % 2)
        self._draft = Draft(self.path)  # which tells a folder without permission apart from a missing codec
        self._temporary = self._draft.path
        width, height = size[1] + self._padding[1], size[0] + self._padding[0]
        self._is_open = self._open_encoder(width, height, fps)
        if not self._is_open:
            self.abandon()
            raise OutputError(
                f"{self.path}: this OpenCV cannot write a {width}x{height} mp4 at {fps:g} frames/s "
                f"(tried {', '.join(_OPENCV_CODECS)}); free space, or install opencv-python-headless from "
                "PyPI"
            )

    def write(self, frame: NDArray[np.uint8], time_s: float | None = None) -> None:
        """Append a uint8 BGR [H, W, 3] frame of the writer's size; else ``FrameError``.

        Frames follow each other at the file's one rate: ``time_s`` is of no use here.
        """
        frame = check_frame(frame)
        if frame.shape[:2] != self.size:
            raise FrameError(
                f"Expected frames of {self.size[1]}x{self.size[0]} for {self.path}, "
                f"got {frame.shape[1]}x{frame.shape[0]}; resize it first"
            )
        if any(self._padding):
            bottom, right = self._padding
            frame = np.asarray(cv2.copyMakeBorder(frame, 0, bottom, 0, right, cv2.BORDER_REPLICATE), np.uint8)
        written = self._encode(frame, time_s)
        self.frames += 1
        if not written:
            raise OutputError(
                f"{self.path}: frame {self.frames} cannot be written; free space or choose another place"
            )

    def close(self) -> None:
        """Finish the file, check that it holds every frame, and give it its name. Safe to call twice."""
        if not self._is_open:
            return
        try:
            self._release()
            self._check()
            with output_errors(self.path):
                self._draft.publish()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Drop what was written; the file under its name, if any, stays. Safe to call twice."""
        self._is_open = False
        self._release()
        self._draft.discard()

    def _open_encoder(self, width: int, height: int, fps: float) -> bool:
        """Start the file; ``False`` where no codec can."""
        self._writer = cv2.VideoWriter()
        place, size = str(self._temporary), (width, height)
        with quiet_opencv(), ffmpeg_lines():
            return any(
                self._writer.open(place, cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), fps, size)
                for codec in _OPENCV_CODECS
            )

    def _encode(self, frame: NDArray[np.uint8], time_s: float | None) -> bool:
        """Append one frame; ``False`` where that is known to have failed, which OpenCV does not tell."""
        with quiet_opencv():
            self._writer.write(frame)
        return True

    def _release(self) -> None:
        """Complete the file. Safe to call twice."""
        with quiet_opencv(), ffmpeg_lines():
            self._writer.release()

    def _check(self) -> None:
        if self.frames == 0:
            raise OutputError(f"{self.path}: no frame was written to this video")
        with quiet_opencv(), ffmpeg_lines():
            reopened = cv2.VideoCapture(str(self._temporary), cv2.CAP_FFMPEG)
            held = int(reopened.get(cv2.CAP_PROP_FRAME_COUNT)) if reopened.isOpened() else 0
            readable = held > 0 and reopened.grab()
            reopened.release()
        # One more than counted is right: an interrupt may fall between writing and counting.
        if not readable or held < self.frames:
            raise OutputError(
                f"{self.path}: only {held if readable else 0} of {self.frames} frames could be written; "
                "free space or choose another place for the output"
            )

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


class AvVideoWriter(VideoWriter):
    """An mp4 file of H.264 frames, each at its own time: a camera that drops frames keeps its pace.

    ``write`` takes the frame's ``time_s``; without it frames follow each other at ``fps``. The rest
    is as in ``VideoWriter``.
    """

    def _open_encoder(self, width: int, height: int, fps: float) -> bool:
        import av

        self._container: Any = None
        self._errors = (av.FFmpegError, OSError)
        self._is_broken = False
        self._fps = Fraction(fps).limit_denominator(100_000)
        self._first_time: float | None = None
        self._last_tick = -1
        try:
            self._container = av.open(str(self._temporary), "w", format="mp4")
            self._stream = stream = self._container.add_stream(_CODEC, rate=self._fps)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"preset": "veryfast", "crf": "23"}
            stream.codec_context.time_base = Fraction(1, _TICKS)
            stream.codec_context.thread_count = _THREADS
            stream.codec_context.open()
        except (*self._errors, ValueError):
            return False
        return True

    def _encode(self, frame: NDArray[np.uint8], time_s: float | None) -> bool:
        import av

        if time_s is None:
            time_s = float(self.frames / self._fps)
        if self._first_time is None:
            self._first_time = time_s
        # After that of the frame before, whatever the source says.
        self._last_tick = max(self._last_tick + 1, round((time_s - self._first_time) * _TICKS))
        picture = av.VideoFrame.from_ndarray(frame, format="bgr24")
        picture.pts, picture.time_base = self._last_tick, Fraction(1, _TICKS)
        try:
            self._container.mux(self._stream.encode(picture))
        except self._errors:
            self._is_broken = True
        return not self._is_broken

    def _release(self) -> None:
        container, self._container = self._container, None
        if container is None:
            return
        # After a failed write FFmpeg's writer must not be touched again but to be closed. What goes
        # wrong here leaves a file that lacks frames, and the check says so.
        with contextlib.suppress(*self._errors):
            if not self._is_broken:
                container.mux(self._stream.encode(None))
        with contextlib.suppress(*self._errors):
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
