"""Other libraries' own predictors against what Anchorline makes of their checkpoints, on frames of any size.

    python benchmarks/foreign_parity.py --torchvision --detectron2 CHECKOUT --mmdetection --mmcv CHECKOUT \
        --images DIR

For each case of ``foreign_models.py`` the library detects in photographs and in frames of many shapes, one by
one and as one batch of mixed shapes. So do the imported checkpoint in PyTorch and the one ONNX file exported
from it, through ``Detector``, without any option. Rows go to ``results/any_frame_parity.csv``; the exit code
is 1 when detections differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import foreign_models as models
import torch
from foreign_models import Case, Foreign, Frame
from record import append_row

from anchorline.data.synthetic import generate_scene
from anchorline.export import import_checkpoint
from anchorline.export.onnx_export import export_onnx
from anchorline.runtime import Detections, Detector
from anchorline.train.predict import TorchDetector
from anchorline.verify.compare import TOLERANCES, compare_all, cuts_of

PHOTOGRAPHS = 3
# Height and width that photographs are stretched to: landscape, portrait, two narrow ones, small, large. The
# first four make up the batch.
SHAPES = ((480, 640), (640, 480), (200, 3000), (700, 90), (97, 97), (1080, 1920))
BATCH = 4
# In pixels of the frame, and score.
TOLERANCE = dataclasses.replace(TOLERANCES["fp32"], box_px=0.01, score=1e-4)


def main() -> None:
    """Try the cases one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torchvision", action="store_true", help="the installed torchvision")
    parser.add_argument("--detectron2", type=Path, metavar="CHECKOUT", help="Detectron2's sources")
    parser.add_argument("--mmdetection", action="store_true", help="the installed mmdet")
    parser.add_argument(
        "--mmcv", type=Path, metavar="CHECKOUT", help="mmcv's sources, where it is not compiled"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="photographs; default: generated scenes")
    parser.add_argument("--cases", help="names of --list with commas between; default: all")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument(
        "--sides",
        type=int,
        nargs=2,
        metavar=("SHORTER", "LONGER"),
        help="sides of a resized image; default: the case's",
    )
    arguments = parser.parse_args()
    libraries = {
        "torchvision": models.TORCHVISION,
        "Detectron2": models.DETECTRON2,
        "MMDetection": models.MMDETECTION,
    }
    if arguments.list:
        for library, cases in libraries.items():
            print(f"{library}: {', '.join(cases)}")
        return
    known = {name for cases in libraries.values() for name in cases}
    chosen = set(arguments.cases.split(",")) if arguments.cases else known
    if unknown := sorted(chosen - known):
        sys.exit(f"--cases: no case {unknown[0]!r}; --list shows them")
    if not (arguments.torchvision or arguments.detectron2 or arguments.mmdetection):
        sys.exit("give --torchvision, --detectron2 CHECKOUT, --mmdetection, or several of them")
    frames, exact = frames_of_many_shapes(arguments.images), True
    for build, cases in prepared(arguments):
        for name in (name for name in cases if name in chosen):
            with tempfile.TemporaryDirectory() as folder:
                sides = tuple(arguments.sides) if arguments.sides else None
                exact &= try_case(build(cases[name], sides), name, cases[name], frames, Path(folder))
            gc.collect()
    sys.exit(0 if exact else 1)


def prepared(
    arguments: argparse.Namespace,
) -> Iterator[tuple[Callable[[Case, Any], Foreign], Mapping[str, Case]]]:
    """The libraries asked for, made importable: what builds a model of a case, and the cases."""
    if arguments.torchvision:
        yield models.Torchvision, models.TORCHVISION
    if arguments.detectron2:
        models.prepare_detectron2(arguments.detectron2)
        yield lambda case, sides: models.Detectron2(case, sides, arguments.detectron2), models.DETECTRON2
    if arguments.mmdetection:
        models.prepare_mmdetection(arguments.mmcv)
        yield models.MMDetection, models.MMDETECTION


def frames_of_many_shapes(folder: Path | None) -> list[Frame]:
    """Photographs evenly from ``folder`` (else generated scenes), stretched to ``SHAPES`` and as they are."""
    if folder is None:
        photographs = [generate_scene(0, (427, 640), number)[0] for number in range(PHOTOGRAPHS)]
    else:
        read = (cv2.imread(str(path)) for path in sorted(folder.iterdir()))
        found = [image for image in read if image is not None]
        if not found:
            sys.exit(f"--images {folder}: no image that can be read")
        photographs = found[:: max(1, len(found) // PHOTOGRAPHS)][:PHOTOGRAPHS]
    stretched = (
        cv2.resize(photographs[number % len(photographs)], (width, height))
        for number, (height, width) in enumerate(SHAPES)
    )
    return [*stretched, *photographs]


def try_case(foreign: Foreign, name: str, case: Case, frames: Sequence[Frame], folder: Path) -> bool:
    """Compare one model in PyTorch and through onnxruntime, append the rows, and say whether all agree."""
    foreign.draw(frames[:BATCH])
    checkpoint, imported, exported = foreign.save(folder), folder / "model.safetensors", folder / "model.onnx"
    import_checkpoint(checkpoint, imported, classes=case.classes, **foreign.told)
    export_onnx(imported, exported, verify=False)
    foreign.load(checkpoint)
    groups = {"one by one": [[frame] for frame in frames], "one batch": [frames[:BATCH]]}
    expected = {group: [foreign.detect(batch) for batch in batches] for group, batches in groups.items()}
    detectors = (
        TorchDetector.load(imported),
        Detector(exported, provider="cpu", threads=torch.get_num_threads()),
    )
    agreeing = []
    for detector in detectors:
        for group, batches in groups.items():
            found = [detector.batch(batch) for batch in batches]
            agreeing.append(record(foreign.version, name, detector, group, expected[group], found))
    return all(agreeing)


def record(
    library: str,
    name: str,
    detector: TorchDetector | Detector,
    group: str,
    expected: Sequence[Sequence[Detections]],
    found: Sequence[Sequence[Detections]],
) -> bool:
    """Append a row for the frames of ``group``, detections by batch, and say whether all agree."""
    contract = detector.contract
    form = "pytorch" if isinstance(detector, TorchDetector) else "onnxruntime"
    resize = f"{contract.resize.shorter_side}/{contract.resize.longer_side}"
    theirs, ours = ([each for batch in batches for each in batch] for batches in (expected, found))
    summary = compare_all(theirs, ours, **vars(cuts_of(contract, TOLERANCE)))
    total = summary.total
    print(f"{library}, {name}, {resize}, {form}, {group}: {summary.describe()}")
    if total.first_disagreement:
        print(f"    {total.first_disagreement}")
    append_row(
        "any_frame_parity",
        "python benchmarks/foreign_parity.py --torchvision --detectron2 DIR --mmdetection --mmcv DIR",
        {
            "library": library,
            "case": name,
            "resize": resize,
            "form": form,
            "frames": group,
            "images": summary.images,
            "detections": sum(map(len, theirs)),
            "equal": total.matched - total.differing,
            "differing": total.differing,
            "missed": total.missed,
            "extra": total.extra,
            "ties": total.borderline + total.nms_ties,
            "max_box_px": f"{total.max_box_error:.2g}",
            "max_score": f"{total.max_score_error:.2g}",
        },
    )
    return summary.agrees


if __name__ == "__main__":
    main()
