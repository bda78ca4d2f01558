"""What was measured: one row for each model and provider, as table, JSON, CSV and picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anchorline.runtime.io.errors import OutputError, SettingsError
from anchorline.runtime.io.files import atomic_path

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


# A picture of what was measured. Needs matplotlib (extra ``evaluate``).


_SUFFIXES = (".png", ".svg", ".pdf")
_SHADES = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08306b")
_COLOURS = ("#e69f00", "#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#999999")


def check_plot(path: str | Path) -> None:
    """Raise before the work where the picture cannot be made: its suffix, or matplotlib missing."""
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{path}: unknown suffix of a picture; expected one of {', '.join(_SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"the picture {path} needs matplotlib ({error}); pip install 'anchorline[evaluate]'"
        ) from error


def plot_bench(report: BenchReport, path: str | Path) -> None:
    """Above, the percentiles of the whole call for each row; below, where its median goes, by stage."""
    check_plot(path)
    from matplotlib.figure import Figure

    count = len(report.rows)
    figure = Figure(figsize=(9, 3.6 + 1.25 * count), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1.6, 1))
    names = [_name(row) for row in report.rows]
    _totals(above, report)
    _shares(below, report)
    for axes in (above, below):
        axes.set_yticks(range(count), names, fontsize="small")
        axes.set_ylim(count - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    machine = report.machine
    figure.suptitle(f"{machine['processor']}, {machine['cores']} cores", fontsize="medium")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _name(row: BenchRow) -> str:
    return f"{row.model}\n{row.provider}, {row.precision}, batch {row.batch}"


def _totals(axes: Any, report: BenchReport) -> None:
    height = 0.8 / len(QUANTITIES)
    for place, (quantity, shade) in enumerate(zip(QUANTITIES, _SHADES, strict=True)):
        values = [row.stages[TOTAL][quantity] for row in report.rows]
        positions = [number + height * (place - 2) for number in range(len(values))]
        axes.barh(positions, values, height=height, color=shade, label=quantity)
        for position, value in zip(positions, values, strict=True):
            axes.annotate(f"{value:.1f}", (value, position), xytext=(3, 0), textcoords="offset points",
                          va="center", fontsize=6)  # fmt: skip
    axes.set_xlabel("frames to boxes, ms a batch; nothing is clipped")
    axes.margins(x=0.08)
    _legend(axes)


def _shares(axes: Any, report: BenchReport) -> None:
    starts = [0.0] * len(report.rows)
    for stage, colour in zip(STAGES, _COLOURS, strict=False):
        values = [row.stages[stage]["p50"] for row in report.rows]
        axes.barh(range(len(values)), values, left=starts, height=0.6, color=colour, label=stage)
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    axes.set_xlabel("median of each stage, ms a batch")
    _legend(axes)


def _legend(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
