"""Small trainings: a narrow model, a few small scenes, a tenth of a second a step."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import runpy
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.data.synthetic import synthetic_dataset
from anchorline.train.loop.metrics import StepReport
from anchorline.train.loop.train import train
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import Settings, TrainingSettings

# What the processes below import, so that the server they are forked from has it once for all of them.
PRELOADED = [
    *("torch", "torch.distributed.rendezvous", "torch.utils.data", "torchvision"),
    *("anchorline.cli", "anchorline.cli.train", "anchorline.evaluation.evaluation"),
    *("anchorline.data.synthetic", "anchorline.train.predict", "anchorline.train.loop.train"),
]


class Recorder:
    """Keeps the reports of a training; raises ``error`` after step ``at``, where one is given."""

    def __init__(self, at: int = -1, error: type[BaseException] = AssertionError) -> None:
        self.reports: list[StepReport] = []
        self.at, self.error = at, error

    def __call__(self, report: StepReport) -> None:
        self.reports.append(report)
        if report.step == self.at:
            raise self.error

    @property
    def losses(self) -> list[dict[str, float]]:
        return [dict(report.losses) for report in self.reports]


@pytest.fixture(autouse=True)
def _eager_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers give way to other processes, and on a machine full of tests they would wait for minutes."""
    monkeypatch.setattr(os, "nice", lambda _: 0, raising=False)


@pytest.fixture(scope="session")
def recorder() -> type[Recorder]:
    """The class ``Recorder``, for ``train(..., report=...)``."""
    return Recorder


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Settings]:
    """``tiny(model={...}, **training)``: settings of 2 epochs of 2 steps on the scenes."""

    def settings(model: dict[str, object] | None = None, **training: object) -> Settings:
        architecture: dict[str, object] = {
            "backbone": "mobilenet_v2_050",
            "neck": "single",
            "anchor_sizes": ((16.0, 32.0),),
            "canvas": (64, 96),
            "backbone_norm": "live",
            "representation": 32,
            "rpn_pre_nms": 50,
            "rpn_post_nms": 30,
        }
        schedule: dict[str, object] = {
            "epochs": 2,
            "batch": 4,
            "warmup_steps": 2,
            "workers": 0,
            "rpn_pre_nms": 50,
            "rpn_post_nms": 30,
            "roi_samples": 32,
        }
        return Settings(
            ModelSettings(**{**architecture, **(model or {})}),  # type: ignore[arg-type]
            TrainingSettings(**{**schedule, **training}),  # type: ignore[arg-type]
        )

    return settings


@pytest.fixture(scope="session")
def scenes() -> Dataset:
    """Eight small scenes, drawn once."""
    drawn = synthetic_dataset(8, seed=1, size=(96, 128))
    return dataclasses.replace(drawn, images=tuple(_in_memory(image) for image in drawn))


def _in_memory(image: LabelledImage) -> LabelledImage:
    pixels = image.load()
    return dataclasses.replace(image, load=lambda: pixels)


@pytest.fixture(scope="session")
def squares(labelled: Callable[..., LabelledImage]) -> Dataset:
    """Eight images with a red or a blue square: what a few steps suffice to learn by heart."""
    random = np.random.default_rng(0)
    images = []
    for number in range(8):
        pixels = random.integers(0, 40, (64, 96, 3), dtype=np.uint8)
        x, y = int(random.integers(0, 64)), int(random.integers(0, 32))
        pixels[y : y + 32, x : x + 32] = ((40, 40, 255), (255, 40, 40))[number % 2]
        box = (float(x), float(y), x + 32.0, y + 32.0)
        images.append(labelled(pixels, [box], [number % 2], id=f"square-{number}"))
    return Dataset("squares", ("red", "blue"), tuple(images))


@pytest.fixture(scope="session")
def labelled() -> Callable[..., LabelledImage]:
    """``labelled(pixels, boxes, labels, ...)``: a labelled image that is in memory."""

    def image(
        pixels: NDArray[np.uint8],
        boxes: list[tuple[float, float, float, float]],
        labels: list[int] | None = None,
        *,
        id: str = "image",
        difficult: list[bool] | None = None,
        crowd: list[bool] | None = None,
    ) -> LabelledImage:
        none = [False] * len(boxes)
        return LabelledImage(
            id=id,
            size=(pixels.shape[0], pixels.shape[1]),
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            labels=np.array(labels or [0] * len(boxes), np.int64),
            difficult=np.array(difficult or none, np.bool_),
            crowd=np.array(crowd or none, np.bool_),
            load=lambda: pixels,
        )

    return image


@pytest.fixture(scope="session")
def fork() -> Callable[..., BaseProcess]:
    """``fork(task, options, environment, result)``: start a task of ``one_process.py`` in a process.

    It is forked from a server that has PyTorch loaded: a process of its own costs three seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    script = str(Path(__file__).parent / "one_process.py")

    def run(task: str, options: dict[str, Any], environment: dict[str, str], result: Path) -> BaseProcess:
        names = {"ENVIRONMENT": environment, "TASK": task, "OPTIONS": options, "RESULT": result}
        process = context.Process(target=runpy.run_path, args=(script, names, "one_process"))
        process.start()
        return process

    return run


@pytest.fixture(scope="session")
def finished(
    tiny: Callable[..., Settings], scenes: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run of one epoch on the scenes; not to be changed."""
    out = tmp_path_factory.mktemp("finished")
    train(tiny(epochs=1), scenes, out)
    return out


@pytest.fixture
def files(tmp_path: Path) -> Callable[[], set[str]]:
    """``files()``: every file under ``tmp_path``; fails where one is hidden, as temporary files are."""

    def found() -> set[str]:
        assert not list(tmp_path.rglob(".*")), "temporary files are left"
        return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}

    return found
