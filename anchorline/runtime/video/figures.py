"""What the pipeline measures of each source: rates, losses, ages, times of stages; and a picture of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from anchorline.runtime.io.errors import DataError, OutputError, SettingsError
from anchorline.runtime.io.files import atomic_path
from anchorline.runtime.timing import PERCENTILES, Durations, Histogram, StageTimes
from anchorline.runtime.video.intake import SourceQueue

# How fast frames come and go just now, rather than over the whole run.


_SPAN = 1.0  # seconds that a rate is taken over, at least


class Rates(NamedTuple):
    """Frames a second that a source delivered, and that were answered."""

    read: float = 0.0
    answered: float = 0.0


class RecentRates:
    """The rates of about the last second. Safe to be asked by several threads."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._counts = dict.fromkeys(figures.sources, (0, 0))
        self._rates = dict.fromkeys(figures.sources, Rates())

    def now(self) -> dict[str, Rates]:
        """Each source's rates, taken anew where the last ones are a second old."""
        with self._lock:
            seconds = time.monotonic() - self._last
            if seconds >= _SPAN:
                for name, source in self._figures.sources.items():
                    counts, before = (source.frames_in, source.frames_out), self._counts[name]
                    self._rates[name] = Rates(
                        (counts[0] - before[0]) / seconds, (counts[1] - before[1]) / seconds
                    )
                    self._counts[name] = counts
                self._last += seconds
            return dict(self._rates)


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


# A picture of how old results were and where the time went. Needs matplotlib (extra ``evaluate``).


_SUFFIXES = (".png", ".svg", ".pdf")
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#666666", "#b0a000")
_SHADES = ("#9ecae1", "#4292c6", "#08306b")


def check_report(path: str | Path) -> None:
    """Raise before the work where the picture cannot be made: its suffix, or matplotlib missing."""
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{path}: unknown suffix of a report; expected one of {', '.join(_SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"the report {path} needs matplotlib ({error}); pip install 'anchorline[evaluate]'"
        ) from error


def plot_latency(figures: Figures, path: str | Path) -> None:
    """Draw ages over time, and the percentiles of each stage, into a .png, .svg or .pdf.

    The upper panel shows the highest age in each span of time, so that no peak is hidden, with marks
    where a source was lost, stalled or came back; the lower one the stages in milliseconds.
    """
    check_report(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8.5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 1))
    _ages(above, figures)
    _stages(below, figures)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _ages(axes: Any, figures: Figures) -> None:
    for colour, source in zip(_cycle(len(figures.sources)), figures.sources.values(), strict=True):
        points = source.trace.points
        found = source.snapshot()
        label = f"{source.name}: {found['fps_out']:.1f} frames/s, {found['dropped']} dropped"
        marker = "o" if len(points) == 1 else None
        axes.plot([t for t, _ in points], [1000 * age for _, age in points], color=colour, lw=1.2,
                  marker=marker, label=label)  # fmt: skip
        for at, kind in source.events:
            axes.axvline(at, color=colour, lw=0.8, ls="--" if kind == "reconnected" else ":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since the start (dotted: lost or stalled, dashed: back)")
    axes.set_ylabel("highest age, capture to result (ms)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize="small")


def _stages(axes: Any, figures: Figures) -> None:
    rows = dict(figures.stages.percentiles())
    if figures.age():
        rows["capture to result"] = figures.age()
    names = list(rows)
    for place, (percentile, shade) in enumerate(zip(PERCENTILES, _SHADES, strict=True)):
        values = [rows[name][f"p{percentile}"] for name in names]
        positions = [row + 0.27 * (place - 1) for row in range(len(names))]
        axes.barh(positions, values, height=0.27, color=shade, label=f"p{percentile}")
        for position, value in zip(positions, values, strict=True):
            axes.annotate(f"{value:.2f}", (value, position), xytext=(3, 0), textcoords="offset points",
                          va="center", fontsize=6)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper right", fontsize="small")


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]
