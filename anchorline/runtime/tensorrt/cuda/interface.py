"""What the runtime asks of CUDA, and CUDA's errors. Addresses, streams and events are plain integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.errors import GpuError

# CUDA's errors as exceptions, with CUDA's own name and text.


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


LEGACY_STREAM = 1  # CU_STREAM_LEGACY: the default stream, which other blocking streams wait for
PER_THREAD_STREAM = 2  # CU_STREAM_PER_THREAD: the calling thread's default stream, another one in each


@dataclass(frozen=True)
class PinnedBuffer:
    """Page-locked host memory, which is copied asynchronously: its address and its bytes as an array."""

    address: int
    array: NDArray[np.uint8]


class Cuda(Protocol):
    """One GPU and its primary context. Every call but ``current`` wants the context current.

    Calls raise ``CudaError``. A stream is its handle; ``stream_handle`` accepts other libraries' streams.
    """

    package: str
    device: int
    has_graphs: bool
    device_name: str
    compute_capability: int  # 86 for 8.6

    def current(self) -> AbstractContextManager[None]:
        """Make the context the calling thread's, for the block."""
        ...

    def memory_info(self) -> tuple[int, int]:
        """Free and total device memory, in bytes."""
        ...

    def allocate(self, size: int, what: str, remedy: str) -> int:
        """Device memory of ``size`` bytes; ``what`` and ``remedy`` are for ``OutOfDeviceMemoryError``."""
        ...

    def free(self, address: int) -> None: ...

    def allocate_pinned(self, size: int) -> PinnedBuffer: ...

    def free_pinned(self, buffer: PinnedBuffer) -> None: ...

    def device_of(self, address: int) -> int | None:
        """The number of the device that the address belongs to, this one for pinned memory, which each GPU
        reads; ``None`` for memory CUDA does not know."""
        ...

    def create_stream(self) -> int:
        """A stream that does not wait for the legacy default stream."""
        ...

    def destroy_stream(self, stream: int) -> None: ...

    def stream_handle(self, stream: Any) -> int:
        """The handle of a stream of this or another library; ``SettingsError`` for what is none."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until all work on the stream is done."""
        ...

    def copy_in(self, target: int, source: PinnedBuffer, size: int, stream: int) -> None:
        """Queue a copy of the first ``size`` bytes to the device."""
        ...

    def copy_out(self, target: PinnedBuffer, source: int, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes to the host."""
        ...

    def create_event(self, timing: bool = False) -> int: ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None: ...

    def wait(self, stream: int, event: int) -> None:
        """Later work on ``stream`` waits for the event."""
        ...

    def seconds_between(self, start: int, end: int) -> float:
        """Time between two recorded timing events that have happened."""
        ...

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Record what ``work`` queues on ``stream`` instead of running it; a graph to launch.

        Thread-local: other threads may allocate and copy meanwhile. If ``work`` raises, the capture is
        ended and nothing is left of it.
        """
        ...

    def launch_graph(self, graph: int, stream: int) -> None: ...

    def destroy_graph(self, graph: int) -> None: ...

    def load_kernel(self, source: str, kernel: str) -> Any:
        """A kernel of ``runtime/plugins/kernels``, ready to be launched."""
        ...

    def launch(
        self, kernel: Any, grid: tuple[int, int, int], threads: int, arguments: Sequence[Any], stream: int
    ) -> None:
        """Queue a kernel; ``arguments`` are ctypes values."""
        ...

    def close(self) -> None:
        """Let go of the context. Safe to call twice."""
        ...
