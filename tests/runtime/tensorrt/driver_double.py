"""A double of cuda-bindings' driver module that keeps device memory in NumPy and forgives nothing.

Work is queued and runs when somebody waits for it, so results that are read too early, and buffers that
are filled again too early, show as wrong numbers. Everything that CUDA would leave undefined is a
``Misuse``: addresses of the other side, freed handles, calls without a context, names that cuda-bindings
does not have or that take another number of arguments. What CUDA reports, such as a full memory, is
returned as its error code.
"""

from __future__ import annotations

import bisect
import itertools
import re
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import driver as real
from numpy.typing import NDArray

from anchorline.runtime.canvas import Placement, to_canvas
from anchorline.runtime.nv12 import Nv12, bgr_of

OK = real.CUresult.CUDA_SUCCESS
LEGACY = (0, 1)  # two names of one stream
PER_THREAD = 2  # another one in each thread
PRIMARY = 77  # the primary context
_PAGE = 4096
_FREE_OF_CONTEXT = re.compile(r"cu(Init|Device|Ctx|GetError|DriverGet)")


class Misuse(AssertionError):
    """Something that real CUDA would crash on, or get wrong in silence."""


class Stream:
    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.capture: list[Callable[[], None]] | None = None
        self.capture_thread = 0
        self.broken_capture = False


