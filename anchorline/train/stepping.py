"""One optimiser step after another: forward, backward, clip, update, average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from anchorline.train.batches import Batch
from anchorline.train.data_parallel import SharedLosses
from anchorline.train.distributed import mean_of, process_count
from anchorline.train.faster_rcnn import FasterRCNN
from anchorline.train.optimisation import MovingAverage, build_optimiser, build_schedule
from anchorline.train.precision import autocast, build_scaler
from anchorline.train.run_checks import not_finite
from anchorline.train.training_settings import TrainingSettings

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
