"""PyTorch against onnxruntime, detection by detection, on every image of a data set and on awkward ones.

    python benchmarks/parity.py RUN/model.safetensors RUN/model.onnx --data voc:DIR@test

Each image alone and in batches of 3 and 8 (mixed sizes), then images from 32x32 to 4000x3000, wide, tall,
empty, grey and RGBA files. One row goes to ``results/parity.csv``; the exit code is 1 when they differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from record import append_row

from anchorline.data.dataset import load_dataset
from anchorline.runtime import Detections, Detector, read_image
from anchorline.train.predict import TorchDetector
from anchorline.verify.compare import Comparison, compare_detections, summarise

BATCHES = (1, 3, 8)
SIZES = ((32, 32), (32, 640), (640, 32), (97, 131), (480, 640), (640, 480), (1080, 1920), (3000, 4000))
BOX_PX, SCORE = 0.05, 1e-4

Frame = NDArray[np.uint8]


def main() -> None:
    """Compare, print, append the row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--data", required=True)
    arguments = parser.parse_args()
    reference, candidate = TorchDetector.load(arguments.checkpoint), Detector(arguments.onnx, provider="cpu")
    frames = [image.load() for image in load_dataset(arguments.data, reference.contract.names)]
    frames += awkward(frames[0])
    expected = [reference(frame) for frame in frames]
    comparisons = []
    for batch in BATCHES:
        found = [one for part in parts(frames, batch) for one in candidate.batch(part)]
        comparisons += compare(reference, expected, found, batch)
    # An image's result must not depend on what else is in its batch, on PyTorch's side either.
    together = [one for part in parts(frames, BATCHES[-1]) for one in reference.batch(part)]
    comparisons += compare(reference, expected, together, BATCHES[-1])
    names, each = zip(*comparisons, strict=True)
    summary = summarise(each, image_names=names)
    print(summary.describe())
    if not summary.agrees:
        print(summary.first_disagreement)
    total = summary.total
    append_row(
        "parity",
        "python benchmarks/parity.py model.safetensors model.onnx --data voc:bccd@test",
        {
            "images": len(frames),
            "batches": "/".join(map(str, BATCHES)),
            "agrees": summary.agrees,
            "matched": total.matched,
            "missed": total.missed,
            "extra": total.extra,
            "ties": total.borderline + total.nms_ties,
            "max_box_px": f"{total.max_box_error:.3g}",
            "max_score": f"{total.max_score_error:.3g}",
        },
    )
    sys.exit(0 if summary.agrees else 1)


def compare(
    reference: TorchDetector, expected: Sequence[Detections], found: Sequence[Detections], batch: int
) -> list[tuple[str, Comparison]]:
    """One comparison for each image, named by its number and the batch."""
    thresholds = reference.contract.thresholds
    return [
        (
            f"image {number}, batch {batch}",
            compare_detections(
                ours,
                theirs,
                score_threshold=thresholds.score,
                box_tolerance_px=BOX_PX,
                score_tolerance=SCORE,
                nms_iou=thresholds.nms_iou,
                max_detections=thresholds.max_detections,
            ),
        )
        for number, (ours, theirs) in enumerate(zip(expected, found, strict=True))
    ]


def parts(frames: Sequence[Frame], size: int) -> Iterator[Sequence[Frame]]:
    """The frames in groups; neighbours of other sizes share a batch."""
    yield from (frames[start : start + size] for start in range(0, len(frames), size))


def awkward(frame: Frame) -> list[Frame]:
    """One photograph at many sizes, an empty image, and what a grey and an RGBA file give."""
    frames = [cv2.resize(frame, (width, height)) for height, width in SIZES]
    frames.append(np.zeros_like(frame))
    with tempfile.TemporaryDirectory() as folder:
        for name, pixels in (
            ("grey.png", cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)),
            ("rgba.png", cv2.cvtColor(frame, cv2.COLOR_BGR2BGRA)),
        ):
            path = Path(folder) / name
            cv2.imwrite(str(path), pixels)
            frames.append(read_image(path))
    return frames


if __name__ == "__main__":
    main()
