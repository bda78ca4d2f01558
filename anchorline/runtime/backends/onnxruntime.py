"""Running an exported ONNX file with onnxruntime, on the CPU or on a GPU.

With ``execution_providers``, for what its providers need, the only module that imports onnxruntime.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anchorline.runtime.backends.base import Arrays, HostLane
from anchorline.runtime.backends.cpu_options import (
    CpuOptions,
    adds_in_16_bits,
    core_budget,
    has_native_bf16,
)
from anchorline.runtime.backends.execution_providers import (
    PROVIDER_PACKAGES,
    add_provider,
    linked_tensorrt,
    packaged_providers,
    preload_libraries,
)
from anchorline.runtime.contract import BANDS_OP, Contract
from anchorline.runtime.io.errors import ArtefactError, GpuError, SettingsError, one_line
from anchorline.runtime.io.files import input_errors
from anchorline.runtime.model_file import ModelFile, read_onnx
from anchorline.runtime.tensorrt.cuda import CudaError, GpuOptions

# By their names on the command line; the second and third come with onnxruntime-gpu, the last as a package of
# its own or in a build of onnxruntime.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
_GRAPH_OPTIONS = {
    "cuda": "enable_cuda_graph",
    "tensorrt": "trt_cuda_graph_enable",
    "tensorrt-rtx": "enable_cuda_graph",
}
_LOST = range(700, 721)  # cudaError_t from an illegal address to a failed launch
_NO_GRAPH = "-1"  # onnxruntime's: a run that is not captured
_FATAL_ONLY = 4  # onnxruntime's log severity: its errors come back as exceptions anyway
_Bound = tuple[Any, Any, dict[str, Any]]  # binding, run options, inputs by name
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
# Quantises float layers that stand between rounded values, with one scale for all channels.
_UNWANTED_OPTIMIZERS = ["WeightBiasQuantization"]

log = logging.getLogger("anchorline.runtime")


def available_providers() -> list[str]:
    """The names in ``PROVIDERS`` that the installed onnxruntime was built with, and those that it has a
    package for; ``cpu`` without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return ["cpu"]
    there = onnxruntime.get_available_providers()
    built_in = [name for name, provider in PROVIDERS.items() if provider in there]
    return list(dict.fromkeys([*built_in, *packaged_providers()]))


