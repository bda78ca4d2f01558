"""One process of a training, started by the fixture ``fork`` with its task in the globals.

``ENVIRONMENT`` is what torchrun would set, ``TASK`` names a function below and ``OPTIONS`` are its
arguments. What it returns or raises goes into ``RESULT``, a file; its stderr and stdout into others beside.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from anchorline.data.dataset import Dataset
from anchorline.data.synthetic import synthetic_dataset
from anchorline.evaluation.evaluation import run_detector
from anchorline.runtime.io.errors import AnchorlineError, DataError
from anchorline.train.loop.distributed import run_shared
from anchorline.train.loop.metrics import StepReport
from anchorline.train.loop.train import train
from anchorline.train.loop.trainer import Trainer
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.predict import load_rpn
from anchorline.train.settings import Settings

ENVIRONMENT: dict[str, str] = globals().get("ENVIRONMENT", {})
TASK: str = globals().get("TASK", "")
OPTIONS: dict[str, Any] = globals().get("OPTIONS", {})
RESULT: Path = globals().get("RESULT", Path())
os.environ.update(ENVIRONMENT)
RANK = int(os.environ.get("RANK", "0"))


class Killed(Exception):
    """Stands for a bug."""


def scenes(images: int) -> Dataset:
    """Small scenes, each of which is drawn once."""
    drawn = synthetic_dataset(images, seed=1, size=(96, 128))
    kept = tuple(dataclasses.replace(each, load=functools.cache(each.load)) for each in drawn)
    return dataclasses.replace(drawn, images=kept)


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


def proposed(checkpoint: Path, cases: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The proposals of an RPN, shared and by this process alone, for each number of images and batch."""
    from anchorline.train.loop.distributed import joined_processes

    detect, found = load_rpn(checkpoint).batch, []
    with joined_processes("cpu"):
        for images, batch in cases:
            data = scenes(images)
            shared = list(run_shared(detect, data, batch))
            both = {"shared": shared, "alone": list(run_detector(detect, data, batch))}
            found.append({name: [(i.boxes, i.scores) for i in each] for name, each in both.items()})
    return found


def waiting() -> None:
    """Join other processes, who never come; a file ``.joining`` appears when PyTorch waits for them."""
    from anchorline.train.loop.distributed import joined_processes

    module = importlib.import_module("torch.distributed.rendezvous")
    real = module.rendezvous

    def rendezvous(*arguments: Any, **options: Any) -> Any:
        RESULT.with_suffix(".joining").touch()
        return real(*arguments, **options)

    module.rendezvous = rendezvous  # type: ignore[attr-defined]
    with joined_processes("cpu"):
        pass


def commanded(arguments: list[str], fault: str = "") -> int:
    """The command line, with a ``fault`` in the third step of the second process."""
    from anchorline.cli import main

    if fault and RANK == 1:
        spoil_third_step(fault)
    return main(arguments)


def record_images() -> list[list[str]]:
    """The ids of the images of each step of this process, filled while it trains."""
    seen: list[list[str]] = []
    step = Trainer.train_step

    def recorded(self: Trainer, batches: Any) -> dict[str, float]:
        seen.append([id for batch in batches for id in batch.ids])
        return step(self, batches)

    Trainer.train_step = recorded  # type: ignore[method-assign]
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


TASKS: dict[str, Callable[..., Any]] = {
    "trained": trained,
    "proposed": proposed,
    "commanded": commanded,
    "waiting": waiting,
}


def _run(task: str, options: dict[str, Any], result: Path) -> None:
    torch.set_num_threads(1)
    os.nice = lambda _: 0  # workers that give way would wait for all other tests
    for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        stream.flush()
        os.dup2(os.open(result.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), stream.fileno())
    outcome: Any
    try:
        outcome = TASKS[task](**options)
    except AnchorlineError as error:
        outcome = (type(error).__name__, str(error))
    result.write_bytes(pickle.dumps(outcome))


if ENVIRONMENT or TASK:
    _run(TASK, OPTIONS, RESULT)
