"""The threads between the intake and the caller: detecting, tracking and drawing, writing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import Detections
from anchorline.runtime.errors import SettingsError
from anchorline.runtime.pipeline.channel import Channel, OrderedChannel
from anchorline.runtime.pipeline.figures import Figures
from anchorline.runtime.pipeline.filters import Filters
from anchorline.runtime.pipeline.following import Following
from anchorline.runtime.pipeline.frame_detector import FrameDetector
from anchorline.runtime.pipeline.frames import Frame, Result
from anchorline.runtime.pipeline.intake import Intake
from anchorline.runtime.pipeline.sinks import Callback, Sink

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
