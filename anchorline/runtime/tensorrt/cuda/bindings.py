"""The CUDA layer over cuda-bindings, the only module of it that imports ``cuda``."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from anchorline.runtime.io.errors import GpuError, SettingsError
from anchorline.runtime.tensorrt.cuda.interface import (
    OUT_OF_MEMORY,
    CudaError,
    NoGpuError,
    OutOfDeviceMemoryError,
    PinnedBuffer,
)
from anchorline.runtime.tensorrt.plugins.images import image

_NO_DEVICE_NAMES = ("CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_INVALID_DEVICE", "CUDA_ERROR_STUB_LIBRARY")
_PINNED_FLAGS = 0  # cuMemHostAlloc: readable from the device as well, by unified addressing


def load_driver() -> Any:
    """cuda-bindings' driver module; ``NoGpuError`` where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise NoGpuError(
            f"cuda-bindings cannot be imported ({error}); pip install 'anchorline[gpu]'"
        ) from None
    return driver


class BindingsCuda:
    """``Cuda`` over cuda-bindings."""

    package = "cuda-bindings"
    has_graphs = True

    def __init__(self, device: int = 0) -> None:
        self._driver = load_driver()
        self.device = device
        self._context = 0
        self._handle = self._open(device)
        self.device_name = str(
            self._call("cuDeviceGetName", 256, self._handle, doing="asking the GPU").decode().strip("\0 ")
        )
        self.compute_capability = self._capability()
        self._context = int(
            self._call("cuDevicePrimaryCtxRetain", self._handle, doing="opening the GPU's primary context")
        )
        self._libraries: dict[str, Any] = {}
        self._loading = threading.Lock()  # lanes are made by many threads; each source is loaded once
        # .yes while this thread is in a block of ``current``; .kept once it had no context and kept ours
        self._inside = threading.local()

    def _open(self, device: int) -> Any:
        try:
            self._call("cuInit", 0, doing="starting")
            return self._call("cuDeviceGet", device, doing=f"opening GPU {device}")
        except CudaError as error:
            if error.name in _NO_DEVICE_NAMES:
                raise NoGpuError(f"there is no GPU {device} here ({error.name})") from None
            raise NoGpuError(
                f"the GPU's driver does not start ({error.name}); see anchorline doctor"
            ) from None
        except GpuError:
            raise
        except Exception as error:  # how cuda-bindings say that libcuda is missing differs by version
            reason = " ".join(str(error).split())
            raise NoGpuError(f"there is no NVIDIA driver here ({reason})") from None

    def _capability(self) -> int:
        names = self._driver.CUdevice_attribute
        major, minor = (
            int(self._call("cuDeviceGetAttribute", attribute, self._handle, doing="asking the GPU"))
            for attribute in (
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return 10 * major + minor

    def _call(self, function: str, *arguments: Any, doing: str) -> Any:
        """Call the driver; returns its one value, all of several, or ``None``."""
        result = getattr(self._driver, function)(*arguments)
        if int(result[0]):
            raise self._error(result[0], doing)
        return result[1] if len(result) == 2 else result[1:]

    def _error(self, code: Any, doing: str) -> CudaError:
        name = str(getattr(code, "name", code))
        found = self._driver.cuGetErrorString(code)
        text = found[1].decode() if not int(found[0]) and found[1] else ""
        return CudaError(doing, name, text)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """A thread without a context keeps ours, so that the next call finds it; another's is given back.

        Blocks may be nested.
        """
        if getattr(self._inside, "yes", False):
            yield
            return
        with self._entered():
            self._inside.yes = True
            try:
                yield
            finally:
                self._inside.yes = False

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        there = int(self._call("cuCtxGetCurrent", doing="asking for the current context"))
        if there == self._context:
            yield
        elif there == 0:
            self._call("cuCtxSetCurrent", self._context, doing="entering the GPU's context")
            self._inside.kept = True
            yield
        else:
            self._call("cuCtxPushCurrent", self._context, doing="entering the GPU's context")
            try:
                yield
            finally:
                self._call("cuCtxPopCurrent", doing="leaving the GPU's context")

    def memory_info(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo", doing="asking for free memory")
        return int(free), int(total)

    def allocate(self, size: int, what: str, remedy: str) -> int:
        try:
            return int(self._call("cuMemAlloc", size, doing=f"allocating {what}"))
        except CudaError as error:
            if error.name != OUT_OF_MEMORY:
                raise
        free: int | None
        try:
            free = self.memory_info()[0]
        except CudaError:
            free = None
        raise OutOfDeviceMemoryError(size, free, what, remedy)

    def free(self, address: int) -> None:
        self._call("cuMemFree", address, doing="freeing device memory")

    def allocate_pinned(self, size: int) -> PinnedBuffer:
        doing = f"allocating {size} bytes of pinned host memory"
        address = int(self._call("cuMemHostAlloc", size, _PINNED_FLAGS, doing=doing))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        return PinnedBuffer(address, array)

    def free_pinned(self, buffer: PinnedBuffer) -> None:
        self._call("cuMemFreeHost", buffer.address, doing="freeing pinned host memory")

    def device_of(self, address: int) -> int | None:
        names = self._driver.CUpointer_attribute
        wanted = [names.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, names.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL]
        kind, device = self._call("cuPointerGetAttributes", 2, wanted, address, doing="asking about a frame")
        if int(kind) == int(self._driver.CUmemorytype.CU_MEMORYTYPE_HOST):
            return self.device
        return int(device) if int(kind) else None

    def create_stream(self) -> int:
        flag = int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return int(self._call("cuStreamCreate", flag, doing="creating a stream"))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream, doing="destroying a stream")

    def stream_handle(self, stream: Any) -> int:
        return stream_handle(stream)

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream, doing="waiting for the GPU")

    def copy_in(self, target: int, source: PinnedBuffer, size: int, stream: int) -> None:
        self._call("cuMemcpyHtoDAsync", target, source.address, size, stream, doing="copying to the GPU")

    def copy_out(self, target: PinnedBuffer, source: int, size: int, stream: int) -> None:
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
        self._call("cuStreamWaitEvent", stream, event, 0, doing="waiting for an event")

    def seconds_between(self, start: int, end: int) -> float:
        return float(self._call("cuEventElapsedTime", start, end, doing="reading an event's time")) / 1000.0

    def capture(self, stream: int, work: Callable[[], None]) -> int:
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
        with self._loading:
            if source not in self._libraries:
                none: list[Any] = []  # no options, for compiler or library
                loaded = (image(source, self.compute_capability), none, none, 0, none, none, 0)
                self._libraries[source] = self._call("cuLibraryLoadData", *loaded, doing=f"loading {source}")
            library = self._libraries[source]
        found = self._call("cuLibraryGetKernel", library, kernel.encode(), doing=f"finding {kernel}")
        return self._call("cuKernelGetFunction", found, doing=f"loading {kernel}")  # else at the first launch

    def launch(
        self, kernel: Any, grid: tuple[int, int, int], threads: int, arguments: Sequence[Any], stream: int
    ) -> None:
        # ctypes reads a null pointer as None, which cuda-bindings do not take.
        values = tuple(0 if argument.value is None else argument.value for argument in arguments)
        types = tuple(type(argument) for argument in arguments)
        given = (kernel, *grid, threads, 1, 1, 0, stream, (values, types), 0)
        self._call("cuLaunchKernel", *given, doing="launching a kernel")

    def close(self) -> None:
        if not self._context:
            return
        with contextlib.suppress(CudaError), self.current():
            for library in self._libraries.values():
                self._call("cuLibraryUnload", library, doing="unloading kernels")
        self._libraries.clear()
        with contextlib.suppress(CudaError):
            self._leave()
        self._context = 0
        with contextlib.suppress(CudaError):
            self._call("cuDevicePrimaryCtxRelease", self._handle, doing="closing the GPU's primary context")

    def _leave(self) -> None:
        """Where this thread kept our context, which may be gone at once, it has none again."""
        there = int(self._call("cuCtxGetCurrent", doing="asking for the current context"))
        if getattr(self._inside, "kept", False) and there == self._context:
            self._call("cuCtxSetCurrent", 0, doing="leaving the GPU's context")


def stream_handle(stream: Any) -> int:
    """The handle of a CUDA stream: an integer, or a stream of PyTorch, pycuda, CuPy or cuda.core."""
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
