"""What a step and an image cost here, measured; and how many epochs the budget leaves each training."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from anchorline.runtime.io.errors import SettingsError
from anchorline.train.data.dataset import Batch, groups, read_batches, single_threaded_opencv
from anchorline.train.loop.trainer import PhaseConfig, Trainer, steps_of_epoch
from anchorline.train.predict import TorchDetector
from paper_experiments.proposals import DenseDetector
from paper_experiments.runs import COUNTS, SELECTIVE_SEARCH, TEST_PROPOSALS, WITHOUT_NMS, Run, runs_of
from paper_experiments.study import Study

WARM, MEASURED = 2, 8  # steps
IMAGES = 3
SPARE = 0.1  # of the budget, for what the estimate does not know
LEAST = 4  # epochs: one for each step of alternating training
# Alternating's epoch against a joint one: 37 to 55 s (results/alternating.csv and bccd.csv).
ALTERNATING = 0.7
SEARCH_S = 2.0  # seconds of selective search an image; the paper says 1 to 2


@dataclass(frozen=True)
class Costs:
    """Seconds of one joint training step, of detecting in one test image, and of doing so densely.

    ``anchors`` is the number of dense windows in an image.
    """

    step_s: float
    image_s: float
    dense_s: float
    anchors: int

    def detecting(self, rois: int) -> float:
        """Seconds for one image with ``rois`` proposals: a line through the two that were measured."""
        extra = max(0, min(rois, self.anchors) - TEST_PROPOSALS)
        slope = (self.dense_s - self.image_s) / max(1, self.anchors - TEST_PROPOSALS)
        return self.image_s + extra * max(0.0, slope)


def measure_costs(study: Study) -> Costs:
    """Time the joint training's own steps, its loader included, and an untrained model's detections."""
    settings = study.settings(Run("joint", 0), LEAST)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model_path = folder / "model.safetensors"
        phase = PhaseConfig(
            *(settings, study.train_data, study.device, folder, model_path, 1), backbone_weights=study.weights
        )
        trainer = Trainer(phase)
        step_s = _step_seconds(trainer)
        detector = TorchDetector(trainer.model, trainer.contract, str(study.device))
        dense = DenseDetector(trainer.model, trainer.contract, str(study.device))
        frames = [image.load() for image in study.test_data.images[:IMAGES]]
        return Costs(
            step_s, _image_seconds(detector, frames), _image_seconds(dense, frames), anchor_count(study)
        )


def _image_seconds(detector: TorchDetector, frames: Sequence[NDArray[np.uint8]]) -> float:
    """The median over ``frames``, after one to warm up."""
    detector.batch([frames[0]])
    return statistics.median(_seconds(partial(detector.batch, [frame])) for frame in frames)


def _step_seconds(trainer: Trainer) -> float:
    trainer.model.train()
    times = []
    with single_threaded_opencv():
        steps = _endless_steps(trainer)
        for _ in range(WARM):
            trainer.train_step(next(steps))
        for _ in range(MEASURED):
            times.append(_seconds(lambda: trainer.train_step(next(steps))))
    return sum(times) / len(times)


def _endless_steps(trainer: Trainer) -> Iterator[list[Batch]]:
    while True:
        yield from groups(read_batches(trainer.loader), trainer.settings.training.accumulate)
        trainer.sampler.epoch += 1


def anchor_count(study: Study) -> int:
    """Anchors on the canvas of one image: k at each place of the map of stride 16."""
    height, width = study.model.canvas
    return -(-height // 16) * -(-width // 16) * study.model.anchors_per_place


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def evaluation_seconds(run: Run, study: Study, costs: Costs) -> float:
    """What a run measures, in seconds: passes over the test images, and over the training images."""
    test, train, detect = len(study.test_data), len(study.train_data), costs.detecting
    once, search = detect(TEST_PROPOSALS), run.experiment == "selective-search"
    if search:
        found = SEARCH_S * (test + train) if study.search is None else 0.0
        return 0.0 if study.no_search else found + test * detect(SELECTIVE_SEARCH)
    return {
        "joint": 2 * test * once,
        "alternating": (4 * test + 2 * train) * once,
        "one-stage": test * costs.dense_s,
        "proposals": test * (4 * (once + sum(map(detect, COUNTS))) + detect(WITHOUT_NMS)),
        "timing": 150 * once,
    }.get(run.experiment, 2 * test * once)


def training_seconds(run: Run, study: Study, costs: Costs) -> float:
    """Seconds of one epoch of a run; but for alternating taken for a joint one, which no other exceeds."""
    if not run.trains or (run.experiment == "selective-search" and study.no_search):
        return 0.0
    share = ALTERNATING if run.experiment == "alternating" else 1.0
    return share * costs.step_s * steps_of_epoch(len(study.train_data), study.settings(run, LEAST))


@dataclass(frozen=True)
class Schedule:
    """The runs, the epochs of each training, and the seconds estimated for training and measuring."""

    runs: tuple[Run, ...]
    epochs: int
    sweep_seeds: tuple[int, ...]
    training_s: float
    evaluation_s: float


def plan_epochs(
    study: Study, costs: Costs, seconds: float, seeds: Sequence[int], only: Sequence[str], wanted: int
) -> Schedule:
    """The epochs that ``seconds`` leave each training, the same for all.

    Where they are fewer than ``wanted``, anchors and lambda lose seeds, the last first, but for one. Raises
    ``SettingsError`` where not even four epochs fit.
    """
    for count in range(len(seeds), 0, -1):
        runs = runs_of(seeds, seeds[:count], only)
        epoch = sum(training_seconds(run, study, costs) for run in runs)
        measuring = sum(evaluation_seconds(run, study, costs) for run in runs)
        left = (1 - SPARE) * seconds - measuring
        epochs = int(left // epoch) if epoch and left > 0 else (LEAST if not epoch else 0)
        if epochs >= wanted:
            break
    if epochs < LEAST:
        least = (LEAST * epoch + measuring) / (1 - SPARE) / 60
        raise SettingsError(
            f"--budget leaves {max(0.0, left) / 60:.1f} minutes for training, and {LEAST} epochs of each run "
            f"take {LEAST * epoch / 60:.1f}; expected {least:.1f} minutes, fewer --seeds, or --only"
        )
    return Schedule(runs, epochs, tuple(seeds[:count]), epochs * epoch, measuring)


def fixed_epochs(
    study: Study, costs: Costs, seeds: Sequence[int], only: Sequence[str], epochs: int
) -> Schedule:
    """The same with ``epochs`` as they were asked for."""
    runs = runs_of(seeds, seeds, only)
    epoch = sum(training_seconds(run, study, costs) for run in runs)
    measuring = sum(evaluation_seconds(run, study, costs) for run in runs)
    return Schedule(runs, epochs, tuple(seeds), epochs * epoch, measuring)
