"""The trainer: one phase of a training, from fresh weights or a saved state to its last checkpoint.

Joint training is one phase; alternating training is four of them (``alternating.py``).
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from anchorline.data.dataset import Dataset
from anchorline.data.proposals import read_proposals
from anchorline.data.slices import object_sides
from anchorline.data.summary import DataSummary, summarise_data
from anchorline.evaluation.evaluation import proposal_recall
from anchorline.runtime.canvas import unmixed
from anchorline.runtime.io.errors import ArtefactError, TrainingError, reason_of
from anchorline.runtime.io.files import atomic_path, atomic_write_text, expect_regular, write_json
from anchorline.runtime.slices import OBJECT_SIDES, in_slices
from anchorline.train.checkpoint import contract_of, load_checkpoint, save_checkpoint
from anchorline.train.data.dataset import (
    Batch,
    CanvasDataset,
    batch_sizes,
    build_loader,
    groups,
    read_batches,
    single_threaded_opencv,
    worker_deaths,
    write_sample_sheet,
)
from anchorline.train.loop import distributed
from anchorline.train.loop.metrics import MetricsFile, Report, StepReport
from anchorline.train.loop.optim import MovingAverage, autocast, build_optimiser, build_scaler, build_schedule
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.predict import STORED_PROPOSALS, StoredProposalDetector, TorchDetector
from anchorline.train.pretrained import load_pretrained
from anchorline.train.settings import RENAMED, Settings

STATE_FILE = "state.pt"
COUNTERS = ("epoch", "step", "best", "validations_since_best")
VALIDATION_BATCH = 4  # images


@dataclass(frozen=True)
class PhaseConfig:
    """What a phase trains, on what, from which weights, and where its files go."""

    settings: Settings
    data: Dataset
    device: torch.device
    folder: Path
    checkpoint: Path
    epochs: int
    parts: tuple[str, ...] = ("backbone", "rpn", "roi_heads")
    """What is trained; the rest is frozen. With the shared convolutions (``backbone``, the pyramid included)
    the statistics of live batch norms are."""
    proposals: Path | None = None
    """Stored proposals for the detection head to train on, where the RPN is not trained with it."""
    backbone_weights: Path | str | None = None
    start: Path | None = None
    """A checkpoint that the weights are taken from, but for those of the parts in ``fresh``."""
    fresh: tuple[str, ...] = ()
    validation: Dataset | None = None
    validation_proposals: Path | None = None
    keep_best: bool = True
    """Keep the best checkpoint by validation; else, or without one, the latest."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What the checkpoints say about their origin."""
    report: Report | None = None
    name: str = ""
    first_epoch: int = 0
    """Of the phase in its schedule, as ``first_step``: no phase repeats another's random views."""
    first_step: int = 0
    all_steps: int = 0
    """Of the schedule; 0 for a single phase."""

    @property
    def task(self) -> str:
        """What the trained model delivers, as in its contract."""
        return "detections" if "roi_heads" in self.parts else "proposals"

    @property
    def metric(self) -> str:
        """The figure of the validations."""
        return "map50" if "roi_heads" in self.parts else "recall50"

    @property
    def needs_proposals(self) -> bool:
        """Whether the model has no RPN that fits its backbone, and detects on stored proposals alone."""
        return "backbone" in self.parts and "rpn" not in self.parts


@dataclass(frozen=True)
class TrainResult:
    """Where the best checkpoint lies, and its mAP50 on the validation data (None without any).

    ``recall`` is that of an RPN trained alone: of the validation's objects by its proposals, at IoU 0.5.
    """

    checkpoint: Path
    steps: int
    map50: float | None
    interrupted: bool = False
    recall: float | None = None


class NotFiniteError(ArithmeticError):
    """A loss or a gradient that is not finite; the message says which."""


