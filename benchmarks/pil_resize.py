"""What Pillow's antialiased resize costs against OpenCV's and Pillow's own, and what the plain one changes.

    python benchmarks/pil_resize.py [RUN/model.safetensors]

Costs are processor time of one thread, as multiples of ``cv2.resize`` in the same run; rows go to
``results/pil_resize.csv``. With a checkpoint that was trained on generated scenes, scenes of other sizes are
detected with both resizes: rows of ``results/pil_resize_effect.csv`` say how far the detections agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from record import append_row

from anchorline.data.synthetic import synthetic_dataset
from anchorline.evaluation.evaluation import evaluate
from anchorline.runtime.canvas import place, usual_canvas
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.resize import resize_antialiased
from anchorline.train.checkpoint import load_checkpoint
from anchorline.train.predict import TorchDetector
from anchorline.verify.compare import compare_all

DETECTRON2 = ResizeRule(800, 1333, rounding="nearest")
FRAMES = ((480, 640), (720, 1280), (1080, 1920))
FACTORS = (2 / 3, 1.5, 3.0)  # sides of the scenes, as multiples of the canvas'
SCENES, SEED = 30, 9
REPEATS = 15


def main() -> None:
    """Measure the cost, and the effect on a model where one is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?")
    checkpoint = parser.parse_args().checkpoint
    for size in FRAMES:
        show("pil_resize", cost(size))
    for factor in FACTORS if checkpoint else ():
        show("pil_resize_effect", effect(checkpoint, factor))


def show(name: str, figures: dict[str, object]) -> None:
    print(figures)
    append_row(name, "python benchmarks/pil_resize.py", figures)


def cost(size: tuple[int, int]) -> dict[str, object]:
    """Frames of ``size`` to Detectron2's size for them."""
    height, width = place(size, (1344, 1344), DETECTRON2).valid
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = np.empty((height, width, 3), np.uint8)
    cv2.setNumThreads(1)
    ways: dict[str, Callable[[], object]] = {
        "cv2": lambda: cv2.resize(frame, (width, height), dst=out, interpolation=cv2.INTER_LINEAR),
        "pillow": lambda: np.asarray(
            Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
        ),
        "antialiased": lambda: resize_antialiased(frame, out),
    }
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(REPEATS):
        for name, way in ways.items():
            start = time.thread_time()
            way()
            seconds[name] = min(seconds[name], time.thread_time() - start)
    return {
        "frame": f"{size[0]}x{size[1]}",
        "resized": f"{height}x{width}",
        "pillow_to_cv2": f"{seconds['pillow'] / seconds['cv2']:.1f}",
        "antialiased_to_cv2": f"{seconds['antialiased'] / seconds['cv2']:.1f}",
        "antialiased_to_pillow": f"{seconds['antialiased'] / seconds['pillow']:.2f}",
        "differing_from_pillow": int((ways["pillow"]() != resize_antialiased(frame, out)).sum()),
    }


def effect(checkpoint: Path, factor: float) -> dict[str, object]:
    """Detections of scenes that are ``factor`` times as large as the canvas, with either resize."""
    model, contract = load_checkpoint(checkpoint)
    height, width = usual_canvas(contract)
    size = (round(height * factor), round(width * factor))
    dataset = synthetic_dataset(SCENES, SEED, size)
    frames = [image.load() for image in dataset]
    found, scores = {}, {}
    for interpolation in ("antialiased", "bilinear"):
        rule = dataclasses.replace(contract.resize, interpolation=interpolation)
        detector = TorchDetector(model, dataclasses.replace(contract, resize=rule, input_dtype="uint8"))
        found[interpolation] = detector.batch(frames)
        ready = iter(found[interpolation])
        report = evaluate(
            lambda batch, ready=ready: [next(ready) for _ in batch],
            dataset,
            provider="pytorch",
            precision="fp32",
        )
        scores[interpolation] = report.map
    agreement = compare_all(
        found["antialiased"], found["bilinear"], score_threshold=0.05, nms_iou=0.5, max_detections=100
    ).total
    count = sum(map(len, found["antialiased"]))
    return {
        "canvas": "x".join(map(str, usual_canvas(contract))),
        "scenes": f"{size[0]}x{size[1]}",
        "shrunk_by": f"{factor:.2f}",
        "images": SCENES,
        "detections": count,
        "matched": f"{agreement.matched / max(1, count):.4f}",
        "max_score": f"{agreement.max_score_error:.2g}",
        "map_antialiased": f"{scores['antialiased']:.4f}",
        "map_plain": f"{scores['bilinear']:.4f}",
    }


if __name__ == "__main__":
    main()
