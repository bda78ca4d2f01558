"""The facts about this machine. Each comes from a small function of its own, which tests replace."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchorline.runtime.backends.cpu_options import cpu_facts
from anchorline.runtime.backends.execution_providers import linked_tensorrt

_REQUIREMENT_NAME = re.compile(r"[A-Za-z0-9._-]+")
_QUERY = "name,compute_cap,memory.total,driver_version"
_QUERY_SECONDS = 20  # a driver that is not kept loaded takes several to answer
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR in cuda.h
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_NAME_BYTES = 256
# What speeds up a network on a CPU: wider vectors, and instructions for bfloat16 and int8 products.
CPU_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8", "asimddp", "i8mm",
    "bf16", "sve",
)  # fmt: skip
PROBED = ("cuda.bindings", "safetensors", "tensorrt", "tensorrt_rtx", "torch", "torchvision")
"""Modules whose presence is looked up without importing them."""


@dataclass(frozen=True)
class Gpu:
    """``compute_capability`` as one number: 86 for 8.6; ``memory_mib`` is 0 where it is not known."""

    name: str
    compute_capability: int
    memory_mib: int = 0


@dataclass(frozen=True)
class GpuState:
    """``driver`` is its version, ``cuda`` the newest CUDA (major, minor) that it runs; None if unknown.

    ``fault`` says what is broken about a driver that is there.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: tuple[int, int] | None = None
    fault: str | None = None


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
    """``packages`` and ``requirers`` are of ``installed_packages``, ``importable`` by module of ``PROBED``.

    ``providers`` are onnxruntime's, ``onnxruntime_cuda`` the CUDA version it was built for ("" for none),
    ``onnxruntime_tensorrt`` the major version of TensorRT that its provider is linked to.
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
    onnxruntime_tensorrt: int | None = None
    gpu: GpuState = field(default_factory=GpuState)


def examine_machine() -> Machine:
    """All facts; in under a second, since PyTorch and TensorRT are not imported."""
    packages, requirers = installed_packages()
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
        packages=packages,
        requirers=requirers,
        importable={name: is_importable(name) for name in PROBED},
        numpy=import_module("numpy")[0],
        opencv=import_module("cv2")[0],
        onnxruntime=runtime,
        providers=providers,
        onnxruntime_cuda=str(getattr(module, "cuda_version", None) or ""),
        onnxruntime_tensorrt=linked_tensorrt(),
        gpu=find_gpus(),
    )


def installed_packages() -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """The versions of the distributions on this interpreter's path, and the names of those that require each.

    By normalised name; read from their metadata, never imported. Of two with one name it is the first, as an
    import takes.
    """
    versions: dict[str, str] = {}
    requirers: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        name, version = normalised(metadata["Name"] or ""), metadata["Version"]
        if not name or not version or name in versions:
            continue  # what a broken uninstall leaves behind has neither
        versions[name] = version
        for requirement in metadata.get_all("Requires-Dist") or []:
            wanted = _REQUIREMENT_NAME.match(requirement)
            if wanted and "extra ==" not in requirement:
                requirers.setdefault(normalised(wanted.group()), []).append(name)
    return versions, {name: tuple(sorted(each)) for name, each in requirers.items()}


def normalised(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``(10, 16, 0)`` of ``10.16.0.post1``."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def is_importable(module: str) -> bool:
    """Whether there is such a module, without importing it (its parent package is imported)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def import_module(name: str) -> tuple[Imported, Any | None]:
    """Import a module and say what came of it; one that is not there at all is no error."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a damaged package may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return Imported(), None
        text = " ".join(str(error).split())
        return Imported(error=text[:200] or type(error).__name__), None
    return Imported(version=str(getattr(module, "__version__", "unknown"))), module


def find_cpu() -> Cpu:
    """Name, usable cores, and which of ``CPU_FEATURES`` the processor has (Linux only)."""
    facts = cpu_facts()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = facts.get("model name") or platform.processor() or platform.machine()
    return Cpu(name, cores, tuple(feature for feature in CPU_FEATURES if feature in flags))


def find_gpus() -> GpuState:
    """The GPUs and their driver, from ``nvidia-smi`` or the driver's own library. Never raises."""
    library, cuda, number = load_driver(), None, ctypes.c_int()
    if library is not None and library.cuDriverGetVersion(ctypes.byref(number)) == 0:
        cuda = number.value // 1000, number.value % 1000 // 10
    gpus, driver, fault = _from_nvidia_smi()
    if not gpus and library is not None:
        gpus, library_fault = _from_driver(library)
        fault = library_fault or (None if gpus else fault)
    elif gpus and library is None:
        fault = "nvidia-smi lists a GPU, but the driver's libcuda cannot be loaded"
    return GpuState(gpus, driver or kernel_driver_version(), cuda, fault)


def load_driver() -> Any | None:
    """The driver's library, or None where it is not installed."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def kernel_driver_version() -> str | None:
    """The version of the kernel's NVIDIA module, or None where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return found.group() if found else None


def query_nvidia_smi() -> tuple[int, str] | None:
    """Exit code and output of ``nvidia-smi``, or None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_QUERY_SECONDS
        )
    except subprocess.TimeoutExpired:
        return 1, f"nvidia-smi did not answer within {_QUERY_SECONDS} s"
    except OSError as error:
        return 1, f"nvidia-smi cannot be run ({error.strerror or error})"
    return done.returncode, done.stdout.strip() or done.stderr.strip()


def _from_nvidia_smi() -> tuple[tuple[Gpu, ...], str | None, str | None]:
    """GPUs, driver version, and what it complained of."""
    code, text = query_nvidia_smi() or (0, "")
    if "No devices were found" in text:
        return (), None, None
    if code != 0:
        return (), None, text.partition("\n")[0] or f"nvidia-smi ended with exit code {code}"
    gpus, driver = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.rsplit(",", 3)]
        if len(cells) == 4 and cells[1].replace(".", "").isdecimal():
            memory = int(cells[2]) if cells[2].isdecimal() else 0
            gpus.append(Gpu(cells[0], int(cells[1].replace(".", "")), memory))
            driver = cells[3]
    return tuple(gpus), driver, None


def _from_driver(library: Any) -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs by the driver API, as a Jetson or a container without ``nvidia-smi`` needs; and its fault."""
    code, count = library.cuInit(0), ctypes.c_int()
    if code == _NO_DEVICE:
        return (), None
    if code != 0:
        return (), f"the driver's libcuda does not start (cuInit gives error {code})"
    if library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return (), "the driver's libcuda does not list its devices"
    gpus = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(_NAME_BYTES)
        library.cuDeviceGet(ctypes.byref(device), index)
        library.cuDeviceGetName(name, _NAME_BYTES, device)
        library.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        library.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        gpus.append(Gpu(name.value.decode("utf-8", "replace"), 10 * major.value + minor.value))
    return tuple(gpus), None
