"""The two pictures: recall against IoU by number of proposals (figure 4), and mAP against proposals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from anchorline.evaluation.pictures import new_figure, save_figure

SHOWN = ("50", "100", "300", "1000")  # proposals
Curves = Mapping[str, Sequence[Mapping[str, Mapping[str, float | None]]]]


def plot_recall(curves: Curves, path: Path) -> None:
    """Recall over IoU: a panel for each number of proposals, for each source the mean line of its seeds."""
    figure, panels = new_figure(3.1 * len(SHOWN), 3.4, len(SHOWN))
    for axes, count in zip(panels, SHOWN, strict=True):
        for name, seeds in curves.items():
            ious = list(seeds[0][count])
            values = [mean(each[count][iou] or 0.0 for each in seeds) for iou in ious]
            axes.plot(list(map(float, ious)), values, linewidth=1.8, label=name)
        axes.set(xlabel="IoU", xlim=(0.5, 0.95), ylim=(0, 1.02))
        axes.set_title(f"{count} proposals", fontsize=10)
    panels[0].set_ylabel("recall")
    # Above the panels: within them every corner has curves somewhere.
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_proposals(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """VOC07 mAP over the number of test proposals, a line for each ablation, with the range of its seeds."""
    figure, (axes,) = new_figure(5.6, 4.0)
    chosen = [row for row in rows if row["experiment"] == "proposals" and row["voc07"] not in ("", None)]
    for name in dict.fromkeys(row["variant"] for row in chosen):
        points: dict[int, list[float]] = {}
        for row in (each for each in chosen if each["variant"] == name):
            points.setdefault(int(row["proposals"]), []).append(100 * float(row["voc07"]))
        counts = sorted(points)
        axes.plot(counts, [mean(points[count]) for count in counts], "o-", markersize=4, label=name)
        lows, highs = ([edge(points[count]) for count in counts] for edge in (min, max))
        axes.fill_between(counts, lows, highs, alpha=0.15)
    axes.set(xlabel="test proposals", ylabel="VOC07 mAP, %", xscale="log")
    ticks = sorted({int(row["proposals"]) for row in chosen})
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.legend(frameon=False)
    save_figure(figure, path)
