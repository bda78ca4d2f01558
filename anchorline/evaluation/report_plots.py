"""Pictures of an evaluation: proposal recall, the table of classes and sizes, the confusion matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anchorline.evaluation.confusion import BACKGROUND, ConfusionMatrix
from anchorline.evaluation.evaluate import EvaluationReport
from anchorline.evaluation.plots import literal, new_figure, new_figures, save_figure
from anchorline.evaluation.proposal_recall import ProposalReport

_SHOWN_COUNTS = (50, 100, 300, 1000)
_SHOWN_IOUS = (0.5, 0.7, 0.9)
_MOST_NUMBERED_CLASSES = 20  # numbers in the cells of a larger confusion matrix would not be legible
_MOST_NAMED_CLASSES = 100  # and neither would their names
_MOST_TABLE_ROWS = 200
_GOOD = (0.36, 0.62, 0.84)  # RGB of a table cell with AP 1; lighter below
_NO_FIGURE = "-"


def plot_recall(report: ProposalReport, path: str | Path) -> None:
    """Recall over IoU (the paper's figure 4), and over the number of proposals."""
    figure, (over_iou, over_count) = new_figures(11.0, 4.8, 2)
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
    columns = ["objects", "AP50", "VOC07", "AP"]
    for size in report.per_size:
        columns += [f"{size}\nobjects", f"{size}\nAP50", f"{size}\nAP"]
    rows: dict[str, list[float]] = {}
    for name, each in list(report.per_class.items())[:_MOST_TABLE_ROWS]:
        rows[literal(name)] = [each.objects, each.ap50, each.voc07, each.ap]
        for by_size in report.per_size.values():
            figures = by_size.per_class[name]
            rows[literal(name)] += [figures.objects, figures.ap50, figures.ap]
    objects = sum(each.objects for each in report.per_class.values())
    mean = [objects, report.map50, report.voc07, report.map]
    for by_size in report.per_size.values():
        mean += [by_size.objects, by_size.map50, by_size.map]
    _draw_table({**rows, "all, mean": mean}, columns, _title(report), path)


def _title(report: EvaluationReport) -> str:
    classes = len(report.per_class)
    cut = f", the first {_MOST_TABLE_ROWS} of {classes} classes" if classes > _MOST_TABLE_ROWS else ""
    return f"{report.images} images, {report.provider}, {report.precision}{cut}"


def _draw_table(rows: dict[str, list[float]], columns: list[str], title: str, path: str | Path) -> None:
    from matplotlib.transforms import Bbox

    figure, axes = new_figure(2.2 + 0.75 * len(columns), 1.1 + 0.3 * len(rows))
    axes.set_axis_off()
    counts = [column.endswith("objects") for column in columns]
    texts, colours = [], []
    for values in rows.values():
        pairs = list(zip(values, counts, strict=True))
        texts.append([_cell_text(value, count) for value, count in pairs])
        colours.append([_cell_colour(0.0 if count else value) for value, count in pairs])
    table = axes.table(
        cellText=texts,
        cellColours=colours,
        rowLabels=list(rows),
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
    axes.set_title(title)
    save_figure(figure, path)


def _cell_text(value: float, count: bool) -> str:
    if np.isnan(value):
        return _NO_FIGURE
    return f"{value:.0f}" if count else f"{value:.3f}"


def _cell_colour(value: float) -> tuple[float, float, float]:
    share = 0.0 if np.isnan(value) else value
    red, green, blue = (1.0 - share * (1.0 - channel) for channel in _GOOD)
    return red, green, blue


def plot_confusion(confusion: ConfusionMatrix, path: str | Path) -> None:
    """The counts as numbers, and the share of each object class (of each row) as the shade."""
    names = [*map(literal, confusion.names), BACKGROUND]
    totals = confusion.counts.sum(axis=1, keepdims=True)
    shares = confusion.counts / np.maximum(totals, 1)
    side = 2.6 + min(0.6 * len(names), 14.0)
    figure, axes = new_figure(side + 1.6, side)
    axes.grid(False)
    picture = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    places = range(len(names))
    if len(names) <= _MOST_NAMED_CLASSES + 1:
        axes.set_xticks(places, names, rotation=90 if len(names) > 6 else 0)
        axes.set_yticks(places, names)
    axes.set(xlabel=f"detected class (score from {confusion.min_score:g} on)", ylabel="class of the object")
    if len(names) <= _MOST_NUMBERED_CLASSES + 1:
        for row in places:
            for column in places:
                ink = "white" if shares[row, column] > 0.55 else "black"
                count = str(confusion.counts[row, column])
                axes.text(column, row, count, ha="center", va="center", color=ink, fontsize=9)
    axes.set_title(f"matched from IoU {confusion.iou_threshold:g} on")
    figure.colorbar(picture, ax=axes, shrink=0.75, label="share of the row")
    save_figure(figure, path)
