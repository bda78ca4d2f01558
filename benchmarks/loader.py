"""Whether loading and augmentation keep up with the training: images per second of each, alone.

    python benchmarks/loader.py --data voc:DIR@trainval --workers 2

The loader runs without a model and the training steps on batches that are in memory. One row goes to
``results/loader.csv``; ``ratio`` is loader over training.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from record import append_row

from anchorline.data.dataset import load_dataset
from anchorline.runtime.contract import ResizeRule
from anchorline.train.data.dataset import (
    Batch,
    CanvasDataset,
    build_loader,
    read_batches,
    single_threaded_opencv,
)
from anchorline.train.loop.trainer import PhaseConfig, Trainer
from anchorline.train.settings import load_preset


def main() -> None:
    """Measure both, print, append the row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--preset", default="mobilenet-v2-fpn-quick")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    settings = load_preset(arguments.preset, [f"training.workers={arguments.workers}"])
    dataset = load_dataset(arguments.data)
    views = CanvasDataset(dataset, settings.model.canvas, ResizeRule(), settings.training)
    loader, sampler = build_loader(views, settings.training)
    with single_threaded_opencv():
        list(read_batches(loader))  # starts the workers
        sampler.epoch = 1
        start = time.perf_counter()
        batches = list(read_batches(loader))
        loading = len(batches) * settings.training.batch / (time.perf_counter() - start)
    cpu, nowhere = torch.device("cpu"), Path()  # no file is written
    trainer = Trainer(PhaseConfig(settings, dataset, cpu, nowhere, nowhere, settings.training.epochs))
    trainer.model.train()
    training = settings.training.batch / _step_seconds(trainer, batches, arguments.steps)
    figures = {
        "workers": arguments.workers,
        "loader_images_s": round(loading, 1),
        "training_images_s": round(training, 1),
        "ratio": round(loading / training, 2),
    }
    print(figures)
    print(append_row("loader", f"python benchmarks/loader.py --preset {arguments.preset}", figures))


def _step_seconds(trainer: Trainer, batches: list[Batch], steps: int) -> float:
    """The median time of a training step, after two to warm up."""
    times = []
    for index in range(steps + 2):
        start = time.perf_counter()
        trainer.train_step([batches[index % len(batches)]])
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
