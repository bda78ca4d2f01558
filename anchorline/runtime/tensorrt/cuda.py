"""The CUDA driver, as far as the runtime needs it: memory, streams, events, graphs, kernels.

``BindingsCuda`` has it over cuda-bindings, ``PyCuda`` over pycuda. Both work on the device's primary context,
the one that PyTorch and OpenCV use too, so that memory and streams can be handed over. Addresses, streams and
events are plain integers. Nothing here imports CUDA before a GPU is opened.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from anchorline.runtime.io.errors import GpuError, SettingsError, one_line
from anchorline.runtime.io.schema import check_fields, choice
from anchorline.runtime.tensorrt.kernels import Launch, image

CUDA_PACKAGES = ("cuda-bindings", "pycuda")
LEGACY_STREAM = 1  # CU_STREAM_LEGACY: the default stream, which other blocking streams wait for
PER_THREAD_STREAM = 2  # CU_STREAM_PER_THREAD: the calling thread's default stream, another one in each
OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"

# After one of these the context is lost and every later call in it fails (CUDA driver API, CUresult).
_STICKY = (
    "ASSERT CONTAINED CONTEXT_IS_DESTROYED ECC_UNCORRECTABLE EXTERNAL_DEVICE HARDWARE_STACK_ERROR "
    "ILLEGAL_ADDRESS ILLEGAL_INSTRUCTION INVALID_ADDRESS_SPACE INVALID_PC LAUNCH_FAILED LAUNCH_TIMEOUT "
    "MISALIGNED_ADDRESS MPS_CLIENT_TERMINATED NVLINK_UNCORRECTABLE TENSOR_MEMORY_LEAK"
)
_NO_DEVICE_NAMES = ("CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_INVALID_DEVICE", "CUDA_ERROR_STUB_LIBRARY")
_PINNED_FLAGS = 0  # cuMemHostAlloc: readable from the device as well, by unified addressing

# pycuda tells a failure by its text alone; these are of errors that lose the context. Those it has no
# text for, such as an illegal address, are too young for it, and nearly all of them do.
_LOST_IN_PYCUDA = {
    "launch failed": "CUDA_ERROR_LAUNCH_FAILED",
    "launch timeout": "CUDA_ERROR_LAUNCH_TIMEOUT",
    "context is destroyed": "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "ECC uncorrectable": "CUDA_ERROR_ECC_UNCORRECTABLE",
    "device-side assert triggered": "CUDA_ERROR_ASSERT",
    "invalid/unknown error code": "CUDA_ERROR_UNKNOWN",
}
_FOREIGN_STREAMS = 64  # of a program with pycuda that are remembered

# Held by whoever allocates, frees or loads, and while TensorRT for RTX queues its work: it may be capturing a
# graph, which such calls of other threads end in CUDA's global mode.
memory_lock = threading.RLock()


@dataclass(frozen=True)
class GpuOptions:
    """How a detector uses the GPU of number ``device``; ``cuda`` is the package to reach it through, one of
    ``CUDA_PACKAGES``.

    ``graph`` captures CUDA graphs: by default for engines, not in onnxruntime. ``timings`` measures stages
    by CUDA events. Raises ``SettingsError``.
    """

    device: Annotated[int, Meta(ge=0, description="the number of a GPU, from 0")] = 0
    cuda: Annotated[str, choice(*CUDA_PACKAGES)] = "cuda-bindings"
    graph: Annotated[bool | None, Meta(description="True, False or None")] = None
    timings: Annotated[bool, Meta(description="True or False")] = False

    def __post_init__(self) -> None:
        check_fields(self, "", SettingsError)


class NoGpuError(GpuError):
    """No GPU that could be used: the package, the driver or the device is missing."""


class CudaError(GpuError):
    """A call of the CUDA driver that failed. ``name`` is CUDA's, such as ``CUDA_ERROR_INVALID_VALUE``.

    ``sticky``: the context is lost, and with it everything that this process has on the GPU.
    """

    def __init__(self, doing: str, name: str, text: str = "", remedy: str = "", sticky: bool = False) -> None:
        self.name = name
        self.sticky = sticky or name.removeprefix("CUDA_ERROR_") in _STICKY.split()
        if self.sticky:
            remedy = "the GPU's context is lost: nothing more runs on it, start the process again"
        elif name == OUT_OF_MEMORY and not remedy:  # in another call than for device memory
            remedy = "close other programs, or run less at once (workers, in_flight)"
        reason = f"{name}: {text}" if text else name
        super().__init__(f"CUDA: {doing} failed ({reason}); {remedy or 'check the GPU and its driver'}")


class OutOfDeviceMemoryError(CudaError):
    """Device memory that was not to be had; says how much was wanted and how much is free."""

    def __init__(self, wanted: int, free: int | None, what: str, remedy: str) -> None:
        there = "" if free is None else f", {free / 2**20:.1f} MiB are free"
        text = f"{what} needs {wanted / 2**20:.1f} MiB{there}"
        super().__init__("allocating device memory", OUT_OF_MEMORY, text, remedy)


@dataclass(frozen=True)
class PinnedBuffer:
    """Page-locked host memory, which is copied asynchronously: its address and its bytes as an array."""

    address: int
    array: NDArray[np.uint8]


def load_driver() -> Any:
    """cuda-bindings' driver module; ``NoGpuError`` where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise NoGpuError(
            f"cuda-bindings cannot be imported ({error}); pip install 'anchorline[gpu]'"
        ) from None
    return driver


