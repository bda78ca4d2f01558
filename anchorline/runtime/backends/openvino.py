"""Running an exported ONNX file with OpenVINO, the fastest way on a processor.

With the package ``openvino`` itself: its plugin for onnxruntime (1.8) offers processors of one maker only.
Our custom ops are unknown to it, so onnxruntime first replaces them by their function bodies.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from anchorline.runtime.backends.base import Arrays, HostLane
from anchorline.runtime.backends.cpu_options import CpuOptions, adds_in_16_bits, network_precision
from anchorline.runtime.backends.onnxruntime import write_inlined
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, SettingsError, one_line
from anchorline.runtime.io.files import atomic_path, cache_folder, hidden_folder
from anchorline.runtime.model_file import ModelFile, read_onnx

LIMIT_BYTES = 2 << 30  # of the compiled networks on disk
_TELEMETRY = "openvino_telemetry"
_SUFFIX = ".network"
_CACHE_FORMAT = "5"
_HINTS = {"fp32": "f32", "bf16": "bf16"}

_said: set[Path] = set()  # damaged entries that were logged already

log = logging.getLogger("anchorline.runtime")


def has_openvino() -> bool:
    """Whether the package is installed, without importing it."""
    try:
        return importlib.util.find_spec("openvino") is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def load_openvino() -> Any:
    """The package, imported. Raises ``ImportError``.

    Importing it reports to its makers over the network where ``openvino_telemetry`` is importable; running a
    model must tell nobody, so that package is hidden meanwhile and OpenVINO takes its stand-in.
    """
    if "openvino" in sys.modules or _TELEMETRY in sys.modules:
        import openvino

        return openvino
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        del sys.modules[_TELEMETRY]
    return openvino


@functools.cache
def core() -> Any:
    """OpenVINO's entry point, one a process, since each loads its plugins anew."""
    return load_openvino().Core()


class OpenVINOBackend:
    """A network in an ONNX file that carries its contract; for any number of threads.

    For batches of one there is a network of its own, since OpenVINO computes known shapes faster; that for
    others is compiled when one comes. Both are kept on disk (``store_network``). ``model`` is the file where
    it was read already.
    Raises ``ArtefactError`` for a file that is missing, damaged, no ONNX, without contract or at odds with
    it, that OpenVINO cannot compile, or where OpenVINO cannot be loaded, and ``SettingsError`` where bf16 is
    asked for and the processor or the model is none for it.
    """

    provider = "openvino"
    device_frames = False

    def __init__(
        self, path: str | Path, options: CpuOptions | None = None, model: ModelFile | None = None
    ) -> None:
        self.path, options = Path(path), options or CpuOptions()
        self.threads = options.thread_count
        model = model or read_onnx(self.path)
        try:
            load_openvino()
        except Exception as error:  # a damaged package may raise anything
            raise ArtefactError(
                f"{self.path}: OpenVINO cannot be loaded here ({one_line(error)[:300]}); pip install "
                "'anchorline[openvino]' again, or use the provider cpu"
            ) from error
        self.contract = model.contract
        self._options = options
        self._model: ModelFile | None = model
        self._networks: dict[bool, Any] = {}  # by whether it is for batches of one
        self._opening = threading.Lock()
        network = self.network(alone=True)
        if self.contract.needs_vnni and adds_in_16_bits():
            raise ArtefactError(
                f"{self.path}: its 8-bit weights need VNNI, which this processor has not; quantise the float "
                "model again, or use the provider cpu"
            )
        self.precision = self.contract.precision
        if self.precision == "fp32" and "bfloat16" in str(network.get_property("INFERENCE_PRECISION_HINT")):
            self.precision = "bf16"

    def network(self, alone: bool) -> Any:
        """The compiled network for batches of one, or for any other."""
        with self._opening:
            if self._model is None:
                raise SettingsError(f"{self.path}: the model is closed; open it again")
            if alone not in self._networks:
                self._networks[alone] = _open(self._model, self._options, alone)
            return self._networks[alone]

    def create_lane(self) -> OpenVINOLane:
        return OpenVINOLane(self)

    def close(self) -> None:
        self._model, self._networks = None, {}


