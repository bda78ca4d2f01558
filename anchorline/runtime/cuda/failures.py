"""CUDA's errors as exceptions, with CUDA's own name and text."""

from __future__ import annotations

from anchorline.runtime.errors import GpuError

OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"

# After one of these the context is lost and every later call in it fails (CUDA driver API, CUresult).
_STICKY = {
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_CONTAINED",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_EXTERNAL_DEVICE",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_MPS_CLIENT_TERMINATED",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    "CUDA_ERROR_TENSOR_MEMORY_LEAK",
}
_MIB = 1 << 20


class NoGpuError(GpuError):
    """No GPU that could be used: the package, the driver or the device is missing."""


class CudaError(GpuError):
    """A call of the CUDA driver that failed. ``name`` is CUDA's, such as ``CUDA_ERROR_INVALID_VALUE``.

    ``sticky``: the context is lost, and with it everything that this process has on the GPU.
    """

    def __init__(self, doing: str, name: str, text: str = "", remedy: str = "", sticky: bool = False) -> None:
        self.name = name
        self.sticky = sticky or name in _STICKY
        if self.sticky:
            remedy = "the GPU's context is lost: nothing more runs on it, start the process again"
        elif name == OUT_OF_MEMORY and not remedy:  # in another call than for device memory
            remedy = "close other programs, or run less at once (workers, in_flight)"
        reason = f"{name}: {text}" if text else name
        super().__init__(f"CUDA: {doing} failed ({reason}); {remedy or 'check the GPU and its driver'}")


class OutOfDeviceMemoryError(CudaError):
    """Device memory that was not to be had; says how much was wanted and how much is free."""

    def __init__(self, wanted: int, free: int | None, what: str, remedy: str) -> None:
        there = "" if free is None else f", {free / _MIB:.1f} MiB are free"
        text = f"{what} needs {wanted / _MIB:.1f} MiB{there}"
        super().__init__("allocating device memory", OUT_OF_MEMORY, text, remedy)
