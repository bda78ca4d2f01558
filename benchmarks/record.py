"""Appending measured rows to ``benchmarks/results/*.csv``, with what is needed to repeat them."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "onnxruntime", "openvino", "opencv-python-headless")


def append_row(name: str, command: str, figures: Mapping[str, object]) -> Path:
    """Append ``figures`` to ``results/<name>.csv`` after date, commit, processor, versions and command.

    Raises ``ValueError`` when the file exists with other columns.
    """
    row = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "versions": versions(),
        "command": command,
        **figures,
    }
    path = RESULTS / f"{name}.csv"
    columns = list(row)
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file))
        if columns != list(row):
            raise ValueError(f"{path} has the columns {columns}, expected {list(row)}; start a new file")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(",".join(columns) + "\n", encoding="utf-8")
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, columns, lineterminator="\n").writerow(row)
    return path


def commit() -> str:
    """The short commit, with ``+`` where the working tree differs from it."""
    shown = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", ":/anchorline", ":/benchmarks/*.py")
    return f"{shown or 'unknown'}{'+' if changed else ''}"


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


def versions() -> str:
    """Python and the packages that decide the numbers."""
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return "; ".join(found)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return done.stdout.strip()
