"""A deserialised engine: its tensors, its slots, and what TensorRT says when it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchorline.runtime.contract import NMS_CONVERGED, Contract
from anchorline.runtime.io.errors import ArtefactError, GpuError, NotCopied, OutputError
from anchorline.runtime.io.files import atomic_write_bytes, cache_folder, input_errors
from anchorline.runtime.tensorrt.cuda import Cuda, CudaError, OutOfDeviceMemoryError, memory_lock
from anchorline.runtime.tensorrt.library import FLAVOURS, errors, tensorrt_logger
from anchorline.runtime.tensorrt.manifest import EngineManifest
from anchorline.runtime.tensorrt.plugins import register_plugins

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

log = logging.getLogger("anchorline.runtime")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the network for one image: the shape is without the batch. -1 is a side that is free."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def image_bytes(self) -> int:
        """Of an image whose sides are all fixed."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def on(self, canvas: tuple[int, int]) -> Tensor:
        """This one, ``images``, on a ``canvas`` (height, width)."""
        return dataclasses.replace(self, shape=(*canvas, *self.shape[2:]))


@dataclass
class InferenceSlot:
    """The network for one shape of batches on a lane's buffers: its context, and its graph once captured.

    Everybody else holds this and never the context itself: the traceback of an exception keeps variables
    alive, and a context must be gone before the engine and the GPU are.
    """

    context: Any
    graph: int | None = None


