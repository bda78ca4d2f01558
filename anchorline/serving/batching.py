"""Frames of different callers joined into batches for one model.

Everything but the detector's own call happens on the server's loop, so there are no locks. Only frames of one
canvas are joined (``canvas.by_canvas``): whatever else is in its batch, a frame is laid out as it is alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import canvas_alone
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import AnchorlineError, one_line
from anchorline.runtime.timing import Durations, StageTimes

_log = logging.getLogger("anchorline.serving")
Frame = NDArray[np.uint8]
_Canvas = tuple[int, int]


class QueueFull(Exception):
    """As many requests are in hand as may be."""


class BatchDetector(Protocol):
    """What is served: a ``Detector``, or what does as one."""

    @property
    def contract(self) -> Contract: ...

    @property
    def timings(self) -> Mapping[str, float]: ...

    def batch(self, frames: Sequence[Frame]) -> list[Detections]: ...


@dataclass
class BatchFigures:
    """What has happened so far. ``gone`` are requests whose caller left before their frame was in a batch."""

    frames_by_batch: Counter[int] = field(default_factory=Counter)
    waits: Durations = field(default_factory=Durations)  # of a frame, until its batch began
    stages: StageTimes = field(default_factory=StageTimes)
    refused: int = 0
    late: int = 0
    gone: int = 0


@dataclass(eq=False)
class _Waiting:
    frame: Frame
    answer: asyncio.Future[Detections]
    since: float


class Batcher:
    """Joins what ``detect`` is called with at the same time.

    A batch begins when one of at most ``workers`` threads is free, and there are ``most`` frames of one
    canvas, or the oldest has waited for ``max_wait`` seconds. At most ``room`` requests are in hand at once
    (``place``). ``failure`` is what has made the detector unusable, such as a lost GPU.
    """

    def __init__(
        self, detector: BatchDetector, *, most: int, max_wait: float, room: int, workers: int = 1
    ) -> None:
        self.detector = detector
        self.figures = BatchFigures()
        self.failure: str | None = None
        self.in_hand = 0
        self._most, self._max_wait, self._room, self._workers = most, max_wait, room, workers
        self._waiting: dict[_Canvas, deque[_Waiting]] = {}
        self._running = 0
        self._timer: asyncio.TimerHandle | None = None
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="anchorline network")

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests in hand, while one is worked on. Raises ``QueueFull`` at once."""
        self.check_room()
        self.in_hand += 1
        try:
            yield
        finally:
            self.in_hand -= 1

    def check_room(self) -> None:
        """Raise ``QueueFull`` where there is no place."""
        if self.in_hand >= self._room:
            self.figures.refused += 1
            raise QueueFull

    @property
    def waiting(self) -> int:
        """Frames that are in no batch yet."""
        return sum(map(len, self._waiting.values()))

    async def detect(self, frame: Frame) -> Detections:
        """What the detector finds in a checked frame. A caller who is cancelled costs no run of the network,
        unless the frame is in one already. Raises what the detector raises for this frame."""
        canvas, loop = self._canvas(frame), asyncio.get_running_loop()
        waiting = _Waiting(frame, loop.create_future(), loop.time())
        self._waiting.setdefault(canvas, deque()).append(waiting)
        self._begin()
        try:
            return await waiting.answer
        finally:
            with contextlib.suppress(KeyError, ValueError):  # it was taken into a batch
                self._waiting[canvas].remove(waiting)
                self._forget_empty(canvas)

    def close(self) -> None:
        """Wait for the batch that runs."""
        if self._timer is not None:
            self._timer.cancel()
        self._threads.shutdown()

    def _canvas(self, frame: Frame) -> _Canvas:
        height, width = frame.shape[:2]
        if getattr(self.detector, "provider", "").startswith("tensorrt"):
            return (
                height,
                width,
            )  # an engine chooses among its ranges by all frames of a batch (``canvas.fit``)
        return canvas_alone(self.detector.contract, (height, width))

    def _begin(self) -> None:
        """Begin every batch that is due, and come again when the next one is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while self._running < self._workers and self._waiting:
            now = loop.time()
            due = {canvas: self._due(row) for canvas, row in self._waiting.items()}
            canvas = min(due, key=due.__getitem__)
            if due[canvas] > now:
                self._timer = loop.call_at(due[canvas], self._begin)
                return
            row = self._waiting[canvas]
            taken = [row.popleft() for _ in range(min(len(row), self._most))]
            self._forget_empty(canvas)
            self._running += 1
            self.figures.frames_by_batch[len(taken)] += 1
            for each in taken:
                self.figures.waits.add(now - each.since)
            run = loop.run_in_executor(self._threads, self._run, [each.frame for each in taken])
            run.add_done_callback(lambda done, taken=taken: self._end(taken, done))  # type: ignore[misc]

    def _due(self, row: deque[_Waiting]) -> float:
        """When a batch of these begins; of full ones the oldest is due first."""
        oldest = row[0].since
        return oldest if len(row) >= self._most else oldest + self._max_wait

    def _forget_empty(self, canvas: _Canvas) -> None:
        if not self._waiting[canvas]:
            del self._waiting[canvas]

    def _run(self, frames: list[Frame]) -> list[Detections | Exception]:
        """In a thread: what is found in each frame, or why nothing could be."""
        try:
            found: list[Detections | Exception] = [*self.detector.batch(frames)]
            self.figures.stages.add(self.detector.timings)
        except Exception as error:
            if getattr(error, "sticky", False):
                self.failure = one_line(error)
            elif len(frames) > 1:  # not all of them have to pay for one
                return [each for frame in frames for each in self._run([frame])]
            if not isinstance(error, AnchorlineError):
                _log.exception("a batch failed")
            return [error] * len(frames)
        return found

    def _end(self, taken: list[_Waiting], done: asyncio.Future[list[Detections | Exception]]) -> None:
        self._running -= 1
        for each, found in zip(taken, done.result(), strict=True):
            if each.answer.done():  # its caller has gone
                continue
            if isinstance(found, Exception):
                each.answer.set_exception(found)
            else:
                each.answer.set_result(found)
        self._begin()
