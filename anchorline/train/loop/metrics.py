"""What a training keeps and shows of its steps: ``metrics.csv``, TensorBoard, the progress on stderr."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.runtime.io.files import atomic_write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOSSES = ("loss", "loss_objectness", "loss_rpn_box", "loss_classifier", "loss_box")
COLUMNS = ("step", "epoch", "lr", *LOSSES, "map50")
SMOOTHING = 0.95
SECONDS_BETWEEN_LINES = 30.0

_NOT_OURS = "not the metrics of a training; remove the file, or train without --resume"


@dataclass(frozen=True)
class StepReport:
    """What a progress display may show: ``step`` of ``steps``, ``epoch``, rate, losses by name.

    In a schedule of several phases steps and epochs count through, and ``phase`` names the present one.
    """

    step: int
    steps: int
    epoch: int
    rate: float
    losses: Mapping[str, float]
    phase: str = ""


Report = Callable[[StepReport], None]


class MetricsFile:
    """One row per step and one per validation; the whole file is written at each ``flush``.

    Cells are empty where a row has no value. ``validation`` names the figure of the validations, and its
    column, the last one. With ``open_board`` TensorBoard gets the same figures, as they come.
    """

    def __init__(self, path: Path, validation: str = "map50") -> None:
        self.path, self.validation = path, validation
        self.columns = (*COLUMNS[:-1], validation)
        self.rows: list[dict[str, str]] = []
        self.board: SummaryWriter | None = None

    def add(self, step: int, epoch: int, figures: Mapping[str, float], form: str = ".6g") -> None:
        """The rate and the losses of a step, or the figure of a validation after it."""
        texts = {name: format(value, form) for name, value in figures.items()}
        self.rows.append({"step": str(step), "epoch": str(epoch), **texts})
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)

    def resume(self, step: int) -> None:
        """Take up the rows of an earlier run up to ``step``; raises ``ArtefactError`` for another file."""
        if not self.path.is_file():
            return
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                columns = tuple(reader.fieldnames or ())
                rows = [row for row in reader if int(row["step"]) <= step]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ArtefactError(f"{self.path}: {_NOT_OURS} ({error})") from None
        if columns != self.columns or any(None in row for row in rows):
            raise ArtefactError(f"{self.path}: {_NOT_OURS}")
        self.rows = rows

    def open_board(self, step: int = 0) -> None:
        """Write event files too; what an earlier run has written there after ``step`` is hidden."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SettingsError(
                "training.tensorboard needs the package tensorboard; "
                "pip install 'anchorline[tensorboard]', or leave the setting out"
            ) from None
        self.board = SummaryWriter(str(self.path.with_name("tensorboard")), purge_step=step + 1)

    def flush(self) -> None:
        """Write the file."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write_text(self.path, text.getvalue())

    def close(self) -> None:
        """Write what is still in memory."""
        self.flush()
        if self.board is not None:
            self.board.close()


@contextlib.contextmanager
def training_progress() -> Iterator[Report]:
    """Yield a function that shows one step: a bar on a terminal, elsewhere a line every half minute."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        progress.TextColumn("epoch {task.fields[epoch]}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[losses]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    bar = progress.Progress(*columns, console=console, disable=not console.is_terminal)
    task = bar.add_task("training", total=None, epoch=0, losses="")
    smoothed: dict[str, float] = {}
    started, next_line, before = time.monotonic(), 0.0, -1

    def show(report: StepReport) -> None:
        nonlocal next_line, before
        for name in set(smoothed) - set(report.losses):  # of another phase
            del smoothed[name]
        for name, value in report.losses.items():
            smoothed[name] = SMOOTHING * smoothed.get(name, value) + (1 - SMOOTHING) * value
        losses = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in smoothed.items())
        losses += f" rate {report.rate:.2g}"
        bar.start()  # with the first step, so that what is said before stands above the bar
        bar.update(task, completed=report.step, total=report.steps, epoch=report.epoch + 1, losses=losses)
        before = report.step - 1 if before < 0 else before  # the steps of the run that this one resumes
        elapsed = time.monotonic() - started
        if console.is_terminal or (elapsed < next_line and report.step < report.steps):
            return
        next_line = elapsed + SECONDS_BETWEEN_LINES
        left = elapsed / (report.step - before) * (report.steps - report.step)
        print(
            f"step {report.step}/{report.steps} epoch {report.epoch + 1} {losses} "
            f"elapsed {elapsed:.0f} s, left {left:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    try:
        yield show
    finally:
        bar.stop()