class TensorRTEngine(NotCopied):
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
        # It captures graphs by itself, in its own calls.
        self._capturing = memory_lock if self.is_rtx else contextlib.nullcontext()
        # What TensorRT for RTX compiles for this GPU: a file for each engine, release and kind of GPU. It
        # refuses another kind's, also one of the same compute capability.
        key = f"{manifest.engine_sha256} {trt.__version__} {cuda.compute_capability} {cuda.device_name}"
        self._kept_at = cache_folder() / f"rtx-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cache"
        self._kept = b""
        self._cache: Any = None
        register_plugins(trt)
        self._runtime, self._engine = self._load()
        try:
            self.inputs, self.outputs = self._tensors(manifest.contract)
        except BaseException:
            self.close()  # the traceback would keep it, beyond the GPU
            raise
        self.activation_bytes = int(self._engine.device_memory_size_v2)

    def _load(self) -> tuple[Any, Any]:
        with input_errors(self.path):
            content = self.path.read_bytes()
        mark = errors.mark()
        runtime = engine = None
        with contextlib.suppress(TypeError):  # how the bindings say that there is none
            runtime = self._trt.Runtime(tensorrt_logger(self.manifest.flavour))
        if runtime is not None:
            if self.manifest.options.get("version_compatible"):
                runtime.engine_host_code_allowed = True  # such a plan brings the runtime that it runs on
            with self._capturing:  # weights are allocated
                engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            if errors.tell_of_memory(mark):
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
        inputs = [self._tensor(name, free=2 * (contract.canvas is None)) for name in contract.inputs]
        sides = contract.canvas or (-1, -1)
        expected = Tensor(contract.inputs[0], np.dtype(contract.input_dtype), (*sides, 3))
        if inputs[0] != expected:
            raise ArtefactError(
                f"{self.path}: input {inputs[0].name} is {inputs[0].dtype} {list(inputs[0].shape)} for each "
                f"image; its manifest expects {expected.dtype} {list(expected.shape)}; build it again"
            )
        for number, canvases in enumerate(self.manifest.canvases):
            shapes = self._engine.get_tensor_profile_shape(inputs[0].name, number)
            batches = [shape[0] for shape in shapes]
            if batches != list(self.manifest.batch):
                raise ArtefactError(
                    f"{self.path}: its batches are {batches} (smallest, best, largest); its manifest says "
                    f"{list(self.manifest.batch)}; build it again"
                )
            found = [tuple(shape)[1:3] for shape in shapes]
            if found != list(canvases):
                raise ArtefactError(
                    f"{self.path}: the canvases of its profile {number} are {found} (smallest, best, "
                    f"largest); its manifest says {list(canvases)}; build it again"
                )
        reported = [NMS_CONVERGED] if NMS_CONVERGED in names else []
        return inputs, [self._tensor(name) for name in (*contract.outputs, *reported)]

    def _tensor(self, name: str, free: int = 0) -> Tensor:
        """Of which the batch and so many sides after it may be free."""
        kind = self._engine.get_tensor_dtype(name).name
        shape = tuple(self._engine.get_tensor_shape(name))
        if kind not in _TYPES or any(side < 0 for side in shape[1 + free :]):
            may = "batch, height and width" if free else "the batch"
            raise ArtefactError(
                f"{self.path}: tensor {name} is {kind} {list(shape)}; only {may} may vary; build it again"
            )
        return Tensor(name, np.dtype(_TYPES[kind]), shape[1:])

    def create_slot(
        self,
        batch: int,
        addresses: dict[str, int],
        activations: int,
        graph: bool = True,
        *,
        profile: int = 0,
        canvas: tuple[int, int] | None = None,
        stream: int = 0,
    ) -> InferenceSlot:
        """A slot for batches of ``batch`` on ``canvas``, which is within the optimisation profile of number
        ``profile`` (left out: the only one), bound once and for all to the tensors' ``addresses``.

        A captured graph holds the state of its context, so each shape has a context of its own; they share
        one block of activations, since a lane runs one at a time. With ``graph`` TensorRT for RTX captures by
        itself.
        """
        images, sizes = self.inputs
        shapes = {images.name: images.on(canvas).shape if canvas else images.shape, sizes.name: sizes.shape}
        mark = errors.mark()
        with self._lock, self._capturing:
            slot = InferenceSlot(self._new_context(graph))
        if slot.context is not None and self.activation_bytes:
            slot.context.set_device_memory(activations, self.activation_bytes)
        if (
            slot.context is None  # TensorRT did not make one
            or not self._choose_profile(slot, profile, stream)
            or not all(slot.context.set_input_shape(name, (batch, *sides)) for name, sides in shapes.items())
            or not all(slot.context.set_tensor_address(*bound) for bound in addresses.items())
        ):
            slot.context = None
            on = "" if canvas is None else " on a canvas of {}x{}".format(*canvas)
            raise self._failure(f"cannot prepare batches of {batch}{on}", mark)
        return slot

    def _choose_profile(self, slot: InferenceSlot, profile: int, stream: int) -> bool:
        """Whether it could; the only profile is chosen already."""
        if len(self.manifest.canvases) == 1:
            return True
        chosen = bool(slot.context.set_optimization_profile_async(profile, stream))
        self._cuda.synchronize(stream)  # it may have queued copies
        return chosen

    def destroy_context(self, slot: InferenceSlot) -> None:
        """Let go of the context; its graph must be gone, and nothing of it at work."""
        with self._lock, self._capturing:
            slot.context = None

    def _failure(self, what: str, mark: int) -> GpuError:
        """The error for what TensorRT refused, with its reason since ``mark``."""
        mend = "build it again on this machine, or try GpuOptions(graph=False)"
        remedy = REMEDY if errors.tell_of_memory(mark) else mend
        return GpuError(f"{self.path}: {self.title} {what} ({errors.reason(mark)}); {remedy}")

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
        if self._cache is None:
            cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                content = self._kept_at.read_bytes()
                if cache.deserialize(content):
                    self._kept = content
            self._cache = cache
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    def execute(self, slot: InferenceSlot, stream: int) -> None:
        """Queue the network; ``GpuError`` with TensorRT's reason when it refuses."""
        mark = errors.mark()
        with self._capturing:
            queued = slot.context.execute_async_v3(stream)
        if queued:
            return
        try:
            self._cuda.synchronize(stream)  # brings to light whether the GPU itself is lost
        except CudaError as error:
            if error.sticky:
                raise
        raise self._failure("did not run it", mark)

    def save_cache(self) -> None:
        """Keep the kernels that TensorRT for RTX compiled, for the next start, where that can be."""
        with self._lock:  # lanes that are made at once share it
            serialised = None if self._cache is None else self._cache.serialize()
            content = b"" if serialised is None else bytes(serialised)
            if not content or content == self._kept:
                return
            try:
                atomic_write_bytes(self._kept_at, content)
                self._kept = content
            except OutputError as error:
                log.info("the runtime cache of TensorRT for RTX is not kept: %s", error)

    def close(self) -> None:
        """Let go of engine and runtime, in this order; the contexts must be gone. Safe to call twice."""
        with self._capturing:
            self._cache = None
            self._engine = None
            self._runtime = None
