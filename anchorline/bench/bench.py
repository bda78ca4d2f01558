"""Measuring models, each with each provider in a process of its own, so that its memory is its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from anchorline.bench.figures import BenchReport, BenchRow, check_plot, plot_bench
from anchorline.bench.work import Work
from anchorline.doctor.machine import find_cpu, installed_packages
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, SettingsError
from anchorline.runtime.io.files import atomic_write_text, write_json

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13", "numpy",
             "opencv-python-headless")  # fmt: skip
_MISTAKE = 2

Progress = Callable[[int, int], None]


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
    json_file: str | Path | None = None,
    csv_file: str | Path | None = None,
    plot: str | Path | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure ``models`` on ``providers``, one after the other.

    ``source`` is a video, an image or a folder of images, of which the first frames are held in memory;
    without it generated scenes of 1920x1080 are used. ``batches`` batches of ``batch`` frames are measured
    after ``warmup`` others. The figures go to the files that are named. Raises ``AnchorlineError`` for what
    cannot be opened or run.
    """
    if not models or not providers:
        raise SettingsError("nothing to measure; name at least one model and one provider")
    for name, value, least in (("batch", batch, 1), ("batches", batches, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingsError(f"{name} is {value!r}; expected a whole number of at least {least}")
    if plot is not None:
        check_plot(plot)
    shown = None if source is None else str(source)
    works = [
        Work(str(model), shown, provider, batch, batches, warmup, threads, cpu_precision)
        for model in models
        for provider in providers
    ]
    rows = []
    for done, work in enumerate(works):
        if progress is not None:
            progress(done, len(works))
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
    cpu, packages = find_cpu(), installed_packages().versions
    versions = ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if name in packages)
    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "processor": cpu.name,
        "cores": str(cpu.cores),
        "instructions": " ".join(cpu.features),
        "versions": f"python {python}, {versions}",
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


class BenchError(AnchorlineError, RuntimeError):
    """What the process of a model reported: a mistake of the user's, in one line."""
