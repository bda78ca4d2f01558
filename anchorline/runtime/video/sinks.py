"""Where results go: JSON lines, annotated files, the latest frame for whoever asks, a view of the run."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import OutputError
from anchorline.runtime.io.files import atomic_path, is_stream, json_text, output_errors
from anchorline.runtime.io.images import write_image
from anchorline.runtime.video.frames import Result, Stream
from anchorline.runtime.video.source import is_stdout, next_name
from anchorline.runtime.video.writer import VideoWriter, open_writer

if TYPE_CHECKING:
    from anchorline.runtime.video.pipeline import VideoPipeline

LONGEST_PART = 90_000  # frames of a live source in one file
_STDOUT = 1


class Sink(Protocol):
    """Takes every result, in order. All calls but ``close`` and ``abandon`` come from one thread.

    ``wants_drawing`` asks for ``result.annotated``. ``close`` completes what was written, ``abandon``
    drops it; one of them is called once, after the last ``write``. What ``write`` raises stops the
    pipeline and reaches its caller.
    """

    wants_drawing: bool

    def write(self, result: Result) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


class LiveSink(Sink, Protocol):
    """A sink that shows the run while it goes on, such as ``LiveView``, and is told of it beforehand."""

    def watch(self, pipeline: VideoPipeline) -> None: ...


class JsonLines:
    """One line a frame: ``{"source", "frame", "time_s", "size": [h, w], "detections": [...]}``.

    The file appears under its name when it is complete. To a pipe, a device or stdout (``-``) each
    line is written at once; where whoever read stdout has gone, ``BrokenPipeError`` is raised.
    """

    wants_drawing = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._to_stdout = is_stdout(self.path)
        self._direct = self._to_stdout or is_stream(self.path)
        with output_errors(self.path), contextlib.ExitStack() as stack:
            # Opening /dev/stdout by name would empty the file that it may be redirected to.
            place = os.dup(_STDOUT) if self._to_stdout else stack.enter_context(atomic_path(self.path))
            self._file = stack.enter_context(open(place, "w", encoding="utf-8"))
            self._opened = stack.pop_all()

    def write(self, result: Result) -> None:
        """Append the result's line."""
        self.write_line(line_of(result))

    def write_line(self, line: str) -> None:
        """Append a line that was made elsewhere, by ``line_of``."""
        try:
            with output_errors(self.path):
                self._file.write(line)
                if self._direct:
                    self._file.flush()
        except OutputError as error:
            if self._to_stdout and isinstance(error.__cause__, BrokenPipeError):
                raise error.__cause__ from None  # as in `... --jsonl - | head`, which is nobody's mistake
            raise

    def close(self) -> None:
        """Give the file its name."""
        with output_errors(self.path):
            self._opened.close()

    def abandon(self) -> None:
        """Drop the file, if it is not complete."""
        with contextlib.suppress(OSError), self._opened:
            raise OutputError(f"{self.path}: dropped")


def line_of(result: Result) -> str:
    """The result as a line of the detections JSON lines."""
    size = result.frame.shape[0], result.frame.shape[1]
    record = record_of(result.stream.origin, result.detections, size, result.index, result.time_s)
    return json_text(record) + "\n"


def record_of(
    source: str, detections: Detections, size: tuple[int, int], frame: int = 0, time_s: float = 0.0
) -> dict[str, Any]:
    """What such a line says of a frame of ``size`` (height, width)."""
    return {
        "source": source,
        "frame": frame,
        "time_s": round(time_s, 6),
        "size": [*size],
        "detections": detections.to_records(),
    }


class AnnotatedFiles:
    """Annotated images and mp4 files at the targets that the streams name.

    A file is complete when the next one of its source begins, or at the end. When a camera comes back
    with another size of picture, a new file is begun: ``cam1.mp4``, then ``cam1-2.mp4``, or the next
    number where that is one of the ``targets`` of all sources. A live source's file is followed by
    another after 90 000 frames, an hour at 25 a second: an mp4's index is held in memory until its
    end, and a process that is killed loses no more than that.
    """

    wants_drawing = True

    def __init__(self, targets: Iterable[Path] = ()) -> None:
        self._open: dict[str, tuple[Stream, VideoWriter]] = {}  # by source
        self._begun: set[Path] = set()
        self._taken = set(targets)

    def write(self, result: Result) -> None:
        """Append the annotated frame to its file."""
        stream = result.stream
        assert result.annotated is not None
        if stream.target is None:
            return
        if not stream.is_video:
            self._finish(stream.source)
            write_image(stream.target, result.annotated)
            return
        held = self._open.get(stream.source)
        if held is None or not _goes_on(*held, stream):
            self._finish(stream.source)
            writer = open_writer(self._next_part(stream.target), stream.size, stream.fps)
            held = self._open[stream.source] = (stream, writer)
        held[1].write(result.annotated, result.time_s)

    def close(self) -> None:
        """Finish all files; where one cannot be, the others still are."""
        with contextlib.ExitStack() as stack:  # which raises the error of the one that was added first
            for source in list(self._open):
                stack.callback(self._finish, source)

    def abandon(self) -> None:
        """Drop the files that are not complete."""
        for _, writer in self._open.values():
            writer.abandon()
        self._open.clear()

    def _finish(self, source: str) -> None:
        held = self._open.pop(source, None)
        if held is not None:
            held[1].close()

    def _next_part(self, target: Path) -> Path:
        part = next_name(target, self._taken) if target in self._begun else target
        self._begun.add(part)
        self._taken.add(part)
        return part


def _goes_on(held: Stream, writer: VideoWriter, stream: Stream) -> bool:
    """Whether a stream's frames belong into the file of another one, as after a reconnection."""
    if stream.is_live and writer.frames >= LONGEST_PART:
        return False
    same_file = held.target == stream.target and held.origin == stream.origin
    return held is stream or (same_file and held.size == stream.size)


class LatestFrame:
    """Holds each source's latest result, for a display or a web page that asks when it likes."""

    wants_drawing = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._results: dict[str, Result] = {}

    def write(self, result: Result) -> None:
        """Replace the source's result."""
        with self._lock:
            self._results[result.source] = result

    def get(self, source: str | None = None) -> Result | None:
        """The latest result of a source, or of all of them; ``None`` before the first."""
        with self._lock:
            if source is not None:
                return self._results.get(source)
            return max(self._results.values(), key=lambda result: result.captured, default=None)

    def annotated(self, source: str | None = None) -> NDArray[np.uint8] | None:
        """The latest annotated frame, uint8 BGR [H, W, 3]."""
        result = self.get(source)
        return None if result is None else result.annotated

    def close(self) -> None:
        """The last results stay to be asked for."""

    abandon = close
