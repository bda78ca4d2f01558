"""What the pipeline measures of each source: rates, losses, ages, times of stages; and a run's summary."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from anchorline.runtime.io.errors import DataError, printable
from anchorline.runtime.timing import PERCENTILES, Durations, StageTimes

if TYPE_CHECKING:
    from rich.table import Table

    from anchorline.runtime.video.intake import SourceQueue

_log = logging.getLogger("anchorline.video")
_SPAN = 1.0  # seconds that a recent rate is taken over, at least
_TRACE_LENGTH = 2048
_MOST_WARNINGS = 20  # of each source, however often it is lost


class SourceFigures:
    """One source's figures. Safe to be filled by several threads and read at any time.

    ``frames_in`` were delivered by the source, ``frames_out`` answered; ``dropped`` made way for
    newer ones. ``events`` are (seconds since the start, ``"lost"``, ``"stalled"`` or ``"reconnected"``);
    they are logged as they happen, since a camera's run may take weeks.
    """

    def __init__(self, name: str, live: bool) -> None:
        self.name, self.live = name, live
        self.stages = StageTimes()
        self.ages: list[tuple[float, float]] = []  # (seconds since the start, age), the highest ones
        self.state = "opening"
        self.warnings: list[str] = []
        self.first_error: DataError | None = None
        self.frames_in = self.frames_out = self.detections = 0
        self.reconnects = self.stalls = 0
        self.events: list[tuple[float, str]] = []
        self.queue: SourceQueue | None = None
        self.start = time.monotonic()
        self.age = Durations()  # of the results
        self._lock = threading.Lock()
        self._first_came = self._last_came = self._first_left = self._last_left = 0.0
        self._asked: float | None = None

    def asked(self) -> None:
        """The reader waits for the source from now on."""
        self._asked = time.monotonic()

    def silent_for(self) -> float:
        """For how many seconds the reader has waited in vain; 0 while the source is not what it waits for."""
        asked = self._asked
        return 0.0 if asked is None else time.monotonic() - asked

    def came(self) -> None:
        """The source delivered a frame."""
        with self._lock:
            self._last_came = time.monotonic()
            self._first_came = self._first_came or self._last_came
            self.frames_in += 1
            self.state, self._asked = "playing", None

    def left(self, age: float, detections: int) -> None:
        """A result of this source reached the caller, ``age`` seconds after its capture."""
        with self._lock:
            self._last_left = now = time.monotonic()
            self._first_left = self._first_left or now
            self.frames_out += 1
            self.detections += detections
            self.age.add(age)
            self.ages.append((now - self.start, age))
            if len(self.ages) == 2 * _TRACE_LENGTH:  # of each two the higher one stays, however long it runs
                self.ages = [
                    max(two, key=itemgetter(1)) for two in zip(self.ages[::2], self.ages[1::2], strict=True)
                ]

    def lost(self, error: DataError | None) -> None:
        """A live source broke off or could not be opened."""
        with self._lock:
            self._asked = None
            if self.state != "lost":
                self.state = "lost"
                self._event("lost")
                reason = str(error) if error else f"{self.name}: broke off"
                self._warn(f"{reason} (after {self.frames_in} frames); it is tried again")

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
        with self._lock:
            return {
                "frames_in": self.frames_in,
                "frames": self.frames_out,
                "fps_in": _rate(self.frames_in, self._first_came, self._last_came),
                "fps_out": _rate(self.frames_out, self._first_left, self._last_left),
                "dropped": self.dropped,
                "reconnects": self.reconnects,
                "stalls": self.stalls,
                "age": self.age.percentiles(),
                "stages": self.stages.percentiles(),
            }

    def _event(self, kind: str) -> None:
        if len(self.events) < _TRACE_LENGTH:
            self.events.append((time.monotonic() - self.start, kind))

    def _warn(self, line: str) -> None:
        _log.warning("%s", line)
        if len(self.warnings) < _MOST_WARNINGS:
            self.warnings.append(line)
        elif len(self.warnings) == _MOST_WARNINGS:
            self.warnings.append(f"{self.name}: further messages of this kind are left out")


@dataclass(frozen=True)
class Looks:
    """How many frames the detector was shown, in how many views, and the seconds that this took."""

    frames: int = 0
    views: int = 0
    seconds: float = 0.0

    def __add__(self, other: Looks) -> Looks:
        return Looks(self.frames + other.frames, self.views + other.views, self.seconds + other.seconds)

    @property
    def views_a_frame(self) -> float:
        """1 where nothing was sliced."""
        return self.views / self.frames if self.frames else 1.0

    @property
    def ms_a_frame(self) -> float:
        """The time that the detector took for one, on average."""
        return 1000.0 * self.seconds / self.frames if self.frames else 0.0


class Figures:
    """The figures of all sources, and the stages over all of them."""

    def __init__(self, sources: Mapping[str, bool]) -> None:
        """``sources`` are names, and whether each is live."""
        self.start = time.monotonic()
        self.stages = StageTimes()
        self.sources = {name: SourceFigures(name, live) for name, live in sources.items()}
        self.age = Durations()  # of all results
        self._lock = threading.Lock()
        self.looks = Looks()

    def begin(self) -> None:
        """The pipeline starts now."""
        self.start = time.monotonic()
        for each in self.sources.values():
            each.start = self.start

    def looked(self, looks: Looks) -> None:
        """The detector was shown some more frames."""
        with self._lock:
            self.looks += looks

    def took(self, times: Mapping[str, float], *sources: str) -> None:
        """Stages took these seconds, once for all and in full for each of the sources."""
        for stages in (self.stages, *(self.sources[name].stages for name in sources)):
            stages.add(times)

    def left(self, source: str, age: float, detections: int) -> None:
        """A result reached the caller."""
        self.sources[source].left(age, detections)
        self.age.add(age)

    def anything_came(self) -> bool:
        """Whether any source has delivered a frame."""
        return any(each.frames_in for each in self.sources.values())

    def frames(self) -> int:
        """Results so far."""
        return sum(each.frames_out for each in self.sources.values())

    def summary(self, seconds: float, detector: object) -> DetectSummary:
        """What the run amounts to after so many seconds."""
        each, frames = self.sources.values(), self.frames()
        return DetectSummary(
            frames=frames,
            fps=frames / seconds if seconds > 0 else 0.0,
            stages=self.stages.percentiles(),
            detections=sum(source.detections for source in each),
            provider=str(getattr(detector, "provider", "unknown")),
            precision=str(getattr(detector, "precision", "unknown")),
            dropped=sum(source.dropped for source in each),
            reconnects=sum(source.reconnects for source in each),
            age=self.age.percentiles(),
            sources={source.name: source.snapshot() for source in each},
            warnings=tuple(line for source in each for line in source.warnings),
            views=self.looks.views_a_frame,
            detect_ms=self.looks.ms_a_frame,
        )


class RecentRates:
    """How fast frames came and went in about the last second. To be asked by one thread at a time."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._last = time.monotonic()
        self._counts = dict.fromkeys(figures.sources, (0, 0))
        self._rates = dict.fromkeys(figures.sources, (0.0, 0.0))

    def now(self) -> dict[str, tuple[float, float]]:
        """Frames a second that each source delivered, and that were answered: anew once a second."""
        seconds = time.monotonic() - self._last
        if seconds >= _SPAN:
            for name, source in self._figures.sources.items():
                read, answered = self._counts[name]
                self._counts[name] = counts = (source.frames_in, source.frames_out)
                self._rates[name] = (counts[0] - read) / seconds, (counts[1] - answered) / seconds
            self._last += seconds
        return dict(self._rates)


