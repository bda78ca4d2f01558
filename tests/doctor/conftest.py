"""A machine without a GPU on which all is well, to be changed one fact at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from anchorline.doctor.machine import PROBED, Cpu, Gpu, GpuState, Imported, Machine

PACKAGES = {"numpy": "2.4.6", "opencv-python-headless": "5.0.0.93", "onnxruntime": "1.32.0"}


@pytest.fixture
def make_machine() -> Callable[..., Machine]:
    """``make_machine(packages, **facts)``: a healthy machine with more packages and other facts.

    A package given as None is taken away. Modules count as importable where their package is there.
    """

    def make(packages: dict[str, str | None] | None = None, **facts: Any) -> Machine:
        merged = {name: v for name, v in {**PACKAGES, **(packages or {})}.items() if v is not None}
        modules = {
            **{name: name in merged for name in PROBED},
            "tensorrt": any(name.startswith("tensorrt") and "rtx" not in name for name in merged),
            "tensorrt_rtx": any(name.startswith("tensorrt-rtx") for name in merged),
        }
        healthy = Machine(
            system="Linux 6.1, x86_64",
            python="3.12.1 (CPython)",
            cpu=Cpu("Some CPU", 4, ("avx2", "amx_bf16")),
            packages=merged,
            requirers={},
            importable=modules,
            numpy=Imported("2.4.6"),
            opencv=Imported("5.0.0"),
            onnxruntime=Imported("1.32.0"),
            providers=("CPUExecutionProvider",),
        )
        return dataclasses.replace(healthy, **facts)

    return make


@pytest.fixture
def gpu_state() -> Callable[..., GpuState]:
    """``gpu_state(capability, cuda)``: one GPU with a driver that runs CUDA up to ``cuda``."""

    def make(capability: int = 86, cuda: tuple[int, int] = (13, 0), driver: str = "580.95") -> GpuState:
        return GpuState((Gpu("NVIDIA Test", capability, 24576),), driver, cuda)

    return make
