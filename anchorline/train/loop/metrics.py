"""``metrics.csv``: one row per training step, and one per validation."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.runtime.io.files import atomic_write_text

COLUMNS = (
    "step",
    "epoch",
    "lr",
    "loss",
    "loss_objectness",
    "loss_rpn_box",
    "loss_classifier",
    "loss_box",
    "map50",
)

_NOT_OURS = "not the metrics of a training; remove the file, or train without --resume"


class MetricsFile:
    """Collects rows and writes the whole file at each ``flush``; empty cells where a row has no value.

    ``validation`` names the figure of the validations, and its column, the last one.
    """

    def __init__(self, path: Path, validation: str = "map50") -> None:
        self.path, self.validation = path, validation
        self.columns = (*COLUMNS[:-1], validation)
        self.rows: list[dict[str, str]] = []

    def add_step(self, step: int, epoch: int, rate: float, losses: Mapping[str, float]) -> None:
        """The losses of one step."""
        figures = {"lr": rate, **losses}
        self.rows.append(
            {
                "step": str(step),
                "epoch": str(epoch),
                **{name: f"{value:.6g}" for name, value in figures.items()},
            }
        )

    def add_validation(self, step: int, epoch: int, value: float) -> None:
        """The accuracy after ``step``."""
        self.rows.append({"step": str(step), "epoch": str(epoch), self.validation: f"{value:.5f}"})

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

    def flush(self) -> None:
        """Write the file."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write_text(self.path, text.getvalue())


class TensorBoard:
    """The same figures as event files for TensorBoard, written as they come.

    What an earlier run has written into ``folder`` after ``step`` is hidden, as in ``metrics.csv``.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SettingsError(
                "training.tensorboard needs the package tensorboard; "
                "pip install 'anchorline[tensorboard]', or leave the setting out"
            ) from None
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of one step or validation."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still in memory."""
        self.writer.close()
