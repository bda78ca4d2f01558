"""One process of a training, run by ``test_several_processes.py`` with its task in the globals.

``ENVIRONMENT`` is what torchrun would set, ``TASK`` names a function below and ``OPTIONS`` are its
arguments. What it returns or raises goes into ``RESULT``, a file; its stderr and stdout into others beside.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from anchorline.evaluation.dataset import Dataset
from anchorline.evaluation.evaluate import run_detector
from anchorline.evaluation.synthetic import synthetic_dataset
from anchorline.runtime.errors import AnchorlineError, DataError
from anchorline.train.faster_rcnn import FasterRCNN
from anchorline.train.proposing import load_rpn
from anchorline.train.settings import Settings
from anchorline.train.shared_detection import run_shared
from anchorline.train.stepping import Stepper
from anchorline.train.training import StepReport, train

ENVIRONMENT: dict[str, str] = globals().get("ENVIRONMENT", {})
TASK: str = globals().get("TASK", "")
OPTIONS: dict[str, Any] = globals().get("OPTIONS", {})
RESULT: Path = globals().get("RESULT", Path())
os.environ.update(ENVIRONMENT)
RANK = int(os.environ.get("RANK", "0"))


class Killed(Exception):
    """Stands for a bug."""


def scenes(images: int) -> Dataset:
    return synthetic_dataset(images, seed=1, size=(96, 128))


def trained(
    settings: Settings, images: int, out: Path, validates: bool = False, fault: str = "", **options: Any
) -> dict[str, Any]:
    """Train, and return losses, the images of each step and the result."""
    data, seen = scenes(images), record_images()
    reports: list[StepReport] = []

    def report(step: StepReport) -> None:
        reports.append(step)
        if fault == "bug" and step.step == 3:
            raise Killed

    validation = scenes(7) if validates else None
    result = train(settings, data, out, validation=validation, report=report, **options)
    losses = [dict(each.losses) for each in reports]
    return {"losses": losses, "images": seen, "result": dataclasses.astuple(result)}


def proposed(checkpoint: Path, images: int, batch: int) -> dict[str, Any]:
    """The proposals of an RPN, shared and by this process alone."""
    from anchorline.train.launch import joined_processes

    data = scenes(images)
    with joined_processes("cpu"):
        shared = list(run_shared(load_rpn(checkpoint).batch, data, batch))
    alone = list(run_detector(load_rpn(checkpoint).batch, data, batch))
    both = {"shared": shared, "alone": alone}
    return {name: [(each.boxes, each.scores) for each in found] for name, found in both.items()}


def commanded(arguments: list[str], fault: str = "") -> int:
    """The command line, with a ``fault`` in the third step of the second process."""
    from anchorline.cli import main

    if fault and RANK == 1:
        spoil_third_step(fault)
    return main(arguments)


def record_images() -> list[list[str]]:
    """The ids of the images of each step of this process, filled while it trains."""
    seen: list[list[str]] = []
    step = Stepper.step

    def recorded(self: Stepper, batches: Any) -> dict[str, float]:
        seen.append([id for batch in batches for id in batch.ids])
        return step(self, batches)

    Stepper.step = recorded  # type: ignore[method-assign]
    return seen


def spoil_third_step(fault: str) -> None:
    sound, calls = FasterRCNN.losses, [0]

    def losses(self: FasterRCNN, *arguments: Any) -> dict[str, torch.Tensor]:
        calls[0] += 1
        found = sound(self, *arguments)
        return FAULTS[fault](found) if calls[0] == 3 else found

    FasterRCNN.losses = losses  # type: ignore[method-assign]


def _signal(number: int) -> Callable[[Any], Any]:
    def send(found: Any) -> Any:
        os.kill(os.getpid(), number)
        return found

    return send


def _unreadable(_: Any) -> Any:
    raise DataError("broken.jpg: truncated; copy it again")


FAULTS: dict[str, Callable[[Any], Any]] = {
    "nan": lambda found: {**found, "loss_box": found["loss_box"] * torch.nan},
    "unreadable": _unreadable,
    "SIGKILL": _signal(signal.SIGKILL),
    "SIGTERM": _signal(signal.SIGTERM),
    "SIGINT": _signal(signal.SIGINT),
}


def _run(task: str, options: dict[str, Any], result: Path) -> None:
    torch.set_num_threads(1)
    for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        stream.flush()
        os.dup2(os.open(result.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), stream.fileno())
    outcome: Any
    try:
        outcome = {"trained": trained, "proposed": proposed, "commanded": commanded}[task](**options)
    except AnchorlineError as error:
        outcome = (type(error).__name__, str(error))
    result.write_bytes(pickle.dumps(outcome))


if ENVIRONMENT or TASK:
    _run(TASK, OPTIONS, RESULT)
