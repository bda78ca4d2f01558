"""The CUDA driver, as far as the runtime needs it: memory, streams, events, graphs, kernels.

``interface.py`` says what that is, ``bindings.py`` has it over cuda-bindings and ``pycuda_driver.py``
over pycuda. Both work on the device's primary context, the one that PyTorch and OpenCV use too, so
that memory and streams can be handed over. Nothing here imports CUDA before a GPU is opened.
"""

from __future__ import annotations

from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.tensorrt.cuda.interface import (
    Cuda,
    CudaError,
    NoGpuError,
    OutOfDeviceMemoryError,
    PinnedBuffer,
)

__all__ = [
    "CUDA_PACKAGES",
    "Cuda",
    "CudaError",
    "NoGpuError",
    "OutOfDeviceMemoryError",
    "PinnedBuffer",
    "open_cuda",
]

CUDA_PACKAGES = ("cuda-bindings", "pycuda")


def open_cuda(package: str = "cuda-bindings", device: int = 0) -> Cuda:
    """GPU number ``device`` through one of ``CUDA_PACKAGES``; to be closed when done with.

    Raises ``SettingsError`` for another package, ``NoGpuError`` where package, driver or GPU is missing.
    """
    if isinstance(device, bool) or not isinstance(device, int) or device < 0:
        raise SettingsError(f"device is {device!r}; expected the number of a GPU, from 0")
    if package == "cuda-bindings":
        from anchorline.runtime.tensorrt.cuda.bindings import BindingsCuda

        return BindingsCuda(device)
    if package == "pycuda":
        from anchorline.runtime.tensorrt.cuda.pycuda_driver import PyCuda

        return PyCuda(device)
    raise SettingsError(f"cuda is {package!r}; expected one of {', '.join(CUDA_PACKAGES)}")
