"""The trainer: one optimiser step after another, epochs and validations, and what a resumed run needs."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anchorline.data.dataset import Dataset
from anchorline.data.proposals import ImageProposals
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import ArtefactError, TrainingError
from anchorline.runtime.io.files import atomic_path
from anchorline.train.checkpoint import save_checkpoint
from anchorline.train.data.dataset import (
    Batch,
    CanvasDataset,
    build_loader,
    groups,
    read_batches,
    single_threaded_opencv,
)
from anchorline.train.data.sampler import batch_sizes
from anchorline.train.loop.data_parallel import SharedLosses, synchronise_norms
from anchorline.train.loop.distributed import gather, is_main, mean_of, process_count, rank, wait_for_all
from anchorline.train.loop.metrics import MetricsFile, TensorBoard
from anchorline.train.loop.optim import MovingAverage, autocast, build_optimiser, build_scaler, build_schedule
from anchorline.train.loop.run_checks import first_not_finite, not_finite
from anchorline.train.loop.settings import TrainingSettings
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.settings import Settings

# The progress stands inside the one state file, so that a kill cannot leave two files that disagree.
STATE_FILE = "state.pt"


def save_state(folder: Path, progress: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write ``progress`` (plain values) and ``state`` (state dicts) as one file."""
    with atomic_path(folder / STATE_FILE) as temporary:
        try:
            torch.save({"progress": json.dumps(progress), "state": dict(state)}, temporary)
        except RuntimeError as error:  # how PyTorch reports a full disk
            raise OSError("PyTorch could not write all of it") from error