class OnnxRuntimeBackend:
    """A network in an ONNX file that carries its contract; for any number of threads.

    ``provider`` is one of ``PROVIDERS``; ``threads`` bounds the CPU threads, by default one for each core.
    ``model`` is the file where it was read already. Raises ``ArtefactError`` for a file that is missing,
    damaged, no ONNX, without contract or at odds with it, ``GpuError`` where the provider does not start.
    """

    device_frames = False  # whether frames in GPU memory can be handed to its lanes

    def __init__(
        self,
        path: str | Path,
        provider: str = "cpu",
        threads: int | None = None,
        options: GpuOptions | None = None,
        model: ModelFile | None = None,
    ) -> None:
        if provider not in available_providers():
            raise SettingsError(
                f"provider is {provider!r}; available for ONNX files here: {', '.join(available_providers())}"
            )
        self.path, self.provider = Path(path), provider
        options = options or GpuOptions()
        self.threads = CpuOptions(threads).thread_count
        model = model or read_onnx(self.path)
        self.contract = model.contract
        exact = exact_sums(self.contract) if provider in ("cpu", "openvino") else {}
        if exact and provider == "openvino":
            raise ArtefactError(
                f"{self.path}: its 8-bit weights need VNNI, which this processor has not; quantise the float "
                "model again, or use the provider cpu"
            )
        bf16 = provider == "openvino" and self.contract.precision == "fp32" and has_native_bf16()
        if bf16 and self.contract.winograd:
            raise ArtefactError(
                f"{self.path}: its convolutions are in Winograd's form, for fp32, and OpenVINO as "
                "onnxruntime's provider takes bf16 here; use the provider cpu, or export without --winograd"
            )
        with model.checked():
            self._session: Any = _open_session(self.path, provider, options, self.threads, exact)
        if exact:
            log.warning(
                "%s: its 8-bit weights need VNNI, which this processor has not; it is computed in float32, "
                "quantise the float model again for full speed",
                self.path,
            )
        self.precision = self.contract.precision
        if bf16:
            self.precision = "bf16"  # OpenVINO's own choice there
        # On a GPU inputs and outputs stay bound to device memory. TensorRT's providers move them themselves.
        self._bound = (
            BoundNetwork(self._session, self.contract, "cuda", options.device, bool(options.graph))
            if provider == "cuda"
            else None
        )

    def infer(self, inputs: Arrays) -> tuple[Arrays, dict[str, float]]:
        """Run the network: ``images`` [B, H, W, 3] and ``image_sizes`` float32 [B, 2] by the contract's input
        names, to the contract's outputs by name, and the seconds of upload, network and download."""
        if self._session is None:
            raise SettingsError(f"{self.path}: the model is closed; open it again")
        # The cores that a run takes are shared with the other detectors of this process.
        cores = core_budget().lent(self.threads) if self.provider == "cpu" else contextlib.nullcontext()
        try:
            if self._bound is not None:
                return self._bound.infer(inputs)
            # No IO binding here: on the CPU onnxruntime reads the arrays where they are.
            with cores:
                start = time.perf_counter()
                values = self._session.run(list(self.contract.outputs), dict(inputs))
                seconds = time.perf_counter() - start
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            if self.provider != "cpu":
                raise _gpu_failure(self.path, self.provider, error) from None
            raise ArtefactError(f"{self.path}: onnxruntime cannot run it ({_reason(error)})") from error
        outputs = dict(zip(self.contract.outputs, values, strict=True))
        return outputs, {"upload": 0.0, "network": seconds, "download": 0.0}

    def create_lane(self) -> OnnxRuntimeLane:
        """A lane of this network; callable from any thread, one at a time."""
        return OnnxRuntimeLane(self)

    def close(self) -> None:
        """Release the network. Safe to call twice."""
        self._session = None
        self._bound = None


class OnnxRuntimeLane(HostLane):
    """Preprocesses when a batch is submitted and runs the network when it is collected."""

    def __init__(self, backend: OnnxRuntimeBackend) -> None:
        super().__init__(backend.contract, backend.provider)
        self._backend = backend

    def wait(self, inputs: Arrays) -> tuple[Arrays, dict[str, float]]:
        return self._backend.infer(inputs)


class BoundNetwork:
    """``session`` with its inputs and outputs bound to buffers on ``device_type`` (``cuda``, ``cpu``).

    The buffers of a shape (batch, height and width) are made once, so that the session copies nothing by
    itself and its CUDA graph, with ``graph`` one for each shape, stays valid: it replays the very addresses
    it was captured with. The buffers of the ``KEPT_SHAPES`` used last are kept. Graphs cannot be given back,
    so only the first ``MOST_GRAPHS`` shapes get one, whose buffers then stay. One call runs at a time.
    """

    KEPT_SHAPES = 4
    MOST_GRAPHS = 8

    def __init__(
        self, session: Any, contract: Contract, device_type: str, device: int, graph: bool = False
    ) -> None:
        self._session, self._contract = session, contract
        self._where = (device_type, device)
        self._graph = graph
        self._captured: dict[tuple[int, ...], _Bound] = {}
        self._kept: dict[tuple[int, ...], _Bound] = {}  # the one used last at the end
        self._lock = threading.Lock()

    def infer(self, inputs: Arrays) -> tuple[Arrays, dict[str, float]]:
        """Outputs by name, as arrays of the host, and the seconds of upload, network and download."""
        with self._lock:
            started = time.perf_counter()
            binding, options, buffers = self._bound_for(inputs)
            for name, buffer in buffers.items():
                buffer.update_inplace(np.ascontiguousarray(inputs[name]))
            uploaded = time.perf_counter()
            self._session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()
            ran = time.perf_counter()
            # Copies, for on the CPU numpy() is a view of the buffer that the next call fills.
            values = [np.array(value.numpy()) for value in binding.get_outputs()]
            done = time.perf_counter()
        outputs = dict(zip(self._contract.outputs, values, strict=True))
        seconds = {"upload": uploaded - started, "network": ran - uploaded, "download": done - ran}
        return outputs, seconds

    def _bound_for(self, inputs: Arrays) -> _Bound:
        shape = inputs[self._contract.inputs[0]].shape
        if shape in self._captured:
            return self._captured[shape]
        if shape in self._kept:
            self._kept[shape] = self._kept.pop(shape)
        elif self._graph and len(self._captured) < self.MOST_GRAPHS:
            self._captured[shape] = self._bind(inputs, str(len(self._captured) + 1))
            return self._captured[shape]
        else:
            if len(self._kept) == self.KEPT_SHAPES:
                del self._kept[next(iter(self._kept))]
            self._kept[shape] = self._bind(inputs, _NO_GRAPH)
        return self._kept[shape]

    def _bind(self, inputs: Arrays, graph: str) -> _Bound:
        import onnxruntime

        def buffer(shape: list[int], dtype: Any) -> Any:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, *self._where)

        binding, options = self._session.io_binding(), onnxruntime.RunOptions()
        if self._graph:
            options.add_run_config_entry("gpu_graph_id", graph)
        buffers = {name: buffer(list(values.shape), values.dtype) for name, values in inputs.items()}
        for name, value in buffers.items():
            binding.bind_ortvalue_input(name, value)
        described = {output.name: output for output in self._session.get_outputs()}
        for name in self._contract.outputs:
            shape = [len(inputs[self._contract.inputs[0]]), *described[name].shape[1:]]
            binding.bind_ortvalue_output(name, buffer(shape, _NUMPY_TYPES[described[name].type]))
        return binding, options, buffers