class DriverDouble:
    """Stands for the module ``cuda.bindings.driver``. ``calls`` is the log: (name, arguments)."""

    def __init__(self, memory: int = 1 << 30, capability: int = 89) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.memory, self.capability = memory, capability
        self.fail: dict[str, Any] = {}  # the next call of this name returns this code
        self.sticky: Any = None  # every call returns this code
        self.misuse: list[str] = []
        self.foreign_device_memory: dict[int, int] = {}  # address -> device of another library
        self.device: dict[int, NDArray[np.uint8]] = {}
        self.name = "Double"
        self.pinned: dict[int, NDArray[np.uint8]] = {}
        self.streams: dict[int, Stream] = dict.fromkeys(LEGACY, Stream())
        self.events: dict[int, dict[str, Any]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.executables: dict[int, list[Callable[[], None]]] = {}
        self.libraries: dict[int, bytes] = {}
        self.functions: dict[int, str] = {}
        self.retained = 0
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()  # what is bound to device memory
        self._sorted: list[int] = []
        self._foreign: set[int] = set()
        self._handles = itertools.count(1000)
        self._next_address = 0x7F00_0000_0000
        self._contexts = threading.local()
        self._lock = threading.RLock()

    # The module's names

    def __getattr__(self, name: str) -> Any:
        if not hasattr(real, name):
            raise Misuse(f"cuda-bindings has no {name}")
        if not re.match(r"cu[A-Z]", name):
            return getattr(real, name)
        implementation = getattr(type(self), f"do_{name}", None)
        if implementation is None:
            raise NotImplementedError(f"the double does not know {name}")
        return lambda *arguments: self._enter(name, implementation, arguments)

    def _enter(self, name: str, implementation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        with self._lock:
            self._check_count(name, arguments)
            self.calls.append((name, arguments))
            if name.startswith("cuGetError"):
                return implementation(self, *arguments)
            code = self.sticky if self.sticky is not None else self.fail.pop(name, None)
            if code is not None:
                return (code, None)
            if not _FREE_OF_CONTEXT.match(name):
                self._check_context(name)
            result = implementation(self, *arguments)
            if self.sticky is not None:  # the work itself broke the context
                return (self.sticky, None)
            if isinstance(result, real.CUresult):
                return (result, None)
            return (OK,) if result is None else (OK, *result) if isinstance(result, tuple) else (OK, result)

    def _check_context(self, name: str) -> None:
        if not self._stack():
            raise self._refuse(f"{name} without a current context")
        if self._stack()[-1] != PRIMARY:
            raise self._refuse(f"{name} in somebody else's context")
        if not self.retained:
            raise self._refuse(f"{name} after the primary context was released")

    def _check_count(self, name: str, arguments: tuple[Any, ...]) -> None:
        signature = getattr(real, name).__doc__.strip().splitlines()[0]
        inside = re.sub(r"\[[^\]]*\]", "", signature[signature.index("(") + 1 : signature.rindex(")")])
        wanted = len([part for part in inside.split(",") if part.strip()])
        if wanted != len(arguments):
            raise self._refuse(f"{name} takes {wanted} arguments, got {len(arguments)}")

    def _refuse(self, text: str) -> Misuse:
        self.misuse.append(text)
        return Misuse(text)

    def _stack(self) -> list[int]:
        if not hasattr(self._contexts, "stack"):
            self._contexts.stack = []
        return self._contexts.stack

    # What tests ask

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def leaks(self) -> dict[str, int]:
        """What is still there, of everything that has to be given back."""
        found = Counter(
            device=len(self.device),
            pinned=len(self.pinned),
            streams=len(self.streams) - len(LEGACY),
            events=len(self.events),
            graphs=len(self.graphs) + len(self.executables),
            libraries=len(self.libraries),
            contexts=self.retained,
        )
        return {name: count for name, count in found.items() if count}

    def put(self, values: NDArray[Any]) -> int:
        """Device memory of another library with these bytes; it does not count as a leak when removed."""
        address = self._allocate(values.nbytes)
        self._foreign.add(address)
        self.device[address][:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        return address

    def foreign_blocks(self) -> set[int]:
        """The device memory of other libraries that is there."""
        return set(self._foreign)

    def remove(self, address: int) -> None:
        self._foreign.remove(address)
        del self.device[address]
        self._sorted.remove(address)

    def at(self, address: int, size: int) -> NDArray[np.uint8]:
        """The bytes of device memory at an address, which must lie in one allocation."""
        index = bisect.bisect_right(self._sorted, address) - 1
        base = self._sorted[index] if index >= 0 else -1
        block = self.device.get(base)
        if block is None or address + size > base + len(block):
            kind = "pinned host memory" if self._pinned_at(address, size) is not None else "no device memory"
            raise self._refuse(f"device address {address:#x} (+{size}) is {kind}")
        return block[address - base : address - base + size]

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        target = self._stream(stream)
        (target.queue if target.capture is None else target.capture).append(work)

    def is_capturing(self, stream: int) -> bool:
        return self._stream(stream).capture is not None

    def _stream(self, handle: Any) -> Stream:
        if int(handle) == PER_THREAD:
            if not hasattr(self._contexts, "stream"):
                self._contexts.stream = Stream()
            return self._contexts.stream
        if int(handle) not in self.streams:
            raise self._refuse(f"stream {int(handle)} does not exist (any more)")
        return self.streams[int(handle)]

    def _pinned_at(self, address: int, size: int) -> NDArray[np.uint8] | None:
        for base, block in self.pinned.items():
            if base <= address and address + size <= base + len(block):
                return block[address - base : address - base + size]
        return None

    def _host(self, address: int, size: int) -> NDArray[np.uint8]:
        found = self._pinned_at(address, size)
        if found is None:
            raise self._refuse(f"host address {address:#x} (+{size}) is not pinned memory")
        return found

    def _take(self, table: dict[int, Any], handle: Any, what: str) -> Any:
        if int(handle) not in table:
            raise self._refuse(f"{what} {int(handle)} does not exist (any more)")
        return table.pop(int(handle))

    def _new(self, table: dict[int, Any], value: Any) -> int:
        handle = next(self._handles)
        table[handle] = value
        return handle

    def _drain(self, stream: Stream) -> None:
        while stream.queue:
            stream.queue.pop(0)()

    def _capturing_here(self) -> bool:
        me = threading.get_ident()
        return any(s.capture is not None and s.capture_thread == me for s in self.streams.values())

    # Start, context, errors

    def do_cuInit(self, flags: int) -> None:
        pass

    def do_cuDeviceGet(self, ordinal: int) -> Any:
        return ordinal if ordinal == 0 else real.CUresult.CUDA_ERROR_INVALID_DEVICE

    def do_cuDeviceGetName(self, length: int, device: int) -> bytes:
        return self.name.encode().ljust(length, b"\0")

    def do_cuDeviceGetAttribute(self, attribute: Any, device: int) -> int:
        major = attribute == real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        return self.capability // 10 if major else self.capability % 10

    def do_cuDevicePrimaryCtxRetain(self, device: int) -> int:
        self.retained += 1
        return PRIMARY

    def do_cuDevicePrimaryCtxRelease(self, device: int) -> None:
        self.retained -= 1
        if self.retained < 0:
            raise self._refuse("primary context released too often")

    def do_cuCtxGetCurrent(self) -> int:
        return self._stack()[-1] if self._stack() else 0

    def do_cuCtxGetDevice(self) -> int:
        return 0

    def do_cuCtxSetCurrent(self, context: int) -> None:
        self._stack()[-1:] = [int(context)] if int(context) else []

    def do_cuCtxPushCurrent(self, context: int) -> None:
        self._stack().append(int(context))

    def do_cuCtxPopCurrent(self) -> int:
        return self._stack().pop()

    def do_cuGetErrorString(self, code: Any) -> tuple[Any, bytes]:
        return OK, f"text of {code.name}".encode()

    # Memory

    def _allocate(self, size: int) -> int:
        address = self._next_address
        self._next_address += -(-size // _PAGE) * _PAGE + _PAGE
        self.device[address] = np.full(size, 0xCD, np.uint8)
        bisect.insort(self._sorted, address)
        return address

    def do_cuMemAlloc(self, size: int) -> Any:
        if size <= 0:
            return real.CUresult.CUDA_ERROR_INVALID_VALUE
        if self._capturing_here():
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        if size > self._free():
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY
        return self._allocate(size)

    def _free(self) -> int:
        return self.memory - sum(map(len, self.device.values()))

    def do_cuMemFree(self, address: int) -> None:
        for stream in self.streams.values():
            self._drain(stream)  # cuMemFree waits for the device
        end = int(address) + len(self.device.get(int(address), ()))
        if any(int(address) <= used < end for user in self.users for used in user.used_addresses()):
            raise self._refuse("memory freed before the context of TensorRT that is bound to it")
        self._take(self.device, address, "device memory")
        self._sorted.remove(int(address))

    def do_cuMemGetInfo(self) -> tuple[int, int]:
        return self._free(), self.memory

    def do_cuMemHostAlloc(self, size: int, flags: int) -> int:
        block = np.full(size, 0xAB, np.uint8)
        self.pinned[block.ctypes.data] = block
        return block.ctypes.data

    def do_cuMemFreeHost(self, address: int) -> None:
        # Work that is still queued for it is refused when it runs; whoever still looks at it sees nonsense.
        self._take(self.pinned, address, "pinned memory")[:] = 0xDD

    def do_cuPointerGetAttributes(self, count: int, attributes: list[Any], address: int) -> list[int]:
        if address in self.foreign_device_memory:
            return [2, self.foreign_device_memory[address]]
        if self._pinned_at(address, 1) is not None:
            return [1, 0]
        on_device = any(base <= address < base + len(block) for base, block in self.device.items())
        return [2, 0] if on_device else [0, -2]

    def do_cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> None:
        self._host(source, size), self.at(target, size)

        def copy() -> None:
            self.at(target, size)[:] = self._host(source, size)

        self.enqueue(stream, copy)

    def do_cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> None:
        self._host(target, size), self.at(source, size)

        def copy() -> None:
            self._host(target, size)[:] = self.at(source, size)

        self.enqueue(stream, copy)

    # Streams, events, graphs

    def do_cuStreamCreate(self, flags: int) -> int:
        return self._new(self.streams, Stream())

    def do_cuStreamDestroy(self, stream: int) -> None:
        if int(stream) in LEGACY or self._stream(stream).queue:
            raise self._refuse("a stream destroyed that has work queued, or is the default one")
        self._take(self.streams, stream, "stream")

    def do_cuStreamSynchronize(self, stream: int) -> Any:
        target = self._stream(stream)
        if target.capture is not None:
            target.broken_capture = True
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        self._drain(target)
        return None

    def do_cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        record = self.events[int(event)]["record"]  # the latest so far; a later one does not count
        if record is None:
            raise self._refuse("waiting for an event that was never recorded")

        def wait() -> None:
            while not record["done"]:
                record["stream"].queue.pop(0)()

        self.enqueue(stream, wait)

    def do_cuEventCreate(self, flags: int) -> int:
        timing = not flags & int(real.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        return self._new(self.events, {"record": None, "timing": timing})

    def do_cuEventRecord(self, event: int, stream: int) -> None:
        if int(event) not in self.events:
            raise self._refuse(f"event {event} does not exist (any more)")
        record: dict[str, Any] = {"stream": self._stream(stream), "done": None}
        self.events[int(event)]["record"] = record
        self.enqueue(stream, lambda: record.update(done=time.perf_counter()))

    def do_cuEventDestroy(self, event: int) -> None:
        self._take(self.events, event, "event")

    def do_cuEventElapsedTime(self, start: int, end: int) -> Any:
        first, last = self.events[int(start)], self.events[int(end)]
        if not (first["timing"] and last["timing"]):
            return real.CUresult.CUDA_ERROR_INVALID_HANDLE
        times = [found["record"] and found["record"]["done"] for found in (first, last)]
        return real.CUresult.CUDA_ERROR_NOT_READY if None in times else 1000.0 * (times[1] - times[0])

    def do_cuStreamBeginCapture(self, stream: int, mode: Any) -> Any:
        if int(stream) in LEGACY:
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        if mode != real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL:
            raise self._refuse("a capture that breaks other threads' allocations")
        target = self._stream(stream)
        if target.queue:
            raise self._refuse("a capture begun before the warm-up had ended")
        target.capture, target.capture_thread = [], threading.get_ident()
        return None

    def do_cuStreamEndCapture(self, stream: int) -> Any:
        target = self._stream(stream)
        if target.capture is None:
            return real.CUresult.CUDA_ERROR_ILLEGAL_STATE
        if target.capture_thread != threading.get_ident():
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD
        captured, target.capture = target.capture, None
        if target.broken_capture:
            target.broken_capture = False
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        return self._new(self.graphs, captured)

    def do_cuGraphInstantiate(self, graph: int, flags: int) -> int:
        if int(graph) not in self.graphs:
            raise self._refuse("a graph that does not exist (any more)")
        return self._new(self.executables, list(self.graphs[int(graph)]))

    def do_cuGraphDestroy(self, graph: int) -> None:
        self._take(self.graphs, graph, "graph")

    def do_cuGraphExecDestroy(self, graph: int) -> None:
        self._take(self.executables, graph, "executable graph")

    def do_cuGraphLaunch(self, graph: int, stream: int) -> None:
        if int(graph) not in self.executables:
            raise self._refuse("an executable graph that does not exist (any more)")
        for work in self.executables[int(graph)]:
            self.enqueue(stream, work)

    # Kernels

    def do_cuLibraryLoadData(self, code: bytes, *options: Any) -> int:
        if self._capturing_here():
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        if not code.startswith(b"\x7fELF"):
            raise self._refuse("an image that is no cubin")
        return self._new(self.libraries, code)

    def do_cuLibraryUnload(self, library: int) -> None:
        self._take(self.libraries, library, "library")

    def do_cuLibraryGetKernel(self, library: int, name: bytes) -> Any:
        if name not in self.libraries[int(library)]:
            return real.CUresult.CUDA_ERROR_NOT_FOUND
        return self._new(self.functions, name.decode())

    def do_cuKernelGetFunction(self, kernel: int) -> int:
        return kernel

    def do_cuLaunchKernel(self, function: int, *launch: Any) -> None:
        name, stream, (values, types) = self.functions[int(function)], launch[7], launch[8]
        if len(values) != 12 or len(types) != 12 or "_to_" not in name:
            raise self._refuse(f"kernel {name} with {len(values)} arguments")
        if None in values:
            raise self._refuse("a null pointer as None")
        grid, block = launch[:3], launch[3:6]
        if grid[0] * block[0] < values[6] or block[1:] != (1, 1):
            raise self._refuse("a grid that does not cover the canvas")
        self.enqueue(stream, lambda: self._preprocess(name, grid[1], values))

    def _preprocess(self, name: str, canvas_height: int, values: tuple[Any, ...]) -> None:
        frame, chroma, pitch, height, width, canvas, canvas_width, size, valid_h, valid_w = values[:10]
        dtype = np.dtype(name.partition("_to_")[2])
        if name.startswith("nv12"):
            luma = self._rows(frame, pitch, height, width)
            pixels = np.concatenate([luma, self._rows(chroma, pitch, height // 2, width)])
            matrix, _, full = name.removeprefix("nv12_").partition("_to_")[0].partition("_")
            source = bgr_of(Nv12(pixels, matrix, full == "full"))
        else:
            source = self._rows(frame, pitch, height, 3 * width).reshape(height, width, 3)
        shape = (canvas_height, canvas_width, 3)
        out = self.at(canvas, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
        to_canvas(source, Placement((height, width), (valid_h, valid_w)), out)
        self.at(size, 8).view(np.float32)[:] = (valid_h, valid_w)

    def _rows(self, address: int, pitch: int, rows: int, width: int) -> NDArray[np.uint8]:
        return np.stack([self._readable(address + row * pitch, width) for row in range(rows)])

    def _readable(self, address: int, size: int) -> NDArray[np.uint8]:
        """What a kernel can read: device memory, and pinned memory by unified addressing."""
        found = self._pinned_at(address, size)
        return self.at(address, size) if found is None else found
