"""Sources to sinks through one detector: the threads, and how they start, drain, stop and fail."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.feeding import Feeder
from anchorline.runtime.video.figures import Figures
from anchorline.runtime.video.frames import Frame, Result
from anchorline.runtime.video.intake import Intake, SourceQueue
from anchorline.runtime.video.options import DetectOptions, Filters, TrackOptions
from anchorline.runtime.video.paths import check_outputs
from anchorline.runtime.video.readers import watch
from anchorline.runtime.video.signals import signals_as_exit
from anchorline.runtime.video.sinks import AnnotatedFiles, Callback, JsonLines, Sink
from anchorline.runtime.video.source import Source, plan
from anchorline.runtime.video.summary import DetectSummary
from anchorline.runtime.video.tracks import Following


class FrameDetector(Protocol):
    """What the pipeline calls: ``Detector``, or anything of its shape.

    ``timings``, where there, holds the seconds of this thread's last ``batch`` by stage; ``contract``
    gives the class names and the largest batch; ``provider`` and ``precision`` go to the summary;
    ``concurrent_calls`` is how many threads may usefully call ``batch`` at once (1 where not there).
    """

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]: ...


# Hand-over between two stages: in order, ended by the giver, or cut off for everybody.


Item = TypeVar("Item")


class _Ending:
    """What can be ended: ``_items`` wait for a taker, ``_changed`` tells of each change."""

    _items: deque[Any] | dict[int, Any]

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ended = False

    def end(self) -> None:
        """No more will be put; what is there can still be taken."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def cut(self) -> None:
        """End at once and forget what is there."""
        with self._changed:
            self._ended = True
            self._items.clear()
            self._changed.notify_all()