def call_driver(driver: Any, function: str, *arguments: Any, doing: str) -> Any:
    """Call cuda-bindings; returns its one value, or all of several. Raises ``CudaError``."""
    code, *values = getattr(driver, function)(*arguments)
    if int(code):
        told, text = driver.cuGetErrorString(code)
        raise CudaError(
            doing, str(getattr(code, "name", code)), text.decode() if not int(told) and text else ""
        )
    return values[0] if len(values) == 1 else tuple(values)


def launch_kernel(driver: Any, kernel: Any, item: Launch, stream: int, doing: str) -> None:
    """Queue ``item`` on ``stream``, its kernel loaded as ``kernel``."""
    # ctypes reads a null pointer as None, which cuda-bindings do not take.
    values = tuple(0 if argument.value is None else argument.value for argument in item.arguments)
    types = tuple(type(argument) for argument in item.arguments)
    given = (kernel, *item.grid, item.threads, 1, 1, 0, stream, (values, types), 0)
    call_driver(driver, "cuLaunchKernel", *given, doing=doing)


def compute_capability(driver: Any, device: Any) -> int:
    """A device's compute capability as one number, 86 for 8.6."""
    names = (f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}" for part in ("MAJOR", "MINOR"))
    attributes = (getattr(driver.CUdevice_attribute, name) for name in names)
    major, minor = (
        int(call_driver(driver, "cuDeviceGetAttribute", attribute, device, doing="asking the GPU"))
        for attribute in attributes
    )
    return 10 * major + minor


def device_name(driver: Any, device: Any) -> str:
    """A device's name, such as ``NVIDIA L4``."""
    name = call_driver(driver, "cuDeviceGetName", 256, device, doing="asking the GPU")
    return str(name.decode().strip("\0 "))


def first_gpu() -> tuple[str, int]:
    """Name and compute capability of the first GPU; whatever cuda-bindings raise where there is none."""
    from cuda.bindings import driver

    call_driver(driver, "cuInit", 0, doing="starting")
    device = call_driver(driver, "cuDeviceGet", 0, doing="finding a GPU")
    return device_name(driver, device), compute_capability(driver, device)