def write_inlined(path: Path, target: Path) -> None:
    """Write the graph of ``path`` to ``target`` with our custom ops replaced by their function bodies.

    For runtimes that do not know model-local functions, and that pool RoIs as fast as they multiply. Raises
    ``ArtefactError`` where onnxruntime cannot load it.
    """
    _open_session(path, "cpu", GpuOptions(), inlined=target)


def _by_roi_align(path: Path) -> bytes:
    """The file with ``RoIAlign`` in the place of ``BANDS_OP``, which takes the same and gives the same: both
    functions are in the file, and the names are of one length, so only the nodes' ``op_type`` changes."""
    with input_errors(path):
        content = path.read_bytes()
    bands, align = (b"\x22" + bytes([len(name)]) + name.encode() for name in (BANDS_OP, "RoIAlign"))
    return content.replace(bands, align)


def open_for_checks(
    model: bytes, *, arena: bool = True, in_order: bool = False, config: Mapping[str, str] | None = None
) -> Any:
    """An ``onnxruntime.InferenceSession`` of a graph in memory, quiet and on the cores of this process.

    Without ``arena`` memory is given back after each value's last use; ``in_order`` keeps the order of the
    graph, where that lets values die early. ``config`` are session config entries by key. Raises
    ``ImportError`` and onnxruntime's own errors.
    """
    import onnxruntime

    options = _session_options(CpuOptions().thread_count, config)
    options.enable_cpu_mem_arena = arena
    if in_order:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return onnxruntime.InferenceSession(
        model, options, providers=[PROVIDERS["cpu"]], disabled_optimizers=_UNWANTED_OPTIMIZERS
    )


def exact_sums(contract: Contract) -> dict[str, str]:
    """The session config with which onnxruntime computes this model's integer products exactly here.

    Empty but for a model that needs VNNI on a processor without: there the rounded values are multiplied in
    float32. (``session.x64quantprecision`` would keep integers, but fails on weights that several layers
    share, as the RPN's.)
    """
    return {"session.disable_quant_qdq": "1"} if contract.needs_vnni and adds_in_16_bits() else {}


