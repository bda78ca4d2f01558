"""What was measured: one row for each model and provider, as table, JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

STAGES = ("preprocess", "upload", "network", "download", "postprocess")
TOTAL = "total"  # frames to boxes by the clock, what lies between the stages included
PERCENTILES = (50, 90, 95, 99)
QUANTITIES = (*(f"p{p}" for p in PERCENTILES), "max")


@dataclass(frozen=True)
class BenchRow:
    """One model on one provider.

    ``stages`` holds milliseconds a batch, ``{stage: {"p50", "p90", "p95", "p99", "max"}}``, ``total``
    included; ``batches`` were measured after ``warmup`` others. ``fps`` is frames by the sum of all totals.
    ``open_s`` is the time to open the model, ``first_ms`` that of the first batch. ``peak_mib`` is the
    process's largest resident memory, of which ``base_mib`` was there before the model.
    """

    model: str
    sha256: str
    provider: str
    precision: str
    batch: int
    threads: int
    frame_size: str
    frames: int
    batches: int
    warmup: int
    fps: float
    open_s: float
    first_ms: float
    peak_mib: float
    base_mib: float
    detections: float
    stages: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class BenchReport:
    """The rows, and the ``machine`` they were measured on: processor, cores, versions."""

    rows: tuple[BenchRow, ...]
    machine: Mapping[str, str]

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values for ``files.write_json``: each row states its machine."""
        return [{**asdict(row), "machine": dict(self.machine)} for row in self.rows]

    def to_csv(self) -> str:
        """A line for each row; the stages' figures are columns such as ``network_p95_ms``."""
        lines = []
        for row in self.rows:
            fields = asdict(row)
            stages = fields.pop("stages")
            for stage in (*STAGES, TOTAL):
                fields.update({f"{stage}_{q}_ms": f"{stages[stage][q]:.3f}" for q in QUANTITIES})
            lines.append({**fields, **self.machine})
        text = io.StringIO()
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return text.getvalue()

    def render(self) -> Table:
        """A table for ``rich``'s console, one section a row."""
        from rich.table import Table

        grid = Table.grid(padding=(1, 0))
        for row in self.rows:
            title = f"{row.model}: {row.provider}, {row.precision}, batch {row.batch}, {row.threads} threads"
            caption = (
                f"{row.fps:.1f} frames/s over {row.batches} batches of {row.frame_size} frames; opened in "
                f"{row.open_s:.2f} s, first batch {row.first_ms:.1f} ms; peak memory {row.peak_mib:.0f} MiB, "
                f"{row.base_mib:.0f} of them before the model"
            )
            table = Table(title=title, caption=caption, min_width=72)
            table.add_column("stage")
            for quantity in QUANTITIES:
                table.add_column(f"{quantity} ms", justify="right")
            for stage in (*STAGES, TOTAL):
                if stage == TOTAL:
                    table.add_section()
                table.add_row(stage, *(f"{row.stages[stage][q]:.2f}" for q in QUANTITIES))
            grid.add_row(table)
        grid.add_row("; ".join(f"{name} {value}" for name, value in self.machine.items()))
        return grid


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles and the largest of all durations, in milliseconds. Nothing is left out."""
    found = {f"p{p}": 1000.0 * float(np.percentile(seconds, p)) for p in PERCENTILES}
    return {**found, "max": 1000.0 * max(seconds)}
