"""Joint against 4-step alternating training on BCCD, with as many epochs in all.

    python benchmarks/alternating.py --schedule joint alternating --seeds 0 1 2

One row a run goes to ``results/alternating.csv``: mAP50 of the test split, read once, and the recall of
the RPN's best 300 proposals there at IoU 0.5. Data and weights as for ``bccd.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from bccd import WEIGHTS, _anchorline
from record import append_row


def main() -> None:
    """Train and evaluate once per schedule and seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedule", nargs="+", default=["joint", "alternating"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20, help="of all four steps together")
    parser.add_argument("--epochs-shares", type=float, nargs=4, default=[1.0, 1.0, 1.0, 1.0])
    parser.add_argument("--preset", default="mobilenet-v2-fpn-quick")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--split", default="train", help="trained on")
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    arguments = parser.parse_args()
    shared = Path(os.environ.get("ANCHORLINE_SHARED", ""))
    if not (shared / "data" / "bccd").is_dir() or not (shared / WEIGHTS).is_file():
        sys.exit(f"ANCHORLINE_SHARED is {str(shared)!r}; expected a folder with data/bccd and {WEIGHTS}")
    for seed in arguments.seeds:
        for schedule in arguments.schedule:
            with tempfile.TemporaryDirectory() as scratch:
                folder = (arguments.keep or Path(scratch)) / f"{schedule}-{seed}"
                _one_run(shared, arguments, schedule, seed, folder)


def _one_run(shared: Path, arguments: argparse.Namespace, schedule: str, seed: int, folder: Path) -> None:
    data = f"voc:{shared / 'data' / 'bccd'}"
    changes = [f"training.step_shares={arguments.epochs_shares}", *arguments.overrides]
    options = ["--preset", arguments.preset, "--schedule", schedule, "--epochs", str(arguments.epochs)]
    options += ["--seed", str(seed), *(part for change in changes for part in ("--set", change))]
    start = time.perf_counter()
    _anchorline(
        *("train", *options, "--data", f"{data}@{arguments.split}", "--out", str(folder)),
        *("--backbone-weights", str(shared / WEIGHTS)),
    )
    seconds = time.perf_counter() - start
    model, test = str(folder / "model.safetensors"), f"{data}@test"
    detections, stored, recall = (folder / name for name in ("map.json", "test.jsonl", "recall.json"))
    _anchorline("evaluate", model, "--data", test, "--json", str(detections))
    _anchorline("proposals", "--data", test, "--model", model, "--count", "300", "--out", str(stored))
    _anchorline("evaluate", str(stored), "--data", test, "--json", str(recall))
    report = json.loads(detections.read_text(encoding="utf-8"))
    covered = json.loads(recall.read_text(encoding="utf-8"))["recall"]["300"]["0.5"]
    command = " ".join(["anchorline train", *options, f"--data voc:bccd@{arguments.split}"])
    figures = {
        "schedule": schedule,
        "seed": seed,
        "epochs": arguments.epochs,
        "train_s": round(seconds),
        "map50": round(report["map50"], 4),
        "map": round(report["map"], 4),
        "recall_300": round(covered, 4),
    }
    path = append_row("alternating", f"{command} --backbone-weights {Path(WEIGHTS).name}", figures)
    print(f"{schedule}, seed {seed}: mAP50 {report['map50']:.4f}, recall@300 {covered:.4f}; {path}")


if __name__ == "__main__":
    main()
