"""Detection over images, folders, videos and cameras: the pipeline, with live figures and files."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from anchorline.runtime.io.errors import DataError
from anchorline.runtime.video.figures import Figures, RecentRates, plot_latency
from anchorline.runtime.video.files import VideoReader
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import FrameDetector, VideoPipeline
from anchorline.runtime.video.sinks import Sink
from anchorline.runtime.video.source import Source
from anchorline.runtime.video.summary import DetectSummary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table


# Live figures in the terminal while a pipeline runs.


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


class LiveSink(Sink, Protocol):
    """A sink that shows the run while it goes on, such as ``LiveView``, and is told of it beforehand."""

    def watch(self, pipeline: VideoPipeline) -> None: ...


def detect(
    sources: Sequence[str | Path | int | Source],
    detector: FrameDetector,
    options: DetectOptions | None = None,
    *,
    progress: bool = True,
    live: LiveSink | None = None,
    conclude: Callable[[DetectSummary], object] | None = None,
) -> DetectSummary:
    """Detect in every frame of ``sources``: images, folders of images, videos, cameras, streams.

    ``options.save`` receives annotated copies (see ``plan_items``; a camera's is an mp4 of its name),
    ``options.jsonl`` one line per frame: ``{"source", "frame", "time_s", "size": [h, w], "detections":
    [...]}``. ``progress`` shows live figures on stderr, ``live`` in a browser
    (``anchorline.serving.live_view``). A source that cannot be read is a warning in the summary
    while others can; with none left its ``DataError`` is raised. On Ctrl-C, SIGTERM and SIGHUP the files are
    finished with the frames so far, and ``KeyboardInterrupt`` or ``SystemExit`` goes on; ``conclude``
    is called with the summary in any case, since that is how a camera's run ends.
    """
    pipeline = VideoPipeline(detector, sources, options, sinks=() if live is None else (live,))
    if live is not None:
        live.watch(pipeline)
    run = run_with_display if progress else VideoPipeline.run
    try:
        run(pipeline)
    except (KeyboardInterrupt, SystemExit):
        _end(pipeline, conclude)
        raise
    return _end(pipeline, conclude)


def _end(pipeline: VideoPipeline, conclude: Callable[[DetectSummary], object] | None) -> DetectSummary:
    summary = pipeline.summary()
    if pipeline.options.report is not None:
        plot_latency(pipeline.figures, pipeline.options.report)
    if conclude is not None:
        conclude(summary)
    return summary
