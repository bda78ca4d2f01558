"""Pictures of an evaluation and of a run: curves, confusion matrix, contact sheets, the worst images.

On matplotlib's object interface, without pyplot and its global state. Files are written whole.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.data.dataset import Dataset
from anchorline.data.summary import MOST_ROWS
from anchorline.evaluation.evaluation import EvaluationReport, ProposalReport
from anchorline.evaluation.metrics import (
    BACKGROUND,
    ConfusionMatrix,
    ImageMatches,
    confusion_matrix,
    match_image,
)
from anchorline.runtime.detections import Detections
from anchorline.runtime.drawing import draw
from anchorline.runtime.io.errors import DataError, SettingsError, printable
from anchorline.runtime.io.files import atomic_path, expect_regular, write_json
from anchorline.runtime.io.images import write_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PANEL = (360, 480)  # (height, width) in pixels of each of the two pictures of ``draw_pair``
_PAIR_GAP = 4
PAIR = (PANEL[0], 2 * PANEL[1] + _PAIR_GAP)  # of both
_SMOOTHING = 25  # steps over which the drawn loss is averaged
_LEGEND_INSIDE = 8  # classes; more would cover the curves
_LEGEND_OUTSIDE = 96  # beside the plot; beyond this the JSON has to tell
_LEGEND_ROWS = 32
_TITLE_HEIGHT, _GAP, _PAPER = 22, 6, 255
_GREY = (110, 110, 110)  # visible on light and on dark images
_SHOWN_COUNTS = (50, 100, 300, 1000)
_SHOWN_IOUS = (0.5, 0.7, 0.9)
_MOST_NUMBERED_CLASSES = 20  # numbers in the cells of a larger confusion matrix would not be legible
_MOST_NAMED_CLASSES = 100  # and neither would their names
_GOOD = np.array((0.36, 0.62, 0.84))  # RGB of a table cell with AP 1; lighter below

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]


def plot_pr_curves(report: EvaluationReport, path: str | Path) -> None:
    """Precision over recall at IoU 0.5, one line for each class, as a PNG, SVG or PDF by the suffix."""
    classes = len(report.curves)
    columns = -(-classes // _LEGEND_ROWS) if _LEGEND_INSIDE < classes <= _LEGEND_OUTSIDE else 0
    figure, (axes,) = new_figure(6.4 + 1.7 * columns, 5.2)
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
    columns = read_columns(Path(csv_path))
    figure, (axes,) = new_figure(7.2, 4.6)
    for name in sorted(name for name in columns if name == "loss" or name.startswith("loss_")):
        steps, values = columns[name]
        sums, ends = np.cumsum([0.0, *values]), np.arange(1, len(values) + 1)
        starts = np.maximum(0, ends - _SMOOTHING)
        smoothed = (sums[ends] - sums[starts]) / (ends - starts)  # the running mean, shorter at the start
        total = name == "loss"
        label = "total" if total else name.removeprefix("loss_").replace("_", " ")
        axes.plot(steps, smoothed, linewidth=2.0 if total else 1.1, label=label, zorder=3 - total)
    axes.set(xlabel="step", ylabel="loss")
    axes.set_ylim(bottom=0)
    lines = list(axes.lines)
    if "map50" in columns and columns["map50"].size:
        accuracy = axes.twinx()
        style: dict[str, Any] = {"color": "black", "linewidth": 1, "markersize": 4}
        accuracy.plot(*columns["map50"], "o--", label="mAP50 (right)", **style)
        accuracy.set(ylabel="validation mAP50", ylim=(0, 1))
        lines += accuracy.lines
    axes.legend(handles=lines, frameon=False, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.17))
    save_figure(figure, path)


def contact_sheet(
    images: Sequence[Pixels],
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
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.45
    for index, image in enumerate(images):
        top, left = index // columns * row_height + _GAP, index % columns * column_width + _GAP
        if titles is not None:
            title = printable(titles[index])
            while len(title) > 1 and cv2.getTextSize(title, font, size, 1)[0][0] > cell[1]:
                title = title[:-1]
            base = left, top + _TITLE_HEIGHT - 7
            cv2.putText(sheet, title, base, font, size, (40, 40, 40), 1, cv2.LINE_AA)
        fitted, _ = _fit(image, cell)
        height, width = fitted.shape[:2]
        top, left = top + title_height + (cell[0] - height) // 2, left + (cell[1] - width) // 2
        sheet[top : top + height, left : left + width] = fitted
    write_image(path, sheet)


def _fit(image: Pixels, size: tuple[int, int]) -> tuple[Pixels, float]:
    """The image as large as ``size`` (h, w) allows, and the factor."""
    scale = min(size[0] / image.shape[0], size[1] / image.shape[1])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (width, height), interpolation=method), np.uint8), scale


@dataclass(frozen=True, eq=False)
class Panel:
    """What is drawn into one of the two pictures of an image: ``quiet`` boxes [N, 4], thin and grey, and on
    top of them detections with their labels, in their class's colour where none is given."""

    quiet: NDArray[np.float32]
    marked: Sequence[tuple[Detections, Colour | None]]
    scores: bool = True