def load_state(folder: Path, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Progress and state of the last full epoch.

    Raises ``ArtefactError`` when there is none, or when it was trained with other settings.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise ArtefactError(
            f"{path}: no such file; there is no full epoch to resume from, train without --resume"
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        progress, state = json.loads(saved["progress"]), saved["state"]
        trained_with = {table: dict(progress["settings"][table]) for table in ("model", "training")}
    except Exception as error:  # torch.load raises many kinds for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtefactError(f"{path}: cannot be read ({reason[:120]}); train without --resume") from None
    check_trained_with(path, trained_with, settings)
    return progress, state


def check_trained_with(path: Path, trained_with: Mapping[str, Mapping[str, Any]], settings: Settings) -> None:
    """Raise ``ArtefactError`` for the first of ``settings`` that was another one."""
    wanted = json.loads(json.dumps(settings.to_dict()))
    for table, values in wanted.items():
        for name, value in values.items():
            before = trained_with[table].get(name)
            if before != value:
                raise ArtefactError(
                    f"{path}: was trained with {table}.{name} = {before!r}, not {value!r}; "
                    "resume with the same settings, or train without --resume"
                )


# One optimiser step after another: forward, backward, clip, update, average.


# The losses by name of a batch that is on the model's device.
Losses = Callable[[FasterRCNN, Batch, TrainingSettings], dict[str, Tensor]]


def joint_losses(model: FasterRCNN, batch: Batch, settings: TrainingSettings) -> dict[str, Tensor]:
    """All four losses: RPN, and detection on its proposals of the moment."""
    return model.losses(batch.images, batch.image_sizes, batch.targets, settings)


def rpn_losses(model: FasterRCNN, batch: Batch, settings: TrainingSettings) -> dict[str, Tensor]:
    """The RPN's two losses alone."""
    features = model.features(batch.images, batch.image_sizes)
    objectness, deltas = model.rpn.head(features)
    return model.rpn_losses(features, objectness, deltas, batch.image_sizes, batch.targets, settings)


def detection_losses(model: FasterRCNN, batch: Batch, settings: TrainingSettings) -> dict[str, Tensor]:
    """Fast R-CNN's two losses on the batch's stored proposals."""
    if batch.proposals is None:
        raise ValueError("the batch holds no stored proposals; give some to CanvasDataset")
    features = model.features(batch.images, batch.image_sizes)
    return model.detection_losses(features, batch.proposals, batch.targets, settings)


class NotFiniteError(ArithmeticError):
    """A loss or a gradient that is not finite; the message says which."""


class Stepper:
    """Trains ``model`` step by step; holds the optimiser, its schedule and the average of the weights."""

    def __init__(
        self,
        model: FasterRCNN,
        settings: TrainingSettings,
        steps: int,
        device: torch.device,
        losses: Losses = joint_losses,
    ) -> None:
        self.model, self.settings, self.device, self.losses = model, settings, device, losses
        self.optimiser = build_optimiser(model, settings)
        self.schedule = build_schedule(self.optimiser, settings, steps)
        self.scaler = build_scaler(device, settings.precision)
        self.average: MovingAverage | None = None
        self.restart_average()
        if settings.compile:
            model.backbone.compile()
            model.rpn.head.compile()
        self.shared = SharedLosses(model, self._own_losses) if process_count() > 1 else None

    def restart_average(self) -> None:
        """Begin the moving average at the model's weights as they are now."""
        self.average = MovingAverage(self.model, self.settings.ema) if self.settings.ema else None

    @property
    def rate(self) -> float:
        """The learning rate of the next step, of the heads: the backbone may have its own."""
        return float(self.optimiser.param_groups[-1]["lr"])

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights to keep: the moving average where there is one, else the model's own."""
        return self.average.state if self.average is not None else self.model.state_dict()

    def step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One update from several batches, whose gradients are averaged; the mean losses by name.

        Where several processes train together, each has its part of every batch, and all get the same.
        Raises ``NotFiniteError`` and leaves the weights alone where a loss or the gradient is not finite.
        """
        self.optimiser.zero_grad(set_to_none=True)
        values: dict[str, float] = {}
        for number, batch in enumerate(batches, start=1):
            with self._added_up(number < len(batches)):
                found = self._backward(batch, 1.0 / len(batches))
            for name, value in found.items():
                values[name] = values.get(name, 0.0) + value / len(batches)
        self._update()
        return values

    def _own_losses(self, batch: Batch) -> dict[str, Tensor]:
        return self.losses(self.model, batch, self.settings)

    def _added_up(self, wanted: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self.shared is None else self.shared.added_up(wanted)

    def _backward(self, batch: Batch, share: float) -> dict[str, float]:
        batch = batch.to(self.device)
        with autocast(self.device, self.settings.precision):
            losses = self._own_losses(batch) if self.shared is None else self.shared(batch)
        total = torch.stack(list(losses.values())).sum()
        values = mean_of({"loss": total.item(), **{name: loss.item() for name, loss in losses.items()}})
        if bad := not_finite(values):
            raise NotFiniteError(bad)
        self.scaler.scale(total * share).backward()
        return values

    def _update(self) -> None:
        self.scaler.unscale_(self.optimiser)
        limit = self.settings.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        # In fp16 the scaler skips such a step and lowers its factor; otherwise it is a real fault.
        if not self.scaler.is_enabled() and (bad := not_finite({"norm of the gradient": norm.item()})):
            raise NotFiniteError(bad)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to go on as if never stopped."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else (self.average.state, self.average.updates),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up ``state``; a ``KeyError``, ``ValueError`` or ``RuntimeError`` says it does not fit."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load(*state["average"])


# One training from given weights: epochs, validations and what a resumed run needs.
#
# Joint training is one phase; each step of alternating training is one (``alternating.py``).


Report = Callable[["StepReport"], None]
Validate = Callable[[FasterRCNN, Contract], float]


@dataclass(frozen=True)
class StepReport:
    """What a progress display may show: ``step`` of ``steps``, ``epoch``, rate, losses by name.

    In a schedule of several phases steps and epochs count through, and ``phase`` names the present one.
    """

    step: int
    steps: int
    epoch: int
    rate: float
    losses: Mapping[str, float]
    phase: str = ""


@dataclass(frozen=True)
class PhaseResult:
    """Where the checkpoint of a phase lies, and its best validation (None without any)."""

    checkpoint: Path
    steps: int
    best: float | None
    interrupted: bool = False


@dataclass(frozen=True)
class Plan:
    """What a phase trains, for how long, and where its files go.

    ``parts`` of the model are trained, the others stay as they are; where the shared convolutions
    (``backbone``, the pyramid included) do, the statistics of live batch norms stay with them.
    A model that ``needs_proposals`` has no trained RPN. ``metric`` names the validation's figure. With
    ``keep_best`` the checkpoint is the best by it, else the latest. ``first_epoch``, ``first_step`` and
    ``all_steps`` place the phase in its schedule, so that no phase repeats another's random views.
    """

    folder: Path
    checkpoint: Path
    epochs: int
    losses: Losses = joint_losses
    parts: tuple[str, ...] = ("backbone", "rpn", "roi_heads")
    needs_proposals: bool = False
    metric: str = "map50"
    keep_best: bool = True
    name: str = ""
    first_epoch: int = 0
    first_step: int = 0
    all_steps: int = 0

    @property
    def shared_fixed(self) -> bool:
        return "backbone" not in self.parts


class Phase:
    """One training: the model, its optimiser and its files."""

    def __init__(
        self,
        settings: Settings,
        data: Dataset,
        contract: Contract,
        device: torch.device,
        plan: Plan,
        validate: Validate | None = None,
        proposals: Sequence[ImageProposals] | None = None,
        weights: Callable[[FasterRCNN], None] | None = None,
    ) -> None:
        self.settings, self.contract, self.device, self.plan = settings, contract, device, plan
        self.validate = validate
        training = settings.training
        self.model = FasterRCNN(settings.model, len(data.names)).to(device)
        self.model.to(memory_format=torch.channels_last)
        if weights is not None:
            weights(self.model)
        synchronise_norms(self.model, device)
        self.model.backbone.body.freeze(training.frozen_stages)
        for name, part in self.model.named_children():
            if name not in plan.parts:
                part.requires_grad_(False)
        self.views = CanvasDataset(data, settings.model.canvas, contract.resize, training, proposals)
        self.loader, self.sampler = build_loader(self.views, training)
        self.steps = steps_of_epoch(len(data), settings) * plan.epochs
        self.stepper = Stepper(self.model, training, self.steps, device, plan.losses)
        self.metrics = MetricsFile(plan.folder / "metrics.csv", plan.metric)
        self.board: TensorBoard | None = None
        self.epoch, self.step, self.best, self.validations_since_best = 0, 0, -1.0, 0

    def train(self, report: Report | None) -> PhaseResult:
        """All epochs that are left; behind it all processes can read the files, which the main one writes."""
        interrupted = self._train(report)
        wait_for_all()
        return PhaseResult(
            self.plan.checkpoint, self.step, self.best if self.best >= 0 else None, interrupted
        )

    def _train(self, report: Report | None) -> bool:
        """Train, and say whether an interruption has ended it."""
        if self.settings.training.tensorboard and is_main():
            self.board = TensorBoard(self.plan.folder / "tensorboard", self.step)
        try:
            with single_threaded_opencv():
                while self.epoch < self.plan.epochs and not self._out_of_patience():
                    self._train_epoch(report)
                    self.epoch += 1
                    self._finish_epoch()
        except KeyboardInterrupt:
            if self.validate is None or self.best < 0:
                self._save(self.plan.checkpoint)
            return True
        finally:
            self._flush()
            if self.board is not None:
                self.board.close()
        return False

    def _train_epoch(self, report: Report | None) -> None:
        # Seeded per epoch, so that a resumed run draws the samples an uninterrupted one would.
        epoch = self.plan.first_epoch + self.epoch
        # What the images do not decide themselves, dropout, is another draw in each process.
        torch.manual_seed(self.settings.training.seed * 100_003 + epoch + (rank() << 52))
        self.model.train()
        if self.plan.shared_fixed:
            self.model.backbone.eval()  # the statistics of a live batch norm stay too
        self.sampler.epoch = epoch
        ids: tuple[str, ...] = ()
        for batches in groups(read_batches(self.loader), self.settings.training.accumulate):
            ids = tuple(id for batch in batches for id in batch.ids)
            rate = self.stepper.rate
            try:
                losses = self.stepper.step(batches)
            except NotFiniteError as error:
                everyone = tuple(id for part in gather(ids) for id in part)
                raise self._error(str(error), self.step + 1, everyone) from None
            self.step += 1
            self._note_step(rate, losses, report)
        if bad := first_not_finite(self.stepper.weights):
            raise self._error(f"{bad} is not finite", self.step, ids)

    def _note_step(self, rate: float, losses: Mapping[str, float], report: Report | None) -> None:
        self.metrics.add_step(self.step, self.epoch, rate, losses)
        if self.board is not None:
            self.board.add(self.step, {"lr": rate, **losses})
        if report is not None:
            plan = self.plan
            step, steps = plan.first_step + self.step, plan.all_steps or self.steps
            report(StepReport(step, steps, plan.first_epoch + self.epoch, rate, losses, plan.name))

    def _error(self, what: str, step: int, ids: tuple[str, ...]) -> TrainingError:
        kept = (
            f"the last good weights are in {self.plan.folder}"
            if self.epoch
            else "no epoch was finished before it"
        )
        place = f"{self.plan.name}, " if self.plan.name else ""
        return TrainingError(
            f"{what} at {place}step {step}, images {', '.join(ids)}; expected finite numbers: lower "
            f"training.learning_rate or check these images; {kept}"
        )

    def _finish_epoch(self) -> None:
        every = self.settings.training.validate_every
        last = self.epoch == self.plan.epochs
        if self.validate is None or not self.plan.keep_best:
            self._save(self.plan.checkpoint)
        if self.validate is not None and (last or (every and self.epoch % every == 0)):
            self._note_validation(self.validate(self._weighed_model(), self.contract))
        self._flush()
        if is_main():
            save_state(self.plan.folder / "last", self._progress(), self.stepper.state_dict())
        self._save(self.plan.folder / "last" / "model.safetensors")

    def _note_validation(self, value: float) -> None:
        self.metrics.add_validation(self.step, self.epoch, value)
        if self.board is not None:
            self.board.add(self.step, {self.metrics.validation: value})
        self.validations_since_best += 1
        if value > self.best:
            self.best, self.validations_since_best = value, 0
            if self.plan.keep_best:
                self._save(self.plan.checkpoint)

    def _out_of_patience(self) -> bool:
        return 0 < self.settings.training.patience <= self.validations_since_best

    def _weighed_model(self) -> FasterRCNN:
        model = FasterRCNN(self.settings.model, len(self.contract.names))
        model.load_state_dict(self.stepper.weights)
        return model.eval().to(self.device)

    def _save(self, path: Path) -> None:
        if is_main():
            save_checkpoint(path, self.stepper.weights, self.settings.model, self.contract)

    def _flush(self) -> None:
        if is_main():
            self.metrics.flush()

    def _progress(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "validations_since_best": self.validations_since_best,
            "settings": self.settings.to_dict(),
            "data": self.data_size(),
            "processes": process_count(),
        }

    def data_size(self) -> dict[str, Any]:
        return {"classes": list(self.contract.names), "images": self.sampler.images}

    def resume(self) -> None:
        """Go on from the folder's ``last``; raises ``ArtefactError`` without a state of these settings."""
        folder = self.plan.folder / "last"
        progress, state = load_state(folder, self.settings)
        if progress.get("data") != self.data_size():
            raise ArtefactError(
                f"{folder}: was trained on other data ({progress.get('data')}, not {self.data_size()}); "
                "resume with the same data, or train without --resume"
            )
        try:
            self.stepper.load_state_dict(state)
            self.epoch, self.step, self.best = progress["epoch"], progress["step"], progress["best"]
            self.validations_since_best = progress["validations_since_best"]
            before = int(progress.get("processes", 1))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ArtefactError(
                f"{folder}: does not fit this model ({reason}); train without --resume"
            ) from None
        self._check_processes(before)
        self.metrics.resume(self.step)

    def _check_processes(self, before: int) -> None:
        """Other processes than ``before`` may go on where their epochs have as many steps."""
        each = self.steps // self.plan.epochs
        if self.step != self.epoch * each:
            raise ArtefactError(
                f"{self.plan.folder / 'last'}: an epoch had {self.step // max(1, self.epoch)} steps with "
                f"--nproc-per-node {before}, it would have {each} with {process_count()}; resume with "
                f"--nproc-per-node {before}, or train without --resume"
            )
        if before != process_count() and is_main():
            print(
                f"--nproc-per-node was {before} so far and is {process_count()} now: the same images in the "
                "same steps, other rounding",
                file=sys.stderr,
            )


def steps_of_epoch(images: int, settings: Settings) -> int:
    """Optimiser steps in one pass over ``images`` images."""
    batches = len(batch_sizes(images, settings.training.batch, process_count()))
    return -(-batches // settings.training.accumulate)
