"""A run shown: a bar and a table in the terminal while it goes on, and a picture of its ages afterwards."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorline.runtime.io.errors import DataError, OutputError, SettingsError
from anchorline.runtime.io.files import atomic_path
from anchorline.runtime.timing import PERCENTILES
from anchorline.runtime.video.figures import Figures, RecentRates, source_table
from anchorline.runtime.video.reader import open_file
from anchorline.runtime.video.source import Source

if TYPE_CHECKING:
    from rich.console import Console

    from anchorline.runtime.video.frames import Result
    from anchorline.runtime.video.pipeline import VideoPipeline

_REFRESHES = 4  # a second
_SUFFIXES = (".png", ".svg", ".pdf")
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#666666", "#b0a000")
_SHADES = ("#9ecae1", "#4292c6", "#08306b")


def displayed(pipeline: VideoPipeline) -> Iterator[Result]:
    """The pipeline's results, with a bar of the frames and a table of the sources on stderr."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = _count_frames(pipeline.sources)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("frames"), TimeRemainingColumn())
    with _terminal() as console:
        bar = Progress(TextColumn("detect"), *columns, console=console)
        task = bar.add_task("detect", total=total)
        is_alone = total is not None and len(pipeline.sources) == 1
        recent, sources = RecentRates(pipeline.figures), pipeline.figures.sources

        def shown() -> Group:
            if is_alone:
                return Group(bar)
            rows = {
                name: {**sources[name].snapshot(), "fps_in": read, "fps_out": answered}
                for name, (read, answered) in recent.now().items()
            }
            return Group(bar, source_table(rows, {name: each.state for name, each in sources.items()}))

        with Live(console=console, refresh_per_second=_REFRESHES, get_renderable=shown):
            for result in pipeline:
                bar.advance(task)
                yield result


def _count_frames(sources: Sequence[Source]) -> int | None:
    """The frames of all sources by the videos' headers, or ``None`` where one does not say."""
    total = 0
    for source in sources:
        if not source.items or source.policy == "latest":
            return None
        for item in source.items:
            count: int | None = 1
            if item.is_video:
                try:
                    with open_file(item.path, is_video=True) as reader:
                        count = reader.frame_count
                except DataError:
                    count = 0  # reported when its turn comes
            if count is None:
                return None
            total += -(-count // source.stride)
    return total


@contextlib.contextmanager
def _terminal() -> Iterator[Console]:
    """A console on a copy of stderr: the copy stays a terminal while C libraries' messages are caught."""
    from rich.console import Console

    try:
        descriptor = os.dup(sys.stderr.fileno())
    except (OSError, io.UnsupportedOperation):  # stderr is no real file, as in a notebook
        yield Console(stderr=True)
        return
    buffer = io.BufferedWriter(_Screen(descriptor, "w"))
    with io.TextIOWrapper(buffer, encoding=sys.stderr.encoding or "utf-8") as file:
        yield Console(file=file)


class _Screen(io.FileIO):
    """A terminal that may be closed while the work goes on: nothing is shown from there on."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def check_plot(path: str | Path, kind: str) -> None:
    """Raise before the work where a plot cannot be made: its suffix, or matplotlib missing."""
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{path}: unknown suffix of a {kind}; expected one of {', '.join(_SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"the {kind} {path} needs matplotlib ({error}); pip install 'anchorline[evaluate]'"
        ) from error


def plot_latency(figures: Figures, path: str | Path) -> None:
    """Draw ages over time, and the percentiles of each stage, into a .png, .svg or .pdf.

    The upper panel shows the highest age in each span of time, so that no peak is hidden, with marks
    where a source was lost, stalled or came back; the lower one the stages in milliseconds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8.5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 1))
    for colour, source in zip(itertools.cycle(_COLOURS), figures.sources.values(), strict=False):
        found, ages = source.snapshot(), source.ages
        above.plot(
            [at for at, _ in ages],
            [1000 * age for _, age in ages],
            color=colour,
            lw=1.2,
            marker="o" if len(ages) == 1 else None,
            label=f"{source.name}: {found['fps_out']:.1f} frames/s, {found['dropped']} dropped",
        )
        for at, kind in source.events:
            above.axvline(at, color=colour, lw=0.8, ls="--" if kind == "reconnected" else ":")
    above.set(ylim=(0, None), xlabel="seconds since the start (dotted: lost or stalled, dashed: back)")
    above.set_ylabel("highest age, capture to result (ms)")
    above.grid(alpha=0.3)
    rows = {**figures.stages.percentiles(), "capture to result": figures.age.percentiles()}
    rows = {name: times for name, times in rows.items() if times}
    for place, (percentile, shade) in enumerate(zip(PERCENTILES, _SHADES, strict=True)):
        values = [times[f"p{percentile}"] for times in rows.values()]
        positions = [row + 0.27 * (place - 1) for row in range(len(rows))]
        bars = below.barh(positions, values, height=0.27, color=shade, label=f"p{percentile}")
        below.bar_label(bars, fmt="%.2f", padding=3, fontsize=6)
    below.set_yticks(range(len(rows)), list(rows))
    below.invert_yaxis()
    below.set_xlabel("milliseconds")
    below.margins(x=0.1)
    below.grid(axis="x", alpha=0.3)
    for axes in (above, below):
        axes.legend(loc="upper right", fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
