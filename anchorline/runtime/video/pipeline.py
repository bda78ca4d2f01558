"""Sources to sinks through one detector: the threads, and how they start, drain, stop and fail.

A frame goes from its reader's thread through the intake to one that detects, then to the one that tracks and
draws, to the one that writes, and to the caller. Behind the intake no queue has a bound of its own: the
intake bounds what is under way. Each thread ends its queue with ``None``. (No ``SimpleQueue``: a signal that
comes while one is waited for would take the item along.)
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Queue
from types import FrameType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import by_canvas
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import NotCopied, SettingsError, shown
from anchorline.runtime.video.display import displayed, plot_latency
from anchorline.runtime.video.figures import DetectSummary, Figures, Looks
from anchorline.runtime.video.frames import Result
from anchorline.runtime.video.intake import Feed, Intake
from anchorline.runtime.video.options import DetectOptions, TrackOptions
from anchorline.runtime.video.sinks import AnnotatedFiles, JsonLines, LiveSink, Sink
from anchorline.runtime.video.source import Source, check_outputs, plan
from anchorline.runtime.video.tracks import Tracks

TERMINATED = 128 + signal.SIGTERM
_JOIN_SECONDS = 2.0  # a reader that hangs in a camera's driver is left to its time limit
_LOOKS = 5  # of the watch over silent sources, within one stall

T = TypeVar("T")


class FrameDetector(Protocol):
    """What the pipeline calls: ``Detector``, or anything of its shape.

    ``timings``, where there, holds the seconds of this thread's last ``batch`` by stage; ``contract``
    gives the class names and the largest batch; ``provider`` and ``precision`` go to the summary;
    ``concurrent_calls`` is how many threads may usefully call ``batch`` at once (1 where not there).
    """

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]: ...


class VideoPipeline(NotCopied):
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
        if not callable(getattr(detector, "batch", None)):
            raise SettingsError(f"the detector is {shown(detector)}; expected one with a method batch()")
        if not isinstance(options, DetectOptions | None):
            raise SettingsError(f"options are {shown(options)}; expected DetectOptions(...)")
        if callback is not None and not callable(callback):
            raise SettingsError(f"callback is {shown(callback)}; expected a function of a Result")
        self.detector = detector
        self.options = options = options or DetectOptions()
        self.sources = plan(sources, options.save, policy=options.policy, stride=options.stride)
        items = [item for source in self.sources for item in source.items]
        wanted = [source.target for source in self.sources] + [item.target for item in items]
        targets = [target for target in wanted if target is not None]
        check_outputs([options.jsonl, options.report], [*(item.path for item in items), *targets])
        options.filters.check_names(getattr(getattr(detector, "contract", None), "names", ()))
        self.figures = Figures({source.name: bool(source.live) for source in self.sources})
        latest = [source.policy == "latest" for source in self.sources]
        useful = getattr(detector, "concurrent_calls", 1) if not any(latest) else 1
        self._workers: int = options.workers or useful
        batch = batch_size(options, detector, len(self.sources))
        # One batch in each worker, and one that is drawn, written and handed out each; live frames
        # that wait in between would only get older.
        under_way = batch * (self._workers + (2 if any(latest) else 3))
        self._intake = Intake(latest, batch, options.max_wait, under_way)
        self._targets, self._given_sinks, self._callback = targets, sinks, callback
        self._sinks: list[Sink] = []
        self._tracks: dict[str, Tracks] = {}  # by source, where objects are followed
        self._detected: Queue[tuple[int, list[Result]] | None] = Queue()  # numbered batches
        self._drawn: Queue[Result | None] = Queue()
        self._out: Queue[Result | None] = Queue()
        self._threads: list[threading.Thread] = []
        self._readers: list[threading.Thread] = []
        self._ended = threading.Event()
        self._error: BaseException | None = None  # the first of any thread
        self._started = self._running = self._finished = self._in_block = False
        self._late_error: BaseException | None = None  # came as the loop was left: for the block to raise
        self._seconds = 0.0

    def __iter__(self) -> Iterator[Result]:
        """Each source's results in the order of its frames; ends when every source has ended."""
        if self._started or self._finished:
            raise SettingsError("this pipeline has run already; make a new VideoPipeline for another run")
        self._started = True
        with signals_as_exit():
            try:
                self._start()
                for result in self._items(self._out):
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
        self._intake.stop()

    def close(self) -> None:
        """Stop, finish what was read, and complete the files. Safe to call twice."""
        self.__exit__(None, None, None)

    def __enter__(self) -> VideoPipeline:
        self._in_block = True
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._started:
            self._finish(None if error is None else GeneratorExit())  # an end like any other of the loop
        self._finished = True
        late, self._late_error = self._late_error, None
        if late is not None:
            raise late

    def summary(self) -> DetectSummary:
        """The figures so far; complete when the iteration has ended."""
        seconds = self._seconds or time.monotonic() - self.figures.start
        return self.figures.summary(seconds, self.detector)

    # How it starts.

    def _start(self) -> None:
        self.figures.begin()
        options = self.options
        # Only now, so that a mistake before leaves no file.
        if options.jsonl is not None:
            self._sinks.append(JsonLines(options.jsonl))
        if options.save is not None:
            self._sinks.append(AnnotatedFiles(self._targets))
        self._sinks += self._given_sinks
        if options.track:
            tracking = options.track if isinstance(options.track, TrackOptions) else TrackOptions()
            self._tracks = {each.name: Tracks(each, tracking, options.trails) for each in self.sources}
        for number in range(self._workers):
            self._begin(self._threads, f"detect {number}", self._detect, self._detected)
        self._begin(self._threads, "draw", self._draw, self._drawn)
        self._begin(self._threads, "write", self._write, self._out)
        self._begin(self._threads, "watchdog", self._watch)
        for source, queue in zip(self.sources, self._intake.queues, strict=True):
            self.figures.sources[source.name].queue = queue
            feed = Feed(source, queue, self._intake, self.figures, options)
            self._begin(self._readers, f"read {source.name}", feed.run)
        self._running = True

    def _begin(
        self,
        threads: list[threading.Thread],
        name: str,
        work: Callable[[], None],
        out: Queue[Any] | None = None,
    ) -> None:
        """Start a thread. An error of its ``work`` ends all; its ``out`` is ended in any case."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = self._error or error
                self._abort()
            finally:
                if out is not None:
                    out.put(None)

        thread = threading.Thread(target=run, name=f"anchorline {name}", daemon=True)
        thread.start()
        threads.append(thread)

    # The work of the threads. Batches may finish in any order; they are drawn and written in theirs.

    def _items(self, queue: Queue[T | None], threads: int = 1) -> Iterator[T]:
        """What comes through a queue, until each of the threads that fill it has ended, or a failure."""
        for _ in range(threads):
            while (item := queue.get()) is not None and not self._intake.aborted:
                yield item
        queue.put(None)  # for whoever asks again

    def _detect(self) -> None:
        while (taken := self._intake.take()) is not None:
            number, results = taken
            for run in self._runs(results):
                self._detect_together(run)
            self._detected.put((number, results))

    def _runs(self, results: list[Result]) -> list[list[Result]]:
        """Those of each canvas: what is found in a source does not depend on what the others send."""
        contract = getattr(self.detector, "contract", None)
        if len(results) == 1 or not isinstance(contract, Contract) or contract.canvas is not None:
            return [results]
        runs = by_canvas(contract, [result.frame for result in results])
        return [[results[number] for number in run] for run in runs]

    def _detect_together(self, results: list[Result]) -> None:
        start = time.perf_counter()
        found = self.detector.batch([result.frame for result in results])
        seconds = time.perf_counter() - start
        # A detector without figures of its own is all network.
        times = dict(getattr(self.detector, "timings", None) or {"network": seconds})
        self.figures.took(times, *{result.source for result in results})
        if not isinstance(found, Sequence) or not all(isinstance(each, Detections) for each in found):
            raise SettingsError(f"the detector's batch() gave {shown(found)}; expected a list of Detections")
        if len(found) != len(results):
            raise SettingsError(f"the detector's batch() gave {len(found)} results for {len(results)} frames")
        views = getattr(self.detector, "views", lambda size: 1)
        looked = sum(views((result.frame.shape[0], result.frame.shape[1])) for result in results)
        self.figures.looked(Looks(len(results), looked, seconds))
        for result, detections in zip(results, found, strict=True):
            result.detections = detections
            result.times.update(times)

    def _draw(self) -> None:
        is_wanted = any(sink.wants_drawing for sink in self._sinks)
        early: dict[int, list[Result]] = {}
        due = 0
        for number, results in self._items(self._detected, self._workers):
            early[number] = results
            while due in early:
                for result in early.pop(due):
                    # Before filtering: weak detections and those outside a region hold tracks together.
                    if self._tracks:
                        with self._measured(result, "track"):
                            self._tracks[result.source].follow(result)
                    height, width = result.frame.shape[:2]
                    result.detections = self.options.filters(result.detections, (height, width))
                    if is_wanted:
                        with self._measured(result, "draw"):
                            result.annotated = result.draw(self.options.shown_score)
                    self._drawn.put(result)
                due += 1

    def _write(self) -> None:
        for result in self._items(self._drawn):
            result.age = time.monotonic() - result.captured
            if self._sinks:
                with self._measured(result, "write"):
                    for sink in self._sinks:
                        sink.write(result)
                result.age = time.monotonic() - result.captured
            if self._callback is not None:
                self._callback(result)
            self._out.put(result)

    def _watch(self) -> None:
        """Report each live source that has delivered nothing for the stall time, also those whose reader
        cannot end a hanging read by itself, such as a webcam's driver or an iterator of the caller's."""
        stall = self.options.stall
        while not self._ended.wait(min(1.0, stall / _LOOKS)):
            for source in self.figures.sources.values():
                if source.live and source.silent_for() > stall:
                    source.stalled(stall)

    @contextlib.contextmanager
    def _measured(self, result: Result, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        result.times[stage] = time.perf_counter() - start
        self.figures.took({stage: result.times[stage]}, result.source)

    def _leave(self, result: Result) -> None:
        """The result reaches the caller: note its age, and let another frame in."""
        result.age = time.monotonic() - result.captured
        self.figures.left(result.source, result.age, len(result.detections))
        self._intake.done()

    # How it ends.

    def _abort(self) -> None:
        self._intake.abort()

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
                for result in self._items(self._out):
                    self._leave(result)
        except BaseException:  # a second Ctrl-C: no more draining, but the files are completed
            self._abort()
            raise
        finally:
            try:
                self._ended.set()
                for thread in self._threads:
                    thread.join()
                until = time.monotonic() + _JOIN_SECONDS
                for thread in self._readers:
                    thread.join(max(0.0, until - time.monotonic()))
            finally:
                self._end_outputs()
        if self._error is not None and self._error is not error:
            raise self._error
        if error is None and (complaint := self._nothing_read()) is not None:
            raise complaint

    def _end_outputs(self) -> None:
        """Complete the files and the report, or drop them after an error."""
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
        self._seconds = time.monotonic() - self.figures.start
        if failed:
            return
        if first is not None:
            raise first
        if self.options.report is not None:
            plot_latency(self.figures, self.options.report)

    def _nothing_read(self) -> Exception | None:
        """The first source's complaint, where no source gave a single frame."""
        errors = [each.first_error for each in self.figures.sources.values() if each.first_error]
        return errors[0] if errors and not self.figures.frames() else None


