"""A deserialised engine: its tensors, its contexts, and what TensorRT says when it refuses."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchorline.runtime.contract import NMS_CONVERGED, Contract
from anchorline.runtime.io.errors import ArtefactError, GpuError, OutputError
from anchorline.runtime.io.files import atomic_write_bytes, sha256_of
from anchorline.runtime.tensorrt.cuda.interface import Cuda, CudaError, OutOfDeviceMemoryError
from anchorline.runtime.tensorrt.library import FLAVOURS, log, tensorrt_logger
from anchorline.runtime.tensorrt.manifest import EngineManifest
from anchorline.runtime.tensorrt.plugins import register_plugins

# What TensorRT complained of: it says why in its log alone, and the calls only that they failed.


_KEPT = 32
_LONGEST = 300  # characters of a reason


class ErrorLog(logging.Handler):
    """Keeps the latest errors of TensorRT's log; attached once, so that nothing is done for each frame."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._errors: deque[tuple[int, str]] = deque(maxlen=_KEPT)
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._count += 1
        self._errors.append((self._count, " ".join(record.getMessage().split())))

    def mark(self) -> int:
        """A point in the log, for ``since``."""
        return self._count

    def since(self, mark: int) -> list[str]:
        """The errors after ``mark``, each on one line; those of other threads may be among them."""
        return [text for number, text in list(self._errors) if number > mark]

    def reason(self, mark: int) -> str:
        """The first error after ``mark``: the cause, which later ones follow from."""
        text = next(iter(self.since(mark)), "no reason given")
        return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


errors = ErrorLog()
log.addHandler(errors)


# Whether an engine can run here: TensorRT's release, and the GPU it was built for.


_RELEASE_NUMBERS = 3  # a plan is loaded by the very release that built it
_AMPERE = 80


class CannotRunHereError(GpuError):
    """An engine that is sound but not for this machine; its ONNX file may run instead."""


def check_flavour(manifest: EngineManifest) -> None:
    """Raise ``ArtefactError`` for a flavour of TensorRT that is not known."""
    if manifest.flavour not in FLAVOURS:
        raise ArtefactError(
            f"{manifest.path}: flavour is {manifest.flavour!r}; expected one of {', '.join(FLAVOURS)}; "
            "build the engine again"
        )


def check_fit(manifest: EngineManifest, version: str, capability: int, gpu: str) -> None:
    """Raise ``CannotRunHereError`` where TensorRT ``version`` on a GPU of ``capability`` cannot run it."""
    title = FLAVOURS[manifest.flavour].title
    options = manifest.options
    numbers = 1 if options.get("version_compatible") else _RELEASE_NUMBERS
    if _release(version, numbers) != _release(manifest.flavour_version, numbers):
        raise CannotRunHereError(
            f"it was built with {title} {manifest.flavour_version}, and {version} is installed; build it "
            "again here, or install that release"
        )
    built = manifest.compute_capabilities
    compatible = bool(options.get("hardware_compatible")) and capability >= _AMPERE
    if built and capability not in built and not compatible:
        names = ", ".join(f"sm_{number}" for number in built)
        raise CannotRunHereError(
            f"it was built for {names}, and {gpu} is sm_{capability}; build it again for this GPU"
        )


def onnx_of(engine: Path, manifest: EngineManifest) -> Path:
    """The ONNX file beside an engine that it was built from; ``ArtefactError`` unless it is the very one."""
    stated = manifest.raw.get("onnx")
    name, sha256 = (stated.get("name"), stated.get("sha256")) if isinstance(stated, dict) else (None, None)
    if not isinstance(name, str) or not name or not isinstance(sha256, str):
        raise ArtefactError(f"{manifest.path}: does not say which ONNX file the engine was built from")
    path = engine.parent / Path(name).name
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file; copy the ONNX file to where the engine is")
    if sha256_of(path) != sha256:
        raise ArtefactError(
            f"{path}: is not the ONNX file that the engine was built from (another sha256); copy that one"
        )
    return path


def _release(version: str, numbers: int) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:numbers]]


# What TensorRT for RTX compiled for this GPU, kept from one start to the next.


log = logging.getLogger("anchorline.runtime")


