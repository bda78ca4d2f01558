"""Running an onnxruntime session with its inputs and outputs bound to memory of the device.

The buffers of a batch size are made once, so that the session copies nothing by itself and its CUDA
graph, which replays the very addresses it was captured with, stays valid.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.contract import Contract

_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}


@dataclass(frozen=True)
class _Bound:
    """The buffers of one batch size."""

    binding: Any
    run_options: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]


class BoundNetwork:
    """``session`` with buffers on ``device_type`` (``cuda``, ``cpu``) for each batch size.

    One call runs at a time. With ``graph`` each batch size has a CUDA graph of its own.
    """

    def __init__(
        self, session: Any, contract: Contract, device_type: str, device: int, graph: bool = False
    ) -> None:
        self._session, self._contract = session, contract
        self._where = (device_type, device)
        self._graph = graph
        self._sizes: dict[int, _Bound] = {}
        self._lock = threading.Lock()

    def infer(
        self, inputs: Mapping[str, NDArray[np.generic]]
    ) -> tuple[dict[str, NDArray[np.generic]], dict[str, float]]:
        """Outputs by name, as arrays of the host, and the seconds of upload, network and download."""
        batch = len(inputs[self._contract.inputs[0]])
        with self._lock:
            started = time.perf_counter()
            bound = self._sizes.get(batch)
            if bound is None:
                bound = self._bind(batch, inputs)
            for name, value in bound.inputs.items():
                value.update_inplace(np.ascontiguousarray(inputs[name]))
            uploaded = time.perf_counter()
            self._session.run_with_iobinding(bound.binding, bound.run_options)
            bound.binding.synchronize_outputs()
            ran = time.perf_counter()
            # A copy, for on the CPU numpy() is a view of the buffer that the next call fills.
            outputs = {name: np.array(value.numpy()) for name, value in bound.outputs.items()}
            done = time.perf_counter()
        seconds = {"upload": uploaded - started, "network": ran - uploaded, "download": done - ran}
        return outputs, seconds

    def _bind(self, batch: int, inputs: Mapping[str, NDArray[np.generic]]) -> _Bound:
        import onnxruntime

        def buffer(shape: list[int], dtype: Any) -> Any:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, *self._where)

        binding, options = self._session.io_binding(), onnxruntime.RunOptions()
        if self._graph:
            options.add_run_config_entry("gpu_graph_id", str(batch))
        bound_inputs = {name: buffer(list(inputs[name].shape), inputs[name].dtype) for name in inputs}
        for name, value in bound_inputs.items():
            binding.bind_ortvalue_input(name, value)
        described = {output.name: output for output in self._session.get_outputs()}
        bound_outputs = {}
        for name in self._contract.outputs:
            shape = [batch, *described[name].shape[1:]]
            bound_outputs[name] = buffer(shape, _NUMPY_TYPES[described[name].type])
            binding.bind_ortvalue_output(name, bound_outputs[name])
        return self._sizes.setdefault(batch, _Bound(binding, options, bound_inputs, bound_outputs))
