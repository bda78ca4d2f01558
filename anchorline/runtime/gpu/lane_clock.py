"""How long a lane's batch spends in each stage: by the host's clock, or by CUDA events."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType

from anchorline.runtime.cuda.interface import Cuda

STAGES = ("preprocess", "upload", "network", "download")
_MARKS = 6  # the most of a batch: preprocess, upload, preprocess, network, download, end


class LaneClock:
    """A context manager; ``mark`` begins a stage, ``finish`` gives the seconds of each.

    By the host's clock ``network`` is all the time until the results are there, and ``download`` 0: the
    work is only queued meanwhile. CUDA events tell them apart, at the cost of a few calls a batch.
    """

    def __init__(self, cuda: Cuda, by_events: bool) -> None:
        self._cuda = cuda
        self._marks: list[tuple[str, float | int]] = []
        self._events: list[int] = []
        with contextlib.ExitStack() as stack:
            for _ in range(_MARKS if by_events else 0):
                self._events.append(cuda.create_event(timing=True))
                stack.callback(cuda.destroy_event, self._events[-1])
            self._stack = stack.pop_all()

    def start(self) -> None:
        """Forget the marks of the batch before."""
        self._marks.clear()

    def mark(self, stream: int, stage: str) -> None:
        """The stage that begins where ``stream`` is now; ``end`` ends the last."""
        if self._events:
            event = self._events[len(self._marks)]
            self._cuda.record(event, stream)
            self._marks.append((stage, event))
        elif stage not in ("download", "end"):
            self._marks.append((stage, time.perf_counter()))

    def finish(self) -> dict[str, float]:
        """Seconds by stage, once the work is done."""
        if not self._events:
            self._marks.append(("end", time.perf_counter()))
        seconds = dict.fromkeys(STAGES, 0.0)
        for (stage, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            by_events = bool(self._events)
            spent = self._cuda.seconds_between(int(start), int(end)) if by_events else end - start
            seconds[stage] += spent
        return seconds

    def __enter__(self) -> LaneClock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
