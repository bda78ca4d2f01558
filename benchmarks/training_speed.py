"""Training beside torchvision's own: images a second of both loops, by turns, and their memory.

    python benchmarks/training_speed.py --data voc:DIR@train [--models NAME ...] [--note "loaded machine"]

Each side is a process of its own that trains for good: ours by ``Trainer.run``, torchvision's by the loop
of its ``references/detection`` (PIL images, ``DataLoader``, SGD with warm-up, all losses read for the log).
Both start from the same weights (``drawn_weights.py``), see the same images in the same order without
augmentation, freeze the same layers, and resize to the same canvas as their users do: ours in the loader, on
bytes, torchvision's in the model, on floats. One process works at a time, for some steps; a ratio is the
median over the turns of torchvision's time by ours. The losses differ by which anchors chance has drawn, and
by the grey levels that resizing bytes rounds; on the same pixels with all drawn they are equal
(``tests/train/test_faster_rcnn.py``). Rows go to ``results/training_speed.csv``.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from drawn_weights import draw_weights
from PIL import Image
from record import append_row
from torchvision.transforms.v2 import functional as F

from anchorline.data.dataset import Dataset, load_dataset
from anchorline.export.importers.torchvision import torchvision_model
from anchorline.runtime.backends.cpu_options import usable_cores
from anchorline.train.checkpoint import contract_of, load_checkpoint, save_checkpoint
from anchorline.train.data.dataset import EpochSampler
from anchorline.train.loop.metrics import StepReport
from anchorline.train.loop.trainer import PhaseConfig, Trainer
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.settings import Settings, load_preset

# The preset, and what torchvision's builder freezes of it by default (``trainable_backbone_layers=3``).
MODELS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": ("mobilenet-v3-large-320-fpn", 3),
    "fasterrcnn_resnet50_fpn": ("resnet50-fpn", 2),
}
RATE, MOMENTUM, DECAY = 0.001, 0.9, 1e-4  # a rate at which drawn weights do not diverge
WARM_UP = 2  # steps, not measured
PAUSE = 0.3  # seconds; threads of the side before may still be spinning


class Turn(NamedTuple):
    """What a side did in some steps: losses, seconds by the clock and of processors; its largest memory."""

    losses: list[float]
    seconds: float
    processor_seconds: float
    peak_mib: float


class Turns:
    """Holds a training up: ``after_step`` returns when the next step is wanted."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._begin()

    def _begin(self) -> None:
        self.wanted, self.losses = self.connection.recv(), []
        if not self.wanted:
            os._exit(0)
        self.started, self.used = time.perf_counter(), processor_seconds()

    def after_step(self, loss: float) -> None:
        self.losses.append(loss)
        if len(self.losses) == self.wanted:
            seconds, used = time.perf_counter() - self.started, processor_seconds() - self.used
            self.connection.send(Turn(self.losses, seconds, used, peak_mib()))
            self._begin()


@dataclass(frozen=True)
class Task:
    """What both sides train."""

    settings: Settings
    spec: str
    weights: Path
    threads: int

    def start(self) -> Dataset:
        torch.set_num_threads(self.threads)
        return load_dataset(self.spec)


def main() -> None:
    """Measure the models one after the other."""
    options = parse()
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(name, Path(folder), options)
        print(row)
        if not options.dry_run:
            append_row("training_speed", shlex.join(["python", *sys.argv]), row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="labelled images in files, in landscape format 4:3")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--canvas", type=int, nargs=2, help="height and width, if not the preset's")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4, help="in a turn")
    parser.add_argument("--turns", type=int, default=5, help="of each side")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--note", default="", help="about the machine, for the row")
    parser.add_argument("--dry-run", action="store_true", help="print the rows and write none")
    return parser.parse_args()


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """The row of one model."""
    preset, frozen = MODELS[name]
    overrides = [
        f"batch={options.batch}", "accumulate=1", f"workers={options.workers}", f"frozen_stages={frozen}",
        "precision=fp32", "ema=0", "flip=0", "zoom=[1, 1]", "photometric=0",
        f"learning_rate={RATE}", f"momentum={MOMENTUM}", f"weight_decay={DECAY}",
    ]  # fmt: skip
    if options.canvas:
        overrides.append(f"canvas={options.canvas}")
    settings = load_preset(preset, overrides)
    task = Task(settings, options.data, folder / "weights.safetensors", options.threads)
    draw(task)
    context, ends, processes = multiprocessing.get_context("spawn"), [], []
    for train in (train_ours, train_torchvisions):
        end, other = context.Pipe()
        processes.append(context.Process(target=train, args=(task, other)))
        processes[-1].start()
        ends.append(end)
    first = [take_turn(end, WARM_UP) for end in ends]
    turns: list[list[Turn]] = [[], []]
    for number in range(options.turns):
        for side in (0, 1) if number % 2 else (1, 0):
            turns[side].append(take_turn(ends[side], options.steps))
    for end, process in zip(ends, processes, strict=True):
        end.send(0)
        process.join()
    images = options.batch * options.steps
    pairs = list(zip(*turns, strict=True))
    by_clock = statistics.median(theirs.seconds / ours.seconds for ours, theirs in pairs)
    by_processor = statistics.median(
        theirs.processor_seconds / ours.processor_seconds for ours, theirs in pairs
    )
    losses = [statistics.mean(loss for turn in side for loss in turn.losses) for side in turns]
    return {
        "model": name,
        "canvas": "x".join(map(str, settings.model.canvas)),
        "batch": options.batch,
        "workers": options.workers,
        "threads": options.threads,
        "steps": options.steps * options.turns,
        "images_s": f"{images / statistics.median(ours.seconds for ours, _ in pairs):.3f}",
        "torchvision_images_s": f"{images / statistics.median(theirs.seconds for _, theirs in pairs):.3f}",
        "faster": f"{by_clock:.3f}",
        "faster_by_processor_time": f"{by_processor:.3f}",
        "peak_mib": round(turns[0][-1].peak_mib),
        "torchvision_peak_mib": round(turns[1][-1].peak_mib),
        "first_loss": f"{first[0].losses[0]:.4f}",
        "torchvision_first_loss": f"{first[1].losses[0]:.4f}",
        "mean_loss": f"{losses[0]:.4f}",
        "torchvision_mean_loss": f"{losses[1]:.4f}",
        "note": options.note,
    }


