"""Pictures of a run: precision-recall curves, the loss curve, contact sheets of images.

``report_plots.py`` draws an evaluation's other figures, on the empty ones made here.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.evaluation.evaluate import EvaluationReport
from anchorline.runtime.errors import DataError, SettingsError
from anchorline.runtime.files import atomic_path
from anchorline.runtime.images import write_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMOOTHING = 25  # steps over which the drawn loss is averaged
_LEGEND_INSIDE = 8  # classes; more would cover the curves
_LEGEND_OUTSIDE = 96  # beside the plot; beyond this the JSON has to tell
_LEGEND_ROWS = 32
_TITLE_HEIGHT = 22
_GAP = 6
_PAPER = 255


def plot_pr_curves(report: EvaluationReport, path: str | Path) -> None:
    """Precision over recall at IoU 0.5, one line for each class, as a PNG, SVG or PDF by the suffix."""
    classes = len(report.curves)
    columns = -(-classes // _LEGEND_ROWS) if _LEGEND_INSIDE < classes <= _LEGEND_OUTSIDE else 0
    figure, axes = new_figure(6.4 + 1.7 * columns, 5.2)
    for name, curve in report.curves.items():
        if curve.objects:
            recall = np.concatenate([[0.0][: len(curve.recall)], curve.recall])  # none without detections
            precision = np.concatenate([curve.precision[:1], curve.precision])
            axes.plot(recall, precision, linewidth=1.8, label=f"{literal(name)}  {curve.area:.3f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.03))
    axes.set_title(f"mAP50 {report.map50:.3f} on {report.images} images")
    if axes.lines and columns:
        figure.legend(loc="outside right upper", title="AP50", frameon=False, ncols=columns, fontsize=7)
    elif axes.lines and classes <= _LEGEND_INSIDE:
        axes.legend(loc="lower left", title="AP50", frameon=False)
    save_figure(figure, path)


def plot_loss_curve(csv_path: str | Path, path: str | Path) -> None:
    """The losses of a training run over its steps, smoothed, and the validation mAP50 where it is given.

    Reads the columns ``step``, ``loss`` and any ``loss_*``; empty cells are left out, so validation
    rows (column ``map50``) may stand between training rows. Raises ``DataError`` for another file.
    """
    columns = _read_columns(Path(csv_path))
    figure, axes = new_figure(7.2, 4.6)
    for name in sorted(name for name in columns if name == "loss" or name.startswith("loss_")):
        steps, values = columns[name]
        total = name == "loss"
        label = "total" if total else name.removeprefix("loss_").replace("_", " ")
        axes.plot(steps, _smoothed(values), linewidth=2.0 if total else 1.1, label=label, zorder=3 - total)
    axes.set(xlabel="step", ylabel="loss")
    axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    if "map50" in columns and len(columns["map50"][0]):
        accuracy = axes.twinx()
        accuracy.plot(
            *columns["map50"], "o--", color="black", linewidth=1, markersize=4, label="mAP50 (right)"
        )
        accuracy.set(ylabel="validation mAP50", ylim=(0, 1))
        more_handles, more_labels = accuracy.get_legend_handles_labels()
        handles, labels = handles + more_handles, labels + more_labels
    axes.legend(handles, labels, frameon=False, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.17))
    save_figure(figure, path)


def contact_sheet(
    images: Sequence[NDArray[np.uint8]],
    path: str | Path,
    columns: int = 4,
    titles: Sequence[str] | None = None,
    cell: tuple[int, int] = (240, 320),
) -> None:
    """Images (uint8 BGR [H, W, 3]) side by side in one picture, each fitted into ``cell`` (h, w) pixels."""
    if not images or columns < 1:
        raise SettingsError(
            f"contact sheet of {len(images)} images in {columns} columns; expected at least 1 each"
        )
    if titles is not None and len(titles) != len(images):
        raise SettingsError(
            f"contact sheet of {len(images)} images has {len(titles)} titles; expected one each"
        )
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    title_height = _TITLE_HEIGHT if titles is not None else 0
    row_height, column_width = cell[0] + title_height + _GAP, cell[1] + _GAP
    sheet = np.full((rows * row_height + _GAP, columns * column_width + _GAP, 3), _PAPER, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * row_height + _GAP, index % columns * column_width + _GAP
        if titles is not None:
            _write_title(sheet, titles[index], left, top, cell[1])
        _fit(sheet[top + title_height : top + title_height + cell[0], left : left + cell[1]], image)
    write_image(path, sheet)


def _fit(place: NDArray[np.uint8], image: NDArray[np.uint8]) -> None:
    """Scale an image into the middle of its place."""
    scale = min(place.shape[0] / image.shape[0], place.shape[1] / image.shape[1])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    top, left = (place.shape[0] - height) // 2, (place.shape[1] - width) // 2
    place[top : top + height, left : left + width] = cv2.resize(image, (width, height), interpolation=method)


def _write_title(sheet: NDArray[np.uint8], title: str, left: int, top: int, width: int) -> None:
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.45
    while len(title) > 1 and cv2.getTextSize(title, font, scale, 1)[0][0] > width:
        title = title[:-1]
    cv2.putText(sheet, title, (left, top + _TITLE_HEIGHT - 7), font, scale, (40, 40, 40), 1, cv2.LINE_AA)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one plot, its size in inches."""
    figure, (axes,) = new_figures(width, height, 1)
    return figure, axes


def new_figures(width: float, height: float, count: int) -> tuple[Figure, list[Axes]]:
    """A figure with plots side by side, without pyplot's global state, so that it needs no display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SettingsError("plots need matplotlib, which is not installed; pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    plots = [figure.add_subplot(1, count, number) for number in range(1, count + 1)]
    for axes in plots:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, plots


def literal(text: str) -> str:
    """A name as matplotlib's text: what stands between two dollar signs would be a formula."""
    return text.replace("$", r"\$")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure as a PNG, SVG or PDF by the suffix, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _read_columns(path: Path) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Each numeric column with the steps at which it has a value: (steps, values)."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected the CSV of a training run") from None
    if not rows or "step" not in rows[0] or "loss" not in rows[0]:
        raise DataError(f"{path}: expected a CSV with the columns step and loss, and at least one row")
    columns: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for name in (name for name in rows[0] if isinstance(name, str)):
        points = [(row["step"], row[name]) for row in rows if row["step"] and row[name]]
        try:
            values = np.array(points, dtype=np.float64).reshape(-1, 2)
        except ValueError:
            continue  # a column of text
        columns[name] = (values[:, 0], values[:, 1])
    return columns


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The running mean over the last steps, shorter at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - _SMOOTHING)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))
