"""Mixed precision: which type the heavy layers compute in."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from anchorline.runtime.errors import SettingsError


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