def take_turn(end: Connection, steps: int) -> Turn:
    """Let a side take ``steps`` steps."""
    time.sleep(PAUSE)
    end.send(steps)
    turn: Turn = end.recv()
    if not all(map(math.isfinite, turn.losses)):
        sys.exit(f"losses {turn.losses}; expected finite ones")
    return turn


def draw(task: Task) -> None:
    """Write the weights that both sides start from."""
    data = task.start()
    contract = contract_of(task.settings.model, data.names, None, {}, "detections")
    model = FasterRCNN(task.settings.model, len(data.names))
    drawn = draw_weights(
        torchvision_model(model, contract), [data.images[i].load() for i in range(2)], seed=0
    )
    model.load_state_dict(drawn.state_dict(), strict=False)  # which lacks the frozen norms' counters
    save_checkpoint(task.weights, model.state_dict(), task.settings.model, contract)


def train_ours(task: Task, connection: Connection) -> None:
    """Our side: the trainer as the command runs it."""
    data, folder = task.start(), task.weights.with_name("run")
    turns: list[Turns] = []

    def report(step: StepReport) -> None:
        turns[0].after_step(step.losses["loss"])

    epochs = task.settings.training.epochs
    cpu, out = torch.device("cpu"), folder / "model.safetensors"
    phase = PhaseConfig(task.settings, data, cpu, folder, out, epochs, start=task.weights, report=report)
    trainer = Trainer(phase)
    turns.append(Turns(connection))
    trainer.run()


class Photographs(torch.utils.data.Dataset[tuple[torch.Tensor, dict[str, torch.Tensor]]]):
    """The images as the recipe reads them, with what its converter of COCO keeps of each object."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        item = self.data.images[index]
        assert item.path is not None
        image = F.pil_to_tensor(Image.open(item.path).convert("RGB"))
        kept = ~item.ignored
        target = {
            "boxes": torch.from_numpy(item.boxes[kept]),
            "labels": torch.from_numpy(item.labels[kept]) + 1,
            "image_id": torch.tensor(index),
        }
        return F.to_dtype(image, torch.float, scale=True), target


def collate(items: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(*items, strict=True))


def train_torchvisions(task: Task, connection: Connection) -> None:
    """torchvision's side, as ``references/detection/{train,engine}.py`` train."""
    data, training = task.start(), task.settings.training
    ours, contract = load_checkpoint(task.weights)[:2]
    model = torchvision_model(ours, contract)
    ours.backbone.body.freeze(training.frozen_stages)
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    del ours
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimiser, start_factor=training.warmup_factor, total_iters=training.warmup_steps
    )
    order = [[index for _, index in keys] for keys in EpochSampler(len(data), training.batch, training.seed)]
    loader = torch.utils.data.DataLoader(
        Photographs(data), batch_sampler=order, num_workers=training.workers, collate_fn=collate
    )
    model.train()
    turns = Turns(connection)
    for images, targets in loader:
        losses = model(list(images), list(targets))
        total = sum(losses.values())
        value = total.item()
        if not math.isfinite(value):
            sys.exit(f"loss {value}")
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        schedule.step()
        for loss in losses.values():  # its log keeps them all
            loss.item()
        turns.after_step(value)


def processor_seconds() -> float:
    """Of this process and of the workers that load its images."""
    seconds, ticks = time.process_time(), os.sysconf("SC_CLK_TCK")
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / ticks
    return seconds


def peak_mib() -> float:
    """The largest resident memory of this process; workers have their own."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
