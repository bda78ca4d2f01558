"""A picture of how old results were and where the time went. Needs matplotlib (extra ``evaluate``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anchorline.runtime.errors import OutputError, SettingsError
from anchorline.runtime.files import atomic_path
from anchorline.runtime.pipeline.figures import Figures
from anchorline.runtime.timing import PERCENTILES

_SUFFIXES = (".png", ".svg", ".pdf")
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#666666", "#b0a000")
_SHADES = ("#9ecae1", "#4292c6", "#08306b")


def check_report(path: str | Path) -> None:
    """Raise before the work where the picture cannot be made: its suffix, or matplotlib missing."""
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{path}: unknown suffix of a report; expected one of {', '.join(_SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"the report {path} needs matplotlib ({error}); pip install 'anchorline[evaluate]'"
        ) from error


def plot_latency(figures: Figures, path: str | Path) -> None:
    """Draw ages over time, and the percentiles of each stage, into a .png, .svg or .pdf.

    The upper panel shows the highest age in each span of time, so that no peak is hidden, with marks
    where a source was lost, stalled or came back; the lower one the stages in milliseconds.
    """
    check_report(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8.5), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 1))
    _ages(above, figures)
    _stages(below, figures)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _ages(axes: Any, figures: Figures) -> None:
    for colour, source in zip(_cycle(len(figures.sources)), figures.sources.values(), strict=True):
        points = source.trace.points
        found = source.snapshot()
        label = f"{source.name}: {found['fps_out']:.1f} frames/s, {found['dropped']} dropped"
        marker = "o" if len(points) == 1 else None
        axes.plot([t for t, _ in points], [1000 * age for _, age in points], color=colour, lw=1.2,
                  marker=marker, label=label)  # fmt: skip
        for at, kind in source.events:
            axes.axvline(at, color=colour, lw=0.8, ls="--" if kind == "reconnected" else ":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since the start (dotted: lost or stalled, dashed: back)")
    axes.set_ylabel("highest age, capture to result (ms)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", fontsize="small")


def _stages(axes: Any, figures: Figures) -> None:
    rows = dict(figures.stages.percentiles())
    if figures.age():
        rows["capture to result"] = figures.age()
    names = list(rows)
    for place, (percentile, shade) in enumerate(zip(PERCENTILES, _SHADES, strict=True)):
        values = [rows[name][f"p{percentile}"] for name in names]
        positions = [row + 0.27 * (place - 1) for row in range(len(names))]
        axes.barh(positions, values, height=0.27, color=shade, label=f"p{percentile}")
        for position, value in zip(positions, values, strict=True):
            axes.annotate(f"{value:.2f}", (value, position), xytext=(3, 0), textcoords="offset points",
                          va="center", fontsize=6)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper right", fontsize="small")


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]
