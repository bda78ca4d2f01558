"""Readers: one opening of a picture, a video, a camera, a stream, or of frames that the caller makes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import check_frame
from anchorline.runtime.io.addresses import shown_address, without_secrets
from anchorline.runtime.io.errors import DataError, NotCopied, SettingsError
from anchorline.runtime.io.files import expect_regular, input_errors, utf8_path
from anchorline.runtime.io.image_bytes import PNG_SIGNATURE, find_damage
from anchorline.runtime.io.images import check_header, check_pixels, read_image
from anchorline.runtime.io.native_log import ffmpeg_lines, quiet_opencv, without_secrets_on_stderr
from anchorline.runtime.video.options import Decoder

FALLBACK_FPS = 25.0
MAX_FPS = 1000.0
_COUNTED = (".mp4", ".m4v", ".mov", ".avi")  # files that state how many frames they hold
# What may fail in a row before the rest is given up: of a file, and of a stream ten seconds of damage.
_FILE_FAILURES, _STREAM_FAILURES = 64, 300
_NO_FRAME = "no frame of this video can be decoded; it may be damaged or empty"
_LONGEST_LIMIT = 2**31 - 1  # milliseconds; OpenCV opens nothing with more
_LACKING = {b"AV01": "AV1"}  # what the FFmpeg in OpenCV's packages decodes on some GPUs only
_TURNS = {90: cv2.ROTATE_90_COUNTERCLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_CLOCKWISE}

Pixels = NDArray[np.uint8]
R = TypeVar("R", bound="Reader")
Timed = tuple[float | None, Pixels]  # the frame's own time in seconds, where it has one


class Reader(NotCopied):
    """One opening of a source, which is its constructor's work. A context manager.

    Iterated once it yields (index, time in seconds, uint8 BGR frame [H, W, 3]), and ends where the source
    ends or breaks off. ``fps`` is the stated rate, ``frame_count`` what a header promises (``None`` if it
    does not say). All calls come from one thread. A constructor raises ``DataError``. A subclass gives the
    frames in ``_next``, the first of them to ``_begin`` where opening without a frame is an error.
    """

    frame_count: int | None = None
    _is_counted = True  # and that is no estimate
    _first: Timed | None = None

    def __init__(self, name: str, live: bool, fps: float = FALLBACK_FPS) -> None:
        self._name, self._live, self.fps = name, live, fps
        self._delivered = 0
        self._lost = 0  # frames in between that could not be decoded
        self._damaged: list[int] = []  # near these frames
        self._notes: list[str] = []  # further warnings
        self._ended = False
        self._closing = contextlib.ExitStack()  # what ends with the reader

    def _next(self) -> Timed | None:
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the file, the camera or the connection. Safe to call twice."""
        raise NotImplementedError

    def __enter__(self: R) -> R:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begin(self, complaint: str, size: tuple[int, int] = (0, 0)) -> None:
        """Take the first frame, of the (height, width) that the header states."""
        try:
            check_pixels(self._name, size)
            self._first = self._next()
            if self._first is None:
                raise DataError(f"{self._name}: {complaint}")
        except DataError:
            self.close()
            raise
        self.size: tuple[int, int] = (self._first[1].shape[0], self._first[1].shape[1])

    def __iter__(self) -> Iterator[tuple[int, float, Pixels]]:
        timed, self._first = self._first or self._next(), None
        while timed is not None:
            time_s, frame = timed
            index = self._delivered + self._lost
            self._delivered += 1
            yield index, index / self.fps if time_s is None else time_s, frame
            timed = self._next()
        self._ended = True

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the part read so far, one line each."""
        found, name, count, promised = [], self._name, self._delivered, self.frame_count
        if self._ended and not self._live and promised is not None and count < promised:
            found.append(
                f"{name}: {count} of the {promised} frames that its header promises could be read; the video "
                "is cut off or damaged"
                if self._is_counted
                else f"{name}: {count} frames could be read, where its length and rate make {promised}; the "
                "video is cut off or damaged, or its rate varies"
            )
        if self._damaged:
            found.append(
                f"{name}: damaged frames: {len(self._damaged)}, the first near frame {self._damaged[0]}; the "
                "picture may be wrong there"
            )
        return [*found, *self._notes]


class IterableReader(Reader):
    """Frames that the caller's own code delivers; the time counts from the first one."""

    def __init__(self, frames: Iterable[Pixels], fps: float = FALLBACK_FPS) -> None:
        super().__init__("frames", live=True, fps=fps)
        self._frames = iter(frames)
        self._start: float | None = None

    def _next(self) -> Timed | None:
        for frame in self._frames:
            now = time.monotonic()
            self._start = now if self._start is None else self._start
            return now - self._start, check_frame(frame)
        return None

    def close(self) -> None:
        """Close the generator, so that its ``finally`` runs now."""
        close = getattr(self._frames, "close", None)
        if close is not None:
            close()


