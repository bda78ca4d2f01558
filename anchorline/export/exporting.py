"""Export a checkpoint to ONNX, and publish it only if onnxruntime agrees with PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from anchorline import __version__
from anchorline.evaluation.compare import ComparisonSummary, compare_all
from anchorline.evaluation.synthetic import generate_scene
from anchorline.export.graph import to_onnx
from anchorline.runtime.canvas import place
from anchorline.runtime.contract import TASKS, Contract
from anchorline.runtime.detector import Detector
from anchorline.runtime.errors import ParityError, SettingsError
from anchorline.runtime.files import atomic_path
from anchorline.train.checkpoint import load_checkpoint, read_header
from anchorline.train.faster_rcnn import FasterRCNN
from anchorline.train.prediction import TorchDetector

# What an fp32 graph may differ by between PyTorch and onnxruntime: sums in another order.
BOX_TOLERANCE = 0.05
SCORE_TOLERANCE = 1e-4

CANVAS_STEP = 32  # the coarsest stride of a backbone

# Sizes that fill the canvas, that leave most of it empty, and extreme shapes.
_CHECK_SIZES = ((240, 320), (480, 640), (64, 512), (512, 64), (100, 100), (33, 47))


@dataclass(frozen=True)
class ExportResult:
    """The published file, its contract, and how it compared with PyTorch (None when not verified)."""

    path: Path
    contract: Contract
    comparison: ComparisonSummary | None


def export_onnx(
    checkpoint: Path,
    out: Path,
    *,
    task: str = "detections",
    canvas: tuple[int, int] | None = None,
    frame_size: tuple[int, int] | None = None,
    max_batch: int | None = None,
    verify: bool = True,
    images: Sequence[NDArray[np.uint8]] = (),
) -> ExportResult:
    """Write the ONNX form of ``checkpoint`` to ``out``.

    ``canvas`` (height, width; multiples of 32) replaces the checkpoint's own; ``frame_size`` (height,
    width) trims it to what frames of a camera fill (see ``trimmed_canvas``). ``max_batch`` bounds the
    otherwise free batch. With ``verify`` the new file must give PyTorch's detections on
    ``images`` (BGR uint8, any sizes; generated scenes when empty), one by one and in mixed batches,
    or ``ParityError`` is raised and nothing is published.
    """
    if task not in TASKS:
        raise SettingsError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    if max_batch is not None and max_batch < 1:
        raise SettingsError(f"max batch is {max_batch}; expected at least 1")
    if out.suffix.lower() != ".onnx":
        raise SettingsError(f"output is {str(out)!r}; expected a file name that ends in .onnx")
    if frame_size is not None:
        if canvas is not None:
            raise SettingsError(
                f"both a canvas {canvas} and a frame size {frame_size} are given; expected one"
            )
        canvas = trimmed_canvas(frame_size, read_header(checkpoint)[1])
    model, contract = load_checkpoint(checkpoint, canvas)
    contract = dataclasses.replace(
        contract,
        task=task,
        max_batch=max_batch,
        source={**contract.source, "exported_by": f"anchorline {__version__}"},
    )
    proto = to_onnx(model, contract)
    comparison = None
    with atomic_path(out) as temporary:
        onnx.save(proto, temporary)
        if verify:
            comparison = compare_with_pytorch(model, temporary, images or check_images())
            if not comparison.agrees:
                raise ParityError(
                    f"{out}: onnxruntime and PyTorch disagree: {comparison.first_disagreement}; "
                    "the file was not published, --no-verify publishes it all the same"
                )
    return ExportResult(out, contract, comparison)


def trimmed_canvas(frame_size: tuple[int, int], contract: Contract) -> tuple[int, int]:
    """The smallest canvas that holds frames of ``frame_size`` at the scale they have on the model's own.

    Both are (height, width). Objects keep their size in pixels, and the empty part of the canvas,
    which costs as much time as the full part, is gone.
    """
    if min(frame_size) < 1:
        raise SettingsError(f"frame size is {frame_size}; expected a height and a width of at least 1 pixel")
    height, width = place(frame_size, contract.canvas, contract.resize).valid
    return -(-height // CANVAS_STEP) * CANVAS_STEP, -(-width // CANVAS_STEP) * CANVAS_STEP


def check_images() -> list[NDArray[np.uint8]]:
    """Generated scenes of several sizes, and an empty image."""
    scenes = [generate_scene(7, size, index)[0] for index, size in enumerate(_CHECK_SIZES) if min(size) >= 64]
    crops = [scenes[0][:h, :w].copy() for h, w in _CHECK_SIZES if min(h, w) < 64]
    return [*scenes, *crops, np.zeros((240, 320, 3), np.uint8)]


def compare_with_pytorch(
    model: FasterRCNN, path: Path, images: Sequence[NDArray[np.uint8]]
) -> ComparisonSummary:
    """Compare the ONNX file at ``path``, on onnxruntime's CPU provider, with ``model``.

    Each image alone, then all of them in mixed batches of up to three.
    """
    with Detector(path, provider="cpu") as candidate:
        reference = TorchDetector(model, candidate.contract)
        expected = [reference(image) for image in images]
        found = [candidate(image) for image in images]
        size = min(3, candidate.contract.max_batch or 3)
        for start in range(0, len(images), size):
            found += candidate.batch(images[start : start + size])
    thresholds, proposals = candidate.contract.thresholds, candidate.contract.task == "proposals"
    return compare_all(
        expected * 2,
        found,
        score_threshold=0.0 if proposals else thresholds.score,
        nms_iou=thresholds.rpn_nms_iou if proposals else thresholds.nms_iou,
        max_detections=thresholds.max_proposals if proposals else thresholds.max_detections,
        box_tolerance_px=BOX_TOLERANCE,
        score_tolerance=SCORE_TOLERANCE,
    )
