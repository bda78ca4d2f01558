"""Train a model: settings and labelled images in, ``RUN/model.safetensors`` out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anchorline.evaluation.dataset import Dataset
from anchorline.evaluation.evaluate import evaluate
from anchorline.runtime.errors import ArtefactError, TrainingError
from anchorline.runtime.files import atomic_write_text
from anchorline.train.backbone_weights import load_backbone_weights
from anchorline.train.batches import (
    Batch,
    CanvasDataset,
    build_loader,
    read_batches,
    single_threaded_opencv,
)
from anchorline.train.checkpoint import contract_of, save_checkpoint
from anchorline.train.faster_rcnn import FasterRCNN
from anchorline.train.metrics import MetricsFile
from anchorline.train.optimisation import MovingAverage, build_optimiser, build_schedule
from anchorline.train.precision import autocast
from anchorline.train.prediction import TorchDetector
from anchorline.train.run_checks import check_data, choose_device, first_not_finite, not_finite
from anchorline.train.run_state import load_state, save_state
from anchorline.train.settings import Settings

Report = Callable[["StepReport"], None]


@dataclass(frozen=True)
class StepReport:
    """What a progress display may show: ``step`` of ``steps``, ``epoch``, rate, losses by name."""

    step: int
    steps: int
    epoch: int
    rate: float
    losses: Mapping[str, float]


@dataclass(frozen=True)
class TrainResult:
    """Where the best checkpoint lies, and its mAP50 on the validation data (None without any)."""

    checkpoint: Path
    steps: int
    map50: float | None
    interrupted: bool = False


def train(
    settings: Settings,
    data: Dataset,
    out: Path,
    *,
    validation: Dataset | None = None,
    backbone_weights: Path | None = None,
    resume: bool = False,
    device: str = "auto",
    source: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> TrainResult:
    """Train a detector on ``data`` and write the run folder ``out``.

    ``out`` receives ``model.safetensors`` (the best by mAP50 where ``validation`` is given, else the
    latest), ``last/`` (the state of the last full epoch, from which ``resume`` goes on),
    ``metrics.csv`` and ``settings.json``. Ctrl-C saves the weights and returns. Raises
    ``TrainingError`` for a loss that is not finite, naming the batch; the last good checkpoint stays.
    """
    check_data(data, validation)
    torch.manual_seed(settings.training.seed)
    run = _Run(settings, data, out, validation, choose_device(device), source or {})
    if backbone_weights is not None and not resume:
        load_backbone_weights(run.model.backbone.body, backbone_weights)
        run.average = MovingAverage(run.model, settings.training.ema) if settings.training.ema else None
    if resume:
        run.resume()
    run.write_settings()
    return run.train(report)


class _Run:
    """One training: the model, its optimiser and its files."""

    def __init__(
        self,
        settings: Settings,
        data: Dataset,
        out: Path,
        validation: Dataset | None,
        device: torch.device,
        source: Mapping[str, Any],
    ) -> None:
        self.settings, self.out, self.validation, self.device = settings, out, validation, device
        training = settings.training
        self.model = FasterRCNN(settings.model, len(data.names)).to(device)
        self.model.to(memory_format=torch.channels_last)
        self.model.backbone.body.freeze(training.frozen_stages)
        source = {**source, "data": data.spec, "settings": settings.to_dict()}
        self.contract = contract_of(settings.model, data.names, data.category_ids, source)
        self.loader, self.sampler = build_loader(
            CanvasDataset(data, settings.model.canvas, self.contract.resize, training), training
        )
        self.steps = len(self.sampler) * training.epochs
        self.optimiser = build_optimiser(self.model, training)
        self.schedule = build_schedule(self.optimiser, training, self.steps)
        self.average = MovingAverage(self.model, training.ema) if training.ema else None
        self.metrics = MetricsFile(out / "metrics.csv")
        self.epoch, self.step, self.best = 0, 0, -1.0
        self.batch_ids: tuple[str, ...] = ()

    def train(self, report: Report | None) -> TrainResult:
        """All epochs that are left."""
        try:
            with single_threaded_opencv():
                while self.epoch < self.settings.training.epochs:
                    self._train_epoch(report)
                    self.epoch += 1
                    self._finish_epoch()
        except KeyboardInterrupt:
            if self.validation is None or self.best < 0:
                self._save(self.out / "model.safetensors")
            return self._result(interrupted=True)
        finally:
            self.metrics.flush()
        return self._result()

    def _train_epoch(self, report: Report | None) -> None:
        # Seeded per epoch, so that a resumed run draws the samples an uninterrupted one would.
        torch.manual_seed(self.settings.training.seed * 100_003 + self.epoch)
        self.model.train()
        self.sampler.epoch = self.epoch
        for batch in read_batches(self.loader):
            rate = self.optimiser.param_groups[-1]["lr"]  # of the heads: the backbone may have its own
            losses = self._train_step(batch)
            self.step += 1
            self.metrics.add_step(self.step, self.epoch, rate, losses)
            if report is not None:
                report(StepReport(self.step, self.steps, self.epoch, rate, losses))
        if bad := first_not_finite(self._weights()):
            raise self._error(f"{bad} is not finite", self.step)

    def _train_step(self, batch: Batch) -> dict[str, float]:
        training = self.settings.training
        images, sizes = batch.images.to(self.device), batch.image_sizes.to(self.device)
        with autocast(self.device, training.precision):
            losses = self.model.losses(images, sizes, batch.targets.to(self.device), training)
        total = torch.stack(list(losses.values())).sum()
        values = {"loss": total.item(), **{name: loss.item() for name, loss in losses.items()}}
        self.batch_ids = batch.ids
        if bad := not_finite(values):
            raise self._error(bad, self.step + 1)
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        limit = training.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if bad := not_finite({"norm of the gradient": norm.item()}):
            raise self._error(bad, self.step + 1)
        self.optimiser.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model)
        return values

    def _error(self, what: str, step: int) -> TrainingError:
        kept = f"the last good weights are in {self.out}" if self.epoch else "no epoch was finished before it"
        return TrainingError(
            f"{what} at step {step}, images {', '.join(self.batch_ids)}; expected finite numbers: lower "
            f"training.learning_rate or check these images; {kept}"
        )

    def _finish_epoch(self) -> None:
        every = self.settings.training.validate_every
        last = self.epoch == self.settings.training.epochs
        if self.validation is not None and (last or (every and self.epoch % every == 0)):
            map50 = self._validate(self.validation)
            self.metrics.add_validation(self.step, self.epoch, map50)
            if map50 > self.best:
                self.best = map50
                self._save(self.out / "model.safetensors")
        if self.validation is None:
            self._save(self.out / "model.safetensors")
        self.metrics.flush()
        save_state(self.out / "last", self._progress(), self._training_state())
        self._save(self.out / "last" / "model.safetensors")

    def _validate(self, data: Dataset) -> float:
        model = FasterRCNN(self.settings.model, len(self.contract.names))
        model.load_state_dict(self._weights())
        detector = TorchDetector(model.eval(), self.contract, str(self.device))
        return evaluate(detector.batch, data, batch=4, provider=detector.provider).map50

    def _weights(self) -> dict[str, Tensor]:
        return self.average.state if self.average is not None else self.model.state_dict()

    def _save(self, path: Path) -> None:
        save_checkpoint(path, self._weights(), self.settings.model, self.contract)

    def _progress(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "settings": self.settings.to_dict(),
            "data": self._data_size(),
        }

    def _data_size(self) -> dict[str, Any]:
        return {"classes": list(self.contract.names), "images": self.sampler.images}

    def _training_state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": None if self.average is None else (self.average.state, self.average.updates),
        }

    def resume(self) -> None:
        """Go on from ``out/last``; raises ``ArtefactError`` without a state of these settings and data."""
        folder = self.out / "last"
        progress, state = load_state(folder, self.settings)
        if progress.get("data") != self._data_size():
            raise ArtefactError(
                f"{folder}: was trained on other data ({progress.get('data')}, not {self._data_size()}); "
                "resume with the same data, or train without --resume"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.schedule.load_state_dict(state["schedule"])
            if self.average is not None:
                self.average.load(*state["average"])
            self.epoch, self.step, self.best = progress["epoch"], progress["step"], progress["best"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ArtefactError(
                f"{folder}: does not fit this model ({reason}); train without --resume"
            ) from None
        self.metrics.resume(self.step)

    def write_settings(self) -> None:
        """``settings.json``: the effective settings of the run."""
        text = json.dumps(dataclasses.asdict(self.settings), indent=2, sort_keys=True)
        atomic_write_text(self.out / "settings.json", text + "\n")

    def _result(self, interrupted: bool = False) -> TrainResult:
        map50 = self.best if self.best >= 0 else None
        return TrainResult(self.out / "model.safetensors", self.step, map50, interrupted)
