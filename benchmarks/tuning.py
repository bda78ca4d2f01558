"""A trained model tuned, beside its parent and torchvision's own ways with the same weights, in one run.

    python benchmarks/tuning.py RUN/model.safetensors --data voc:DIR@test [--max-drop 0.5]

The checkpoint is exported for any frame size and tuned (``anchorline tune``) on the labelled images. Then
torchvision's model of the same weights (eager, and its ONNX file on onnxruntime's CPU provider), the parent
and the tuned file detect the same frames, side by side and in turning order; a ratio is the median over the
repetitions. A row goes to ``results/tuning.csv``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

import torch
from peers import EAGER, PEER, Side, interleaved, matched_share, peers, ratio
from record import append_row

from anchorline.console import progress_bar, show
from anchorline.data.dataset import load_datasets
from anchorline.evaluation.evaluation import report_detections
from anchorline.export.importers.torchvision import torchvision_model
from anchorline.export.onnx_export import export_onnx
from anchorline.runtime.backends.cpu_options import usable_cores
from anchorline.runtime.canvas import usual_canvas
from anchorline.runtime.detector import Detector
from anchorline.train.checkpoint import load_checkpoint
from anchorline.tune.measuring import open_way
from anchorline.tune.search import Goal
from anchorline.tune.tune import PRECISIONS, tune


def main() -> None:
    """Export, tune, compare, and append a row."""
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        row = measure(options, options.folder or Path(temporary))
    print(row)
    if not options.dry_run:
        append_row("tuning", shlex.join(["python", *sys.argv]), row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", action="append", required=True, metavar="SPEC")
    parser.add_argument("--max-drop", type=float, default=0.5, metavar="POINTS")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="default: all")
    parser.add_argument("--folder", type=Path, help="keep the files here")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--dry-run", action="store_true", help="print the row and write none")
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The row: what was chosen, its accuracy beside the parent's and torchvision's, and the times."""
    folder.mkdir(parents=True, exist_ok=True)
    parent, best = folder / "parent.onnx", folder / "best.onnx"
    model, contract = load_checkpoint(options.checkpoint)
    export_onnx(options.checkpoint, parent, verify=False)
    with progress_bar("tuning") as progress:
        report = tune(
            parent,
            options.data,
            goal=Goal(options.max_drop / 100),
            precisions=options.precision or PRECISIONS,
            threads=options.threads,
            out=best,
            pictures=folder / "tuning.png",
            json_file=folder / "tuning.json",
            fresh=True,
            progress=progress,
        )
    show(report.render())
    print(report.describe())
    assert report.best is not None
    chosen = report.best.candidate
    dataset = load_datasets(options.data, names=contract.names)
    frames = [image.load() for image in dataset.images[: options.frames]]
    peer = torchvision_model(model, contract)
    sides = peers(peer, frames[0], folder / "torchvision.onnx", contract, options.threads)
    own, tuned = Detector(parent, "cpu", threads=options.threads), open_way(best, chosen.way)
    references = [[side.detect(image.load()) for image in dataset] for side in sides]
    shares = [matched_share(references[0], each) for each in references[1:]]
    print(f"on all images {PEER} has of the eager model's detections: {shares}")
    sides += [Side("parent", "cpu", "fp32", own), Side("tuned", chosen.way.provider, "", tuned)]
    seconds = interleaved(sides, frames, options.repetitions)
    places = {side.name: index for index, side in enumerate(sides)}
    last = places["tuned"]
    return {
        "model": str(contract.source.get("preset", options.checkpoint.name)),
        "data": " ".join(Path(spec).name for spec in options.data),
        "images": report.images,
        "calibration_images": report.calibration_images,
        "max_drop": options.max_drop,
        "canvas": "{}x{}".format(*usual_canvas(own.contract)),
        "scale": chosen.scale,
        "proposals": chosen.proposals,
        "pre_nms": chosen.pre_nms,
        "provider": chosen.way.provider,
        "precision": chosen.way.precision,
        "threads": chosen.way.threads,
        "winograd": chosen.winograd,
        "map50_parent": f"{report.parent.figures.map50:.4f}",
        "map50_tuned": f"{report.best.figures.map50:.4f}",
        "map50_torchvision_all_images": f"{report_detections(references[0], dataset, EAGER).map50:.4f}",
        "ms_tuned": f"{1000 * float(sorted(seconds[:, last])[len(seconds) // 2]) / len(frames):.2f}",
        "faster_than_parent": ratio(seconds, places["parent"], last),
        "faster_than_torchvision_onnx": ratio(seconds, places.get(PEER), last),
        "faster_than_torchvision_eager": ratio(seconds, places[EAGER], last),
    }


if __name__ == "__main__":
    main()