class CodecError(DataError):
    """A video whose codec OpenCV has no decoder for; whether it is whole nobody knows."""


class StreamReader(Reader):
    """A webcam (by number) or a URL, read with OpenCV.

    It ends when the stream ends, breaks off, or delivers nothing for ``stall`` seconds; the last is
    FFmpeg's own time limit and does not hold for webcams. ``DataError`` where nothing comes in that time.
    """

    def __init__(self, where: str | int | Path, stall: float, name: str, live: bool = True) -> None:
        super().__init__(name, live)
        self._stall = stall
        utf8_path(str(where))
        if isinstance(where, str) and shown_address(where) != where:
            self._closing.enter_context(without_secrets_on_stderr(where))
        self._capture = cv2.VideoCapture()
        with quiet_opencv(), contextlib.suppress(cv2.error):
            if isinstance(where, int):
                self._capture.open(where)
                # One frame in the driver's buffer, where it can be set: the next one is then a fresh one.
                self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            else:
                limit = min(math.ceil(stall * 1000), _LONGEST_LIMIT)
                settings = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
                self._capture.open(str(where), cv2.CAP_FFMPEG, settings)
        if not self._capture.isOpened():
            self.close()
            raise DataError(f"{name}: cannot be opened; check the address and that the camera is on")
        self._read_header()
        self._begin(
            "opens but delivers no frame; check the address and that the camera is on", self._stated_size()
        )

    def _read_header(self) -> bool:
        """Set ``frame_count`` and ``fps``; whether the latter is stated."""
        count, fps = self._capture.get(cv2.CAP_PROP_FRAME_COUNT), self._capture.get(cv2.CAP_PROP_FPS)
        self.frame_count = int(count) if 0 < count < 2**40 else None
        is_stated = 0 < fps <= MAX_FPS
        self.fps = float(fps) if is_stated else FALLBACK_FPS
        return is_stated

    def _begin(self, complaint: str, size: tuple[int, int] = (0, 0)) -> None:
        code = int(self._capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True)
        try:
            super()._begin(complaint, size)
        except DataError as error:
            codec = _LACKING.get(code.upper())
            if codec is None or complaint not in str(error):
                raise
            raise CodecError(
                f"{self._name}: a video in {codec}, which this OpenCV cannot decode and PyAV can; "
                "pip install 'anchorline[video]', or convert it to H.264"
            ) from None

    def _stated_size(self) -> tuple[int, int]:
        height, width = map(self._capture.get, (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH))
        return int(height), int(width)

    def close(self) -> None:
        self._capture.release()
        self._closing.close()

    def _next(self) -> Timed | None:
        """Grab until a frame comes: a packet that cannot be decoded fails as a lost connection does."""
        until = time.monotonic() + self._stall
        with quiet_opencv(), contextlib.suppress(cv2.error):  # OpenCV's own trouble is a lost connection too
            for _ in range(_STREAM_FAILURES):
                timed = self._grab()
                if timed is not None or time.monotonic() > until:
                    return timed
        return None

    def _grab(self) -> Timed | None:
        picture = self._capture.retrieve()[1] if self._capture.grab() else None
        if picture is None or not picture.size:
            return None
        pixels = np.asarray(picture, np.uint8)
        if pixels.ndim == 2:
            pixels = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR), np.uint8)
        milliseconds = float(self._capture.get(cv2.CAP_PROP_POS_MSEC))
        return milliseconds / 1000.0 if milliseconds > 0 else None, pixels


