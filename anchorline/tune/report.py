"""What a search found: in words, as a table, as JSON and as a plot."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorline.evaluation.pictures import new_figure, save_figure
from anchorline.tune.search import Candidate, Figures, Goal

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 24  # candidates in the table


@dataclass(frozen=True)
class Row:
    """A candidate, and its figures on the most images that it was measured on."""

    candidate: Candidate
    figures: Figures

    def to_json(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.candidate)
        return {**settings.pop("way"), **settings, **dataclasses.asdict(self.figures)}


@dataclass(frozen=True)
class TuneReport:
    """What was measured: the ``parent`` and all candidates, the ``frontier`` of those on all images, the
    ``best`` for the ``goal`` (None where nothing reaches it or the search was ``interrupted``).

    ``written`` are the figures of the file ``out``, read again from the disk and run.
    """

    model: Path
    data: str
    images: int
    calibration_images: int
    goal: Goal
    machine: dict[str, str]
    parent: Row
    rows: tuple[Row, ...]
    frontier: tuple[Row, ...]
    best: Row | None
    interrupted: bool
    notes: tuple[str, ...]
    out: Path | None = None
    written: Figures | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``files.write_json``."""
        return {
            "model": str(self.model),
            "data": self.data,
            "images": self.images,
            "calibration_images": self.calibration_images,
            "goal": self.goal,
            "machine": self.machine,
            "parent": self.parent,
            "candidates": self.rows,
            "frontier": self.frontier,
            "best": self.best,
            "command": self.command(),
            "interrupted": self.interrupted,
            "notes": self.notes,
            "out": self.out,
            "written": self.written,
        }

    def command(self) -> str | None:
        """How ``detect`` runs the best one in the way that was measured."""
        if self.best is None:
            return None
        way = self.best.candidate.way
        words = ["anchorline", "detect", "SOURCE", "--model", str(self.out or "best.onnx")]
        words += ["--provider", way.provider, "--threads", str(way.threads)]
        if way.provider == "openvino" and way.precision != "int8":
            words += ["--cpu-precision", way.precision]
        return shlex.join(words)

    def describe(self) -> str:
        """One line: what is the best, and what it gains and costs."""
        if self.interrupted:
            return "interrupted; the same command goes on from here"
        if self.best is None:
            return f"nothing that was tried is {self.goal.describe()}"
        figures, own = self.best.figures, self.parent.figures
        return (
            f"{self.best.candidate.describe()}: {1 / figures.share:.2f} times as fast as the parent "
            f"({figures.ms:.1f} of {own.ms:.1f} ms a frame), mAP50 {figures.map50:.4f} of {own.map50:.4f} on "
            f"{figures.images} images"
        )

    def render(self) -> Table:
        """A rich table: the candidates on most images first, the fastest of them first."""
        from rich.markup import escape
        from rich.table import Table

        objects = sum(self.parent.figures.objects)
        notes = [
            *self.notes,
            "proposals: kept, and the best of each level before NMS; run by: provider, precision, threads",
            "speed: frame to boxes, as a multiple of the parent's, measured beside it frame by frame",
            f"on {self.parent.figures.images} images with {objects} objects mAP50 is known to about "
            f"{100 * self.parent.figures.uncertainty:.1f} points; candidates see the same images",
        ]
        table = Table(
            title=escape(f"{self.model.name} on {self.data}: {self.goal.describe()}"),
            caption=escape("\n".join(notes)),
            caption_justify="left",
            # Nine columns in a terminal of 80 characters.
            box=None,
            collapse_padding=True,
            pad_edge=False,
        )
        for column in ("", "scale", "proposals", "run by"):
            table.add_column(column, no_wrap=True)
        for column in ("images", "mAP50", "drop", "ms", "speed"):
            table.add_column(column, justify="right", no_wrap=True)
        ranked = sorted(self.rows, key=lambda row: (-row.figures.images, row.figures.share))
        for row in [self.parent, *ranked[:_SHOWN]]:
            each, figures = row.candidate, row.figures
            drop = self._parent_on(figures.images)
            mark = "parent" if row is self.parent else "best" if row == self.best else ""
            table.add_row(
                mark or ("*" if row in self.frontier else ""),
                f"{each.scale:g}",
                f"{each.proposals} of {each.pre_nms}",
                f"{each.way.provider} {each.way.precision} {each.way.threads}{' W' * each.winograd}",
                str(figures.images),
                f"{figures.map50:.4f}",
                "-" if drop is None else f"{100 * (drop - figures.map50):+.2f}",
                f"{figures.ms:.1f}",
                f"{1 / figures.share:.2f}",
                style="bold" if mark == "best" else None,
            )
        if len(ranked) > _SHOWN:
            table.caption = f"{len(ranked) - _SHOWN} more are in the JSON\n{table.caption}"
        return table

    def _parent_on(self, images: int) -> float | None:
        """The parent's mAP50 on so many images, where that is its last figure."""
        return self.parent.figures.map50 if images == self.parent.figures.images else None


def plot_tuning(report: TuneReport, path: str | Path) -> None:
    """mAP50 over the time of a frame: all candidates, larger where they saw more images, and the frontier."""
    figure, (axes,) = new_figure(7.6, 5.0)
    rows = [row for row in report.rows if row.figures.images]
    precisions = sorted({row.candidate.way.precision for row in rows})
    for precision, colour in zip(precisions, ("#0072b2", "#e69f00", "#009e73"), strict=False):
        some = [row.figures for row in rows if row.candidate.way.precision == precision]
        sizes = [10 + 50 * each.images / report.images for each in some]
        axes.scatter(
            [each.ms for each in some],
            [each.map50 for each in some],
            s=sizes,
            color=colour,
            alpha=0.6,
            label=precision,
        )
    line = [row.figures for row in report.frontier]
    axes.plot([each.ms for each in line], [each.map50 for each in line], "k-", linewidth=1, label="frontier")
    marks = [("parent", report.parent, "D"), *([("best", report.best, "*")] if report.best else [])]
    for name, row, marker in marks:
        size = 60 if marker == "D" else 160
        axes.scatter(
            [row.figures.ms], [row.figures.map50], s=size, marker=marker, color="black", label=name, zorder=3
        )
    if report.goal.budget_ms is None:
        axes.axhline(report.parent.figures.map50 - report.goal.max_drop, color="0.5", linestyle=":")
    else:
        axes.axvline(report.goal.budget_ms, color="0.5", linestyle=":")
    axes.set(xlabel="ms a frame, frame to boxes", ylabel="mAP50")
    axes.set_title(f"{report.images} images; smaller points saw fewer", fontsize="medium")
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)
