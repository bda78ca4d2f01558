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
from anchorline.evaluation.verify.material import from_frames, scenes
from anchorline.evaluation.verify.record import write_not_executed, write_record
from anchorline.evaluation.verify.report import VerifyReport
from anchorline.evaluation.verify.subject import Subject, onnx_subject
from anchorline.evaluation.verify.verifying import verify as verify_subjects
from anchorline.export.graph import to_onnx
from anchorline.runtime.canvas import padded, place
from anchorline.runtime.contract import CANVAS_KEY, TASKS, Contract
from anchorline.runtime.errors import ParityError, SettingsError
from anchorline.runtime.files import atomic_path
from anchorline.train.checkpoint import load_checkpoint, read_header
from anchorline.train.faster_rcnn import FasterRCNN
from anchorline.train.prediction import TorchDetector
from anchorline.train.stage_outputs import TorchStages
from anchorline.train.tasks import OUTPUTS, check_own_proposals

_NO_LIMIT = 1 << 20  # pixels

# The quick set, for about half a minute: ``anchorline verify`` tries everything. On a large canvas, where one
# image takes seconds, less of it.
QUICK_SCENES = 3
QUICK_TRAPS = ("empty image", "all 255", "mixed sizes in a batch")
LARGE_CANVAS = 500_000  # pixels
LARGE_SCENES = 1
LARGE_TRAPS = ("mixed sizes in a batch",)


@dataclass(frozen=True)
class ExportResult:
    """The published file, its contract, and how it compared with PyTorch (None when not verified)."""

    path: Path
    contract: Contract
    verification: VerifyReport | None


def export_onnx(
    checkpoint: Path,
    out: Path,
    *,
    task: str | None = None,
    canvas: tuple[int, int] | None = None,
    frame_size: tuple[int, int] | None = None,
    max_batch: int | None = None,
    verify: bool = True,
    images: Sequence[NDArray[np.uint8]] = (),
) -> ExportResult:
    """Write the ONNX form of ``checkpoint`` to ``out``.

    ``canvas`` (height, width; multiples of 32) replaces the checkpoint's own; ``frame_size`` (height,
    width) trims it to what frames of a camera fill (see ``trimmed_canvas``). ``max_batch`` bounds the
    otherwise free batch. With ``verify`` the new file must give what PyTorch gives, stage by stage and
    detection by detection, on ``images`` (BGR uint8, any sizes; generated scenes when empty) and in a
    few traps, or ``ParityError`` is raised and nothing is published. The verdict, or that there is none,
    goes to the record beside the file.
    """
    if task is not None and task not in TASKS:
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
    task = task or contract.task
    check_own_proposals(checkpoint, contract, task)
    contract = dataclasses.replace(
        contract,
        task=task,
        outputs=OUTPUTS[task],
        max_batch=max_batch,
        source={
            **contract.source,
            **({CANVAS_KEY: list(canvas)} if canvas else {}),
            "exported_by": f"anchorline {__version__}",
        },
    )
    proto = to_onnx(model, contract)
    report = None
    with atomic_path(out) as temporary:
        onnx.save(proto, temporary)
        if verify:
            report = verify_with_pytorch(checkpoint, model, temporary, images)
            if not report.passed:
                raise ParityError(
                    f"{out}: onnxruntime and PyTorch disagree in {report.reason}; "
                    "the file was not published, --no-verify publishes it all the same"
                )
    if report is None:
        write_not_executed(out, "exported with --no-verify", checkpoint)
    else:
        write_record(out, report)
    return ExportResult(out, contract, report)


def trimmed_canvas(frame_size: tuple[int, int], contract: Contract) -> tuple[int, int]:
    """The smallest canvas that holds frames of ``frame_size`` at the scale they have on the model's own.

    Both are (height, width). Objects keep their size in pixels, and the empty part of the canvas,
    which costs as much time as the full part, is gone. Frames of an imported model have the scale that
    its source library gives them, whatever the model's canvas, and this is the size it pads them to.
    """
    if min(frame_size) < 1:
        raise SettingsError(f"frame size is {frame_size}; expected a height and a width of at least 1 pixel")
    room = (_NO_LIMIT, _NO_LIMIT) if contract.resize.is_bounded else contract.canvas
    return padded(place(frame_size, room, contract.resize).valid)


def verify_with_pytorch(
    checkpoint: Path, model: FasterRCNN, path: Path, images: Sequence[NDArray[np.uint8]] = ()
) -> VerifyReport:
    """Compare the ONNX file at ``path``, on onnxruntime's CPU provider, with ``model``: the quick set."""
    candidate = onnx_subject(path)
    detector = TorchDetector(model, candidate.detector.contract)
    contract = candidate.detector.contract
    large = contract.canvas[0] * contract.canvas[1] > LARGE_CANVAS
    made = scenes(contract.names, LARGE_SCENES if large else QUICK_SCENES)
    dataset = from_frames("the given images", contract.names, images) if images else made
    which = LARGE_TRAPS if large else QUICK_TRAPS
    try:
        return verify_subjects(
            Subject(checkpoint, detector, TorchStages(detector)), candidate, dataset, which_traps=which
        )
    finally:
        candidate.close()
