"""Where frames come in: each source has a thread that reads it, and a queue that batches are taken from."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import DataError
from anchorline.runtime.video.figures import Figures
from anchorline.runtime.video.frames import Result, Stream
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.reader import IterableReader, Reader, StreamReader, open_file, open_stream
from anchorline.runtime.video.source import Item, Source

FIRST_PAUSE = 0.5  # seconds before a lost source is opened again; doubled each time, up to
LONGEST_PAUSE = 15.0
_DEPTH = 4  # frames that a waiting source may be ahead, or a batch where that is more
_NEARLY = 0.9
_NOTHING = Detections.empty()


@dataclass(eq=False)
class SourceQueue:
    """The frames of one source that wait for the detector. The intake's lock guards it."""

    latest: bool  # is what counts: a newer frame takes the place of one that waits
    frames: deque[Result] = field(default_factory=deque)
    dropped: int = 0
    ended: bool = False


class Intake:
    """The queues of all sources, and the one place where the pipeline waits for frames.

    Filling and taking are apart. Under ``wait`` a full queue holds its reader up, so every frame is
    answered, in order. Under ``latest`` there is room for one frame, and a newer one takes its place: the
    older one is dropped and counted. The intake also bounds how many frames are under way behind it, so
    that a slow consumer holds up the taking, and no stale frames pile up in between.
    """

    def __init__(self, latest: Sequence[bool], batch: int, max_wait: float, limit: int) -> None:
        """``latest`` says of each source whether its newest frame is what counts. ``batch`` frames at most
        are taken at once, after at most ``max_wait`` seconds of waiting for company; ``limit`` bounds the
        frames that are taken and not yet ``done``."""
        self.queues = [SourceQueue(each) for each in latest]
        self.stopped = threading.Event()  # no more frames are accepted
        self.aborted = False  # nor handed out
        self._batch, self._max_wait, self._limit = batch, max_wait, max(limit, batch)
        self._depth = max(_DEPTH, batch)
        self._changed = threading.Condition()
        self._under_way = 0
        self._taken = 0  # batches so far
        self._turn = 0  # the queue that is asked first

    def offer(self, queue: SourceQueue, frame: Result) -> bool:
        """Add a frame by the queue's policy; ``False`` when the pipeline takes no more."""
        with self._changed:
            if queue.latest and not self.stopped.is_set():
                queue.dropped += len(queue.frames)
                queue.frames.clear()
            self._changed.wait_for(lambda: len(queue.frames) < self._depth or self.stopped.is_set())
            if self.stopped.is_set():
                return False
            queue.frames.append(frame)
            self._changed.notify_all()
            return True

    def end(self, queue: SourceQueue) -> None:
        """The source delivers no more."""
        with self._changed:
            queue.ended = True
            self._changed.notify_all()

    def take(self) -> tuple[int, list[Result]] | None:
        """The number of the batch and its frames, waited for; ``None`` when all is over."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._over() or self._can_take())
                if self._over():
                    return None
                # Until the batch is full, nobody is left who could fill it, or the time is up.
                self._changed.wait_for(lambda: not (self._can_take() and self._may_grow()), self._max_wait)
                frames = self._pick()
                if frames:  # another worker may have been faster
                    break
            self._taken += 1
            self._under_way += len(frames)
            self._changed.notify_all()
            return self._taken - 1, frames

    def done(self) -> None:
        """A frame has left the pipeline."""
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Accept no more frames; what waits here is still handed out."""
        with self._changed:
            self.stopped.set()
            for queue in self.queues:
                queue.ended = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Accept and hand out nothing more."""
        with self._changed:
            self.stopped.set()
            self.aborted = True
            for queue in self.queues:
                queue.frames.clear()
            self._changed.notify_all()

    def _can_take(self) -> bool:
        return self._under_way + self._batch <= self._limit and any(queue.frames for queue in self.queues)

    def _over(self) -> bool:
        return self.aborted or all(queue.ended and not queue.frames for queue in self.queues)

    def _may_grow(self) -> bool:
        waiting = sum(len(queue.frames) for queue in self.queues)
        # One frame of a live source is all there is: the next would take its place, not join it.
        growing = any(not (queue.ended or (queue.latest and queue.frames)) for queue in self.queues)
        return growing and waiting < self._batch

    def _pick(self) -> list[Result]:
        """Frames from the queues in turn, one from each at a time, so that none is left behind."""
        frames: list[Result] = []
        while len(frames) < self._batch and self._can_take():
            queue = self.queues[self._turn % len(self.queues)]
            self._turn += 1
            if queue.frames:
                frames.append(queue.frames.popleft())
        return frames


class Feed:
    """The work of the thread that reads a source: its frames go into its queue; a live one is opened again
    when it is lost."""

    def __init__(
        self, source: Source, queue: SourceQueue, intake: Intake, figures: Figures, options: DetectOptions
    ) -> None:
        self._source, self._queue, self._intake, self._options = source, queue, intake, options
        self._all_figures, self._figures = figures, figures.sources[source.name]
        self._delivered = 0  # frames read so far, over all connections
        self._first_captured: float | None = None

    def run(self) -> None:
        """Read until the source ends or the pipeline stops. Raises what nobody expected."""
        source, stopped = self._source, self._intake.stopped
        try:
            if not isinstance(source.where, str | int | Path):
                self._pump()
            elif source.live and not source.items:
                self._read_live()
            else:
                for item in source.items or (None,):
                    if stopped.is_set():
                        break
                    try:
                        self._pump(item)
                    except DataError as error:
                        self._figures.unreadable(error)
        finally:
            self._figures.state = "ended"
            self._intake.end(self._queue)

    def _read_live(self) -> None:
        figures, options, stopped = self._figures, self._options, self._intake.stopped
        began, pause = time.monotonic(), FIRST_PAUSE
        while not stopped.is_set():
            before, error = self._delivered, None
            try:
                self._pump()
            except DataError as caught:
                error = caught
            if stopped.is_set():
                return
            if figures.silent_for() > _NEARLY * options.stall:
                figures.stalled(options.stall)  # before the watchdog looks: the reader's limit is the same
            figures.lost(error)
            is_late = time.monotonic() - began > options.patience
            if error and is_late and not self._all_figures.anything_came():
                figures.unreadable(error)
                return
            pause = FIRST_PAUSE if self._delivered > before else min(2 * pause, LONGEST_PAUSE)
            stopped.wait(pause)

    def _open(self, item: Item | None) -> Reader:
        """The reader of a file, or of what the source is."""
        where, decoder = self._source.where, self._options.decoder
        if item is not None:
            return open_file(item.path, item.is_video, decoder)
        if not isinstance(where, str | int | Path):
            return IterableReader(where)
        stall, name, live = self._options.stall, self._source.describe(), bool(self._source.live)
        if isinstance(where, int):
            return StreamReader(where, stall, name, live)
        return open_stream(where, decoder, stall, name, live)

    def _pump(self, item: Item | None = None) -> None:
        """Open the source, or a file of it, and hand the frames on until it ends."""
        source, figures, stopped = self._source, self._figures, self._intake.stopped
        figures.asked()
        start = time.perf_counter()
        reader = self._open(item)
        # Opening an image decodes it; opening a video is no frame's share.
        opened = time.perf_counter() - start if item and not item.is_video else 0.0
        if self._delivered and item is None:
            figures.reconnected()
        stream: Stream | None = None
        is_played = source.policy == "latest" and item is not None and item.is_video
        began: float | None = None  # of a file that is played at its own rate, as if a camera delivered it
        with contextlib.closing(reader):
            frames = iter(reader)
            while not stopped.is_set():
                start = time.perf_counter()
                figures.asked()
                numbered = next(frames, None)
                if numbered is None:
                    break
                decode, opened = opened + time.perf_counter() - start, 0.0
                index, time_s, pixels = numbered
                if is_played:
                    now = time.monotonic()
                    began = now - time_s if began is None else began
                    stopped.wait(max(0.0, began + time_s - now))
                captured = time.monotonic()
                if source.live:  # a connection's own numbers start again with each one
                    self._first_captured = self._first_captured or captured
                    index, time_s = self._delivered, captured - self._first_captured
                self._delivered += 1
                figures.came()
                times = {"decode": decode}
                self._all_figures.took(times, source.name)
                if index % source.stride:
                    continue
                size = (pixels.shape[0], pixels.shape[1])
                if stream is None or size != stream.size:
                    stream = self._stream(size, reader.fps / source.stride, item)
                frame = Result(pixels, _NOTHING, stream, index, time_s, captured, times)
                if not self._intake.offer(self._queue, frame):
                    break
            figures.note(reader.warnings)

    def _stream(self, size: tuple[int, int], fps: float, item: Item | None) -> Stream:
        source = self._source
        if item is None:
            return Stream(source.name, source.name, size, fps, True, bool(source.live), source.target)
        is_alone = item.is_video and len(source.items) == 1
        origin = source.name if is_alone else str(item.path)
        return Stream(source.name, origin, size, fps, item.is_video, target=item.target)
