"""Launching the kernels through the CUDA driver, the only module here that imports cuda."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from typing import Any

from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.tensorrt.plugins.images import image
from anchorline.runtime.tensorrt.plugins.ops import Launch

_libraries: dict[tuple[str, int], Any] = {}
_loading = threading.Lock()


def launch(launches: Iterable[Launch], stream: int) -> None:
    """Put the kernels on ``stream`` (an address) of the current CUDA context; waits for nothing.

    The first launch on a GPU loads the kernels' image, see ``preload``. Raises ``ArtefactError``.
    """
    from cuda.bindings import driver

    for item in launches:
        kernel = _kernel(item.source, item.kernel, _current_device())
        values = tuple(argument.value for argument in item.arguments)
        types = tuple(type(argument) for argument in item.arguments)
        handle = driver.CUfunction(int(kernel))  # the driver takes a kernel of a library for a function
        _checked(
            driver.cuLaunchKernel(handle, *item.grid, item.threads, 1, 1, 0, stream, (values, types), 0),
            f"launching {item.kernel}",
        )


def preload(source: str, kernels: Iterable[str]) -> None:
    """Load kernels ahead of their first launch, which then allocates nothing and may be captured."""
    from cuda.bindings import driver

    for kernel in kernels:
        handle = _kernel(source, kernel, _current_device())
        _checked(driver.cuKernelGetFunction(handle), f"loading {kernel}")  # otherwise loaded when launched


def compute_capability(device: int) -> int:
    """A device's compute capability as one number, 86 for 8.6."""
    from cuda.bindings import driver

    attributes = driver.CUdevice_attribute
    parts = (
        attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    )
    major, minor = (_checked(driver.cuDeviceGetAttribute(p, device), "asking the GPU")[0] for p in parts)
    return int(major) * 10 + int(minor)


def first_gpu() -> tuple[str, int]:
    """Name and compute capability of the first GPU; whatever the driver raises where there is none."""
    from cuda.bindings import driver

    _checked(driver.cuInit(0), "starting")
    (device,) = _checked(driver.cuDeviceGet(0), "finding a GPU")
    (name,) = _checked(driver.cuDeviceGetName(256, device), "asking the GPU")
    return name.decode().strip(chr(0)).strip(), compute_capability(int(device))


def _current_device() -> int:
    from cuda.bindings import driver

    (device,) = _checked(driver.cuCtxGetDevice(), "finding the current GPU")
    return int(device)


@functools.cache
def _kernel(source: str, kernel: str, device: int) -> Any:
    from cuda.bindings import driver

    (handle,) = _checked(
        driver.cuLibraryGetKernel(_library(source, compute_capability(device)), kernel.encode()),
        f"finding {kernel}",
    )
    return handle


def _library(source: str, architecture: int) -> Any:
    """An image loaded for all contexts of the process, once: TensorRT calls from many threads."""
    from cuda.bindings import driver

    with _loading:
        if (source, architecture) not in _libraries:
            loaded = driver.cuLibraryLoadData(image(source, architecture), [], [], 0, [], [], 0)
            (_libraries[source, architecture],) = _checked(loaded, f"loading the image of {source}")
        return _libraries[source, architecture]


def _checked(result: tuple[Any, ...], doing: str) -> tuple[Any, ...]:
    """The values of a driver call, or an ``ArtefactError`` with the driver's own words."""
    code = result[0]
    if int(code):
        reason = getattr(code, "name", code)
        raise ArtefactError(f"CUDA: {doing} failed with {reason}; check the GPU and its driver")
    return result[1:]