class OpenVINOLane(HostLane):
    """Preprocesses and starts the network when a batch is submitted; it runs while the caller goes on."""

    def __init__(self, backend: OpenVINOBackend) -> None:
        super().__init__(backend.contract, "openvino")
        self._path, self._network = backend.path, backend.network
        self._requests = {True: self._network(True).create_infer_request()}
        self._request = self._requests[True]  # the one that runs or ran last
        self._arrays: list[Any] = []  # what the network reads while it runs
        self._running = False
        self._started = 0.0

    def start(self, inputs: Arrays) -> None:
        tensor = load_openvino().Tensor
        try:
            self._arrays = [np.ascontiguousarray(inputs[name]) for name in self._contract.inputs]
            alone = len(self._arrays[0]) == 1
            if alone not in self._requests:
                self._requests[alone] = self._network(alone).create_infer_request()
            self._request = self._requests[alone]
            for name, array in zip(self._contract.inputs, self._arrays, strict=True):
                self._request.set_tensor(name, tensor(array, shared_memory=True))
            self._started = time.perf_counter()
            self._request.start_async()
        except RuntimeError as error:
            raise self._failure(error) from error
        self._running = True

    def wait(self, inputs: Arrays) -> tuple[Arrays, dict[str, float]]:
        ended_before = self._request.wait_for(0)  # then the clock here says nothing, and OpenVINO's does
        self._running = False
        try:
            self._request.wait()
        except RuntimeError as error:
            raise self._failure(error) from error
        # Copies, for the next run fills the same memory.
        outputs = {name: np.array(self._request.get_tensor(name).data) for name in self._contract.outputs}
        network = self._request.latency / 1000.0 if ended_before else time.perf_counter() - self._started
        return outputs, {"upload": 0.0, "network": network, "download": 0.0}

    def drain(self) -> None:
        super().drain()
        if self._running:
            self._running = False
            with contextlib.suppress(RuntimeError):
                self._request.wait()

    def close(self) -> None:
        self.drain()
        self._request, self._requests, self._arrays = None, {}, []

    def _failure(self, error: Exception) -> ArtefactError:
        reason = one_line(error)[-300:]
        return ArtefactError(f"{self._path}: OpenVINO cannot run it ({reason}); use the provider cpu")


