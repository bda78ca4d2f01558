"""Imported detectors against torchvision's own, on real images: in PyTorch and through onnxruntime.

    python benchmarks/import_torchvision.py --photos DIR --videos A.mp4 B.mp4 [--models NAME ...]

The weights are drawn (``drawn_weights.py``), so that each image has tens of detections. Of each of three
aspects, eight crops of real pixels in varied sizes, which torchvision pads to one size. Rows go to
``results/import_torchvision.csv``; the exit code is 1 when an exact path misses its tolerances.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from drawn_weights import draw_weights
from numpy.typing import NDArray
from record import append_row

from anchorline.export.importers.torchvision import TorchvisionDetector
from anchorline.export.onnx_export import export_onnx
from anchorline.runtime import Detections, Detector
from anchorline.runtime.canvas import frame_canvas
from anchorline.train.predict import TorchDetector
from anchorline.verify.compare import ComparisonSummary, compare_all

# Smallest first. The number of outputs: COCO's, and a user's.
MODELS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": 91,
    "fasterrcnn_mobilenet_v3_large_fpn": 21,
    "fasterrcnn_resnet50_fpn": 91,
    "fasterrcnn_resnet50_fpn_v2": 21,
}
# Width / height: ranges in which torchvision pads all frames to one size, at 800/1333 and at 320/640.
ASPECTS = {"4:3": (1.325, 1.355), "16:9": (1.745, 1.795), "3:4": (1 / 1.355, 1 / 1.325)}
PER_ASPECT = 8
PYTORCH, ONNX = (0.02, 2e-5), (0.05, 1e-4)  # tolerances: pixels, score
SHARE = 0.995

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Trial:
    """One imported model, torchvision's own, and the frames of each aspect with torchvision's detections."""

    name: str
    imported: Path
    reference: TorchvisionDetector
    frames: dict[str, list[Frame]]
    expected: dict[str, list[Detections]]


def main() -> None:
    """Try the models one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--videos", type=Path, nargs="+", required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    frames = crops(arguments.photos, arguments.videos)
    exact = True
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            exact &= try_model(name, frames, Path(folder))
    sys.exit(0 if exact else 1)


def try_model(name: str, frames: dict[str, list[Frame]], folder: Path) -> bool:
    """Compare one model in every way, append the rows, and say whether the exact paths agree."""
    trial = prepare(name, frames, folder)
    agreeing = []
    for aspect in ASPECTS:
        canvas = frame_canvas(frames[aspect][0].shape[:2], trial.reference.contract)
        for frame in frames[aspect]:
            assert frame_canvas(frame.shape[:2], trial.reference.contract) == canvas
        ours = TorchDetector.load(trial.imported, canvas=canvas)
        agreeing.append(record(trial, aspect, "pytorch", ours.batch, canvas, PYTORCH))
        onnx = folder / "model.onnx"
        export_onnx(trial.imported, onnx, canvas=canvas, verify=False)
        with Detector(onnx, provider="cpu", threads=torch.get_num_threads()) as detector:
            agreeing.append(record(trial, aspect, "onnxruntime", detector.batch, canvas, ONNX))
    return all(agreeing)


def prepare(name: str, frames: dict[str, list[Frame]], folder: Path) -> Trial:
    """Draw the weights, import them, and run torchvision's detector."""
    builder: Callable[..., torchvision.models.detection.FasterRCNN]
    builder = getattr(torchvision.models.detection, name)
    model = builder(weights=None, weights_backbone=None, num_classes=MODELS[name])
    draw_weights(model, [group[0] for group in frames.values()], seed=0)
    checkpoint, imported = folder / "checkpoint.pth", folder / "model.safetensors"
    torch.save({"model": model.state_dict(), "epoch": 3}, checkpoint)
    import_in_process(name, checkpoint, imported, classes_file(name, folder))
    ours = TorchDetector.load(imported)
    reference = TorchvisionDetector(model, ours.contract)
    expected = {aspect: list(map(reference, group)) for aspect, group in frames.items()}
    return Trial(name, imported, reference, frames, expected)


def classes_file(name: str, folder: Path) -> Path | None:
    """Made-up class names where they are not COCO's."""
    if MODELS[name] == 91:
        return None
    path = folder / "classes.txt"
    path.write_text("\n".join(f"class {number}" for number in range(1, MODELS[name])), encoding="utf-8")
    return path


