"""Train a model: settings and labelled images in, ``RUN/model.safetensors`` out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anchorline.evaluation.data_summary import DataSummary, summarise_data
from anchorline.evaluation.dataset import Dataset
from anchorline.evaluation.evaluate import evaluate
from anchorline.runtime.errors import ArtefactError, TrainingError
from anchorline.runtime.files import atomic_write_text, write_json
from anchorline.train.backbone_weights import IMAGENET, load_backbone_weights, load_imagenet_weights
from anchorline.train.batches import (
    CanvasDataset,
    build_loader,
    groups,
    read_batches,
    single_threaded_opencv,
)
from anchorline.train.checkpoint import contract_of, save_checkpoint
from anchorline.train.faster_rcnn import FasterRCNN
from anchorline.train.metrics import MetricsFile, TensorBoard
from anchorline.train.prediction import TorchDetector
from anchorline.train.run_checks import check_data, choose_device, first_not_finite
from anchorline.train.run_state import load_state, save_state
from anchorline.train.sample_sheet import write_sample_sheet
from anchorline.train.settings import Settings
from anchorline.train.stepping import NotFiniteError, Stepper

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
    backbone_weights: Path | str | None = None,
    resume: bool = False,
    device: str = "auto",
    source: Mapping[str, Any] | None = None,
    report: Report | None = None,
    show_data: Callable[[DataSummary], None] | None = None,
) -> TrainResult:
    """Train a detector on ``data`` and write the run folder ``out``.

    ``out`` receives ``model.safetensors`` (the best by mAP50 where ``validation`` is given, else the
    latest), ``last/`` (the state of the last full epoch, from which ``resume`` goes on),
    ``metrics.csv``, ``settings.json``, ``data.json`` and ``samples.png``. Ctrl-C saves the weights
    and returns. ``backbone_weights`` is a file, or ``"imagenet"`` for torchvision's own weights.
    ``show_data`` is called once, when all is checked and the training begins. Raises ``TrainingError``
    for a loss that is not finite, naming the images; the last good checkpoint stays.
    """
    check_data(data, validation)
    torch.manual_seed(settings.training.seed)
    run = _Run(settings, data, out, validation, choose_device(device), source or {})
    if backbone_weights is not None and not resume:
        body = run.model.backbone.body
        if backbone_weights == IMAGENET:
            load_imagenet_weights(body, settings.model.backbone)
        else:
            load_backbone_weights(body, Path(backbone_weights))
        run.stepper.restart_average()
    if resume:
        run.resume()
    summary = summarise_data(data)
    run.write_beginnings(summary)
    if show_data is not None:
        show_data(summary)
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
        self.views = CanvasDataset(data, settings.model.canvas, self.contract.resize, training)
        self.loader, self.sampler = build_loader(self.views, training)
        self.steps = -(-len(self.sampler) // training.accumulate) * training.epochs
        self.stepper = Stepper(self.model, training, self.steps, device)
        self.metrics = MetricsFile(out / "metrics.csv")
        self.board: TensorBoard | None = None
        self.epoch, self.step, self.best, self.validations_since_best = 0, 0, -1.0, 0

    def train(self, report: Report | None) -> TrainResult:
        """All epochs that are left."""
        try:
            with single_threaded_opencv():
                while self.epoch < self.settings.training.epochs and not self._out_of_patience():
                    self._train_epoch(report)
                    self.epoch += 1
                    self._finish_epoch()
        except KeyboardInterrupt:
            if self.validation is None or self.best < 0:
                self._save(self.out / "model.safetensors")
            return self._result(interrupted=True)
        finally:
            self.metrics.flush()
            if self.board is not None:
                self.board.close()
        return self._result()

    def _train_epoch(self, report: Report | None) -> None:
        # Seeded per epoch, so that a resumed run draws the samples an uninterrupted one would.
        torch.manual_seed(self.settings.training.seed * 100_003 + self.epoch)
        self.model.train()
        self.sampler.epoch = self.epoch
        ids: tuple[str, ...] = ()
        for batches in groups(read_batches(self.loader), self.settings.training.accumulate):
            ids = tuple(id for batch in batches for id in batch.ids)
            rate = self.stepper.rate
            try:
                losses = self.stepper.step(batches)
            except NotFiniteError as error:
                raise self._error(str(error), self.step + 1, ids) from None
            self.step += 1
            self._note_step(rate, losses, report)
        if bad := first_not_finite(self.stepper.weights):
            raise self._error(f"{bad} is not finite", self.step, ids)

    def _note_step(self, rate: float, losses: Mapping[str, float], report: Report | None) -> None:
        self.metrics.add_step(self.step, self.epoch, rate, losses)
        if self.board is not None:
            self.board.add(self.step, {"lr": rate, **losses})
        if report is not None:
            report(StepReport(self.step, self.steps, self.epoch, rate, losses))

    def _error(self, what: str, step: int, ids: tuple[str, ...]) -> TrainingError:
        kept = f"the last good weights are in {self.out}" if self.epoch else "no epoch was finished before it"
        return TrainingError(
            f"{what} at step {step}, images {', '.join(ids)}; expected finite numbers: lower "
            f"training.learning_rate or check these images; {kept}"
        )

    def _finish_epoch(self) -> None:
        every = self.settings.training.validate_every
        last = self.epoch == self.settings.training.epochs
        if self.validation is None:
            self._save(self.out / "model.safetensors")
        elif last or (every and self.epoch % every == 0):
            self._note_validation(self._validate(self.validation))
        self.metrics.flush()
        save_state(self.out / "last", self._progress(), self.stepper.state_dict())
        self._save(self.out / "last" / "model.safetensors")

    def _note_validation(self, map50: float) -> None:
        self.metrics.add_validation(self.step, self.epoch, map50)
        if self.board is not None:
            self.board.add(self.step, {"map50": map50})
        self.validations_since_best += 1
        if map50 > self.best:
            self.best, self.validations_since_best = map50, 0
            self._save(self.out / "model.safetensors")

    def _out_of_patience(self) -> bool:
        return 0 < self.settings.training.patience <= self.validations_since_best

    def _validate(self, data: Dataset) -> float:
        model = FasterRCNN(self.settings.model, len(self.contract.names))
        model.load_state_dict(self.stepper.weights)
        detector = TorchDetector(model.eval(), self.contract, str(self.device))
        return evaluate(detector.batch, data, batch=4, provider=detector.provider).map50

    def _save(self, path: Path) -> None:
        save_checkpoint(path, self.stepper.weights, self.settings.model, self.contract)

    def _progress(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "validations_since_best": self.validations_since_best,
            "settings": self.settings.to_dict(),
            "data": self._data_size(),
        }

    def _data_size(self) -> dict[str, Any]:
        return {"classes": list(self.contract.names), "images": self.sampler.images}

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
            self.stepper.load_state_dict(state)
            self.epoch, self.step, self.best = progress["epoch"], progress["step"], progress["best"]
            self.validations_since_best = progress["validations_since_best"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ArtefactError(
                f"{folder}: does not fit this model ({reason}); train without --resume"
            ) from None
        self.metrics.resume(self.step)

    def write_beginnings(self, summary: DataSummary) -> None:
        """Effective settings, what the data holds, and a picture of the first views with their boxes."""
        text = json.dumps(dataclasses.asdict(self.settings), indent=2, sort_keys=True)
        atomic_write_text(self.out / "settings.json", text + "\n")
        write_json(self.out / "data.json", summary.to_json())
        if self.settings.training.tensorboard:
            self.board = TensorBoard(self.out / "tensorboard", self.step)
        write_sample_sheet(self.views, self.out / "samples.png")

    def _result(self, interrupted: bool = False) -> TrainResult:
        map50 = self.best if self.best >= 0 else None
        return TrainResult(self.out / "model.safetensors", self.step, map50, interrupted)
