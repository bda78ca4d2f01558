"""Measuring models, each with each provider in a process of its own, so that its memory is its own.

What was measured is shown as table, JSON, CSV and picture.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorline.bench.work import QUANTITIES, TOTAL, BenchRow, Work
from anchorline.doctor.machine import find_cpu, installed_packages
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, SettingsError, check_count
from anchorline.runtime.io.files import atomic_path, atomic_write_text, write_json
from anchorline.runtime.timing import DETECTOR_STAGES
from anchorline.runtime.video.display import check_plot
from anchorline.runtime.video.figures import stage_table
from anchorline.runtime.video.options import SliceOptions

if TYPE_CHECKING:
    from rich.table import Table

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13", "numpy",
             "opencv-python-headless")  # fmt: skip
_MISTAKE = 2
_SHADES = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08306b")
_COLOURS = ("#e69f00", "#56b4e9", "#0072b2", "#009e73", "#cc79a7")


class BenchError(AnchorlineError, RuntimeError):
    """What the process of a model reported: a mistake of the user's, in one line."""


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
            for stage, times in fields.pop("stages").items():
                fields.update({f"{stage}_{quantity}_ms": f"{ms:.3f}" for quantity, ms in times.items()})
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
            sliced = f", each in {row.views:g} views" if row.views != 1 else ""
            caption = (
                f"{row.fps:.1f} frames/s ({1000 / row.fps:.1f} ms a frame{sliced}) over {row.batches} "
                f"batches of {row.frame_size} frames; opened in {row.open_s:.2f} s, first batch "
                f"{row.first_ms:.1f} ms; peak memory {row.peak_mib:.0f} MiB, {row.base_mib:.0f} of them "
                "before the model"
            )
            grid.add_row(stage_table(row.stages, TOTAL, title=title, caption=caption, min_width=72))
        grid.add_row("; ".join(f"{name} {value}" for name, value in self.machine.items()))
        return grid


def bench(
    models: Sequence[str | Path],
    *,
    source: str | Path | None = None,
    providers: Sequence[str] = ("auto",),
    batch: int = 1,
    batches: int = 100,
    warmup: int = 10,
    threads: int | None = None,
    cpu_precision: str = "auto",
    measure: bool | None = None,
    slices: SliceOptions | None = None,
    json_file: str | Path | None = None,
    csv_file: str | Path | None = None,
    plot: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BenchReport:
    """Measure ``models`` on ``providers``, one after the other.

    ``source`` is a video, an image or a folder of images, of which the first frames are held in memory;
    without it generated scenes of 1920x1080 are used. ``batches`` batches of ``batch`` frames are measured
    after ``warmup`` others, in ``slices`` where they are given. ``measure`` is ``Detector``'s. The figures
    go to the files that are named. Raises ``AnchorlineError`` for what cannot be opened or run.
    """
    if not models or not providers:
        raise SettingsError("nothing to measure; name at least one model and one provider")
    for name, value, least in (("batch", batch, 1), ("batches", batches, 1), ("warmup", warmup, 0)):
        check_count(name, value, least)
    if plot is not None:
        check_plot(plot, "picture")
    pairs = list(itertools.product(map(str, models), providers))
    shown = None if source is None else str(source)
    in_slices = None if slices is None else asdict(slices)
    rows = []
    for done, (model, provider) in enumerate(pairs):
        if progress is not None:
            progress(done, len(pairs))
        options = (batch, batches, warmup, threads, cpu_precision, measure, in_slices)
        work = Work(model, shown, provider, *options)
        rows.append(_measure(work))
    report = BenchReport(tuple(rows), machine())
    if json_file is not None:
        write_json(json_file, report.to_json())
    if csv_file is not None:
        atomic_write_text(csv_file, report.to_csv())
    if plot is not None:
        plot_bench(report, plot)
    return report


def machine() -> dict[str, str]:
    """The processor, its usable cores and instructions, and the packages that decide the figures."""
    cpu, (packages, _) = find_cpu(), installed_packages()
    versions = ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if name in packages)
    return {
        "processor": cpu.name,
        "cores": str(cpu.cores),
        "instructions": " ".join(cpu.features),
        "versions": f"python {platform.python_version()}, {versions}",
    }


def _measure(work: Work) -> BenchRow:
    """The row of one process."""
    command = [sys.executable, "-m", "anchorline.bench.work"]
    done = subprocess.run(
        command, input=json.dumps(asdict(work)), capture_output=True, text=True, encoding="utf-8", check=False
    )
    if done.returncode == _MISTAKE:
        raise BenchError(done.stdout.strip())
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise ArtefactError(
            f"{work.model}: its process ended with code {done.returncode} on {work.provider} ({last[:200]}); "
            "see whether memory suffices, or use another provider"
        )
    sys.stderr.write(done.stderr)
    return BenchRow(**json.loads(lines[-1]))


def plot_bench(report: BenchReport, path: str | Path) -> None:
    """Above, the percentiles of the whole call for each row; below, where its median goes, by stage."""
    from matplotlib.figure import Figure

    rows, height = report.rows, 0.8 / len(QUANTITIES)
    places = range(len(rows))
    figure = Figure(figsize=(9, 3.6 + 1.25 * len(rows)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1.6, 1))
    for step, (quantity, shade) in enumerate(zip(QUANTITIES, _SHADES, strict=True)):
        positions = [place + height * (step - 2) for place in places]
        values = [row.stages[TOTAL][quantity] for row in rows]
        bars = above.barh(positions, values, height=height, color=shade, label=quantity)
        above.bar_label(bars, fmt="%.1f", padding=3, fontsize=6)
    above.margins(x=0.08)
    starts = [0.0] * len(rows)
    for stage, colour in zip(DETECTOR_STAGES, _COLOURS, strict=True):
        values = [row.stages[stage]["p50"] for row in rows]
        below.barh(places, values, left=starts, height=0.6, color=colour, label=stage)
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    names = [f"{row.model}\n{row.provider}, {row.precision}, batch {row.batch}" for row in rows]
    for axes, label in (
        (above, "frames to boxes, ms a batch; nothing is clipped"),
        (below, "median of each stage, ms a batch"),
    ):
        axes.set_xlabel(label)
        axes.set_yticks(places, names, fontsize="small")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
    machine = report.machine
    figure.suptitle(f"{machine['processor']}, {machine['cores']} cores", fontsize="medium")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
