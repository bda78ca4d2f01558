"""Reading and writing video files, one frame at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import check_frame
from anchorline.runtime.io.errors import DataError, FrameError, OutputError, SettingsError
from anchorline.runtime.io.files import discard, output_errors, publish, temporary_sibling
from anchorline.runtime.io.native_log import NativeLog, quiet_opencv

# What FFmpeg prints, and OpenCV's complaint that a frame could not be written (it raises nothing).
_FFMPEG_LINE = rb"\[[^\]\n]+ @ 0x[0-9a-f]+\]|OpenCV: FFMPEG:|.*Failed to write frame"
_READING, _WRITING = "video reading", "video writing"  # one file is read while another is written
_WRITE_FAILED = "Failed to write frame"
_FAILURES_AT_THE_END = 64  # grabs that fail in a row before the rest of a damaged video is given up
_FALLBACK_FPS = 25.0
_MAX_FPS = 1000.0
_COUNTED = (".mp4", ".m4v", ".mov", ".avi")  # files that state how many frames they hold
_CODECS = ("avc1", "mp4v")  # H.264 where this OpenCV can encode it, else MPEG-4 part 2


class VideoReader:
    """A video file as an iterator of (index, time in seconds, frame). A context manager.

    Frames are uint8 BGR [H, W, 3], upright: the file's rotation is applied. ``size`` is their
    (height, width), ``frame_count`` what the header promises (``None`` if it does not say). A
    damaged stream is read as far as it goes, and ``warnings`` says in a line each what is missing.
    ``index`` counts the frames of the file, those that could not be decoded included. Raises
    ``DataError`` for a file that is missing, no video or without a frame. To be iterated once.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        _check_file(self.path)
        self._log = NativeLog(_FFMPEG_LINE, _READING)
        self._failures = 0  # grabs that failed before a later one went well
        self._delivered = 0
        self._damaged: list[int] = []
        self._resized_from: int | None = None
        self._ended = False
        self._capture = cv2.VideoCapture()
        with quiet_opencv(), self._log.capture() as messages:
            # One decoding thread: FFmpeg then reports damage during the very grab that meets it.
            self._capture.open(str(self.path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        if not self._capture.isOpened():
            self.close()
            reason = f" ({_message(messages[-1])})" if messages else ""
            raise DataError(
                f"{self.path}: cannot be read as a video{reason}; the file may be cut off or no video"
            )
        self._capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.frame_count: int | None = int(count) if 0 < count < 2**40 else None
        stated_fps = self._capture.get(cv2.CAP_PROP_FPS)
        self._fps_is_stated = math.isfinite(stated_fps) and 0 < stated_fps <= _MAX_FPS
        self.fps: float = float(stated_fps) if self._fps_is_stated else _FALLBACK_FPS
        self._first = self._next_frame()
        if self._first is None:
            self.close()
            raise DataError(f"{self.path}: no frame of this video can be decoded; it may be damaged or empty")
        self.size: tuple[int, int] = (self._first.shape[0], self._first.shape[1])

    def __iter__(self) -> Iterator[tuple[int, float, NDArray[np.uint8]]]:
        frame, self._first = self._first, None
        while frame is not None:
            index = self._delivered + self._failures
            self._delivered += 1
            yield index, self._time(index), self._at_first_size(frame, index)
            frame = self._next_frame()
        self._ended = True

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the part of the video read so far, one line each."""
        found = []
        if self._ended and self.frame_count is not None and self._delivered < self.frame_count:
            found.append(self._shortfall())
        if self._damaged:
            found.append(
                f"{self.path}: damaged frames: {len(self._damaged)}, the first near frame "
                f"{self._damaged[0]}; the picture may be wrong there"
            )
        if self._resized_from is not None:
            found.append(
                f"{self.path}: the picture size changes at frame {self._resized_from}; frames from there on "
                f"are resized to {self.size[1]}x{self.size[0]}"
            )
        if not self._fps_is_stated:
            found.append(f"{self.path}: states no usable frame rate; {_FALLBACK_FPS:g} frames/s are assumed")
        return found

    def _shortfall(self) -> str:
        if self.path.suffix.lower() in _COUNTED:
            return (
                f"{self.path}: {self._delivered} of the {self.frame_count} frames that its header promises "
                "could be read; the video is cut off or damaged"
            )
        return (
            f"{self.path}: {self._delivered} frames could be read, where its length and rate make "
            f"{self.frame_count}; the video is cut off or damaged, or its rate varies"
        )

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self._capture.release()
        self._log.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_frame(self) -> NDArray[np.uint8] | None:
        """Grab until a frame comes: past a damaged stretch a decoder may find its feet again."""
        for failures in range(_FAILURES_AT_THE_END):
            with quiet_opencv(), self._log.capture() as messages:
                done = self._capture.grab()
                picture = self._capture.retrieve()[1] if done else None
            if picture is not None and picture.size:
                self._failures += failures
                if messages:
                    self._damaged.append(self._delivered + self._failures)
                return three_channels(picture)
        return None

    def _at_first_size(self, frame: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
        if frame.shape[:2] == self.size:
            return frame
        if self._resized_from is None:
            self._resized_from = index
        return np.asarray(cv2.resize(frame, (self.size[1], self.size[0])), np.uint8)

    def _time(self, index: int) -> float:
        """The frame's time stamp, or its place at the nominal frame rate where there is none."""
        milliseconds = self._capture.get(cv2.CAP_PROP_POS_MSEC)
        return milliseconds / 1000.0 if milliseconds > 0 else index / self.fps


class VideoWriter:
    """An mp4 file to write frames to. A context manager.

    ``size`` is the (height, width) of the frames; odd sides are padded by one repeated row or column,
    which video codecs need. The file appears under its name when it is complete: it is removed when
    the block raises, and ``OutputError`` is raised when the closed file does not hold every frame,
    as on a full disk.
    """

    def __init__(self, path: str | Path, size: tuple[int, int], fps: float) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise OutputError(f"{self.path}: unknown video suffix {self.path.suffix!r}; expected .mp4")
        if not (math.isfinite(fps) and 0 < fps <= _MAX_FPS):
            raise SettingsError(f"frame rate is {fps!r}; expected a number above 0 and at most {_MAX_FPS:g}")
        self.size = size
        self._padding = (size[0] % 2, size[1] % 2)
        self.frames = 0  # written so far
        self._log = NativeLog(_FFMPEG_LINE, _WRITING)
        self._temporary = temporary_sibling(self.path)
        with output_errors(self.path):
            self._temporary.touch()  # tells a folder without permission or space apart from a missing codec
        self._is_open = False
        self._open(fps)

    def _open(self, fps: float) -> None:
        padded = (self.size[1] + self._padding[1], self.size[0] + self._padding[0])
        with quiet_opencv(), self._log.capture():
            self._is_open = self._open_encoder(padded, fps)
        if not self._is_open:
            self.abandon()
            raise OutputError(
                f"{self.path}: this OpenCV cannot write a {padded[0]}x{padded[1]} mp4 at {fps:g} frames/s "
                f"(tried {', '.join(_CODECS)}); free space, or install opencv-python-headless from PyPI"
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
        with self._log.capture() as messages:
            written = self._encode(frame, time_s)
        self.frames += 1
        if not written or any(_WRITE_FAILED in line for line in messages):
            raise OutputError(
                f"{self.path}: frame {self.frames} cannot be written; free space or choose another place"
            )

    def close(self) -> None:
        """Finish the file, check that it holds every frame, and give it its name. Safe to call twice."""
        if not self._is_open:
            return
        try:
            with self._log.capture():
                self._is_open = False
                self._release()
            self._check()
            with output_errors(self.path):
                publish(self._temporary, self.path)
        finally:
            self.abandon()
            self._log.close()

    def abandon(self) -> None:
        """Drop what was written; the file under its name, if any, stays. Safe to call twice."""
        with self._log.capture():
            self._is_open = False
            self._release()
        discard(self._temporary)

    def _open_encoder(self, size: tuple[int, int], fps: float) -> bool:
        """Start the file for frames of this (width, height); ``False`` where no codec can."""
        self._writer = cv2.VideoWriter()
        return any(
            self._writer.open(str(self._temporary), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), fps, size)
            for codec in _CODECS
        )

    def _encode(self, frame: NDArray[np.uint8], time_s: float | None) -> bool:
        """Append one frame; ``False`` where that is known to have failed."""
        self._writer.write(frame)
        return True

    def _release(self) -> None:
        """Complete the file. Safe to call twice."""
        self._writer.release()

    def _check(self) -> None:
        if self.frames == 0:
            raise OutputError(f"{self.path}: no frame was written to this video")
        with quiet_opencv(), self._log.capture():
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise DataError(f"{path}: is a folder, expected a video file")
        with path.open("rb") as file:
            if not file.read(1):
                raise DataError(f"{path}: the file is empty, expected a video; copy or download it again")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a video") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def three_channels(picture: NDArray[Any]) -> NDArray[np.uint8]:
    """A decoded picture as uint8 [H, W, 3], grey ones included."""
    image = np.asarray(picture, np.uint8)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_GRAY2BGR), np.uint8) if image.ndim == 2 else image


def _message(line: str) -> str:
    """FFmpeg's message without the address of the object that printed it."""
    return line.split("] ", 1)[-1]