class Channel(_Ending, Generic[Item]):
    """A queue without a bound of its own: the intake bounds what is under way in the whole pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self._items: deque[Item] = deque()

    def put(self, item: Item) -> None:
        """Append an item; after ``end`` or ``cut`` it is forgotten."""
        with self._changed:
            if not self._ended:
                self._items.append(item)
                self._changed.notify()

    def get(self) -> Item | None:
        """The next item, waited for; ``None`` when there will be none any more."""
        with self._changed:
            while not self._items and not self._ended:
                self._changed.wait()
            return self._items.popleft() if self._items else None


class OrderedChannel(_Ending, Generic[Item]):
    """A channel whose items are taken by number, 0, 1, 2 ..., in whatever order they are put."""

    def __init__(self) -> None:
        super().__init__()
        self._items: dict[int, Item] = {}
        self._next = 0

    def put(self, number: int, item: Item) -> None:
        """Add the item with this number."""
        with self._changed:
            if not self._ended:
                self._items[number] = item
                self._changed.notify()

    def get(self) -> Item | None:
        """The item whose turn it is, waited for; ``None`` when there will be none any more."""
        with self._changed:
            while self._next not in self._items and not self._ended:
                self._changed.wait()
            item = self._items.pop(self._next, None)
            self._next += 1
            return item


# The threads between the intake and the caller: detecting, tracking and drawing, writing.


Work = Callable[[], None]


class Workers:
    """The work of the threads. Batches may finish in any order; they are drawn and written in theirs.

    An exception in any of them goes to ``fail``, which cuts the intake and ``out``; each thread then
    cuts the channel behind it, so that all of them end.
    """

    def __init__(
        self,
        detector: FrameDetector,
        filters: Filters,
        intake: Intake,
        out: Channel[Result],
        sinks: Sequence[Sink],
        figures: Figures,
        shown_score: float,
        fail: Callable[[BaseException], None],
        following: Following | None = None,
    ) -> None:
        self._detector, self._filters = detector, filters
        self._intake, self._out, self._sinks = intake, out, sinks
        self._figures, self._shown_score, self._fail = figures, shown_score, fail
        self._following = following
        self._detected: OrderedChannel[list[Result]] = OrderedChannel()
        self._drawn: Channel[Result] = Channel()
        self._lock = threading.Lock()
        self._detecting = 0

    def parts(self, detecting: int) -> Iterator[tuple[str, Work]]:
        """The threads' names and work, with this many that detect."""
        self._detecting = detecting
        for number in range(detecting):
            yield f"detect {number}", self._guarded(self._detect, self._end_detecting)
        yield "draw", self._guarded(self._draw, self._drawn.end)
        yield "write", self._guarded(self._write, self._out.end)

    def _guarded(self, work: Work, end: Work) -> Work:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._fail(error)
                self._detected.cut()
                self._drawn.cut()
            finally:
                end()

        return run

    def _end_detecting(self) -> None:
        with self._lock:
            self._detecting -= 1
            if self._detecting == 0:
                self._detected.end()

    def _detect(self) -> None:
        while (taken := self._intake.take()) is not None:
            number, frames = taken
            start = time.perf_counter()
            found = self._detector.batch([frame.pixels for frame in frames])
            seconds = time.perf_counter() - start
            # A detector without figures of its own is all network.
            timings = dict(getattr(self._detector, "timings", None) or {"network": seconds})
            self._note(frames, timings)
            self._detected.put(number, self._results(frames, found, timings))

    def _note(self, frames: Sequence[Frame], timings: dict[str, float]) -> None:
        self._figures.stages.add_all(timings)
        for source in {frame.stream.source for frame in frames}:
            self._figures.sources[source].stages.add_all(timings)

    def _results(
        self, frames: Sequence[Frame], found: Sequence[Detections], timings: dict[str, float]
    ) -> list[Result]:
        if len(found) != len(frames):
            raise SettingsError(f"the detector's batch() gave {len(found)} results for {len(frames)} frames")
        return [
            Result(
                frame=frame.pixels,
                detections=detections if self._following else self._filtered(detections, frame.pixels),
                stream=frame.stream,
                index=frame.index,
                time_s=frame.time_s,
                captured=frame.captured,
                times={"decode": frame.decode, **timings},
            )
            for frame, detections in zip(frames, found, strict=True)
        ]

    def _filtered(self, detections: Detections, pixels: NDArray[np.uint8]) -> Detections:
        return self._filters(detections, (pixels.shape[0], pixels.shape[1]))

    def _follow(self, following: Following, result: Result) -> None:
        """Track before filtering: weak detections and those outside a region hold tracks together."""
        start = time.perf_counter()
        following.follow(result)
        result.detections = self._filtered(result.detections, result.frame)
        self._took(result, "track", start)

    def _draw(self) -> None:
        wanted = any(sink.wants_drawing for sink in self._sinks)
        while (batch := self._detected.get()) is not None:
            for result in batch:
                if self._following is not None:
                    self._follow(self._following, result)
                if wanted:
                    start = time.perf_counter()
                    result.annotated = result.draw(self._shown_score)
                    self._took(result, "draw", start)
                self._drawn.put(result)

    def _write(self) -> None:
        files = [sink for sink in self._sinks if not isinstance(sink, Callback)]
        callbacks = [sink for sink in self._sinks if isinstance(sink, Callback)]
        while (result := self._drawn.get()) is not None:
            result.age = time.monotonic() - result.captured
            if files:
                start = time.perf_counter()
                for sink in files:
                    sink.write(result)
                self._took(result, "write", start)
                result.age = time.monotonic() - result.captured
            for callback in callbacks:
                callback.write(result)
            self._out.put(result)

    def _took(self, result: Result, stage: str, start: float) -> None:
        seconds = time.perf_counter() - start
        result.times[stage] = seconds
        self._figures.stages.add(stage, seconds)
        self._figures.sources[result.source].stages.add(stage, seconds)


_JOIN_SECONDS = 2.0  # a reader that hangs in a camera's driver is left to its time limit


