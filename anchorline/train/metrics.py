"""``metrics.csv``: one row per training step, and one per validation."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from anchorline.runtime.files import atomic_write_text

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


class MetricsFile:
    """Collects rows and writes the whole file at each ``flush``; empty cells where a row has no value."""

    def __init__(self, path: Path) -> None:
        self.path = path
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

    def add_validation(self, step: int, epoch: int, map50: float) -> None:
        """The accuracy after ``step``."""
        self.rows.append({"step": str(step), "epoch": str(epoch), "map50": f"{map50:.5f}"})

    def resume(self, step: int) -> None:
        """Take up the rows of an earlier run up to ``step``."""
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def flush(self) -> None:
        """Write the file."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write_text(self.path, text.getvalue())