def _open(model: ModelFile, options: CpuOptions, alone: bool) -> Any:
    """The compiled network, for batches of one or any, kept on disk so that a model opens at once the second
    time.

    The file's name is the hash of everything that decides the network, so it never goes stale.
    """
    precision = network_precision(options.precision, model.contract)
    settings = {  # of a kept network as well: it forgets even the precision that it was compiled for
        "INFERENCE_NUM_THREADS": str(options.thread_count),
        "PERFORMANCE_HINT": options.tuning.upper(),
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
    }
    facts = {
        "format": _CACHE_FORMAT,
        "model": model.check(),
        "batch": "1" if alone else "any",
        "openvino": str(load_openvino().__version__),
        "device": str(core().get_property("CPU", "FULL_DEVICE_NAME")),
        "capabilities": str(core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        **settings,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    kept_at = cache_folder() / "networks" / f"{key[:40]}{_SUFFIX}"
    try:
        if kept := load_network(kept_at):
            return core().import_model(kept, "CPU", settings)
    except (ArtefactError, RuntimeError) as error:
        if kept_at not in _said:
            _said.add(kept_at)
            reason = str(error).strip().splitlines()[-1]
            log.warning("%s: the kept network %s is damaged (%s); made again", model.path, kept_at, reason)
    with hidden_folder(Path(tempfile.gettempdir()), 0o700) as folder:
        inlined = folder / "inlined.onnx"
        write_inlined(model.path, inlined)
        network = _compile(model.path, inlined, settings, model.contract, alone)
    exported = network.export_model()
    store_network(kept_at, exported if isinstance(exported, bytes) else bytes(exported.read()))
    return network


def _compile(path: Path, inlined: Path, settings: dict[str, str], contract: Contract, alone: bool) -> Any:
    try:
        model = core().read_model(str(inlined))
        if alone:
            sides = contract.canvas or (-1, -1)
            model.reshape(dict(zip(contract.inputs, ([1, *sides, 3], [1, 2]), strict=True)))
        _keep_coordinates(model)
        _fuse_hardswish(model)
        if contract.winograd:
            _pool_channels_last(model)
        return core().compile_model(model, "CPU", settings)
    except Exception as error:
        version = str(load_openvino().__version__).partition("-")[0]
        raise ArtefactError(
            f"{path}: OpenVINO {version} cannot compile it ({one_line(error)[:300]}); use the provider cpu"
        ) from error


def _keep_coordinates(model: Any) -> None:
    """Make the RoIs' coordinates outputs of the graph as well, which nobody reads.

    OpenVINO computes in bf16 all that leads to a convolution, a matrix product or RoI pooling, so also the
    coordinates of what is pooled, which bf16 rounds to half a cell of a large feature map. What leads to an
    output it leaves in fp32.
    """
    rois = [op.input_value(1) for op in model.get_ops() if op.get_type_name() == "ROIAlign"]
    if rois:
        model.add_outputs(rois)


def _fuse_hardswish(model: Any) -> None:
    """Let x * HardSigmoid(x), what HardSwish became when its function was written out, be one op again.

    That one is computed in the convolution before it. For the two, OpenVINO reorders the convolution's map
    and goes through it twice, a tenth of MobileNetV3-320's time.
    """
    import openvino.opset13 as ops

    for op in model.get_ordered_ops():
        if op.get_type_name() != "HardSigmoid" or not _is_hardswish_gate(op):
            continue
        x = op.input_value(0)
        for user in op.output(0).get_target_inputs():
            product = user.get_node()
            if product.get_type_name() == "Multiply" and product.input_value(1 - user.get_index()) == x:
                product.output(0).replace(ops.hswish(x).output(0))


def _is_hardswish_gate(op: Any) -> bool:
    """Whether a ``HardSigmoid`` has HardSwish's slope and offset, 1/6 and 1/2."""
    slope, offset = (op.input_value(index).get_node() for index in (1, 2))
    constants = all(each.get_type_name() == "Constant" for each in (slope, offset))
    return constants and np.allclose([slope.data, offset.data], [1 / 6, 0.5], rtol=1e-6)


def _pool_channels_last(model: Any) -> None:
    """Let RoIs be pooled from maps whose channels lie together, which is many times faster.

    OpenVINO keeps what plain convolutions write in that order, but not what Winograd's form does. A
    convolution of each channel by itself, by 1, changes nothing else.
    """
    import openvino.opset13 as ops

    for op in model.get_ops():
        if op.get_type_name() == "ROIAlign":
            maps = op.input_value(0)
            ones = np.ones((maps.get_partial_shape()[1].get_length(), 1, 1, 1, 1), np.float32)
            ordered = ops.group_convolution(maps, ops.constant(ones), [1, 1], [0, 0], [0, 0], [1, 1])
            op.input(0).replace_source_output(ordered.output(0))


def load_network(path: Path) -> bytes | None:
    """The payload that ``store_network`` kept, None where there is no such file; ``ArtefactError`` where it
    cannot be used."""
    try:
        with path.open("rb") as file:
            digest, payload = file.readline(), file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtefactError(error.strerror or str(error)) from error
    if hashlib.sha256(payload).hexdigest().encode() != digest.strip():
        raise ArtefactError("its contents have changed")
    with contextlib.suppress(OSError):
        os.utime(path)  # used just now
    return payload


def store_network(path: Path, payload: bytes, limit: int = LIMIT_BYTES) -> None:
    """Keep a compiled network: a line with its SHA-256, and the payload.

    Those in its folder that were not used for longest make room, down to ``limit`` bytes. Where it cannot be
    kept, the log says so and all goes on without.
    """
    if len(payload) > limit:
        return
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            file.write(hashlib.sha256(payload).hexdigest().encode() + b"\n")
            file.write(payload)
    except AnchorlineError as error:
        log.info("the compiled network is not kept: %s", error)
        return
    with contextlib.suppress(OSError):
        found = [(each.stat(), each) for each in path.parent.glob(f"*{_SUFFIX}")]
        total = sum(stat.st_size for stat, _ in found)
        for stat, old in sorted(found, key=lambda each: each[0].st_mtime):
            if total <= limit:
                break
            old.unlink(missing_ok=True)
            total -= stat.st_size
