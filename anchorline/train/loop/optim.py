"""Optimiser, learning-rate schedule, the moving average of the weights, and mixed precision."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from anchorline.runtime.io.errors import SettingsError
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.settings import TrainingSettings

# Of the one-cycle rate: the share of the training in which it rises, and where it begins.
RISING = 0.3
FIRST_RATE = 0.04


def computes_bf16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 natively, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The autocast context for ``precision`` (``fp32``, ``bf16``, ``fp16``, ``auto``) on ``device``."""
    if precision == "fp16":
        return torch.autocast(device.type, dtype=torch.float16)
    if precision == "bf16" or (precision == "auto" and computes_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def build_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """The scaler of the loss that keeps fp16's gradients in range; does nothing for other precisions.

    Raises ``SettingsError`` for fp16 off the GPU, where it is neither faster nor safer than bf16.
    """
    if precision == "fp16" and device.type != "cuda":
        raise SettingsError(
            "training.precision is 'fp16' without a CUDA device; expected 'bf16', 'auto' or 'fp32'"
        )
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def build_optimiser(model: FasterRCNN, settings: TrainingSettings) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW; no weight decay on norms and biases, backbone and biases at own rates."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = settings.backbone_rate if name.startswith("backbone.body.") else 1.0
            rate = settings.learning_rate * share
            if name.endswith(".bias"):
                rate *= settings.bias_rate
            decay = settings.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    members = [{"params": each, "lr": rate, "weight_decay": decay} for (rate, decay), each in groups.items()]
    # On a processor a parameter is updated in one pass, where the default takes five.
    fused = True if next(model.parameters()).device.type == "cpu" else None
    if settings.optimiser == "adamw":
        betas = (settings.momentum, 0.999)
        return torch.optim.AdamW(members, lr=settings.learning_rate, betas=betas, fused=fused)
    return torch.optim.SGD(members, lr=settings.learning_rate, momentum=settings.momentum, fused=fused)


def build_schedule(optimiser: torch.optim.Optimizer, settings: TrainingSettings, steps: int) -> LambdaLR:
    """Linear warm-up, then ``settings.lr_schedule`` over ``steps`` steps in all."""

    def factor(step: int) -> float:
        progress = min(1.0, step / max(1, steps))
        if settings.lr_schedule == "one-cycle":
            # Up along a cosine for the first share, down to zero for the rest (Smith and Topin, 2018).
            if progress < RISING:
                return FIRST_RATE + (1 - FIRST_RATE) * 0.5 * (1 - math.cos(math.pi * progress / RISING))
            return 0.5 * (1 + math.cos(math.pi * (progress - RISING) / (1 - RISING)))
        done = min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
        warmup = settings.warmup_factor + (1 - settings.warmup_factor) * done
        if settings.lr_schedule == "step":
            return warmup * 0.1 ** sum(progress >= milestone for milestone in settings.milestones)
        return warmup * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimiser, factor)


class MovingAverage:
    """An exponential moving average of a model's state; short at first, so early weights fade fast."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Take up an earlier average, on the device this one is on."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
        self.updates = updates

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = [(self.state[name], tensor) for name, tensor in model.state_dict().items()]
        for kept, now in pairs:
            if not now.is_floating_point():
                kept.copy_(now)
        averaged, current = zip(*(pair for pair in pairs if pair[1].is_floating_point()), strict=True)
        torch._foreach_lerp_(averaged, current, weight)