def import_in_process(name: str, checkpoint: Path, out: Path, classes: Path | None) -> None:
    """Import in a process of its own, and record its time and its memory beyond the libraries'."""
    program = (
        "import sys, time; from pathlib import Path; import torchvision\n"
        "from anchorline.export import import_checkpoint\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "name, checkpoint, out, classes = sys.argv[1:]\n"
        "before, start = peak(), time.perf_counter()\n"
        "classes = Path(classes) if classes else None\n"
        "import_checkpoint(checkpoint, Path(out), arch=name, classes=classes, verify=False)\n"
        "print(time.perf_counter() - start, peak() - before)"
    )
    command = [sys.executable, "-c", program, name, str(checkpoint), str(out), str(classes or "")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, more = map(float, done.stdout.split())
    size = checkpoint.stat().st_size
    print(f"{name}: imported in {seconds:.1f} s, memory {more / size:.2f} x the file's {size / 1e6:.0f} MB")
    append_row(
        "import_cost",
        "python benchmarks/import_torchvision.py",
        {
            "model": name,
            "file_mb": round(size / 1e6),
            "seconds": f"{seconds:.1f}",
            "memory_by_file": f"{more / size:.2f}",
        },
    )


def record(
    trial: Trial,
    aspect: str,
    what: str,
    detect: Callable[[Sequence[Frame]], list[Detections]],
    canvas: tuple[int, int],
    tolerance: tuple[float, float],
) -> bool:
    """Compare ``detect`` with torchvision on one aspect, append a row; whether it is within ``tolerance``."""
    expected = trial.expected[aspect]
    found = [detect([frame])[0] for frame in trial.frames[aspect]]
    summary = compare(expected, found, tolerance)
    total = summary.total
    reference, candidate = sum(map(len, expected)), sum(map(len, found))
    shares = total.matched / max(1, reference), total.matched / max(1, candidate)
    print(f"{trial.name} {aspect} {what} {canvas}: {summary.describe()}; {summary.first_disagreement or ''}")
    append_row(
        "import_torchvision",
        "python benchmarks/import_torchvision.py",
        {
            "model": trial.name,
            "outputs": MODELS[trial.name],
            "form": what,
            "canvas": f"{canvas[0]}x{canvas[1]}",
            "images": len(found),
            "torchvision_detections": reference,
            "matched": f"{shares[0]:.4f}",
            "matched_back": f"{shares[1]:.4f}",
            "unexplained": total.missed + total.extra,
            "max_box_px": f"{total.max_box_error:.2g}",
            "max_score": f"{total.max_score_error:.2g}",
        },
    )
    return summary.agrees and min(shares) >= SHARE


def compare(
    expected: Sequence[Detections], found: Sequence[Detections], tolerance: tuple[float, float]
) -> ComparisonSummary:
    return compare_all(
        expected,
        found,
        score_threshold=0.05,
        nms_iou=0.5,
        max_detections=100,
        box_tolerance_px=tolerance[0],
        score_tolerance=tolerance[1],
    )


def crops(photos: Path, videos: Sequence[Path]) -> dict[str, list[Frame]]:
    """For each aspect, crops of photographs and of video frames, 40 to 100 % of the largest possible."""
    rng = np.random.default_rng(5)
    paths = sorted(path for path in photos.iterdir() if path.suffix.lower() in (".jpg", ".png"))
    sources = [cv2.imread(str(path)) for path in paths[:: max(1, len(paths) // 12)][:12]]
    for video in videos:
        capture = cv2.VideoCapture(str(video))
        frames = [frame for ok, frame in iter(capture.read, (False, None)) if ok]
        sources += frames[:: max(1, len(frames) // 6)][:6]
    found = {}
    for aspect, (low, high) in ASPECTS.items():
        group = []
        for index in range(PER_ASPECT):
            source = sources[(index * 3 + len(found)) % len(sources)]
            ratio = rng.uniform(low, high)
            height = min(source.shape[0], source.shape[1] / ratio) * rng.uniform(0.4, 1.0)
            height, width = round(height), round(height * ratio)
            top = rng.integers(source.shape[0] - height + 1)
            left = rng.integers(source.shape[1] - width + 1)
            group.append(np.ascontiguousarray(source[top : top + height, left : left + width]))
        found[aspect] = group
    return found


if __name__ == "__main__":
    main()
