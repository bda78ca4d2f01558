"""A training's progress bar on stderr: losses, rate and time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from anchorline.train.loop.trainer import Report, StepReport

SMOOTHING = 0.95
SECONDS_BETWEEN_LINES = 30.0


@contextlib.contextmanager
def training_progress() -> Iterator[Report]:
    """Yield a function that shows one step; a bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _LinePrinter()
        return
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    smoothed: dict[str, float] = {}
    bar = Progress(*columns, console=console)
    task = bar.add_task("training", total=None, epoch=0, losses="")
    try:

        def show(report: StepReport) -> None:
            bar.start()  # with the first step, so that what is said before stands above the bar
            _smooth(smoothed, report)
            bar.update(
                task,
                completed=report.step,
                total=report.steps,
                epoch=report.epoch + 1,
                losses=_text(smoothed, report),
            )

        yield show
    finally:
        bar.stop()


class _LinePrinter:
    """One line on stderr at the start, every half minute and at the end."""

    def __init__(self) -> None:
        self.smoothed: dict[str, float] = {}
        self.started = time.monotonic()
        self.first_step: int | None = None
        self.next_line = 0.0

    def __call__(self, report: StepReport) -> None:
        if self.first_step is None:
            self.first_step = report.step - 1
        _smooth(self.smoothed, report)
        elapsed = time.monotonic() - self.started
        if elapsed < self.next_line and report.step < report.steps:
            return
        self.next_line = elapsed + SECONDS_BETWEEN_LINES
        left = elapsed / (report.step - self.first_step) * (report.steps - report.step)
        print(
            f"step {report.step}/{report.steps} epoch {report.epoch + 1} {_text(self.smoothed, report)} "
            f"elapsed {elapsed:.0f} s, left {left:.0f} s",
            file=sys.stderr,
            flush=True,
        )


def _smooth(smoothed: dict[str, float], report: StepReport) -> None:
    for name in set(smoothed) - set(report.losses):  # of another phase
        del smoothed[name]
    for name, value in report.losses.items():
        smoothed[name] = SMOOTHING * smoothed.get(name, value) + (1 - SMOOTHING) * value


def _text(smoothed: dict[str, float], report: StepReport) -> str:
    losses = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in smoothed.items())
    return f"{losses} rate {report.rate:.2g}"
