"""The CUDA layer over pycuda: buffers, streams, events and kernels; pycuda knows no graphs.

For programs that use pycuda already. Their code and this one meet on the primary context, which
``pycuda.autoprimaryctx`` makes current; ``pycuda.autoinit`` makes a context of its own, whose memory
cannot be used here. Written after pycuda 2026.1.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.tensorrt.cuda.interface import (
    LEGACY_STREAM,
    CudaError,
    NoGpuError,
    OutOfDeviceMemoryError,
    PinnedBuffer,
)
from anchorline.runtime.tensorrt.plugins.images import image

# pycuda tells a failure by its text alone; these are of errors that lose the context. Those it has no
# text for, such as an illegal address, are too young for it, and nearly all of them do.
_LOST = {
    "launch failed": "CUDA_ERROR_LAUNCH_FAILED",
    "launch timeout": "CUDA_ERROR_LAUNCH_TIMEOUT",
    "context is destroyed": "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "ECC uncorrectable": "CUDA_ERROR_ECC_UNCORRECTABLE",
    "device-side assert triggered": "CUDA_ERROR_ASSERT",
    "invalid/unknown error code": "CUDA_ERROR_UNKNOWN",
}
_REMEMBERED = 64


class PyCuda:
    """``Cuda`` over pycuda. Streams of other libraries are taken when they are pycuda's."""

    package = "pycuda"
    has_graphs = False

    def __init__(self, device: int = 0) -> None:
        self._pycuda = _load()
        self.device = device
        try:
            self._pycuda.init()
            if device >= self._pycuda.Device.count():
                raise NoGpuError(f"there is no GPU {device} here")
            opened = self._pycuda.Device(device)
            major, minor = opened.compute_capability()
            self._context: Any = opened.retain_primary_context()
        except self._pycuda.Error as error:
            raise NoGpuError(f"the GPU's driver does not start ({_text(error)})") from None
        self.device_name = str(opened.name())
        self.compute_capability = 10 * int(major) + int(minor)
        # pycuda's objects by the integers that stand for them; freed when they are dropped.
        self._memory: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._streams: dict[int, Any] = {0: None, LEGACY_STREAM: None}
        self._foreign: dict[int, Any] = {}  # the latest streams of the program's own
        self._events: dict[int, Any] = {}
        self._numbers = itertools.count(1)
        self._modules: dict[str, Any] = {}
        self._loading = threading.Lock()  # lanes are made by many threads; each source is loaded once
        self._inside = threading.local()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Blocks may be nested."""
        if getattr(self._inside, "yes", False):
            yield
            return
        with self._errors("entering the GPU's context"):
            self._context.push()
        self._inside.yes = True
        try:
            yield
        finally:
            self._inside.yes = False
            with self._errors("leaving the GPU's context"):
                self._context.pop()

    def memory_info(self) -> tuple[int, int]:
        with self._errors("asking for free memory"):
            free, total = self._pycuda.mem_get_info()
        return int(free), int(total)

    def allocate(self, size: int, what: str, remedy: str) -> int:
        try:
            with self._errors(f"allocating {what}"):
                block = self._pycuda.mem_alloc(size)
        except OutOfDeviceMemoryError:
            raise OutOfDeviceMemoryError(size, self.memory_info()[0], what, remedy) from None
        self._memory[int(block)] = block
        return int(block)

    def free(self, address: int) -> None:
        with self._errors("freeing device memory"):
            self._memory.pop(address).free()

    def allocate_pinned(self, size: int) -> PinnedBuffer:
        with self._errors(f"allocating {size} bytes of pinned host memory"):
            array = self._pycuda.pagelocked_empty(size, np.uint8)
        self._pinned[array.ctypes.data] = array
        return PinnedBuffer(array.ctypes.data, array)

    def free_pinned(self, buffer: PinnedBuffer) -> None:
        with self._errors("freeing pinned host memory"):
            self._pinned.pop(buffer.address).base.free()

    def device_of(self, address: int) -> int | None:
        """Of this GPU or unknown: pycuda does not tell other devices."""
        try:
            self._pycuda.mem_get_address_range(address)
        except self._pycuda.Error:
            return None
        return self.device

    def create_stream(self) -> int:
        with self._errors("creating a stream"):
            made = self._pycuda.Stream()
        self._streams[int(made.handle)] = made
        return int(made.handle)

    def destroy_stream(self, stream: int) -> None:
        del self._streams[stream]

    def stream_handle(self, stream: Any) -> int:
        if isinstance(stream, self._pycuda.Stream):
            return self._remember(stream)
        if isinstance(stream, int) and (stream in self._streams or stream in self._foreign):
            return stream
        raise SettingsError(f"stream is {stream!r}; with cuda='pycuda' expected a pycuda.driver.Stream")

    def synchronize(self, stream: int) -> None:
        with self._errors("waiting for the GPU"):
            waited = self._stream(stream)
            if waited is None:
                self._pycuda.Context.synchronize()
            else:
                waited.synchronize()

    def copy_in(self, target: int, source: PinnedBuffer, size: int, stream: int) -> None:
        with self._errors("copying to the GPU"):
            self._pycuda.memcpy_htod_async(target, source.array[:size], self._stream(stream))

    def copy_out(self, target: PinnedBuffer, source: int, size: int, stream: int) -> None:
        with self._errors("copying from the GPU"):
            self._pycuda.memcpy_dtoh_async(target.array[:size], source, self._stream(stream))

    def create_event(self, timing: bool = False) -> int:
        flags = self._pycuda.event_flags
        number = next(self._numbers)
        with self._errors("creating an event"):
            self._events[number] = self._pycuda.Event(flags.DEFAULT if timing else flags.DISABLE_TIMING)
        return number

    def destroy_event(self, event: int) -> None:
        del self._events[event]

    def record(self, event: int, stream: int) -> None:
        with self._errors("recording an event"):
            self._events[event].record(self._stream(stream))

    def wait(self, stream: int, event: int) -> None:
        with self._errors("waiting for an event"):
            waiting = self._stream(stream)
            if waiting is None:  # pycuda's default stream has no object that could wait
                self._events[event].synchronize()
            else:
                waiting.wait_for_event(self._events[event])

    def seconds_between(self, start: int, end: int) -> float:
        with self._errors("reading an event's time"):
            return float(self._events[start].time_till(self._events[end])) / 1000.0

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        raise NotImplementedError("pycuda has no CUDA graphs: ask has_graphs")

    def launch_graph(self, graph: int, stream: int) -> None:
        raise NotImplementedError("pycuda has no CUDA graphs: ask has_graphs")

    def destroy_graph(self, graph: int) -> None:
        raise NotImplementedError("pycuda has no CUDA graphs: ask has_graphs")

    def load_kernel(self, source: str, kernel: str) -> Any:
        with self._loading, self._errors(f"loading {kernel}"):
            if source not in self._modules:
                code = image(source, self.compute_capability)
                self._modules[source] = self._pycuda.module_from_buffer(code)
            return self._modules[source].get_function(kernel)

    def launch(
        self, kernel: Any, grid: tuple[int, int, int], threads: int, arguments: Sequence[Any], stream: int
    ) -> None:
        values = [_number(argument) for argument in arguments]
        with self._errors("launching a kernel"):
            kernel(*values, grid=grid, block=(threads, 1, 1), stream=self._stream(stream))

    def close(self) -> None:
        if self._context is None:
            return
        with contextlib.suppress(CudaError), self.current():
            for table in (self._modules, self._events, self._memory, self._pinned):
                table.clear()
            self._streams.clear()
            self._foreign.clear()
        with contextlib.suppress(self._pycuda.Error):
            self._context.detach()
        self._context = None

    def _remember(self, stream: Any) -> int:
        """Its handle; a program may make a stream for each frame, so only the latest are kept."""
        handle = int(stream.handle)
        with self._loading:
            self._foreign[handle] = stream
            if len(self._foreign) > _REMEMBERED:
                del self._foreign[next(iter(self._foreign))]
        return handle

    def _stream(self, handle: int) -> Any:
        """pycuda's object; ``None`` is its default stream."""
        if handle in self._streams:
            return self._streams[handle]
        found = self._foreign.get(handle)
        if found is None:
            raise SettingsError(
                f"the frame comes from CUDA stream {handle:#x}, which pycuda cannot work with; hand over a "
                "pycuda.driver.Stream, or use cuda='cuda-bindings'"
            )
        return found

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except self._pycuda.MemoryError:
            raise OutOfDeviceMemoryError(0, None, doing, "close other programs on the GPU") from None
        except self._pycuda.Error as error:
            text = _text(error)
            lost = next((name for words, name in _LOST.items() if words in text), None)
            raise CudaError(doing, lost or type(error).__name__, text, sticky=lost is not None) from None


def _load() -> Any:
    try:
        return importlib.import_module("pycuda.driver")
    except ImportError as error:  # not installed, or libcuda is missing, to which it is linked
        raise NoGpuError(
            f"pycuda cannot be imported ({_text(error)}); it needs the NVIDIA driver and pip install pycuda"
        ) from None


def _number(argument: Any) -> Any:
    """A ctypes value as the NumPy number that pycuda packs with its size."""
    if type(argument).__name__ == "c_void_p":
        return np.uintp(argument.value or 0)
    return np.dtype(type(argument)).type(argument.value)


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())
