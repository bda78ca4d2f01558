"""A double of ``pycuda.driver`` over the double of the driver.

pycuda cannot be imported without a driver, so the names and signatures are those of its source, version
2026.1 (src/wrapper/wrap_cudadrv.cpp, pycuda/driver.py); anything else is not there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


class Error(Exception):
    pass


class MemoryError(Error):  # pycuda's own, named like the built-in one
    pass


class LogicError(Error):
    pass


_TEXTS = {
    "CUDA_ERROR_INVALID_VALUE": "invalid value",
    "CUDA_ERROR_LAUNCH_FAILED": "launch failed",
    "CUDA_ERROR_NO_DEVICE": "no device",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "invalid/unknown error code",
}


def make_pycuda(driver: Any, devices: int = 1) -> Any:
    """The module, as an object."""

    def call(name: str, *arguments: Any) -> Any:
        code, *values = getattr(driver, name)(*arguments)
        if code.name == "CUDA_ERROR_OUT_OF_MEMORY":
            raise MemoryError(f"{name} failed: out of memory")
        if int(code):
            raise LogicError(f"{name} failed: {_TEXTS.get(code.name, code.name)}")
        return values[0] if len(values) == 1 else values

    def release(name: str, handle: int) -> None:
        """As pycuda's destructors: in the context the object was made in."""
        call("cuCtxPushCurrent", 77)
        call(name, handle)
        call("cuCtxPopCurrent")

    def handle_of(stream: Any) -> int:
        return 0 if stream is None else stream.handle

    class Context:
        def __init__(self) -> None:
            self.handle = call("cuDevicePrimaryCtxRetain", 0)

        def push(self) -> None:
            call("cuCtxPushCurrent", self.handle)

        def detach(self) -> None:
            call("cuDevicePrimaryCtxRelease", 0)

        @staticmethod
        def pop() -> None:
            call("cuCtxPopCurrent")

        @staticmethod
        def synchronize() -> None:
            call("cuStreamSynchronize", 0)

    class Device:
        def __init__(self, number: int) -> None:
            assert number < devices

        count = staticmethod(lambda: devices)

        def name(self) -> str:
            return "Double"

        def compute_capability(self) -> tuple[int, int]:
            return divmod(driver.capability, 10)

        def retain_primary_context(self) -> Context:
            return Context()

    class Stream:
        def __init__(self, flags: int = 0) -> None:
            self.handle = call("cuStreamCreate", flags)

        def synchronize(self) -> None:
            call("cuStreamSynchronize", self.handle)

        def wait_for_event(self, event: Event) -> None:
            call("cuStreamWaitEvent", self.handle, event._handle, 0)

        def __del__(self) -> None:
            release("cuStreamDestroy", self.handle)

    class Event:
        def __init__(self, flags: int = 0) -> None:
            self._handle = call("cuEventCreate", flags)

        def record(self, stream: Any = None) -> Event:
            call("cuEventRecord", self._handle, handle_of(stream))
            return self

        def synchronize(self) -> Event:
            record = driver.events[self._handle]["record"]
            driver._drain(record["stream"])
            return self

        def time_till(self, end: Event) -> float:
            return call("cuEventElapsedTime", self._handle, end._handle)

        def __del__(self) -> None:
            release("cuEventDestroy", self._handle)

    class DeviceAllocation:
        def __init__(self, size: int) -> None:
            self._address: int | None = None
            self._address = call("cuMemAlloc", size)

        def __int__(self) -> int:
            assert self._address is not None
            return self._address

        def free(self) -> None:
            address, self._address = int(self), None
            release("cuMemFree", address)

        def __del__(self) -> None:
            if self._address is not None:
                self.free()

    class Pagelocked(np.ndarray):
        """What ``pagelocked_empty`` gives: its base is the allocation."""

        @property
        def base(self) -> Any:
            return SimpleNamespace(free=lambda: call("cuMemFreeHost", self.ctypes.data))

    def pagelocked_empty(shape: int, dtype: Any, order: str = "C", mem_flags: int = 0) -> np.ndarray:
        address = call("cuMemHostAlloc", shape, mem_flags)
        return driver.pinned[address].view(Pagelocked)

    class Module:
        def __init__(self, content: bytes) -> None:
            self._handle = call("cuLibraryLoadData", content, [], [], 0, [], [], 0)

        def get_function(self, name: str) -> Any:
            function = call("cuLibraryGetKernel", self._handle, name.encode())

            def launch(*values: Any, grid: Any, block: Any, stream: Any = None) -> None:
                assert all(isinstance(value, np.number) for value in values)
                packed = (tuple(value.item() for value in values), tuple(map(type, values)))
                call("cuLaunchKernel", function, *grid, *block, 0, handle_of(stream), packed, 0)

            return launch

        def __del__(self) -> None:
            release("cuLibraryUnload", self._handle)

    def memcpy_htod_async(dest: int, src: np.ndarray, stream: Any = None) -> None:
        call("cuMemcpyHtoDAsync", dest, src.ctypes.data, src.nbytes, handle_of(stream))

    def memcpy_dtoh_async(dest: np.ndarray, src: int, stream: Any = None) -> None:
        call("cuMemcpyDtoHAsync", dest.ctypes.data, src, dest.nbytes, handle_of(stream))

    def mem_get_address_range(address: int) -> tuple[int, int]:
        if call("cuPointerGetAttributes", 2, [], address)[0] != 2:
            raise LogicError("cuMemGetAddressRange failed: not found")
        return address, 1

    return SimpleNamespace(
        Context=Context,
        Device=Device,
        Error=Error,
        Event=Event,
        LogicError=LogicError,
        MemoryError=MemoryError,
        Stream=Stream,
        event_flags=SimpleNamespace(DEFAULT=0, DISABLE_TIMING=2),
        init=lambda: call("cuInit", 0),
        mem_alloc=DeviceAllocation,
        mem_get_address_range=mem_get_address_range,
        mem_get_info=lambda: tuple(call("cuMemGetInfo")),
        memcpy_dtoh_async=memcpy_dtoh_async,
        memcpy_htod_async=memcpy_htod_async,
        module_from_buffer=Module,
        pagelocked_empty=pagelocked_empty,
    )
