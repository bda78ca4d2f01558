"""What a canvas larger than the frame's own costs in agreement and accuracy, and what the float resize does.

    python benchmarks/canvas_effect.py RUN/model.safetensors --data SPEC

A trained checkpoint whose canvas has the shape of the images is treated as an imported one: its frames keep
their scale, and the canvas grows around them. Rows go to ``results/canvas_effect.csv``.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from record import append_row

from anchorline.data.dataset import load_dataset
from anchorline.evaluation.evaluation import evaluate
from anchorline.runtime.canvas import Preprocessor
from anchorline.runtime.contract import ResizeRule
from anchorline.train.checkpoint import load_checkpoint
from anchorline.train.predict import TorchDetector
from anchorline.verify.compare import compare_all

GROWTH = ((0, 0), (0, 32), (0, 64), (0, 128), (128, 0), (128, 128))  # rows and columns more


def main() -> None:
    """Evaluate on each canvas, and with the bytes resize on the exact one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True)
    arguments = parser.parse_args()
    height, width = load_checkpoint(arguments.checkpoint)[0].settings.canvas
    exact = detector(arguments.checkpoint, (height, width), "float32")
    dataset = load_dataset(arguments.data, exact.contract.names)
    frames = [image.load() for image in dataset]
    expected = exact.batch(frames)
    for rows, columns in GROWTH:
        for dtype in ("float32", "uint8") if not rows + columns else ("float32",):
            tried = detector(arguments.checkpoint, (height + rows, width + columns), dtype)
            agreement = compare_all(
                expected, tried.batch(frames), score_threshold=0.05, nms_iou=0.5, max_detections=100
            ).total
            report = evaluate(tried.batch, dataset, provider="pytorch", precision="fp32")
            found = sum(map(len, expected))
            figures = {
                "canvas": f"{height + rows}x{width + columns}",
                "resize": dtype,
                "images": len(frames),
                "detections": found,
                "matched": f"{agreement.matched / max(1, found):.4f}",
                "max_score": f"{agreement.max_score_error:.2g}",
                "map50": f"{report.map50:.4f}",
                "map": f"{report.map:.4f}",
                "preprocess_ms": f"{preprocess_ms(tried, frames):.2f}",
            }
            print(figures)
            append_row(
                "canvas_effect", f"python benchmarks/canvas_effect.py --data {arguments.data}", figures
            )


def detector(checkpoint: Path, canvas: tuple[int, int], dtype: str) -> TorchDetector:
    """The model with its frames at their own scale on another canvas."""
    model, contract = load_checkpoint(checkpoint)
    height, width = model.settings.canvas
    rule = ResizeRule(min(height, width), max(height, width))
    return TorchDetector(model, dataclasses.replace(contract, canvas=canvas, resize=rule, input_dtype=dtype))


def preprocess_ms(tried: TorchDetector, frames: Sequence[NDArray[np.uint8]]) -> float:
    """Best time of three to lay one frame onto the canvas, in milliseconds."""
    preprocess = Preprocessor(tried.contract)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for frame in frames:
            preprocess([frame])
        times.append((time.perf_counter() - start) / len(frames))
    return 1e3 * min(times)


if __name__ == "__main__":
    main()