class BindingsCuda:
    """GPU number ``device`` and its primary context, over cuda-bindings; to be closed when done with.

    Every call but ``current`` wants the context current, and raises ``CudaError``.
    """

    package = "cuda-bindings"

    def __init__(self, device: int = 0) -> None:
        self._driver = load_driver()
        self.device = device
        self._context = 0
        try:
            self._call("cuInit", 0, doing="starting")
            self._handle = self._call("cuDeviceGet", device, doing=f"opening GPU {device}")
        except CudaError as error:
            if error.name in _NO_DEVICE_NAMES:
                raise NoGpuError(f"there is no GPU {device} here ({error.name})") from None
            raise NoGpuError(
                f"the GPU's driver does not start ({error.name}); see anchorline doctor"
            ) from None
        except Exception as error:  # how cuda-bindings say that libcuda is missing differs by version
            raise NoGpuError(f"there is no NVIDIA driver here ({one_line(error)})") from None
        self.device_name = device_name(self._driver, self._handle)
        self.compute_capability = compute_capability(self._driver, self._handle)  # 86 for 8.6
        self._context = int(
            self._call("cuDevicePrimaryCtxRetain", self._handle, doing="opening the GPU's primary context")
        )
        self._libraries: dict[str, Any] = {}
        self._loading = threading.Lock()  # lanes are made by many threads; each source is loaded once
        # .yes while this thread is in a block of ``current``; .kept once it had no context and kept ours
        self._inside = threading.local()

    def _call(self, function: str, *arguments: Any, doing: str) -> Any:
        return call_driver(self._driver, function, *arguments, doing=doing)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the context the calling thread's, for the block; blocks may be nested.

        A thread without a context keeps ours, so that the next call finds it; another's is given back.
        """
        if getattr(self._inside, "yes", False):
            yield
            return
        there = int(self._call("cuCtxGetCurrent", doing="asking for the current context"))
        pushed = there not in (0, self._context)
        if pushed:
            self._call("cuCtxPushCurrent", self._context, doing="entering the GPU's context")
        elif there == 0:
            self._call("cuCtxSetCurrent", self._context, doing="entering the GPU's context")
            self._inside.kept = True
        self._inside.yes = True
        try:
            yield
        finally:
            self._inside.yes = False
            if pushed:
                self._call("cuCtxPopCurrent", doing="leaving the GPU's context")

    def memory_info(self) -> tuple[int, int]:
        """Free and total device memory, in bytes."""
        free, total = self._call("cuMemGetInfo", doing="asking for free memory")
        return int(free), int(total)

    def allocate(self, size: int, what: str, remedy: str) -> int:
        """Device memory of ``size`` bytes; ``what`` and ``remedy`` are for ``OutOfDeviceMemoryError``."""
        try:
            with memory_lock:
                return int(self._call("cuMemAlloc", size, doing=f"allocating {what}"))
        except CudaError as error:
            if error.name != OUT_OF_MEMORY:
                raise
        free = None
        with contextlib.suppress(CudaError):
            free = self.memory_info()[0]
        raise OutOfDeviceMemoryError(size, free, what, remedy)

    def free(self, address: int) -> None:
        with memory_lock:
            self._call("cuMemFree", address, doing="freeing device memory")

    def allocate_pinned(self, size: int) -> PinnedBuffer:
        doing = f"allocating {size} bytes of pinned host memory"
        with memory_lock:
            address = int(self._call("cuMemHostAlloc", size, _PINNED_FLAGS, doing=doing))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return PinnedBuffer(address, array)

    def free_pinned(self, buffer: PinnedBuffer) -> None:
        with memory_lock:
            self._call("cuMemFreeHost", buffer.address, doing="freeing pinned host memory")

    def device_of(self, address: int) -> int | None:
        """The number of the device that the address belongs to, this one for pinned memory, which each GPU
        reads; ``None`` for memory CUDA does not know."""
        names = self._driver.CUpointer_attribute
        wanted = [names.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, names.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL]
        kind, device = self._call("cuPointerGetAttributes", 2, wanted, address, doing="asking about a frame")
        if int(kind) == int(self._driver.CUmemorytype.CU_MEMORYTYPE_HOST):
            return self.device
        return int(device) if int(kind) else None

    def create_stream(self) -> int:
        """A stream that does not wait for the legacy default stream."""
        flag = int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return int(self._call("cuStreamCreate", flag, doing="creating a stream"))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream, doing="destroying a stream")

    def stream_handle(self, stream: Any) -> int:
        """The handle of a CUDA stream: an integer, or a stream of PyTorch, pycuda, CuPy or cuda.core;
        ``SettingsError`` for what is none."""
        if hasattr(stream, "__cuda_stream__"):
            return int(stream.__cuda_stream__()[1])
        for name in ("cuda_stream", "handle", "ptr"):
            if isinstance(getattr(stream, name, None), int):
                return int(getattr(stream, name))
        if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
            return stream
        raise SettingsError(
            f"stream is {stream!r}; expected a stream of PyTorch, pycuda, CuPy or cuda.core, or its handle"
        )

    def synchronize(self, stream: int) -> None:
        """Wait until all work on the stream is done."""
        self._call("cuStreamSynchronize", stream, doing="waiting for the GPU")

    def copy_in(self, target: int, source: PinnedBuffer, size: int, stream: int) -> None:
        """Queue a copy of the first ``size`` bytes to the device."""
        self._call("cuMemcpyHtoDAsync", target, source.address, size, stream, doing="copying to the GPU")

    def copy_out(self, target: PinnedBuffer, source: int, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes to the host."""
        self._call("cuMemcpyDtoHAsync", target.address, source, size, stream, doing="copying from the GPU")

    def create_event(self, timing: bool = False) -> int:
        flags = self._driver.CUevent_flags
        flag = int(flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING)
        return int(self._call("cuEventCreate", flag, doing="creating an event"))

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy", event, doing="destroying an event")

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream, doing="recording an event")

    def wait(self, stream: int, event: int) -> None:
        """Later work on ``stream`` waits for the event."""
        self._call("cuStreamWaitEvent", stream, event, 0, doing="waiting for an event")

    def seconds_between(self, start: int, end: int) -> float:
        """Time between two recorded timing events that have happened."""
        return float(self._call("cuEventElapsedTime", start, end, doing="reading an event's time")) / 1000.0

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Record what ``work`` queues on ``stream`` instead of running it; a graph to launch.

        Thread-local: other threads may allocate and copy meanwhile. If ``work`` raises, the capture is
        ended and nothing is left of it.
        """
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode, doing="beginning a graph")
        try:
            work()
        except BaseException:
            code, graph = self._driver.cuStreamEndCapture(stream)  # the reason is the exception under way
            if not int(code) and int(graph):
                self._driver.cuGraphDestroy(graph)
            raise
        graph = self._call("cuStreamEndCapture", stream, doing="recording a graph")
        try:
            return int(self._call("cuGraphInstantiate", graph, 0, doing="making a graph executable"))
        finally:
            self._call("cuGraphDestroy", graph, doing="destroying a graph")

    def launch_graph(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", graph, stream, doing="launching a graph")

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", graph, doing="destroying a graph")

    def load_kernel(self, source: str, kernel: str) -> Any:
        """A kernel of the folder ``kernels``, ready to be launched."""
        with memory_lock, self._loading:
            if source not in self._libraries:
                none: list[Any] = []  # no options, for compiler or library
                given = (image(source, self.compute_capability), none, none, 0, none, none, 0)
                self._libraries[source] = self._call("cuLibraryLoadData", *given, doing=f"loading {source}")
            library = self._libraries[source]
            found = self._call("cuLibraryGetKernel", library, kernel.encode(), doing=f"finding {kernel}")
            # Else it is loaded at the first launch.
            return self._call("cuKernelGetFunction", found, doing=f"loading {kernel}")

    def launch(self, kernel: Any, item: Launch, stream: int) -> None:
        """Queue ``item``, whose kernel was loaded as ``kernel``."""
        launch_kernel(self._driver, kernel, item, stream, doing="launching a kernel")

    def close(self) -> None:
        """Let go of the context. Safe to call twice."""
        if not self._context:
            return
        with contextlib.suppress(CudaError), self.current():
            for library in self._libraries.values():
                self._call("cuLibraryUnload", library, doing="unloading kernels")
        self._libraries.clear()
        with contextlib.suppress(CudaError):  # where this thread kept our context, it has none again
            there = int(self._call("cuCtxGetCurrent", doing="asking for the current context"))
            if getattr(self._inside, "kept", False) and there == self._context:
                self._call("cuCtxSetCurrent", 0, doing="leaving the GPU's context")
        self._context = 0
        with contextlib.suppress(CudaError):
            self._call("cuDevicePrimaryCtxRelease", self._handle, doing="closing the GPU's primary context")


def load_pycuda() -> Any:
    """The module ``pycuda.driver``; ``NoGpuError`` where it cannot be had."""
    try:
        return importlib.import_module("pycuda.driver")
    except ImportError as error:  # not installed, or libcuda is missing, to which it is linked
        raise NoGpuError(
            f"pycuda cannot be imported ({one_line(error)}); it needs the NVIDIA driver and "
            "pip install pycuda"
        ) from None


class PyCuda:
    """The same as ``BindingsCuda`` over pycuda, but for graphs, which pycuda does not know.

    For programs that use pycuda already. Their code and this one meet on the primary context, which
    ``pycuda.autoprimaryctx`` makes current; ``pycuda.autoinit`` makes a context of its own, whose memory
    cannot be used here. Streams of other libraries are taken when they are pycuda's. Written after pycuda
    2026.1.
    """

    package = "pycuda"

    def __init__(self, device: int = 0) -> None:
        self._pycuda = load_pycuda()
        self.device = device
        try:
            self._pycuda.init()
            if device >= self._pycuda.Device.count():
                raise NoGpuError(f"there is no GPU {device} here")
            opened = self._pycuda.Device(device)
            major, minor = opened.compute_capability()
            self._context: Any = opened.retain_primary_context()
        except self._pycuda.Error as error:
            raise NoGpuError(f"the GPU's driver does not start ({one_line(error)})") from None
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
        self._loading = threading.Lock()
        self._inside = threading.local()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        if getattr(self._inside, "yes", False):
            yield
            return
        self._call(self._context.push, doing="entering the GPU's context")
        self._inside.yes = True
        try:
            yield
        finally:
            self._inside.yes = False
            self._call(self._context.pop, doing="leaving the GPU's context")

    def memory_info(self) -> tuple[int, int]:
        free, total = self._call(self._pycuda.mem_get_info, doing="asking for free memory")
        return int(free), int(total)

    def allocate(self, size: int, what: str, remedy: str) -> int:
        try:
            with memory_lock:
                block = self._call(self._pycuda.mem_alloc, size, doing=f"allocating {what}")
        except OutOfDeviceMemoryError:
            raise OutOfDeviceMemoryError(size, self.memory_info()[0], what, remedy) from None
        self._memory[int(block)] = block
        return int(block)

    def free(self, address: int) -> None:
        with memory_lock:
            self._call(self._memory.pop(address).free, doing="freeing device memory")

    def allocate_pinned(self, size: int) -> PinnedBuffer:
        doing = f"allocating {size} bytes of pinned host memory"
        with memory_lock:
            array = self._call(self._pycuda.pagelocked_empty, size, np.uint8, doing=doing)
        self._pinned[array.ctypes.data] = array
        return PinnedBuffer(array.ctypes.data, array)

    def free_pinned(self, buffer: PinnedBuffer) -> None:
        with memory_lock:
            self._call(self._pinned.pop(buffer.address).base.free, doing="freeing pinned host memory")

    def device_of(self, address: int) -> int | None:
        """This GPU or unknown: pycuda does not tell other devices."""
        try:
            self._pycuda.mem_get_address_range(address)
        except self._pycuda.Error:
            return None
        return self.device

    def create_stream(self) -> int:
        made = self._call(self._pycuda.Stream, doing="creating a stream")
        self._streams[int(made.handle)] = made
        return int(made.handle)

    def destroy_stream(self, stream: int) -> None:
        del self._streams[stream]

    def stream_handle(self, stream: Any) -> int:
        if isinstance(stream, self._pycuda.Stream):
            handle = int(stream.handle)
            with self._loading:  # a program may make a stream for each frame, so only the latest are kept
                self._foreign[handle] = stream
                if len(self._foreign) > _FOREIGN_STREAMS:
                    del self._foreign[next(iter(self._foreign))]
            return handle
        if isinstance(stream, int) and (stream in self._streams or stream in self._foreign):
            return stream
        raise SettingsError(f"stream is {stream!r}; with cuda='pycuda' expected a pycuda.driver.Stream")

    def synchronize(self, stream: int) -> None:
        waited = self._stream(stream) or self._pycuda.Context
        self._call(waited.synchronize, doing="waiting for the GPU")

    def copy_in(self, target: int, source: PinnedBuffer, size: int, stream: int) -> None:
        given = (target, source.array[:size], self._stream(stream))
        self._call(self._pycuda.memcpy_htod_async, *given, doing="copying to the GPU")

    def copy_out(self, target: PinnedBuffer, source: int, size: int, stream: int) -> None:
        given = (target.array[:size], source, self._stream(stream))
        self._call(self._pycuda.memcpy_dtoh_async, *given, doing="copying from the GPU")

    def create_event(self, timing: bool = False) -> int:
        flags = self._pycuda.event_flags
        number, flag = next(self._numbers), flags.DEFAULT if timing else flags.DISABLE_TIMING
        self._events[number] = self._call(self._pycuda.Event, flag, doing="creating an event")
        return number

    def destroy_event(self, event: int) -> None:
        del self._events[event]

    def record(self, event: int, stream: int) -> None:
        self._call(self._events[event].record, self._stream(stream), doing="recording an event")

    def wait(self, stream: int, event: int) -> None:
        waiting = self._stream(stream)
        if waiting is None:  # pycuda's default stream has no object that could wait
            self._call(self._events[event].synchronize, doing="waiting for an event")
        else:
            self._call(waiting.wait_for_event, self._events[event], doing="waiting for an event")

    def seconds_between(self, start: int, end: int) -> float:
        times = self._events[start], self._events[end]
        return float(self._call(times[0].time_till, times[1], doing="reading an event's time")) / 1000.0

    def load_kernel(self, source: str, kernel: str) -> Any:
        with memory_lock, self._loading:
            if source not in self._modules:
                code, load = image(source, self.compute_capability), self._pycuda.module_from_buffer
                self._modules[source] = self._call(load, code, doing=f"loading {kernel}")
            return self._call(self._modules[source].get_function, kernel, doing=f"loading {kernel}")

    def launch(self, kernel: Any, item: Launch, stream: int) -> None:
        # As NumPy numbers, which pycuda packs with their size.
        values = [
            np.uintp(argument.value or 0)
            if isinstance(argument, ctypes.c_void_p)
            else np.dtype(type(argument)).type(argument.value)
            for argument in item.arguments
        ]
        how = {"grid": item.grid, "block": (item.threads, 1, 1), "stream": self._stream(stream)}
        self._call(kernel, *values, **how, doing="launching a kernel")

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

    def _call(self, function: Callable[..., Any], *arguments: Any, doing: str, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except self._pycuda.MemoryError:
            raise OutOfDeviceMemoryError(0, None, doing, "close other programs on the GPU") from None
        except self._pycuda.Error as error:
            text = one_line(error)
            lost = next((name for words, name in _LOST_IN_PYCUDA.items() if words in text), None)
            raise CudaError(doing, lost or type(error).__name__, text, sticky=lost is not None) from None


Cuda = BindingsCuda | PyCuda


def open_cuda(package: str = "cuda-bindings", device: int = 0) -> Cuda:
    """GPU number ``device`` through one of ``CUDA_PACKAGES``; to be closed when done with.

    Raises ``NoGpuError`` where package, driver or GPU is missing.
    """
    return PyCuda(device) if package == "pycuda" else BindingsCuda(device)
