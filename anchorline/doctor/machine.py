"""The facts about this machine. Each comes from a small function of its own, which tests replace."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchorline.doctor.gpu import GpuState, find_gpus
from anchorline.doctor.packages import installed_packages, is_importable

# What speeds up a network on a CPU: wider vectors, and instructions for bfloat16 and int8 products.
CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
PROBED = ("cuda.bindings", "safetensors", "tensorrt", "tensorrt_rtx", "torch", "torchvision")
"""Modules whose presence is looked up without importing them."""


@dataclass(frozen=True)
class Cpu:
    """``cores`` are those this process may use; ``features`` are from ``CPU_FEATURES``."""

    name: str
    cores: int
    features: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """A module that was imported: its version, or why that failed (None: it worked or is not installed)."""

    version: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Machine:
    """``packages`` and ``requirers`` as in ``packages.Packages``; ``importable`` by module of ``PROBED``.

    ``providers`` are onnxruntime's, ``onnxruntime_cuda`` the CUDA version it was built for ("" for none).
    """

    system: str
    python: str
    cpu: Cpu
    packages: dict[str, str]
    requirers: dict[str, tuple[str, ...]]
    importable: dict[str, bool]
    numpy: Imported
    opencv: Imported
    onnxruntime: Imported
    providers: tuple[str, ...] = ()
    onnxruntime_cuda: str = ""
    gpu: GpuState = field(default_factory=GpuState)

    def version(self, *names: str) -> str | None:
        """The version of the first of these packages that is installed."""
        return next((self.packages[name] for name in names if name in self.packages), None)


def examine_machine() -> Machine:
    """Look at everything; under a second, since PyTorch and TensorRT are not imported."""
    packages = installed_packages()
    runtime, module = import_module("onnxruntime")
    providers: tuple[str, ...] = ()
    if module is not None:
        try:
            providers = tuple(module.get_available_providers())
        except AttributeError:  # only the folder is left of a package that was uninstalled
            runtime = Imported(error="it has no get_available_providers; its files are incomplete")
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        cpu=find_cpu(),
        packages=packages.versions,
        requirers=packages.requirers,
        importable={name: is_importable(name) for name in PROBED},
        numpy=import_module("numpy")[0],
        opencv=import_module("cv2")[0],
        onnxruntime=runtime,
        providers=providers,
        onnxruntime_cuda=str(getattr(module, "cuda_version", None) or ""),
        gpu=find_gpus(),
    )


def import_module(name: str) -> tuple[Imported, Any | None]:
    """Import a module and say what came of it; one that is not there at all is no error."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return Imported(error=None if error.name == name else _one_line(error)), None
    except Exception as error:  # a damaged package may raise anything
        return Imported(error=_one_line(error)), None
    return Imported(version=str(getattr(module, "__version__", "unknown"))), module


def find_cpu() -> Cpu:
    """Name, usable cores, and which of ``CPU_FEATURES`` the processor has (Linux only)."""
    lines = read_cpuinfo().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = facts.get("model name") or platform.processor() or platform.machine()
    return Cpu(name, cores, tuple(feature for feature in CPU_FEATURES if feature in flags))


def read_cpuinfo() -> str:
    """What Linux says of the processor; nothing elsewhere."""
    if not sys.platform.startswith("linux"):
        return ""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
