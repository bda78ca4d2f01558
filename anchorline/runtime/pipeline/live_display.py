"""Live figures in the terminal while a pipeline runs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from anchorline.runtime.errors import DataError
from anchorline.runtime.pipeline.figures import Figures
from anchorline.runtime.pipeline.rates import RecentRates
from anchorline.runtime.pipeline.source import Source
from anchorline.runtime.pipeline.video_pipeline import VideoPipeline
from anchorline.runtime.summary import DetectSummary
from anchorline.runtime.video import VideoReader

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

_REFRESHES = 4  # a second


def run_with_display(pipeline: VideoPipeline) -> DetectSummary:
    """Work through the pipeline with a bar of the frames and a table of the sources on stderr."""
    from rich.console import Group
    from rich.live import Live

    total = count_frames(pipeline.sources)
    with _terminal() as console:
        bar = _bar(console)
        task = bar.add_task("detect", total=total)
        table = _LiveTable(pipeline.figures)
        shown = [bar] if total is not None and len(pipeline.sources) == 1 else [bar, table]
        with Live(Group(*shown), console=console, refresh_per_second=_REFRESHES):
            for _ in pipeline:
                bar.advance(task)
    return pipeline.summary()


def count_frames(sources: list[Source]) -> int | None:
    """The frames of all sources by the videos' headers, or ``None`` where one does not say."""
    total = 0
    for source in sources:
        if not source.is_files or source.chosen_policy == "latest":
            return None
        for item in source.items:
            count: int | None = 1
            if item.is_video:
                try:
                    with VideoReader(item.path) as reader:
                        count = reader.frame_count
                except DataError:
                    count = 0  # reported when its turn comes
            if count is None:
                return None
            total += -(-count // source.stride)
    return total


class _LiveTable:
    """The sources' figures as a table that is made anew each time it is shown."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._recent = RecentRates(figures)

    def __rich__(self) -> Table:
        from rich.table import Table

        recent = self._recent.now()
        table = Table()
        table.add_column("source", overflow="fold")
        for column in ("state", "frames", "in/s", "out/s", "dropped", "reconnects", "age p50", "age p95"):
            table.add_column(column, justify="right")
        for name, source in self._figures.sources.items():
            now = source.snapshot()
            ages = [f"{now['age'][p]:.0f} ms" if now["age"] else "" for p in ("p50", "p95")]
            rates = [f"{rate:.1f}" for rate in recent[name]]
            losses = [str(now["dropped"]), str(now["reconnects"])]
            table.add_row(name, source.state, str(now["frames"]), *rates, *losses, *ages)
        return table


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("detect"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


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
