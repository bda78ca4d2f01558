"""Accuracy on real images: train on BCCD, read its test split once, from the checkpoint and from ONNX.

    python benchmarks/bccd.py --seeds 0 1 2

BCCD (364 blood-cell images, three classes, MIT) and MobileNetV2's ImageNet weights are looked for in
the folder that ``ANCHORLINE_SHARED`` names. One row per seed goes to ``results/bccd.csv``.
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
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    arguments = parser.parse_args()
    shared = Path(os.environ.get("ANCHORLINE_SHARED", ""))
    if not (shared / WEIGHTS).is_file():
        sys.exit(f"ANCHORLINE_SHARED is {str(shared)!r}; expected a folder with data/bccd and {WEIGHTS}")
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = (arguments.keep or Path(scratch)) / f"seed-{seed}"
            _one_seed(shared, folder, arguments.preset, arguments.overrides, seed)


def _one_seed(shared: Path, folder: Path, preset: str, overrides: list[str], seed: int) -> None:
    changes = [part for override in overrides for part in ("--set", override)]
    data = f"voc:{shared / 'data' / 'bccd'}"
    start = time.perf_counter()
    _anchorline(
        *("train", "--preset", preset, "--data", f"{data}@trainval", "--seed", str(seed), *changes),
        *("--backbone-weights", str(shared / WEIGHTS), "--out", str(folder)),
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
    shown = " ".join(["train", "--preset", preset, "--data voc:bccd@trainval", "--seed", str(seed), *changes])
    path = append_row(
        "bccd",
        f"anchorline {shown}",
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
    print(f"seed {seed}: mAP50 {report['map50']:.4f}, ONNX {reports['.onnx']['map50']:.4f}; {path}")


def _anchorline(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "anchorline", *arguments], check=True)


if __name__ == "__main__":
    main()