class VideoPipeline:
    """Detect in every source at once: an iterator of ``Result`` and a context manager.

    >>> options = DetectOptions(save="out")
    >>> with VideoPipeline(detector, ["cam1=rtsp://camera/live", "clip.mp4"], options) as pipeline:
    ...     for result in pipeline:
    ...         print(result.source, result.index, len(result.detections), result.age)

    ``sources`` are as on the command line, or ``Source`` objects, for which the ``policy`` and ``stride`` of
    ``options`` do not hold. What ``options`` ask for and the ``sinks`` receive every result before the
    caller does; ``callback`` is called with each.

    Leaving the loop or the block in any way, ``stop()``, Ctrl-C, SIGTERM and SIGHUP end the reading; what was
    read is still detected and written, and the files are completed. An exception in any thread of the
    pipeline, a callback's included, ends everything, drops the unfinished files, and is raised once
    to the caller. To be run once.
    """

    def __init__(
        self,
        detector: FrameDetector,
        sources: Sequence[str | Path | int | Source],
        options: DetectOptions | None = None,
        *,
        sinks: Sequence[Sink] = (),
        callback: Callable[[Result], object] | None = None,
    ) -> None:
        self.detector = detector
        self.options = options = options or DetectOptions()
        self.sources = plan(sources, options.save, policy=options.policy, stride=options.stride)
        read = [item.path for source in self.sources for item in source.items]
        self._targets = [
            target
            for source in self.sources
            for target in (source.target, *(item.target for item in source.items))
            if target is not None
        ]
        check_outputs([options.jsonl, options.report], [*read, *self._targets])
        options.filters.check_names(getattr(getattr(detector, "contract", None), "names", ()))
        self.figures = Figures({source.name: bool(source.live) for source in self.sources})
        self._given_sinks, self._callback = sinks, callback
        all_wait = all(source.chosen_policy == "wait" for source in self.sources)
        useful = getattr(detector, "concurrent_calls", 1) if all_wait else 1
        self._workers: int = options.workers or useful
        batch = batch_size(options, detector, len(self.sources))
        # One batch in each worker, and one that is drawn, written and handed out each; live frames
        # that wait in between would only get older.
        under_way = batch * (self._workers + (3 if all_wait else 2))
        policies = [source.chosen_policy for source in self.sources]
        self._intake = Intake(policies, batch, options.max_wait, under_way)
        self._sinks: list[Sink] = []
        self._out: Channel[Result] = Channel()
        self._stopped, self._ended = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._error_lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._readers: list[threading.Thread] = []
        self._started = self._running = self._finished = self._in_block = False
        # What came as the loop was left, for the block to raise.
        self._late_error: BaseException | None = None
        self._seconds = 0.0

    def __iter__(self) -> Iterator[Result]:
        """Each source's results in the order of its frames; ends when every source has ended."""
        if self._started or self._finished:
            raise SettingsError("this pipeline has run already; make a new VideoPipeline for another run")
        self._started = True
        with signals_as_exit():
            try:
                self._start()
                while (result := self._out.get()) is not None:
                    self._leave(result)
                    yield result
            except BaseException as error:
                self._leave_loop(error)
                raise
            self._finish(None)

    def run(self) -> DetectSummary:
        """Work through all results without handing them out."""
        for _ in self:
            pass
        return self.summary()

    def stop(self) -> None:
        """End the reading, from any thread; what was read still comes out."""
        self._stopped.set()
        self._intake.stop()

    def close(self) -> None:
        """Stop, finish what was read, and complete the files. Safe to call twice."""
        self.__exit__(None, None, None)

    def __enter__(self) -> VideoPipeline:
        self._in_block = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            self._finish(None if error is None else GeneratorExit())  # an end like any other of the loop
        self._finished = True
        if (late := self._late_error) is not None:
            self._late_error = None
            raise late

    def summary(self) -> DetectSummary:
        """The figures so far; complete when the iteration has ended."""
        figures = self.figures
        seconds = self._seconds or time.monotonic() - figures.start
        frames = figures.frames()
        sources = {name: each.snapshot() for name, each in figures.sources.items()}
        return DetectSummary(
            frames=frames,
            fps=frames / seconds if seconds > 0 else 0.0,
            stages=figures.stages.percentiles(),
            detections=sum(each.detections for each in figures.sources.values()),
            provider=str(getattr(self.detector, "provider", "unknown")),
            precision=str(getattr(self.detector, "precision", "unknown")),
            dropped=sum(each.dropped for each in figures.sources.values()),
            reconnects=sum(each.reconnects for each in figures.sources.values()),
            age=figures.age(),
            sources=sources,
            warnings=tuple(line for each in figures.sources.values() for line in each.warnings),
        )

    def _start(self) -> None:
        self.figures.begin()
        self._open_sinks()
        following = None
        if track := self.options.track:
            track_options = track if isinstance(track, TrackOptions) else TrackOptions()
            following = Following(self.sources, track_options, self.options.trails)
        workers = Workers(
            self.detector,
            self.options.filters,
            self._intake,
            self._out,
            self._sinks,
            self.figures,
            self.options.shown_score,
            self._fail,
            following,
        )
        for name, work in workers.parts(self._workers):
            self._begin(self._threads, name, work)
        watched = list(self.figures.sources.values())
        self._begin(self._threads, "watchdog", lambda: watch(watched, self.options.stall, self._ended))
        for source, queue in zip(self.sources, self._intake.queues, strict=True):
            self._begin(self._readers, f"read {source.name}", self._feeder(source, queue).run)
        self._running = True

    def _open_sinks(self) -> None:
        """Only when the pipeline starts, so that a mistake before leaves no file."""
        options = self.options
        if options.jsonl is not None:
            self._sinks.append(JsonLines(options.jsonl))
        if options.save is not None:
            self._sinks.append(AnnotatedFiles(self._targets))
        self._sinks += self._given_sinks
        if self._callback is not None:
            self._sinks.append(Callback(self._callback))

    def _feeder(self, source: Source, queue: SourceQueue) -> Feeder:
        figures = self.figures.sources[source.name]
        figures.queue = queue
        return Feeder(
            source=source,
            queue=queue,
            intake=self._intake,
            figures=figures,
            stopped=self._stopped,
            fail=self._fail,
            decoder=self.options.decoder,
            stall=self.options.stall,
            patience=self.options.patience,
            anything_came=self.figures.anything_came,
        )

    def _begin(self, threads: list[threading.Thread], name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=f"anchorline {name}", daemon=True)
        thread.start()
        threads.append(thread)

    def _leave(self, result: Result) -> None:
        """The result reaches the caller: note its age, and let another frame in."""
        result.age = time.monotonic() - result.captured
        self.figures.left(result.source, result.age, len(result.detections))
        self._intake.done()

    def _fail(self, error: BaseException) -> None:
        """Note the first error of any thread and let all of them end."""
        with self._error_lock:
            self._error = self._error or error
        self._abort()

    def _abort(self) -> None:
        self._stopped.set()
        self._intake.abort()
        self._out.cut()

    def _leave_loop(self, reason: BaseException) -> None:
        """Finish. Python swallows what is raised while a generator is dropped, so the block raises that."""
        try:
            self._finish(reason)
        except BaseException as error:
            if not (self._in_block and isinstance(reason, GeneratorExit)):
                raise
            self._late_error = error

    def _finish(self, error: BaseException | None) -> None:
        """End everything once: drain after a stop or an interrupt, drop everything after an error."""
        if self._finished:
            return
        self._finished = True
        try:
            if isinstance(error, Exception) or not self._running:
                self._error = self._error or error
                self._abort()
            else:
                self.stop()
                while (result := self._out.get()) is not None:
                    self._leave(result)
        except BaseException:  # a second Ctrl-C: no more draining, but the files are completed
            self._abort()
            raise
        finally:
            try:
                self._end_threads()
            finally:
                self._close_sinks()
                self._seconds = time.monotonic() - self.figures.start
        if self._error is not None and self._error is not error:
            raise self._error
        complaint = self._nothing_read() if error is None else None
        if complaint is not None:
            raise complaint

    def _end_threads(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        until = time.monotonic() + _JOIN_SECONDS
        for thread in self._readers:
            thread.join(max(0.0, until - time.monotonic()))

    def _close_sinks(self) -> None:
        failed = self._error is not None or self._nothing_read() is not None
        sinks, self._sinks = self._sinks, []
        first: BaseException | None = None
        for sink in sinks:
            try:
                if failed or first is not None:
                    sink.abandon()
                else:
                    sink.close()
            except BaseException as error:
                first = first or error
        if first is not None and not failed:
            raise first

    def _nothing_read(self) -> Exception | None:
        """The first source's complaint, where no source gave a single frame."""
        if self.figures.frames():
            return None
        errors = [each.first_error for each in self.figures.sources.values()]
        return next((error for error in errors if error is not None), None)


def batch_size(options: DetectOptions, detector: FrameDetector, sources: int) -> int:
    """How many frames are detected together at most. Raises ``SettingsError`` where the model takes less."""
    largest = getattr(getattr(detector, "contract", None), "max_batch", None)
    batch = options.batch or min(sources, largest or sources)
    if largest is not None and batch > largest:
        raise SettingsError(f"batch is {batch}, but the model takes at most {largest} frames at once")
    return batch
