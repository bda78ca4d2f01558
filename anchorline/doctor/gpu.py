"""The GPUs and their driver, from ``nvidia-smi`` or the driver's own library; quiet where there is none."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_QUERY = "name,compute_cap,memory.total,driver_version"
_QUERY_SECONDS = 20  # a driver that is not kept loaded takes several to answer
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR in cuda.h
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_NAME_BYTES = 256


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


def find_gpus() -> GpuState:
    """What this machine has. Never raises."""
    library = load_driver()
    cuda = None if library is None else _cuda_version(library)
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
    answer = query_nvidia_smi()
    if answer is None:
        return (), None, None
    code, text = answer
    first_line = next(iter(text.splitlines()), "")
    if "No devices were found" in text:
        return (), None, None
    if code != 0:
        return (), None, first_line or f"nvidia-smi ended with exit code {code}"
    gpus, driver = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.rsplit(",", 3)]
        if len(cells) == 4 and cells[1].replace(".", "").isdecimal():
            memory = int(cells[2]) if cells[2].isdecimal() else 0
            gpus.append(Gpu(cells[0], int(cells[1].replace(".", "")), memory))
            driver = cells[3]
    return tuple(gpus), driver, None


def _cuda_version(library: Any) -> tuple[int, int] | None:
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def _from_driver(library: Any) -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs by the driver API, as a Jetson or a container without ``nvidia-smi`` needs; and its fault."""
    code = library.cuInit(0)
    if code == _NO_DEVICE:
        return (), None
    if code != 0:
        return (), f"the driver's libcuda does not start (cuInit gives error {code})"
    count = ctypes.c_int()
    if library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return (), "the driver's libcuda does not list its devices"
    return tuple(_device(library, index) for index in range(count.value)), None


def _device(library: Any, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, _NAME_BYTES, device)
    library.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    library.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return Gpu(name.value.decode("utf-8", "replace"), 10 * major.value + minor.value)