class VideoReader(StreamReader):
    """A video file as an iterator of (index, time in seconds, frame), read with OpenCV. A context manager.

    Frames are uint8 BGR [H, W, 3], upright: the file's rotation is applied. ``size`` is their
    (height, width), ``frame_count`` what the header promises (``None`` if it does not say). A
    damaged stream is read as far as it goes, and ``warnings`` says in a line each what is missing.
    ``index`` counts the frames of the file, those that could not be decoded included. Raises
    ``DataError`` for a file that is missing, no video or without a frame. To be iterated once.
    """

    def __init__(self, path: str | Path) -> None:
        Reader.__init__(self, str(path), live=False)
        with input_errors(path, "expected a video", DataError):
            self.path = Path(utf8_path(path))
            if self.path.is_dir():
                raise DataError(f"{path}: is a folder, expected a video file")
            with self.path.open("rb") as file:
                if not file.read(1):
                    raise DataError(f"{path}: the file is empty, expected a video; copy or download it again")
        self._capture = cv2.VideoCapture()
        with quiet_opencv(), ffmpeg_lines() as messages:
            # One decoding thread: FFmpeg then reports damage during the very grab that meets it.
            self._capture.open(str(self.path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        if not self._capture.isOpened():
            self.close()
            reason = f" ({messages[-1].split('] ', 1)[-1]})" if messages else ""
            raise DataError(
                f"{self.path}: cannot be read as a video{reason}; the file may be cut off or no video"
            )
        self._capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        if not self._read_header():
            self._notes.append(f"{path}: states no usable frame rate; {FALLBACK_FPS:g} frames/s are assumed")
        self._is_counted = self.path.suffix.lower() in _COUNTED
        self._begin(_NO_FRAME, self._stated_size())

    def __iter__(self) -> Iterator[tuple[int, float, Pixels]]:
        is_resized = False
        for index, time_s, frame in super().__iter__():
            if frame.shape[:2] != self.size:
                height, width = self.size
                frame = np.asarray(cv2.resize(frame, (width, height)), np.uint8)
                if not is_resized:
                    self._notes.append(
                        f"{self.path}: the picture size changes at frame {index}; frames from there on are "
                        f"resized to {width}x{height}"
                    )
                is_resized = True
            yield index, time_s, frame

    def _next(self) -> Timed | None:
        """Grab until a frame comes: past a damaged stretch a decoder may find its feet again."""
        for failures in range(_FILE_FAILURES):
            with quiet_opencv(), ffmpeg_lines() as messages:
                timed = self._grab()
            if timed is not None:
                self._lost += failures
                if messages:
                    self._damaged.append(self._delivered + self._lost)
                return timed
        return None


class AvReader(Reader):
    """A video file or a URL, read with PyAV, which knows of damage frame by frame and decodes in threads.

    ``stall`` bounds the seconds that opening and each read of a URL may take. Frames come upright.
    Raises ``DataError`` for what cannot be opened or has no frame.
    """

    def __init__(
        self, where: str | Path, stall: float | None = None, name: str = "", live: bool = False
    ) -> None:
        super().__init__(name or without_secrets(str(where), [str(where)]), live)
        av = import_pyav()
        expect_regular(where, DataError)
        self._errors = av.FFmpegError
        self._stall = math.inf if stall is None else stall
        options = {"rtsp_transport": "tcp"} if str(where).startswith("rtsp") else {}
        limits = None if stall is None else (stall, stall)
        try:
            self._container = av.open(str(where), timeout=limits, options=options)
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or without_secrets(str(error), [str(where)])
            raise DataError(
                f"{self._name}: cannot be read as a video ({reason}); check that it is there and whole"
            ) from None
        if not self._container.streams.video:
            self.close()
            raise DataError(f"{self._name}: holds no video; expected a video file or stream")
        stream = self._container.streams.video[0]
        stream.thread_type = "SLICE" if live else "AUTO"  # frame threads would hold frames back
        self.frame_count = stream.frames or None
        self.fps = float(stream.average_rate or stream.guessed_rate or FALLBACK_FPS)
        # Where the video begins: not at 0 in a transport stream, or in what was cut out of a longer one.
        self._start = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
        self._frames = self._decoded()
        codec = stream.codec_context  # None where FFmpeg knows of none
        self._begin(_NO_FRAME, (codec.height, codec.width) if codec else (0, 0))

    def close(self) -> None:
        self._container.close()

    def _next(self) -> Timed | None:
        return next(self._frames, None)

    def _decoded(self) -> Iterator[Timed]:
        """Each frame's time and pixels, past damaged packets: a camera's may lack what came before."""
        good, bad = time.monotonic(), 0
        for packet in self._packets():
            try:
                frames = packet.decode()
                bad = 0
            except EOFError:
                return
            except self._errors:
                frames = []
                bad += 1
                self._damaged.append(self._delivered)
            for frame in frames:
                if frame.is_corrupt:
                    self._damaged.append(self._delivered)
                pixels = np.asarray(frame.to_ndarray(format="bgr24"), np.uint8)
                turn = _TURNS.get(round(getattr(frame, "rotation", 0)) % 360)
                upright = pixels if turn is None else np.asarray(cv2.rotate(pixels, turn), np.uint8)
                yield None if frame.time is None else float(frame.time) - self._start, upright
                good = time.monotonic()
            if time.monotonic() - good > self._stall if self._live else bad >= _FILE_FAILURES:
                return

    def _packets(self) -> Iterator[Any]:
        """Packets until the end, or until the file or connection fails."""
        try:
            yield from self._container.demux(video=0)
        except EOFError:
            return
        except self._errors:
            if not self._live:
                self._damaged.append(self._delivered)


def import_pyav() -> ModuleType:
    """The package ``av``. Raises ``SettingsError`` where PyAV is not installed."""
    try:
        import av
    except ImportError as error:
        raise SettingsError(
            f"the decoder pyav needs PyAV ({error}); pip install 'anchorline[video]'"
        ) from error
    return av


def open_file(path: str | Path, is_video: bool, decoder: Decoder = "opencv") -> Reader:
    """The reader of an image or video file. A codec that OpenCV lacks is left to PyAV, if that is there."""
    if not is_video:
        return IterableReader([read_image(path)], fps=1.0)
    check_header(path)  # of a GIF or an APNG: FFmpeg decodes while it opens
    reader = _opened(decoder, lambda: VideoReader(path), lambda: AvReader(path))
    with Path(path).open("rb") as file:  # FFmpeg says nothing of an APNG that was cut off
        head = file.read(len(PNG_SIGNATURE))
        damage = find_damage(head + file.read()) if head == PNG_SIGNATURE else None
    if damage:
        reader._notes.append(f"{path}: {damage}; what is left of it is read")
    return reader


def open_stream(where: str | Path, decoder: Decoder, stall: float, name: str, live: bool) -> Reader:
    """The reader of a URL, as ``open_file`` chooses it."""
    return _opened(
        decoder, lambda: StreamReader(where, stall, name, live), lambda: AvReader(where, stall, name, live)
    )


def _opened(decoder: Decoder, opencv: Callable[[], Reader], pyav: Callable[[], Reader]) -> Reader:
    if decoder == "pyav":
        return pyav()
    try:
        return opencv()
    except CodecError:
        with contextlib.suppress(SettingsError):  # there is no PyAV
            return pyav()
        raise