def detect(
    sources: Sequence[str | Path | int | Source],
    detector: FrameDetector,
    options: DetectOptions | None = None,
    *,
    progress: bool = True,
    live: LiveSink | None = None,
    conclude: Callable[[DetectSummary], object] = lambda summary: None,
) -> DetectSummary:
    """Detect in every frame of ``sources``: images, folders of images, videos, cameras, streams.

    ``options.save`` receives annotated copies (see ``source.plan``), ``options.jsonl`` lines (see
    ``sinks.JsonLines``). ``progress`` shows live figures on stderr, ``live`` in a browser
    (``anchorline.serving.live_view``). A source that cannot be read is a warning in the summary
    while others can; with none left its ``DataError`` is raised. On Ctrl-C, SIGTERM and SIGHUP the files are
    finished with the frames so far, and ``KeyboardInterrupt`` or ``SystemExit`` goes on; ``conclude``
    is called with the summary in any case, since that is how a camera's run ends.
    """
    pipeline = VideoPipeline(detector, sources, options, sinks=() if live is None else (live,))
    if live is not None:
        live.watch(pipeline)
    try:
        for _ in displayed(pipeline) if progress else pipeline:
            pass
    except (KeyboardInterrupt, SystemExit):
        conclude(pipeline.summary())
        raise
    summary = pipeline.summary()
    conclude(summary)
    return summary


def batch_size(options: DetectOptions, detector: FrameDetector, sources: int) -> int:
    """How many frames are detected together at most. Raises ``SettingsError`` where the model takes less."""
    largest = getattr(getattr(detector, "contract", None), "max_batch", None)
    batch = options.batch or min(sources, largest or sources)
    if largest is not None and batch > largest:
        raise SettingsError(f"batch is {batch}, but the model takes at most {largest} frames at once")
    return batch


@contextlib.contextmanager
def signals_as_exit() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise ``SystemExit`` with the shell's code for them (143, 129).

    SIGHUP comes when the terminal is closed or its connection is lost; Windows has none. Only in the main
    thread, and each only where nobody else handles or ignores it (as ``nohup`` does SIGHUP); elsewhere
    nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [kind for kind in kinds if is_main and signal.getsignal(kind) is signal.SIG_DFL]
    for kind in ours:
        signal.signal(kind, _exit)
    try:
        yield
    finally:
        # A generator that nobody holds any more may be ended by another thread, which must not do this.
        with contextlib.suppress(ValueError):
            for kind in ours:
                signal.signal(kind, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