def draw_pair(pixels: Pixels, left: Panel, right: Panel) -> Pixels:
    """An image (uint8 BGR [H, W, 3]) twice beside each other, each time with its panel's boxes."""
    # Drawn on when it is small, so that lines and letters have the sheet's size and not the image's.
    small, scale = _fit(pixels, PANEL)
    pictures = []
    for panel in (left, right):
        picture = small.copy()
        outlines = [(panel.quiet, _GREY, 1)]
        outlines += [(each.boxes, colour, 2) for each, colour in panel.marked if colour is not None]
        for boxes, colour, thickness in outlines:
            for x1, y1, x2, y2 in np.round(boxes * scale).astype(int).tolist():
                cv2.rectangle(picture, (x1, y1), (x2 - 1, y2 - 1), colour, thickness)
        for each, own_colour in panel.marked:
            scaled = Detections(each.boxes * scale, each.scores, each.labels, each.class_names)
            picture = draw(picture, scaled, scores=panel.scores, colour=own_colour)
        pictures += [picture, np.full((len(small), _PAIR_GAP, 3), _PAPER, np.uint8)]
    return np.concatenate(pictures[:3], axis=1)


def new_figure(width: float, height: float, count: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure (size in inches) with ``count`` plots side by side, without pyplot's global state, so that it
    needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SettingsError("plots need matplotlib, which is not installed; pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    plots = list(figure.subplots(1, count, squeeze=False)[0])
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


def read_columns(path: Path) -> dict[str, NDArray[np.float64]]:
    """Each numeric column of a training's CSV as [2, N]: the steps at which it has one, and the values."""
    expect_regular(path, DataError)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected the CSV of a training run") from None
    if not rows or "step" not in rows[0] or "loss" not in rows[0]:
        raise DataError(f"{path}: expected a CSV with the columns step and loss, and at least one row")
    columns = {}
    for name in (name for name in rows[0] if isinstance(name, str)):
        points = [(row["step"], row[name]) for row in rows if row["step"] and row[name]]
        with contextlib.suppress(ValueError):  # a column of text
            columns[name] = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return columns


def plot_recall(report: ProposalReport, path: str | Path) -> None:
    """Recall over IoU (the paper's figure 4), and over the number of proposals."""
    figure, (over_iou, over_count) = new_figure(11.0, 4.8, 2)
    counts = [count for count in _SHOWN_COUNTS if count in report.recall] or list(report.recall)
    for drawn, count in enumerate(counts):
        by_iou = report.recall[count]
        width = 3.2 - 2.0 * drawn / len(counts)  # a line that lies on another one leaves its rim visible
        over_iou.plot(list(by_iou), list(by_iou.values()), linewidth=width, label=f"{count} proposals")
    over_iou.set(xlabel="IoU", ylabel="recall", xlim=(0.5, 0.95), ylim=(0, 1.03))
    over_iou.legend(loc="lower left", frameon=False)
    for iou in _SHOWN_IOUS:
        shares = [by_iou[iou] for by_iou in report.recall.values()]
        over_count.plot(list(report.recall), shares, "o-", markersize=3, linewidth=1.8, label=f"IoU {iou}")
    average = [float(np.mean(list(by_iou.values()))) for by_iou in report.recall.values()]
    over_count.plot(list(report.recall), average, "k--", linewidth=1.4, label="average, IoU .5:.95")
    over_count.set(xlabel="proposals an image", ylabel="recall", xscale="log", ylim=(0, 1.03))
    over_count.xaxis.set_major_formatter("{x:g}")
    over_count.legend(loc="upper left", frameon=False)
    figure.suptitle(f"{report.objects} objects in {report.images} images, average recall {report.ar:.3f}")
    save_figure(figure, path)


def plot_class_table(report: EvaluationReport, path: str | Path) -> None:
    """A table: for each class its objects and AP, over all sizes and by size; darker cells are better."""
    from matplotlib.transforms import Bbox

    columns = ["objects", "AP50", "VOC07", "AP"]
    for size in report.per_size:
        columns += [f"{size}\nobjects", f"{size}\nAP50", f"{size}\nAP"]
    *classes, (_, means) = report.rows()
    rows = [(literal(name), figures) for name, figures in classes[:MOST_ROWS]] + [("all, mean", means)]
    formats = [".0f" if column.endswith("objects") else ".3f" for column in columns]
    texts = []
    for _, figures in rows:
        pairs = zip(figures, formats, strict=True)
        texts.append(["-" if np.isnan(figure) else format(figure, each) for figure, each in pairs])
    shares = np.nan_to_num([figures for _, figures in rows]) * (np.array(formats) == ".3f")
    colours = 1.0 - shares[..., None] * (1.0 - _GOOD)
    figure, (axes,) = new_figure(2.2 + 0.75 * len(columns), 1.1 + 0.3 * len(rows))
    axes.set_axis_off()
    table = axes.table(
        cellText=texts,
        cellColours=colours.tolist(),
        rowLabels=[name for name, _ in rows],
        colLabels=columns,
        bbox=Bbox.unit(),
        cellLoc="center",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for (row, _), cell in table.get_celld().items():
        cell.set_edgecolor("0.85")
        if row in (0, len(rows)):
            cell.set_text_props(weight="bold")
        if row == 0:
            cell.set_height(2 * cell.get_height())
    cut = f", the first {MOST_ROWS} of {len(classes)} classes" if len(rows) <= len(classes) else ""
    axes.set_title(f"{report.images} images, {report.provider}, {report.precision}{cut}")
    save_figure(figure, path)


def plot_confusion(confusion: ConfusionMatrix, path: str | Path) -> None:
    """The counts as numbers, and the share of each object class (of each row) as the shade."""
    names = [*map(literal, confusion.names), BACKGROUND]
    totals = confusion.counts.sum(axis=1, keepdims=True)
    shares = confusion.counts / np.maximum(totals, 1)
    side = 2.6 + min(0.6 * len(names), 14.0)
    figure, (axes,) = new_figure(side + 1.6, side)
    axes.grid(False)
    picture = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    places = range(len(names))
    if len(names) <= _MOST_NAMED_CLASSES + 1:
        axes.set_xticks(places, names, rotation=90 if len(names) > 6 else 0)
        axes.set_yticks(places, names)
    axes.set(xlabel=f"detected class (score from {confusion.min_score:g} on)", ylabel="class of the object")
    if len(names) <= _MOST_NUMBERED_CLASSES + 1:
        for (row, column), count in np.ndenumerate(confusion.counts):
            ink = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=ink, fontsize=9)
    axes.set_title(f"matched from IoU {confusion.iou_threshold:g} on")
    figure.colorbar(picture, ax=axes, shrink=0.75, label="share of the row")
    save_figure(figure, path)


@dataclass(frozen=True)
class ImageErrors:
    """How many objects of an image were missed and how many detections are false.

    ``index`` is the image's place in the data set. An object detected as another class is both: one
    missed and one false.
    """

    index: int
    id: str
    matches: ImageMatches

    @property
    def missed(self) -> int:
        return len(self.matches.missed)

    @property
    def false_positives(self) -> int:
        return len(self.matches.false_positives)

    def to_json(self) -> dict[str, Any]:
        return {"image": self.id, "missed": self.missed, "false_positives": self.false_positives}


def rank_images(
    dataset: Dataset, detections: Sequence[Detections], min_score: float = 0.5
) -> list[ImageErrors]:
    """All images, those with the most errors first; detections count from ``min_score`` on.

    ``detections``, one for each image, have labels that index ``dataset.names``. Difficult and crowd
    objects count neither way.
    """
    errors = [
        ImageErrors(index, image.id, match_image(image, found, min_score))
        for index, (image, found) in enumerate(zip(dataset, detections, strict=True))
    ]
    return sorted(errors, key=lambda each: -(each.missed + each.false_positives))


def worst_images_sheet(
    dataset: Dataset,
    detections: Sequence[Detections],
    path: str | Path,
    count: int = 12,
    min_score: float = 0.5,
) -> list[ImageErrors]:
    """Write the ``count`` worst images side by side: ground truth left, detections right.

    Only errors carry a label and their class's colour: missed objects left, false detections right.
    What was found is drawn in grey. Returns the images shown.
    """
    worst = rank_images(dataset, detections, min_score)[:count]
    pairs, titles = [], []
    for each in worst:
        image, found, matches = dataset.images[each.index], detections[each.index], each.matches
        truth = Detections(image.boxes, np.ones(len(image.boxes), np.float32), image.labels, dataset.names)
        named = Detections(found.boxes, found.scores, found.labels, dataset.names)
        hit = np.setdiff1d(np.arange(len(truth)), matches.missed)
        left = Panel(truth.boxes[hit], [(truth[matches.missed], None)], scores=False)
        right = Panel(named.boxes[matches.pairs[:, 0]], [(named[matches.false_positives], None)])
        pairs.append(draw_pair(image.load(), left, right))
        titles.append(f"{each.id}: {each.missed} missed (left), {each.false_positives} false (right)")
    contact_sheet(pairs, path, 2, titles, PAIR)
    return worst


def write_report_files(
    report: EvaluationReport | ProposalReport,
    dataset: Dataset,
    folder: str | Path,
    shown_score: float = 0.5,
    worst_images: int = 12,
) -> None:
    """Write each of an evaluation's results as a picture and, with the same name, as JSON.

    For detections ``per_class``, ``pr_curves``, ``confusion`` and ``worst_images`` (a .jpg); the last
    two count detections from ``shown_score`` on. For proposals ``recall``. ``dataset`` is the one
    that was evaluated. Each JSON names the model and the data, as the report does.
    """
    folder = Path(folder)
    about = {"model": report.model, "data": report.data}
    if isinstance(report, ProposalReport):
        plot_recall(report, folder / "recall.png")
        write_json(folder / "recall.json", report)
        return
    if not 0.0 <= shown_score <= 1.0:
        raise SettingsError(f"shown score is {shown_score}; expected 0 to 1")
    if len(report.detections) != len(dataset):
        raise SettingsError(
            f"the report holds detections of {len(report.detections)} images and {dataset.spec} has "
            f"{len(dataset)}; give the data set that was evaluated"
        )
    plot_class_table(report, folder / "per_class.png")
    write_json(folder / "per_class.json", report)
    plot_pr_curves(report, folder / "pr_curves.png")
    write_json(folder / "pr_curves.json", {**about, "iou_threshold": 0.5, "classes": report.curves})
    confusion = confusion_matrix(dataset, report.detections, shown_score)
    plot_confusion(confusion, folder / "confusion.png")
    write_json(folder / "confusion.json", {**about, **confusion.to_json()})
    sheet = folder / "worst_images.jpg"
    worst = worst_images_sheet(dataset, report.detections, sheet, worst_images, shown_score)
    write_json(folder / "worst_images.json", {**about, "min_score": shown_score, "images": worst})