@dataclass(frozen=True)
class DetectSummary:
    """What a run amounted to. ``stages`` holds milliseconds, ``{stage: {"p50", "p95", "p99"}}``; ``fps`` is
    frames over the wall time of the whole run, reading and writing included. ``age`` is the same percentiles
    of the time from capture to result. ``sources`` holds each source's own figures by name. ``views`` is how
    often the network looked at a frame on average, 1 without slices, and ``detect_ms`` the time that the
    detector took for one."""

    frames: int
    fps: float
    stages: dict[str, dict[str, float]]
    detections: int
    provider: str
    precision: str
    dropped: int = 0
    reconnects: int = 0
    age: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    views: float = 1.0
    detect_ms: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``files.write_json``."""
        return {**asdict(self), "warnings": list(self.warnings)}

    def render(self) -> Table:
        """The closing tables, one below the other, for ``rich``'s console."""
        from rich.table import Table

        tables = Table.grid(padding=(0, 0))
        title = f"{self.frames} frames, {self.detections} detections, {self.fps:.1f} frames/s"
        caption, total = f"provider {self.provider}, {self.precision}", "capture to result"
        if self.views > 1:
            caption += f"\neach frame in {self.views:.3g} views, {self.detect_ms:.1f} ms a frame"
        stages = {**self.stages, total: self.age} if self.age else self.stages
        tables.add_row(stage_table(stages, total, title=title, caption=caption, min_width=48))
        if self.sources:
            table = source_table(self.sources)
            table.caption = "age: capture to result, in ms"
            tables.add_row(table)
        return tables


def stage_table(stages: Mapping[str, Mapping[str, float]], total: str, **options: Any) -> Table:
    """The milliseconds of each stage for ``rich``, with a line above the one called ``total``."""
    from rich.table import Table

    table = Table("stage", **options)
    for quantity in next(iter(stages.values()), [f"p{percentile}" for percentile in PERCENTILES]):
        table.add_column(f"{quantity} ms", justify="right")
    for stage, times in stages.items():
        if stage == total:
            table.add_section()
        table.add_row(stage, *(f"{milliseconds:.2f}" for milliseconds in times.values()))
    return table


def source_table(sources: Mapping[str, Mapping[str, Any]], states: Mapping[str, str] | None = None) -> Table:
    """The snapshots of sources as a table for ``rich``, with the state of each where it goes on."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("source", overflow="fold")
    heads = ("frames", "in/s", "out/s", "drops", "reconnects", "age p50", "p95")
    for column in ("state", *heads) if states else heads:
        table.add_column(column, justify="right", no_wrap=True)
    for name, each in sources.items():
        ages = [f"{each['age'][p]:.1f}" if each["age"] else "" for p in ("p50", "p95")]
        rates = [f"{each[rate]:.1f}" for rate in ("fps_in", "fps_out")]
        counts = [str(each[count]) for count in ("dropped", "reconnects")]
        state = [states[name]] if states else []
        table.add_row(Text(printable(name)), *state, str(each["frames"]), *rates, *counts, *ages)
    return table


def _rate(count: int, first: float, last: float) -> float:
    """Frames a second between the first and the last of them."""
    return (count - 1) / (last - first) if last > first else 0.0