class RtxCache:
    """A file for each engine, release and kind of GPU. One that cannot be read or written is no error."""

    def __init__(self, manifest: EngineManifest, trt: Any, capability: int) -> None:
        key = f"{manifest.engine_sha256} {trt.__version__} {capability}"
        name = f"rtx-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cache"
        base = os.environ.get("XDG_CACHE_HOME")
        self.path = (Path(base) if base else Path.home() / ".cache") / "anchorline" / name
        self._cache: Any = None
        self._saved: bytes = b""

    def attach(self, config: Any) -> None:
        """Give a context's settings the cache, which is read from its file the first time."""
        if self._cache is None:
            cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                content = self.path.read_bytes()
                if cache.deserialize(content):
                    self._saved = content
            self._cache = cache
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file if there is anything new."""
        if self._cache is None:
            return
        serialised = self._cache.serialize()
        content = b"" if serialised is None else bytes(serialised)
        if not content or content == self._saved:
            return
        try:
            atomic_write_bytes(self.path, content)
            self._saved = content
        except OutputError as error:
            log.info("the runtime cache of TensorRT for RTX is not kept: %s", error)


REMEDY = (
    "close other programs on the GPU, build with a smaller --batch, or run less at once (workers, in_flight)"
)
_TYPES = {
    "BOOL": np.bool_,
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
}
_MEMORY_WORDS = ("out of memory", "outofmemory", "cudamalloc", "cuda_error_out_of_memory")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the network for one image: the shape is without the batch."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def image_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass
class Execution:
    """The network for one batch size: its context, and its graph once that is captured.

    Everybody else holds this and never the context itself: the traceback of an exception keeps variables
    alive, and a context must be gone before the engine and the GPU are.
    """

    context: Any
    graph: int | None = None


class TensorRTEngine:
    """The plan at ``path``, loaded by the module ``trt`` on the current CUDA context.

    Plugins are registered before. Raises ``ArtefactError`` for a plan that cannot be loaded or is at odds
    with its manifest, ``OutOfDeviceMemoryError`` where its weights do not fit.
    """

    def __init__(self, path: Path, manifest: EngineManifest, trt: Any, cuda: Cuda) -> None:
        self.path, self.manifest = path, manifest
        self.title = f"{FLAVOURS[manifest.flavour].title} {trt.__version__}"
        self.is_rtx = manifest.flavour == "tensorrt-rtx"
        self._trt, self._cuda = trt, cuda
        self._lock = threading.Lock()  # contexts are made one at a time
        register_plugins(trt)
        self._runtime, self._engine = self._load()
        try:
            self.inputs, self.outputs = self._tensors(manifest.contract)
        except BaseException:
            self.close()  # the traceback would keep it, beyond the GPU
            raise
        self.activation_bytes = int(self._engine.device_memory_size_v2)
        self._cache = RtxCache(manifest, trt, cuda.compute_capability) if self.is_rtx else None

    def _load(self) -> tuple[Any, Any]:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ArtefactError(f"{self.path}: cannot be read ({error.strerror}); check the file") from None
        mark = errors.mark()
        try:
            runtime = self._trt.Runtime(tensorrt_logger(self.manifest.flavour))
        except TypeError:  # how the bindings say that there is none
            runtime = None
        if runtime is not None and self.manifest.options.get("version_compatible"):
            runtime.engine_host_code_allowed = True  # such a plan brings the runtime that it runs on
        engine = None if runtime is None else runtime.deserialize_cuda_engine(content)
        if engine is None:
            complaints = " ".join(errors.since(mark)).lower()
            if any(word in complaints for word in _MEMORY_WORDS):
                free = self._cuda.memory_info()[0]
                raise OutOfDeviceMemoryError(len(content), free, f"loading {self.path.name}", REMEDY)
            raise ArtefactError(
                f"{self.path}: {self.title} cannot load it ({errors.reason(mark)}); build it again on this "
                "machine"
            )
        return runtime, engine

    def _tensors(self, contract: Contract) -> tuple[list[Tensor], list[Tensor]]:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name).name for name in names}
        for mode, promised in (("INPUT", contract.inputs), ("OUTPUT", contract.outputs)):
            there = [name for name in names if modes[name] == mode and name != NMS_CONVERGED]
            if sorted(there) != sorted(promised):
                raise ArtefactError(
                    f"{self.path}: its {mode.lower()}s are {', '.join(there)}; its manifest expects "
                    f"{', '.join(promised)}; build it again"
                )
        inputs = [self._tensor(name) for name in contract.inputs]
        expected = Tensor(contract.inputs[0], np.dtype(contract.input_dtype), (*contract.canvas, 3))
        if inputs[0] != expected:
            raise ArtefactError(
                f"{self.path}: input {inputs[0].name} is {inputs[0].dtype} {list(inputs[0].shape)} for each "
                f"image; its manifest expects {expected.dtype} {list(expected.shape)}; build it again"
            )
        profile = [shape[0] for shape in self._engine.get_tensor_profile_shape(inputs[0].name, 0)]
        if profile != list(self.manifest.batch):
            raise ArtefactError(
                f"{self.path}: its batches are {profile} (smallest, best, largest); its manifest says "
                f"{list(self.manifest.batch)}; build it again"
            )
        reported = [NMS_CONVERGED] if NMS_CONVERGED in names else []
        return inputs, [self._tensor(name) for name in (*contract.outputs, *reported)]

    def _tensor(self, name: str) -> Tensor:
        kind = self._engine.get_tensor_dtype(name).name
        shape = tuple(self._engine.get_tensor_shape(name))
        if kind not in _TYPES or any(side < 0 for side in shape[1:]):
            raise ArtefactError(
                f"{self.path}: tensor {name} is {kind} {list(shape)}; only the batch may vary; build it again"
            )
        return Tensor(name, np.dtype(_TYPES[kind]), shape[1:])

    def create_execution(
        self, batch: int, addresses: dict[str, int], activations: int, graph: bool = True
    ) -> Execution:
        """An execution for batches of ``batch``, bound once and for all to the tensors' ``addresses``.

        A captured graph holds the state of its context, so each batch size has a context of its own; they
        share one block of activations, since a lane runs one at a time. With ``graph`` TensorRT for RTX
        captures by itself.
        """
        mark = errors.mark()
        with self._lock:
            execution = Execution(self._new_context(graph))
        if not self._bind(execution.context, batch, addresses, activations):
            execution.context = None
            raise self._failure(f"cannot prepare batches of {batch}", mark)
        return execution

    def _bind(self, context: Any, batch: int, addresses: dict[str, int], activations: int) -> bool:
        """Whether TensorRT took it all; a context that it did not make is ``None``."""
        if context is None:
            return False
        if self.activation_bytes:
            context.set_device_memory(activations, self.activation_bytes)
        return all(
            context.set_input_shape(tensor.name, (batch, *tensor.shape)) for tensor in self.inputs
        ) and all(context.set_tensor_address(name, address) for name, address in addresses.items())

    def _failure(self, what: str, mark: int) -> GpuError:
        """The error for what TensorRT refused, with its reason since ``mark``."""
        text = f"{self.path}: {self.title} {what} ({errors.reason(mark)})"
        complaints = " ".join(errors.since(mark)).lower()
        if any(word in complaints for word in _MEMORY_WORDS):
            return GpuError(f"{text}; {REMEDY}")
        return GpuError(f"{text}; build it again on this machine, or try GpuOptions(graph=False)")

    def _new_context(self, graph: bool) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.is_rtx:
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # Kernels for the exact shape are compiled in the first run, not beside later ones.
        config.dynamic_shapes_kernel_specialization_strategy = (
            self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        strategies = self._trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if graph else strategies.DISABLED
        if self._cache is not None:
            self._cache.attach(config)
        return self._engine.create_execution_context(config)

    def execute(self, execution: Execution, stream: int) -> None:
        """Queue the network; ``GpuError`` with TensorRT's reason when it refuses."""
        mark = errors.mark()
        if execution.context.execute_async_v3(stream):
            return
        try:
            self._cuda.synchronize(stream)  # brings to light whether the GPU itself is lost
        except CudaError as error:
            if error.sticky:
                raise
        raise self._failure("did not run it", mark)

    def save_cache(self) -> None:
        """Keep the kernels that TensorRT for RTX compiled, for the next start."""
        with self._lock:  # lanes that are made at once share it
            if self._cache is not None:
                self._cache.save()

    def close(self) -> None:
        """Let go of engine and runtime, in this order; the contexts must be gone. Safe to call twice."""
        self._cache = None
        self._engine = None
        self._runtime = None
