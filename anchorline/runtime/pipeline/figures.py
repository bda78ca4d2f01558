"""What the pipeline measures of each source: rates, losses, ages, and the time of each stage."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from anchorline.runtime.errors import DataError
from anchorline.runtime.pipeline.intake import SourceQueue
from anchorline.runtime.timing import Durations, Histogram, StageTimes

_log = logging.getLogger("anchorline.video")
_TRACE_LENGTH = 2048
_MOST_WARNINGS = 20  # of each source, however often it is lost


class AgeTrace:
    """The highest age in each of at most 2048 equal spans of time, however long it runs.

    When the spans run out, pairs of them become one. ``points`` are (seconds since the start at the
    span's middle, highest age in seconds).
    """

    def __init__(self) -> None:
        self._span = 0.05
        self._highest: dict[int, float] = {}

    def add(self, at: float, age: float) -> None:
        """Note the age of a result that left the pipeline ``at`` seconds after the start."""
        while at / self._span >= _TRACE_LENGTH:
            self._span *= 2
            merged: dict[int, float] = {}
            for index, highest in self._highest.items():
                merged[index // 2] = max(highest, merged.get(index // 2, 0.0))
            self._highest = merged
        index = int(at / self._span)
        self._highest[index] = max(age, self._highest.get(index, 0.0))

    @property
    def points(self) -> list[tuple[float, float]]:
        """What was noted, by time."""
        return [((index + 0.5) * self._span, age) for index, age in sorted(self._highest.items())]


class SourceFigures:
    """One source's figures. Safe to be filled by several threads and read at any time.

    ``frames_in`` were delivered by the source, ``frames_out`` answered; ``dropped`` made way for
    newer ones. ``events`` are (seconds since the start, ``"lost"``, ``"stalled"`` or ``"reconnected"``);
    they are logged as they happen, since a camera's run may take weeks.
    """

    def __init__(self, name: str, live: bool, all_stages: StageTimes) -> None:
        self.name, self.live = name, live
        self.stages = StageTimes()
        self.trace = AgeTrace()
        self.state = "opening"
        self.warnings: list[str] = []
        self.first_error: DataError | None = None
        self.frames_in = self.frames_out = self.detections = 0
        self.reconnects = self.stalls = 0
        self.events: list[tuple[float, str]] = []
        self.queue: SourceQueue | None = None
        self.last_came = time.monotonic()
        self._all_stages = all_stages
        self._start = self.last_came
        self._age = Durations()
        self._lock = threading.Lock()
        self._first_came: float | None = None
        self._first_left: float | None = None
        self._last_left = 0.0
        self._is_lost = False
        self._asked: float | None = None

    def begin(self, start: float) -> None:
        """The pipeline starts now."""
        self._start = self.last_came = start

    def asked(self) -> None:
        """The reader waits for the source from now on."""
        self._asked = time.monotonic()

    def silent_for(self) -> float:
        """For how many seconds the reader has waited in vain; 0 while the source is not what it waits for."""
        asked = self._asked
        return 0.0 if asked is None else time.monotonic() - asked

    def came(self, decode: float) -> None:
        """The source delivered a frame, which took ``decode`` seconds to read."""
        self.stages.add("decode", decode)
        self._all_stages.add("decode", decode)
        with self._lock:
            self.last_came = time.monotonic()
            if self._first_came is None:
                self._first_came = self.last_came
            self.frames_in += 1
            self.state, self._is_lost, self._asked = "playing", False, None

    def left(self, age: float, detections: int) -> None:
        """A result of this source reached the caller, ``age`` seconds after its capture."""
        with self._lock:
            now = time.monotonic()
            if self._first_left is None:
                self._first_left = now
            self._last_left = now
            self.frames_out += 1
            self.detections += detections
            self._age.add(age)
            self.trace.add(now - self._start, age)

    def lost(self, error: DataError | None) -> None:
        """A live source broke off or could not be opened."""
        with self._lock:
            self.state, self._asked = "lost", None
            if not self._is_lost:
                self._event("lost")
                reason = str(error) if error else f"{self.name}: broke off"
                self._warn(f"{reason} (after {self.frames_in} frames); it is tried again")
            self._is_lost = True

    def reconnected(self) -> None:
        """A live source that was lost delivers again."""
        with self._lock:
            self.reconnects += 1
            self._event("reconnected")
            _log.warning("%s: is back", self.name)

    def stalled(self, seconds: float) -> None:
        """A source has delivered nothing for this long."""
        with self._lock:
            if self.state not in ("opening", "playing"):
                return
            self.state = "stalled"
            self.stalls += 1
            self._event("stalled")
            self._warn(f"{self.name}: nothing came for {seconds:g} s (after {self.frames_in} frames)")

    def note(self, lines: Sequence[str]) -> None:
        """What a reader found wrong with its file or connection."""
        with self._lock:
            for line in lines:
                if self.live:
                    self._warn(line)  # there may be any number of connections
                else:
                    self.warnings.append(line)

    def unreadable(self, error: DataError) -> None:
        """A file, or a source for good, that cannot be read."""
        with self._lock:
            self.first_error = self.first_error or error
            self.warnings.append(str(error))

    @property
    def dropped(self) -> int:
        """Frames that made way for newer ones."""
        return 0 if self.queue is None else self.queue.dropped

    def snapshot(self) -> dict[str, Any]:
        """The figures as plain values; times in milliseconds, rates in frames a second."""
        stages = self.stages.percentiles()
        with self._lock:
            return {
                "frames_in": self.frames_in,
                "frames": self.frames_out,
                "fps_in": _rate(self.frames_in, self._first_came, self.last_came),
                "fps_out": _rate(self.frames_out, self._first_left, self._last_left),
                "dropped": self.dropped,
                "reconnects": self.reconnects,
                "stalls": self.stalls,
                "age": self._age.percentiles(),
                "stages": stages,
            }

    def age(self) -> dict[str, float]:
        """Percentiles of the ages of the results, in milliseconds; empty before the first."""
        with self._lock:
            return self._age.percentiles()

    def age_histogram(self) -> Histogram:
        """The ages of the results, counted by their length."""
        with self._lock:
            return self._age.histogram()

    def _event(self, kind: str) -> None:
        if len(self.events) < _TRACE_LENGTH:
            self.events.append((time.monotonic() - self._start, kind))

    def _warn(self, line: str) -> None:
        _log.warning("%s", line)
        if len(self.warnings) < _MOST_WARNINGS:
            self.warnings.append(line)
        elif len(self.warnings) == _MOST_WARNINGS:
            self.warnings.append(f"{self.name}: further messages of this kind are left out")


class Figures:
    """The figures of all sources, and the stages over all of them."""

    def __init__(self, sources: Mapping[str, bool]) -> None:
        """``sources`` are names, and whether each is live."""
        self.start = time.monotonic()
        self.stages = StageTimes()
        self.sources = {name: SourceFigures(name, live, self.stages) for name, live in sources.items()}
        self._ages = Durations()
        self._lock = threading.Lock()

    def begin(self) -> None:
        """The pipeline starts now."""
        self.start = time.monotonic()
        for each in self.sources.values():
            each.begin(self.start)

    def left(self, source: str, age: float, detections: int) -> None:
        """A result reached the caller."""
        self.sources[source].left(age, detections)
        with self._lock:
            self._ages.add(age)

    def anything_came(self) -> bool:
        """Whether any source has delivered a frame."""
        return any(each.frames_in for each in self.sources.values())

    def age(self) -> dict[str, float]:
        """Percentiles of the ages of all results, in milliseconds."""
        with self._lock:
            return self._ages.percentiles()

    def frames(self) -> int:
        """Results so far."""
        return sum(each.frames_out for each in self.sources.values())


def _rate(count: int, first: float | None, last: float) -> float:
    """Frames a second between the first and the last of them."""
    return (count - 1) / (last - first) if count > 1 and first is not None and last > first else 0.0
