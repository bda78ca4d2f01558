"""A picture of what was measured. Needs matplotlib (extra ``evaluate``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anchorline.benchmarking.figures import QUANTITIES, STAGES, TOTAL, BenchReport, BenchRow
from anchorline.runtime.errors import OutputError, SettingsError
from anchorline.runtime.files import atomic_path

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
