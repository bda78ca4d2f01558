"""What must hold before and during a training: usable data and device, finite numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from anchorline.data.dataset import Dataset
from anchorline.runtime.io.errors import DataError, SettingsError
from anchorline.train.loop.distributed import process_count
from anchorline.train.loop.launch import own_cuda_device, place, uses_cuda


def check_data(data: Dataset, validation: Dataset | None) -> None:
    """Raise ``DataError`` unless there is something to learn, and to measure in the classes learnt."""
    _check_objects(data, "train on")
    if validation is None:
        return
    _check_objects(validation, "validate with")
    unknown = sorted(set(validation.names) - set(data.names))
    if unknown:
        raise DataError(
            f"{validation.spec}: has the class {unknown[0]!r}, {data.spec} has only "
            f"{', '.join(data.names)}; validate with data of the trained classes"
        )


def _check_objects(data: Dataset, use: str) -> None:
    # Difficult objects and crowds are neither learnt nor counted.
    if all((image.difficult | image.crowd).all() for image in data):
        raise DataError(f"{data.spec}: holds no labelled object; expected at least one box to {use}")


def check_proposals(
    regime: str, proposals: Path | None, validates: bool, validation_proposals: Path | None
) -> None:
    """Raise ``SettingsError`` unless files of stored proposals are given where the schedule uses them."""
    if regime == "fast-rcnn" and proposals is None:
        raise SettingsError(
            "schedule 'fast-rcnn' trains on stored proposals and none are given; expected --proposals FILE, "
            "as anchorline proposals writes it"
        )
    if regime != "fast-rcnn" and (proposals is not None or validation_proposals is not None):
        raise SettingsError(
            f"stored proposals are given, and schedule {regime!r} makes its own; "
            "expected them with --schedule fast-rcnn only"
        )
    if validation_proposals is not None and not validates:
        raise SettingsError(
            f"{validation_proposals}: proposals for validation are given without validation data; "
            "expected --val SPEC with --val-proposals"
        )


def check_processes(data: Dataset, batch: int, processes: int) -> None:
    """Raise ``SettingsError`` where one of several processes would have no image in a batch or an epoch."""
    if processes > 1 and batch < processes:
        raise SettingsError(
            f"training.batch is {batch}, which {processes} processes share; expected one image for each at "
            f"least: training.batch={processes}, or --nproc-per-node {batch}"
        )
    if processes > 1 and len(data) < processes:
        raise SettingsError(
            f"{data.spec}: has {len(data)} images for {processes} processes; expected at least one for each: "
            f"--nproc-per-node {len(data)}"
        )


def choose_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is CUDA where there is one. Raises ``SettingsError``.

    Of several processes each takes the GPU of its rank on the machine.
    """
    if process_count() > 1 and uses_cuda(name):
        return own_cuda_device(name, place())
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which the device "meta" cannot
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise SettingsError(
            f"device {name!r} cannot be used ({reason}); expected auto, cpu or cuda"
        ) from None
    return device


def not_finite(values: Mapping[str, float]) -> str:
    """The names and values that are NaN or infinite, as text; empty when all are finite."""
    return ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))


def first_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor that holds NaN or an infinity; empty when there is none."""
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), "")
