"""A double of TensorRT's Python module that runs the engine's ONNX file through onnxruntime.

A plan is JSON: ``{"onnx": path, "batch": [low, best, high], "activation_bytes": n, "plugins": [names]}``, and
for several profiles ``"canvases": [[[h, w], [h, w], [h, w]], ...]``, smallest, best and largest of each.
With ``"stub": true`` the network is a few lines of NumPy instead. Names that TensorRT for RTX's module or
its classes do not have are refused, and so is what TensorRT leaves undefined.
"""

from __future__ import annotations

import functools
import json
import logging
import weakref
from typing import Any

import numpy as np

ENGINE_LOG = logging.getLogger("anchorline.tensorrt")
RTX_ONLY = {"CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "IRuntimeCache"}


class TensorRTDouble:
    """Stands for the module ``tensorrt`` or ``tensorrt_rtx``. ``life`` logs what is made and destroyed."""

    def __init__(self, real: Any, driver: Any, flavour: str, version: str = "11.4.0.26") -> None:
        self.real, self.driver, self.flavour = real, driver, flavour
        self.__name__, self.__version__ = flavour.replace("-", "_"), version
        self.life: list[str] = []
        self.refuse: dict[str, str] = {}  # "execute", "context", "deserialize" -> what the log will say
        self.registered: list[str] = []
        self.own_plugins = flavour == "tensorrt-rtx"  # whether ROIAlign_TRT is there, where it is a plugin
        self.executions = 0
        self.check_names(Engine, real.ICudaEngine)
        self.check_names(Context, real.IExecutionContext)
        self.check_names(Runtime, real.Runtime)
        self.check_names(Config, real.IRuntimeConfig)
        self.check_names(Cache, real.IRuntimeCache)

    @staticmethod
    def check_names(double: type, real: type) -> None:
        for name in vars(double):
            if not name.startswith("_") and name != "used_addresses":
                assert hasattr(real, name), f"{real.__name__} has no {name}"

    def __getattr__(self, name: str) -> Any:
        if name in RTX_ONLY and self.flavour == "tensorrt":
            raise AttributeError(f"TensorRT has no {name}")
        if name == "Runtime":
            return functools.partial(Runtime, self)
        if name == "get_plugin_registry":
            return lambda: self
        return getattr(self.real, name)

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.registered.append(creator.name)
        return True

    def init_libnvinfer_plugins(self, logger: Any, namespace: str) -> bool:
        assert self.flavour == "tensorrt", "TensorRT for RTX has no library of plugins"
        self.own_plugins = namespace == ""
        return True

    def failed(self, reason: str) -> None:
        ENGINE_LOG.error("%s", reason)


class Runtime:
    def __init__(self, trt: TensorRTDouble, logger: Any) -> None:
        self._trt = trt
        self.engine_host_code_allowed = False
        trt.life.append("runtime")
        weakref.finalize(self, trt.life.append, "runtime destroyed")

    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        trt = self._trt
        if "deserialize" in trt.refuse:
            trt.failed(trt.refuse["deserialize"])
            return None
        try:
            plan = json.loads(content)
        except ValueError:
            trt.failed("Serialization assertion magicTag failed")
            return None
        if plan.get("version_compatible") and not self.engine_host_code_allowed:
            trt.failed("Engine host code is not allowed")
            return None
        missing = set(plan["plugins"]) - set(trt.registered)
        if missing or not trt.own_plugins:
            trt.failed(f"Cannot find plugin: {', '.join(missing or ['ROIAlign_TRT'])}")
            return None
        return Engine(trt, plan)


class Engine:
    def __init__(self, trt: TensorRTDouble, plan: dict[str, Any]) -> None:
        self._trt, self._plan = trt, plan
        self._session = _session(plan["onnx"])
        self._tensors = [*self._session.get_inputs(), *self._session.get_outputs()]
        self._inputs = len(self._session.get_inputs())
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.num_io_tensors = len(self._tensors)
        self.device_memory_size_v2 = plan["activation_bytes"]
        trt.life.append("engine")
        weakref.finalize(self, Engine._gone, trt)

    @staticmethod
    def _gone(trt: TensorRTDouble) -> None:
        trt.life.append("engine destroyed")
        if not trt.driver.retained:
            trt.driver.misuse.append("a GPU released before an engine of TensorRT")

    num_io_tensors: int
    device_memory_size_v2: int

    def get_tensor_name(self, index: int) -> str:
        return self._tensors[index].name

    def _find(self, name: str) -> tuple[int, Any]:
        for index, tensor in enumerate(self._tensors):
            if tensor.name == name:
                return index, tensor
        raise self._trt.driver._refuse(f"the engine has no tensor {name}")

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._trt.real.TensorIOMode
        return modes.INPUT if self._find(name)[0] < self._inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        types = self._trt.real.DataType
        return {
            "tensor(float)": types.FLOAT,
            "tensor(int32)": types.INT32,
            "tensor(uint8)": types.UINT8,
            "tensor(bool)": types.BOOL,
        }[self._find(name)[1].type]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        shape = self._find(name)[1].shape
        canvases = self._plan.get("canvases", [[shape[1:3]] * 3])[profile]
        return [
            self._trt.real.Dims([batch, *(canvas if len(shape) > 2 else ()), *shape[-1:]])
            for batch, canvas in zip(self._plan["batch"], canvases, strict=True)
        ]

    def get_tensor_shape(self, name: str) -> Any:
        sides = [side if isinstance(side, int) else -1 for side in self._find(name)[1].shape]
        return self._trt.real.Dims(sides)

    def create_runtime_config(self) -> Config:
        if self._trt.flavour == "tensorrt":
            raise AssertionError("runtime settings are TensorRT for RTX's")
        return Config(self._trt)

    def create_execution_context(self, how: Any) -> Context | None:
        trt = self._trt
        if "context" in trt.refuse:
            trt.failed(trt.refuse["context"])
            return None
        strategy = how.strategy_ if isinstance(how, Config) else how
        assert strategy == trt.real.ExecutionContextAllocationStrategy.USER_MANAGED
        if trt.flavour == "tensorrt-rtx":
            trt.life.append(f"graphs: {how.cuda_graph_strategy.name}")
            assert how.cache_ is not None
        context = Context(trt, weakref.ref(self))
        self._contexts.add(context)
        return context


class Config:
    def __init__(self, trt: TensorRTDouble) -> None:
        self._trt = trt
        self.strategy_: Any = None
        self.cache_: Any = None
        self.cuda_graph_strategy: Any = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None

    cuda_graph_strategy: Any
    dynamic_shapes_kernel_specialization_strategy: Any

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy_ = strategy

    def create_runtime_cache(self) -> Cache:
        return Cache(self._trt)

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache_ = cache
        return True


class Cache:
    def __init__(self, trt: TensorRTDouble) -> None:
        self._content = b""
        self._trt = trt

    def deserialize(self, content: bytes) -> bool:
        if not content.startswith(b"cache"):
            return False
        self._content = content
        self._trt.life.append("cache read")
        return True

    def serialize(self) -> memoryview:
        return memoryview(self._content or b"cache of compiled kernels")


class Context:
    def __init__(self, trt: TensorRTDouble, engine: weakref.ref[Engine]) -> None:
        self._trt, self._engine = trt, engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch: tuple[int, int] | None = None
        self._warm = False
        several = len(engine()._plan.get("canvases", ())) > 1
        self._profile: int | None = None if several else 0
        self._token = object()  # of the work that it queued or that was captured from it
        trt.life.append("context")
        trt.driver.users.add(self)
        weakref.finalize(self, Context._gone, trt, engine, self._token)

    @staticmethod
    def _gone(trt: TensorRTDouble, engine: weakref.ref[Engine], token: object) -> None:
        driver = trt.driver
        trt.life.append("context destroyed")
        if engine() is None:
            driver.misuse.append("an engine destroyed before its context")
        if not driver.retained:
            driver.misuse.append("a GPU released before a context of TensorRT")
        work = [stream.queue for stream in driver.streams.values()]
        work += [*driver.graphs.values(), *driver.executables.values()]
        lost = driver.sticky is not None  # then nothing can be destroyed
        if not lost and any(getattr(item, "token", None) is token for queue in work for item in queue):
            driver.misuse.append("a context destroyed before its graph, or with work queued")

    def used_addresses(self) -> list[int]:
        return [*self._addresses.values(), *(self._scratch or ())[:1]]

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        self._trt.driver.at(address, size)
        self._scratch = (address, size)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._trt.driver.calls.append(("set_optimization_profile_async", (profile, stream)))
        self._profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        engine = self._engine()
        assert engine is not None
        if self._profile is None:
            raise self._trt.driver._refuse("a context of an engine with several profiles without one")
        low, _, high = engine.get_tensor_profile_shape(name, self._profile)
        if not all(least <= side <= most for least, side, most in zip(low, shape, high, strict=True)):
            self._trt.failed(f"IExecutionContext::setInputShape: {name} {shape} is not in the profile")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        engine = self._engine()
        assert engine is not None
        engine._find(name)
        assert address % 256 == 0
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine, trt, driver = self._engine(), self._trt, self._trt.driver
        if engine is None:
            raise driver._refuse("a context used after its engine")
        driver.calls.append(("execute_async_v3", (stream,)))
        if "execute" in trt.refuse:
            trt.failed(trt.refuse["execute"])
            return False
        names = [tensor.name for tensor in engine._tensors]
        if set(self._addresses) != set(names) or len(self._shapes) != engine._inputs:
            trt.failed("not all addresses and shapes are set")
            return False
        if engine.device_memory_size_v2 and self._scratch is None:
            raise driver._refuse("a context without scratch memory")
        if driver.is_capturing(stream) and (not self._warm or trt.flavour == "tensorrt-rtx"):
            trt.failed("operation not permitted when stream is capturing")
            return False
        self._warm = True
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        scratch, inside = self._scratch, weakref.ref(engine)  # a graph keeps no engine alive

        def work() -> None:
            there = inside()
            if there is None:
                raise driver._refuse("a graph launched after its engine")
            _run(there, trt, shapes, addresses, scratch)

        work.token = self._token  # type: ignore[attr-defined]
        driver.enqueue(stream, work)
        return True


def _run(engine: Engine, trt: TensorRTDouble, shapes: Any, addresses: Any, scratch: Any) -> None:
    driver = trt.driver
    trt.executions += 1
    if scratch is not None:
        driver.at(*scratch)[:] = 0xEE
    inputs = {}
    for tensor in engine._session.get_inputs():
        shape, dtype = shapes[tensor.name], _DTYPES[tensor.type]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        inputs[tensor.name] = driver.at(addresses[tensor.name], size).view(dtype).reshape(shape)
    names = [output.name for output in engine._session.get_outputs()]
    values = _stub(inputs) if engine._plan.get("stub") else engine._session.run(names, inputs)
    for name, value in zip(names, values, strict=True):
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        driver.at(addresses[name], len(flat))[:] = flat


_DTYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(uint8)": np.uint8}


def _stub(inputs: dict[str, Any]) -> list[Any]:
    """One detection: the valid area, its score from the frame's first pixel."""
    images, sizes = inputs["images"], inputs["image_sizes"]
    count = len(images)
    boxes, scores = np.zeros((count, 3, 4), np.float32), np.zeros((count, 3), np.float32)
    boxes[:, 0, 2:] = sizes[:, ::-1]
    scores[:, 0] = images[:, 0, 0, 0].astype(np.float32) / 255
    return [boxes, scores, np.zeros((count, 3), np.int32), np.ones(count, np.int32)]


@functools.cache
def _session(path: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
