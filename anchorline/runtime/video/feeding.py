"""Reader threads: each opens its source, hands its frames to the intake, and opens it again when lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from anchorline.runtime.io.errors import DataError
from anchorline.runtime.video.figures import SourceFigures
from anchorline.runtime.video.frames import Frame, Stream
from anchorline.runtime.video.intake import Intake, SourceQueue
from anchorline.runtime.video.options import Decoder
from anchorline.runtime.video.paths import Item
from anchorline.runtime.video.readers import IterableReader, Reader, open_file, open_stream
from anchorline.runtime.video.source import Source

FIRST_PAUSE = 0.5  # seconds before a lost source is opened again; doubled each time, up to
LONGEST_PAUSE = 15.0
_NEARLY = 0.9


@dataclass
class Feeder:
    """The work of one reader thread.

    ``stopped`` ends it; ``fail`` takes what nobody expected. ``stall`` is how long a live source may
    deliver nothing, ``patience`` how long to try while no source has ever delivered anything;
    ``anything_came`` tells whether one has.
    """

    source: Source
    queue: SourceQueue
    intake: Intake
    figures: SourceFigures
    stopped: threading.Event
    fail: Callable[[BaseException], None]
    decoder: Decoder
    stall: float
    patience: float
    anything_came: Callable[[], bool]
    delivered: int = 0  # frames read so far, over all connections
    first_captured: float | None = None

    def run(self) -> None:
        """Read until the source ends or the pipeline stops."""
        try:
            if self.source.is_files:
                self._files()
            elif not isinstance(self.source.where, str | int | Path):
                self._iterable()
            elif self.source.live:
                self._live(
                    self.source.where if isinstance(self.source.where, int) else str(self.source.where)
                )
            else:
                self._remote_file(str(self.source.where))
        except BaseException as error:
            self.fail(error)
        finally:
            self.figures.state = "ended"
            self.intake.end(self.queue)

    def _files(self) -> None:
        for item in self.source.items:
            if self.stopped.is_set():
                return
            try:
                self._file(item)
            except DataError as error:
                self.figures.unreadable(error)

    def _file(self, item: Item) -> None:
        start = time.perf_counter()
        reader = open_file(item, self.decoder)
        # Opening an image decodes it; opening a video is no frame's share.
        opened = 0.0 if item.is_video else time.perf_counter() - start
        alone = item.is_video and len(self.source.items) == 1
        origin = self.source.name if alone else str(item.path)
        fps = reader.fps / self.source.stride
        stream = Stream(self.source.name, origin, reader.size, fps, item.is_video, target=item.target)
        self._pump(reader, stream, opened)

    def _remote_file(self, url: str) -> None:
        try:
            reader = open_stream(url, self.decoder, self.stall, self.source.describe(), live=False)
        except DataError as error:
            self.figures.unreadable(error)
            return
        self._pump(reader, self._stream(reader))

    def _iterable(self) -> None:
        frames = self.source.where
        assert not isinstance(frames, str | int | Path)
        self.figures.asked()
        reader = IterableReader(frames)
        self._pump(reader, self._stream(reader))

    def _live(self, where: str | int) -> None:
        began, pause = time.monotonic(), FIRST_PAUSE
        while not self.stopped.is_set():
            before = self.delivered
            try:
                self.figures.asked()
                reader = open_stream(where, self.decoder, self.stall, self.source.describe())
                if before:
                    self.figures.reconnected()
                self._pump(reader, self._stream(reader))
                error: DataError | None = None
            except DataError as caught:
                error = caught
            if self.stopped.is_set():
                return
            if self.figures.silent_for() > _NEARLY * self.stall:
                self.figures.stalled(self.stall)  # before the watchdog looks: the reader's limit is the same
            self.figures.lost(error)
            if error and not self.anything_came() and time.monotonic() - began > self.patience:
                self.figures.unreadable(error)
                return
            pause = FIRST_PAUSE if self.delivered > before else min(2 * pause, LONGEST_PAUSE)
            self.stopped.wait(pause)

    def _stream(self, reader: Reader) -> Stream:
        name = self.source.name
        fps, live = reader.fps / self.source.stride, bool(self.source.live)
        return Stream(name, name, reader.size, fps, is_live=live, target=self.source.target)

    def _pump(self, reader: Reader, stream: Stream, opened: float = 0.0) -> None:
        """Hand the reader's frames on until it ends; ``opened`` seconds went into its first frame."""
        own_index = bool(self.source.live)
        with contextlib.closing(reader):
            frames = iter(reader)
            pace = _Pace(self.stopped) if self._plays_back(stream) else None
            while not self.stopped.is_set():
                start = time.perf_counter()
                self.figures.asked()
                numbered = next(frames, None)
                if numbered is None:
                    break
                decode, opened = opened + time.perf_counter() - start, 0.0
                index, time_s, pixels = numbered
                if pace is not None:
                    pace.wait_until(time_s)
                captured = time.monotonic()
                if own_index:  # a connection's own numbers start again with each one
                    index, time_s = self.delivered, self._since_first(captured)
                self.delivered += 1
                self.figures.came(decode)
                if index % self.source.stride:
                    continue
                if pixels.shape[:2] != stream.size:
                    stream = replace(stream, size=(pixels.shape[0], pixels.shape[1]))
                if not self.intake.offer(self.queue, Frame(stream, index, time_s, pixels, captured, decode)):
                    break
            self.figures.note(reader.warnings)

    def _plays_back(self, stream: Stream) -> bool:
        return self.source.chosen_policy == "latest" and self.source.is_files and stream.is_video

    def _since_first(self, captured: float) -> float:
        if self.first_captured is None:
            self.first_captured = captured
        return captured - self.first_captured


class _Pace:
    """Plays a file at its own rate, as if a camera delivered it."""

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped
        self._start: float | None = None

    def wait_until(self, time_s: float) -> None:
        """Sleep until the frame of this time is due; the first one is due at once."""
        now = time.monotonic()
        if self._start is None:
            self._start = now - time_s
        self._stopped.wait(max(0.0, self._start + time_s - now))
