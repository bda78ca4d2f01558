"""Running an exported ONNX file with OpenVINO, the fastest way on a processor.

With the package ``openvino`` itself: its plugin for onnxruntime (1.8) offers processors of one maker only.
Our custom ops are unknown to it, so onnxruntime first replaces them by their function bodies.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.compiled_cache import CompiledCache, DamagedEntryError, Entry
from anchorline.runtime.contract import Contract
from anchorline.runtime.cpu_options import CpuOptions, adds_in_16_bits, network_precision
from anchorline.runtime.errors import ArtefactError, SettingsError
from anchorline.runtime.files import sha256_of
from anchorline.runtime.onnxruntime_backend import check_file, write_inlined
from anchorline.runtime.openvino_lane import OpenVINOLane
from anchorline.runtime.openvino_library import core, load_openvino, version

_HINTS = {"fp32": "f32", "bf16": "bf16"}
_CACHE_FORMAT = "2"

log = logging.getLogger("anchorline.runtime")
_said: set[Path] = set()  # damaged entries that were logged already


class OpenVINOBackend:
    """A network in an ONNX file that carries its contract. A context manager; for any number of threads.

    Compiled networks are kept on disk (``compiled_cache.py``). Raises ``ArtefactError`` for a file that
    is missing, damaged, no ONNX, without contract or at odds with it, or that OpenVINO cannot compile, and
    ``SettingsError`` where OpenVINO is not installed or the processor has no bf16 and it is asked for.
    """

    device_frames = False
    provider = "openvino"

    def __init__(
        self, path: str | Path, options: CpuOptions | None = None, cache: CompiledCache | None = None
    ) -> None:
        self.path = Path(path)
        options = options or CpuOptions()
        options.check()
        check_file(self.path)
        try:
            load_openvino()
        except Exception as error:  # a damaged package may raise anything
            raise SettingsError(
                f"provider is 'openvino', which cannot be loaded here ({error}); "
                "pip install 'anchorline[openvino]', or use the provider cpu"
            ) from error
        self._network: Any
        self.contract, self._network = _open(self.path, options, cache or CompiledCache())
        if self.contract.needs_vnni and adds_in_16_bits():
            raise ArtefactError(
                f"{self.path}: its 8-bit weights need VNNI, which this processor has not; quantise the float "
                "model again, or use the provider cpu"
            )
        hint = str(self._network.get_property("INFERENCE_PRECISION_HINT"))
        computed = "bf16" if "bfloat16" in hint else "fp32"
        self.precision = computed if self.contract.precision == "fp32" else self.contract.precision
        self._thread = threading.local()

    @property
    def timings(self) -> dict[str, float]:
        """Of this thread's last ``infer``."""
        return dict(getattr(self._thread, "timings", {"upload": 0.0, "network": 0.0, "download": 0.0}))

    def infer(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Run the network: ``images`` [B, H, W, 3] and ``image_sizes`` float32 [B, 2] by the
        contract's input names, to the contract's outputs by name."""
        lane = getattr(self._thread, "lane", None)
        if lane is None:
            lane = self._thread.lane = self.create_lane()
        start = time.perf_counter()
        lane.start(inputs)
        outputs = lane.wait()
        self._thread.timings = {"upload": 0.0, "network": time.perf_counter() - start, "download": 0.0}
        return outputs

    def create_lane(self) -> OpenVINOLane:
        """A lane; any number of them may be at work."""
        if self._network is None:
            raise SettingsError(f"{self.path}: the model is closed; open it again")
        return OpenVINOLane(self.path, self.contract, self._network.create_infer_request())

    def close(self) -> None:
        """Release the network. Safe to call twice."""
        self._network = None
        self._thread = threading.local()

    def __enter__(self) -> OpenVINOBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: Path, options: CpuOptions, cache: CompiledCache) -> tuple[Contract, Any]:
    """The contract and the compiled network, from the cache where it has it."""
    # The contract's precision is known after the first look only, so the wish is part of the key.
    wish = network_precision(options.precision, "fp32")
    settings = {
        "INFERENCE_NUM_THREADS": str(options.thread_count),
        "PERFORMANCE_HINT": options.tuning.upper(),
    }
    facts = {
        "format": _CACHE_FORMAT,
        "model": sha256_of(path),
        "openvino": str(load_openvino().__version__),
        "device": str(core().get_property("CPU", "FULL_DEVICE_NAME")),
        "capabilities": str(core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        "precision": wish,
        **settings,
    }
    entry_path = cache.path(facts)
    found = _from_cache(path, entry_path, settings, cache)
    if found is not None:
        network_precision(options.precision, found[0].precision)
        return found
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        inlined = Path(folder) / "inlined.onnx"
        contract = write_inlined(path, inlined)
        precision = network_precision(options.precision, contract.precision)
        network = _compile(path, inlined, {**settings, "INFERENCE_PRECISION_HINT": _HINTS[precision]})
    cache.store(entry_path, Entry(contract, _exported(network)))
    return contract, network


def _from_cache(
    path: Path, entry_path: Path, settings: dict[str, str], cache: CompiledCache
) -> tuple[Contract, Any] | None:
    try:
        entry = cache.load(entry_path)
        if entry is None:
            return None
        return entry.contract, core().import_model(entry.payload, "CPU", settings)
    except (DamagedEntryError, RuntimeError) as error:
        if entry_path not in _said:
            _said.add(entry_path)
            reason = str(error).strip().splitlines()[-1]
            log.warning("%s: the kept network %s is damaged (%s); made again", path, entry_path, reason)
        return None


def _compile(path: Path, inlined: Path, settings: dict[str, str]) -> Any:
    try:
        model = core().read_model(str(inlined))
        _keep_coordinates(model)
        return core().compile_model(model, "CPU", settings)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(
            f"{path}: OpenVINO {version()} cannot compile it ({reason[:300]}); use the provider cpu"
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


def _exported(network: Any) -> bytes:
    exported = network.export_model()
    return exported if isinstance(exported, bytes) else bytes(exported.read())