class Trainer:
    """Trains a phase: ``begin`` once a run, then ``run``; with ``resume`` from the last full epoch on.

    Raises ``ArtefactError`` where there is no state of these settings and this data, and for damaged
    files; ``SettingsError`` for what cannot be trained here.
    """

    def __init__(self, phase: PhaseConfig, resume: bool = False) -> None:
        settings, training, data = phase.settings, phase.settings.training, phase.data
        self.phase, self.settings, self.device = phase, settings, phase.device
        stored = None if phase.proposals is None else read_proposals(phase.proposals, data)
        self.validation, self.validation_proposals = phase.validation, None
        if phase.validation is not None and phase.needs_proposals:
            if phase.validation_proposals is None:
                self.validation = None
            else:
                self.validation_proposals = read_proposals(phase.validation_proposals, phase.validation)
        source = {**phase.source, "data": data.spec, "settings": settings.to_dict()}
        if phase.needs_proposals:
            source[STORED_PROPOSALS] = True
        self.contract = contract_of(settings.model, data.names, data.category_ids, source, phase.task)
        if (sides := object_sides(data, self.contract)) is not None:
            source[OBJECT_SIDES] = sides
            self.contract = dataclasses.replace(self.contract, source=source)

        torch.manual_seed(training.seed)  # every phase draws its fresh layers from the same seed
        self.model = FasterRCNN(settings.model, len(data.names))
        self.model.to(phase.device).to(memory_format=torch.channels_last)
        if not resume:
            self._take_weights()
        distributed.synchronise_norms(self.model, phase.device)
        self.model.backbone.body.freeze(training.frozen_stages)
        for name, part in self.model.named_children():
            if name not in phase.parts:
                part.requires_grad_(False)

        self.views = CanvasDataset(data, settings.model.canvas, self.contract.resize, training, stored)
        self.loader, self.sampler = build_loader(self.views, training)
        self.steps = steps_of_epoch(len(data), settings) * phase.epochs
        self.optimiser = build_optimiser(self.model, training)
        self.schedule = build_schedule(self.optimiser, training, self.steps)
        self.scaler = build_scaler(phase.device, training.precision)
        self.stateful: dict[str, Any] = {"model": self.model, "optimiser": self.optimiser}
        self.stateful |= {"schedule": self.schedule, "scaler": self.scaler}
        self.average = MovingAverage(self.model, training.ema) if training.ema else None
        if training.compile:
            self.model.backbone.compile()
            self.model.rpn.head.compile()
        several = distributed.process_count() > 1
        self.shared = distributed.shared_losses(self.model, self.losses) if several else None
        self.metrics = MetricsFile(phase.folder / "metrics.csv", phase.metric)
        self.epoch, self.step, self.best, self.validations_since_best = 0, 0, -1.0, 0
        if resume:
            self._resume()

    def _take_weights(self) -> None:
        """Fill the model with what the phase begins with; layers that this leaves out stay fresh."""
        phase = self.phase
        if phase.start is not None:
            before = load_checkpoint(phase.start)[0]
            for name, part in self.model.named_children():
                if name not in phase.fresh:
                    part.load_state_dict(before.get_submodule(name).state_dict())
        elif phase.backbone_weights is not None:
            local_rank = distributed.place().local_rank
            if local_rank > 0:  # a download happens once on each machine
                distributed.wait_for_all()
            load_pretrained(self.model, phase.backbone_weights, self.settings.training.pretrained_input)
            if local_rank == 0:
                distributed.wait_for_all()

    def begin(self, out: Path, show_data: Callable[[DataSummary], None] | None = None) -> None:
        """Write the settings, what the data holds, and a picture of the first views with their boxes."""
        if not distributed.is_main():
            return  # the others wait for it at the first step
        summary = summarise_data(self.phase.data)
        text = json.dumps(self.settings.to_dict(), indent=2, sort_keys=True)
        atomic_write_text(out / "settings.json", text + "\n")
        write_json(out / "data.json", summary.to_json())
        write_sample_sheet(self.views, out / "samples.png")
        if show_data is not None:
            show_data(summary)

    def run(self) -> TrainResult:
        """Train all epochs that are left, or until Ctrl-C, which saves the weights.

        Behind it all processes can read the files, which the main one writes. Raises ``TrainingError`` for
        a loss that is not finite.
        """
        phase, training, interrupted = self.phase, self.settings.training, False
        if training.tensorboard and distributed.is_main():
            self.metrics.open_board(self.step)
        try:
            with single_threaded_opencv(), worker_deaths():
                while self.epoch < phase.epochs:
                    if 0 < training.patience <= self.validations_since_best:
                        break
                    self._train_epoch()
                    self.epoch += 1
                    self._finish_epoch()
        except KeyboardInterrupt:
            interrupted = True
            if self.validation is None or self.best < 0:
                self._save(phase.checkpoint)
        finally:
            if distributed.is_main():
                self.metrics.close()
        distributed.wait_for_all()
        figures = {phase.metric: self.best} if self.best >= 0 else {}
        return TrainResult(
            phase.checkpoint,
            phase.first_step + self.step,
            figures.get("map50"),
            interrupted,
            figures.get("recall50"),
        )

    def _train_epoch(self) -> None:
        phase, training = self.phase, self.settings.training
        # Seeded per epoch, so that a resumed run draws the samples an uninterrupted one would.
        epoch = phase.first_epoch + self.epoch
        # What the images do not decide themselves, dropout, is another draw in each process.
        torch.manual_seed(training.seed * 100_003 + epoch + (distributed.rank() << 52))
        self.model.train()
        if "backbone" not in phase.parts:
            self.model.backbone.eval()  # the statistics of a live batch norm stay too
        self.sampler.epoch = epoch
        ids: tuple[str, ...] = ()
        for batches in groups(read_batches(self.loader), training.accumulate):
            ids = tuple(id for batch in batches for id in batch.ids)
            rate = float(self.optimiser.param_groups[-1]["lr"])  # of the heads: the backbone may have its own
            try:
                losses = self.train_step(batches)
            except NotFiniteError as error:
                everyone = tuple(id for part in distributed.gather(ids) for id in part)
                raise self._error(str(error), self.step + 1, everyone) from None
            self.step += 1
            self.metrics.add(self.step, self.epoch, {"lr": rate, **losses})
            if phase.report is not None:
                step, steps = phase.first_step + self.step, phase.all_steps or self.steps
                phase.report(StepReport(step, steps, epoch, rate, losses, phase.name))
        for name, tensor in self.weights.items():
            if not torch.isfinite(tensor).all():
                raise self._error(f"{name} is not finite", self.step, ids)

    def _error(self, what: str, step: int, ids: tuple[str, ...]) -> TrainingError:
        kept = f"the last good weights are in {self.phase.folder}"
        if not self.epoch:
            kept = "no epoch was finished before it"
        where = f"{self.phase.name}, " if self.phase.name else ""
        return TrainingError(
            f"{what} at {where}step {step}, images {', '.join(ids)}; expected finite numbers: lower "
            f"training.learning_rate or check these images; {kept}"
        )

    def train_step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One update from several batches, whose gradients are averaged; the mean losses by name.

        Where several processes train together, each has its part of every batch, and all get the same.
        Raises ``NotFiniteError`` and leaves the weights alone where a loss or the gradient is not finite.
        """
        training, share = self.settings.training, 1.0 / len(batches)
        means: dict[str, float] = {}
        self.optimiser.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches, start=1):
            batch = batch.to(self.device)
            more = number < len(batches)  # the processes exchange gradients once a step
            with self.shared.no_sync() if self.shared is not None and more else nullcontext():
                with autocast(self.device, training.precision):
                    losses = self.losses(batch) if self.shared is None else self.shared(batch)
                total = torch.stack(list(losses.values())).sum()
                own = {"loss": total.item(), **{name: loss.item() for name, loss in losses.items()}}
                values = distributed.mean_of(own)
                check_finite(values)
                self.scaler.scale(total * share).backward()
            for name, value in values.items():
                means[name] = means.get(name, 0.0) + value / len(batches)
        self.scaler.unscale_(self.optimiser)
        trained = [each for each in self.model.parameters() if each.grad is not None]
        norm = torch.nn.utils.get_total_norm([cast(Tensor, each.grad) for each in trained])
        if training.clip_norm and not norm <= training.clip_norm:  # else a pass over all of it for nothing
            torch.nn.utils.clip_grads_with_norm_(trained, training.clip_norm, norm)
        # In fp16 the scaler skips such a step and lowers its factor; otherwise it is a real fault.
        if not self.scaler.is_enabled():
            check_finite({"norm of the gradient": norm.item()})
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)
        return means

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The losses by name of what is trained, for a batch on the model's device.

        All four of approximate joint training; the RPN's two; or Fast R-CNN's two on stored proposals.
        """
        model, training, parts = self.model, self.settings.training, self.phase.parts
        if "rpn" in parts and "roi_heads" in parts:
            return model.losses(batch.images, batch.image_sizes, batch.targets, training)
        features = model.features(batch.images, batch.image_sizes)
        if "rpn" in parts:
            scored = model.rpn.score_to_train(features, training)
            return model.rpn.losses(scored, batch.image_sizes, batch.targets, training, features)
        if batch.proposals is None:
            raise ValueError("the batch holds no stored proposals; give some to CanvasDataset")
        return model.roi_heads.losses(features, batch.proposals, batch.targets, training)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights to keep: the moving average where there is one, else the model's own."""
        return self.average.state if self.average is not None else self.model.state_dict()

    def _finish_epoch(self) -> None:
        """Validate where it is time to, and keep checkpoints, metrics and the state to go on from."""
        phase, every = self.phase, self.settings.training.validate_every
        if self.validation is None or not phase.keep_best:
            self._save(phase.checkpoint)
        is_time = self.epoch == phase.epochs or (every and self.epoch % every == 0)
        if self.validation is not None and is_time:
            value = self._validate(self.validation)
            self.metrics.add(self.step, self.epoch, {phase.metric: value}, ".5f")
            self.validations_since_best += 1
            if value > self.best:
                self.best, self.validations_since_best = value, 0
                if phase.keep_best:
                    self._save(phase.checkpoint)
        if distributed.is_main():
            self.metrics.flush()
            self._save_state()
        self._save(phase.folder / "last" / "model.safetensors")

    def _validate(self, data: Dataset) -> float:
        """mAP50, or of an RPN alone the recall of its proposals at IoU 0.5."""
        model = FasterRCNN(self.settings.model, len(self.contract.names))
        model.load_state_dict(self.weights)
        model.eval()
        if self.validation_proposals is None:
            detector = TorchDetector(model, self.contract, str(self.device))
        else:
            share = distributed.own_share(self.validation_proposals, VALIDATION_BATCH)
            detector = StoredProposalDetector(model, self.contract, share, str(self.device))
        if self.phase.task == "proposals":
            found = list(distributed.run_shared(detector.batch, data, VALIDATION_BATCH))
            count = self.contract.thresholds.max_proposals
            return proposal_recall(data.images, found, (count,)).recall[count][0.5]
        slices = self.settings.training.slices if self.validation_proposals is None else None
        detect = in_slices(unmixed(detector), slices, self.contract)
        return distributed.shared_map50(detect, data, VALIDATION_BATCH, detector.provider)

    def _save(self, path: Path) -> None:
        if distributed.is_main():
            save_checkpoint(path, self.weights, self.settings.model, self.contract)

    def _save_state(self) -> None:
        # The progress stands inside the one file, so that a kill cannot leave two files that disagree.
        progress = {
            **{name: getattr(self, name) for name in COUNTERS},
            **record_of(self.phase),
            "processes": distributed.process_count(),
        }
        state: dict[str, Any] = {name: each.state_dict() for name, each in self.stateful.items()}
        state["average"] = None if self.average is None else (self.average.state, self.average.updates)
        with atomic_path(self.phase.folder / "last" / STATE_FILE) as temporary:
            try:
                torch.save({"progress": json.dumps(progress), "state": state}, temporary)
            except RuntimeError as error:  # how PyTorch reports a full disk
                raise OSError("PyTorch could not write all of it") from error

    def _resume(self) -> None:
        """Take up the state of the last full epoch, as if never stopped."""
        folder = self.phase.folder / "last"
        path = folder / STATE_FILE
        expect_regular(path)
        if not path.is_file():
            raise ArtefactError(
                f"{path}: no such file; there is no full epoch to resume from, train without --resume"
            )
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            progress, state = json.loads(saved["progress"]), saved["state"]
            check_record(path, progress, self.phase)
        except ArtefactError:
            raise
        except Exception as error:  # torch.load raises many kinds for damaged files
            raise ArtefactError(
                f"{path}: cannot be read ({reason_of(error)}); train without --resume"
            ) from None
        try:
            for name, each in self.stateful.items():
                each.load_state_dict(state[name])
            if self.average is not None:
                self.average.load(*state["average"])
            for name in COUNTERS:
                setattr(self, name, progress[name])
            processes = int(progress.get("processes", 1))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArtefactError(
                f"{folder}: does not fit this model ({reason_of(error)}); train without --resume"
            ) from None
        # Other processes may go on where their epochs have as many steps.
        each, now = self.steps // self.phase.epochs, distributed.process_count()
        if self.step != self.epoch * each:
            raise ArtefactError(
                f"{folder}: an epoch had {self.step // max(1, self.epoch)} steps with --nproc-per-node "
                f"{processes}, it would have {each} with {now}; resume with --nproc-per-node {processes}, "
                "or train without --resume"
            )
        if processes != now and distributed.is_main():
            print(
                f"--nproc-per-node was {processes} so far and is {now} now: the same images in the "
                "same steps, other rounding",
                file=sys.stderr,
            )
        self.metrics.resume(self.step)


