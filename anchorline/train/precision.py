"""Mixed precision: which type the heavy layers compute in."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def computes_bf16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 natively, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The autocast context for ``precision`` (``fp32``, ``bf16``, ``auto``) on ``device``."""
    if precision == "bf16" or (precision == "auto" and computes_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
