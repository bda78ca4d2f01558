"""One training from given weights: epochs, validations and what a resumed run needs.

Joint training is one phase; each step of alternating training is one (``alternating.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anchorline.evaluation.dataset import Dataset
from anchorline.evaluation.stored_proposals import ImageProposals
from anchorline.runtime.contract import Contract
from anchorline.runtime.errors import ArtefactError, TrainingError
from anchorline.train.batches import (
    CanvasDataset,
    build_loader,
    groups,
    read_batches,
    single_threaded_opencv,
)
from anchorline.train.checkpoint import save_checkpoint
from anchorline.train.data_parallel import synchronise_norms
from anchorline.train.distributed import gather, is_main, process_count, rank, wait_for_all
from anchorline.train.epoch_sampler import batch_sizes
from anchorline.train.faster_rcnn import FasterRCNN
from anchorline.train.metrics import MetricsFile, TensorBoard
from anchorline.train.run_checks import first_not_finite
from anchorline.train.run_state import load_state, save_state
from anchorline.train.settings import Settings
from anchorline.train.stepping import Losses, NotFiniteError, Stepper, joint_losses

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