def steps_of_epoch(images: int, settings: Settings) -> int:
    """Optimiser steps in one pass over ``images`` images."""
    batches = len(batch_sizes(images, settings.training.batch, distributed.process_count()))
    return -(-batches // settings.training.accumulate)


def record_of(phase: PhaseConfig) -> dict[str, Any]:
    """What a run writes down of its settings and data: resuming wants the same."""
    data = {"classes": list(phase.data.names), "images": len(phase.data)}
    return {"settings": phase.settings.to_dict(), "data": data}


def check_record(path: Path, record: Mapping[str, Any], phase: PhaseConfig) -> None:
    """Raise ``ArtefactError`` where the ``record`` in ``path`` is of settings or data that give others.

    A setting that it lacks is newer than the run: its default is what the run did.
    """
    wanted = json.loads(json.dumps(record_of(phase)))  # JSON makes lists of tuples
    usual = json.loads(json.dumps(Settings().to_dict()))
    for table, values in wanted["settings"].items():
        before = usual[table]
        before |= {RENAMED.get(name, name): value for name, value in record["settings"][table].items()}
        for name, value in values.items():
            if before.get(name) != value and name != "workers":  # which change no number
                raise ArtefactError(
                    f"{path}: was trained with {table}.{name} = {before.get(name)!r}, not {value!r}; "
                    "resume with the same settings, or train without --resume"
                )
    if record.get("data") != wanted["data"]:
        raise ArtefactError(
            f"{path}: was trained on other data ({record.get('data')}, not {wanted['data']}); "
            "resume with the same data, or train without --resume"
        )


def check_finite(values: Mapping[str, float]) -> None:
    """Raise ``NotFiniteError`` that names the values which are NaN or infinite."""
    if bad := [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]:
        raise NotFiniteError(", ".join(bad))
