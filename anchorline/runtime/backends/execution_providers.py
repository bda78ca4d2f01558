"""What onnxruntime's execution providers need beside onnxruntime itself.

Some are packages of their own, for plain onnxruntime from 1.24 on: libraries that it is told of, which list
the devices they run on. Those of onnxruntime-gpu look for CUDA, cuDNN and TensorRT.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorline.runtime.io.errors import GpuError, one_line


@dataclass(frozen=True)
class ProviderPackage:
    """A package that brings one execution provider: the names of both, and of its module.

    ``kind`` is that of the devices that are used of those it lists (``OrtHardwareDeviceType``).
    """

    provider: str
    module: str
    distribution: str
    kind: str


# By provider. Those for one CUDA release have its number behind the name: ...-cu13.
PROVIDER_PACKAGES = {
    "tensorrt-rtx": ProviderPackage(
        "NvTensorRTRTXExecutionProvider",
        "onnxruntime_ep_nv_tensorrt_rtx",
        "onnxruntime-ep-nv-tensorrt-rtx",
        kind="GPU",
    ),
    "openvino": ProviderPackage(  # it lists GPUs and NPUs as well, which compute otherwise
        "OpenVINOExecutionProvider", "onnxruntime_ep_openvino", "onnxruntime-ep-openvino", kind="CPU"
    ),
}
_LINKED = re.compile(rb"(?:libnvinfer\.so\.|nvinfer_)(\d+)")

_registering = threading.Lock()
_registered: set[str] = set()
log = logging.getLogger("anchorline.runtime")

# onnxruntime's packages for Linux and macOS report to their makers over the network (1.32 does), under an
# identifier that they keep in the user's cache. Running a model must tell nobody; who wants that sets the
# variable to 0. Here, since whatever of ours imports onnxruntime imports this module first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def packaged_providers() -> list[str]:
    """The providers whose packages are installed; OpenVINO's where it offers a device, which it does for
    processors of one maker."""
    there = [name for name, package in PROVIDER_PACKAGES.items() if _is_installed(package.module)]
    if "openvino" in there:
        try:
            provider_devices("openvino")
        except GpuError:
            there.remove("openvino")
    return there


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def provider_devices(provider: str) -> list[Any]:
    """What the package of ``provider`` runs on, ``OrtEpDevice`` as it lists them: at least one.

    Raises ``GpuError`` where its library cannot be loaded or finds nothing.
    """
    import onnxruntime

    package = PROVIDER_PACKAGES[provider]
    if not hasattr(onnxruntime, "register_execution_provider_library"):
        raise GpuError(
            f"onnxruntime is {onnxruntime.__version__}; {package.distribution} needs 1.24 or later: "
            "pip install 'onnxruntime>=1.24'"
        )
    with _registering:
        try:
            # The program may have told onnxruntime of it before, which refuses a second time.
            if provider not in _registered and not _listed(package):
                library = importlib.import_module(package.module).get_library_path()
                onnxruntime.register_execution_provider_library(package.provider, library)
                _registered.add(provider)
        except Exception as error:  # onnxruntime's own, and whatever a damaged package raises
            raise GpuError(
                f"{package.distribution} cannot be loaded by onnxruntime {onnxruntime.__version__} "
                f"({one_line(error)[:300]}); see anchorline doctor"
            ) from None
    devices = _listed(package)
    if not devices:
        raise GpuError(f"{package.distribution} offers no device here; see anchorline doctor")
    return devices


def _listed(package: ProviderPackage) -> list[Any]:
    import onnxruntime

    of_package = (one for one in onnxruntime.get_ep_devices() if one.ep_name == package.provider)
    return [one for one in of_package if one.device.type.name == package.kind]


def add_provider(options: Any, provider: str, number: int, settings: dict[str, str]) -> None:
    """Have sessions with ``options`` run on device ``number`` of those that the provider's package lists.

    Raises ``GpuError`` where there is none.
    """
    devices, package = provider_devices(provider), PROVIDER_PACKAGES[provider]
    if number >= len(devices):
        raise GpuError(f"device is {number}; {package.distribution} lists {len(devices)} here, from 0 on")
    options.add_provider_for_devices([devices[number]], settings)


@functools.cache
def preload_libraries() -> None:
    """Load CUDA and cuDNN from their packages, where onnxruntime-gpu does not look by itself.

    Once a process, and harmless where there are none: onnxruntime says so when the provider starts.
    """
    import onnxruntime

    if not hasattr(onnxruntime, "preload_dlls"):  # before 1.21
        return
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(Exception):
        onnxruntime.preload_dlls()
    for line in told.getvalue().splitlines():
        log.info("onnxruntime: %s", line.strip())


def linked_tensorrt() -> int | None:
    """The major version of TensorRT that onnxruntime's provider is linked to; ``None`` without one."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return None
    for name in ("libonnxruntime_providers_tensorrt.so", "onnxruntime_providers_tensorrt.dll"):
        with contextlib.suppress(OSError):
            found = _LINKED.search((Path(spec.origin).parent / "capi" / name).read_bytes())
            return int(found[1]) if found else None
    return None
