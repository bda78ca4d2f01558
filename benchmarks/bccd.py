"""Accuracy on real images: train on BCCD, read its test split once, from the checkpoint and from ONNX.

    python benchmarks/bccd.py --seeds 0 1 2

BCCD (364 blood-cell images, three classes, MIT) and MobileNetV2's ImageNet weights are looked for in
the folder that ``ANCHORLINE_SHARED`` names. One row per seed goes to ``results/bccd.csv``, and one for
each class, with AP by object size, to ``results/bccd_sizes.csv``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import append_row

WEIGHTS = "weights/mobilenet_v2_imagenet_features.pth"


def main() -> None:
    """Train and evaluate once per seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", default="mobilenet-v2-fpn-quick")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--from-scratch", action="store_true", help="start without ImageNet weights")
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    arguments = parser.parse_args()
    shared = Path(os.environ.get("ANCHORLINE_SHARED", ""))
    weights = None if arguments.from_scratch else shared / WEIGHTS
    if not (shared / "data" / "bccd").is_dir() or not (weights is None or weights.is_file()):
        sys.exit(f"ANCHORLINE_SHARED is {str(shared)!r}; expected a folder with data/bccd and {WEIGHTS}")
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = (arguments.keep or Path(scratch)) / f"seed-{seed}"
            changes = [part for override in arguments.overrides for part in ("--set", override)]
            _one_seed(shared, weights, folder, ["--preset", arguments.preset, *changes], seed)


def _one_seed(shared: Path, weights: Path | None, folder: Path, options: list[str], seed: int) -> None:
    data = f"voc:{shared / 'data' / 'bccd'}"
    start = time.perf_counter()
    _anchorline(
        *("train", *options, "--data", f"{data}@trainval", "--seed", str(seed), "--out", str(folder)),
        *(() if weights is None else ("--backbone-weights", str(weights))),
    )
    seconds = time.perf_counter() - start
    checkpoint, onnx = folder / "model.safetensors", folder / "model.onnx"
    _anchorline("export", str(checkpoint), "--out", str(onnx))
    reports = {}
    for model in (checkpoint, onnx):
        figures = model.with_suffix(".json")
        _anchorline("evaluate", str(model), "--data", f"{data}@test", "--json", str(figures))
        reports[model.suffix] = json.loads(figures.read_text(encoding="utf-8"))
    report = reports[".safetensors"]
    pretrained = [] if weights is None else ["--backbone-weights", weights.name]
    command = " ".join(
        ["anchorline train", *options, "--data voc:bccd@trainval", "--seed", str(seed), *pretrained]
    )
    path = append_row(
        "bccd",
        command,
        {
            "seed": seed,
            "train_s": round(seconds),
            "map50": round(report["map50"], 4),
            "voc07": round(report["voc07"], 4),
            "map": round(report["map"], 4),
            **{f"ap50_{name}": round(each["ap50"], 4) for name, each in report["per_class"].items()},
            "onnx_map50": round(reports[".onnx"]["map50"], 4),
        },
    )
    _append_sizes(command, seed, report)
    print(f"seed {seed}: mAP50 {report['map50']:.4f}, ONNX {reports['.onnx']['map50']:.4f}; {path}")


def _append_sizes(command: str, seed: int, report: dict[str, Any]) -> None:
    """One row a class: the objects of each size and COCO's AP at IoU 0.5 and .5:.95 for them."""
    for name in report["per_class"]:
        figures: dict[str, object] = {"seed": seed, "class": name}
        for size, each in report["per_size"].items():
            of_class = each["per_class"][name]
            figures[f"{size}_objects"] = of_class["objects"]
            for metric in ("ap50", "ap"):
                value = of_class[metric]
                figures[f"{size}_{metric}"] = "" if value is None else round(value, 4)
        append_row("bccd_sizes", command, figures)


def _anchorline(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "anchorline", *arguments], check=True)


if __name__ == "__main__":
    main()