def _session_options(threads: int, config: Mapping[str, str] | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    # Always a number: left to itself onnxruntime pins the threads of every session to the same cores,
    # and several detectors stand in each other's way. It also overlooks a container's limit.
    options.intra_op_num_threads = threads
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    return options


def _open_session(
    path: Path,
    provider: str,
    gpu: GpuOptions,
    threads: int = 1,
    config: Mapping[str, str] | None = None,
    inlined: Path | None = None,
) -> Any:
    """A session of the file; its graph without custom ops is written to the file ``inlined``."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ArtefactError(
            f"{path}: running ONNX files needs onnxruntime ({error}); pip install 'anchorline[cpu]'"
        ) from error
    options = _session_options(threads, config)
    providers = _prepare(options, path, provider, gpu)
    model: str | bytes = str(path)
    if inlined is not None:
        model = _by_roi_align(path)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.optimized_model_filepath = str(inlined)  # functions are inlined even so
    try:
        # Without its own fallback, which says so on stdout and forgets the options: the GPU's number, too.
        session = onnxruntime.InferenceSession(
            model,
            options,
            providers=providers,
            enable_fallback=0,
            disabled_optimizers=_UNWANTED_OPTIMIZERS,
        )
    except Exception as error:
        reason = _reason(error)
        if "Protobuf parsing failed" in reason or "No graph was found" in reason:
            raise ArtefactError(
                f"{path}: not an ONNX file, or one that was cut off; export or copy it again"
            ) from error
        if provider != "cpu":  # a file that is at fault fails on the CPU as well
            raise GpuError(
                f"{path}: onnxruntime {onnxruntime.__version__} cannot start {_full_name(provider)} here "
                f"({reason}); see anchorline doctor, or use the provider cpu"
            ) from None
        raise ArtefactError(
            f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({reason}); "
            "upgrade onnxruntime or export the model again"
        ) from error
    if _full_name(provider) not in session.get_providers():  # it goes on without one that does not start
        linked = linked_tensorrt() if provider == "tensorrt" else None
        tensorrt = f", and TensorRT {linked}, which it is linked to" if linked else ""
        raise GpuError(
            f"{path}: onnxruntime {onnxruntime.__version__} cannot start {PROVIDERS[provider]} here; it "
            f"needs an NVIDIA GPU and the CUDA it was built for{tensorrt}, see anchorline doctor"
        )
    return session


def _prepare(options: Any, path: Path, provider: str, gpu: GpuOptions) -> list[Any] | None:
    """The providers for a session, or ``None`` where a package's was added to its ``options``."""
    import onnxruntime

    if PROVIDERS.get(provider) in onnxruntime.get_available_providers():
        if provider in ("cuda", "tensorrt"):
            preload_libraries()
        return _provider_list(provider, gpu)
    settings = {_GRAPH_OPTIONS[provider]: "1"} if gpu.graph and provider in _GRAPH_OPTIONS else {}
    try:
        add_provider(options, provider, gpu.device if provider in _GRAPH_OPTIONS else 0, settings)
    except GpuError as error:
        raise GpuError(f"{path}: {error}") from None
    return None


def _full_name(provider: str) -> str:
    """onnxruntime's own."""
    return PROVIDERS[provider] if provider in PROVIDERS else PROVIDER_PACKAGES[provider].provider


def _provider_list(provider: str, gpu: GpuOptions) -> list[Any]:
    """The provider with its options, and for what it cannot run those below it."""
    if provider == "cpu":
        return [PROVIDERS["cpu"]]
    options = {"device_id": str(gpu.device)}
    if gpu.graph:
        options[_GRAPH_OPTIONS[provider]] = "1"
    below = [PROVIDERS["cpu"]] if provider == "cuda" else [PROVIDERS["cuda"], PROVIDERS["cpu"]]
    return [(PROVIDERS[provider], options), *below]


def _gpu_failure(path: Path, provider: str, error: Exception) -> GpuError:
    """The error for a run that failed on a GPU; sticky where the text says that the context is lost."""
    reason = _reason(error)
    number = re.search(r"CUDA failure (\d+)", reason)
    if number is not None and int(number[1]) in _LOST:
        return CudaError(f"running {path} in onnxruntime", f"CUDA failure {number[1]}", reason, sticky=True)
    return GpuError(
        f"{path}: onnxruntime cannot run it on {provider} ({reason}); close other programs on the GPU, lower "
        "the batch or the workers, or use the provider cpu"
    )


def _reason(error: Exception) -> str:
    """onnxruntime's message on one line, without its code prefix."""
    message = one_line(error).rsplit("[ONNXRuntimeError] : ", 1)[-1]
    return message if len(message) <= 300 else message[:297] + "..."
