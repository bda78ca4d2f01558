"""A lane of OpenVINO: the network runs while the caller goes on, on the lane's own canvas."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.backend import LaneResult
from anchorline.runtime.canvas import Placement
from anchorline.runtime.contract import Contract
from anchorline.runtime.errors import ArtefactError, SettingsError
from anchorline.runtime.gpu.device_frames import Nv12, host_bgr
from anchorline.runtime.openvino_library import load_openvino
from anchorline.runtime.preprocess import Preprocessor


class OpenVINOLane:
    """Preprocesses and starts the network when a batch is submitted; ``collect`` waits for it."""

    def __init__(self, path: Path, contract: Contract, request: Any) -> None:
        self._path, self._contract, self._request = path, contract, request
        self._preprocess = Preprocessor(contract)
        self._pending: tuple[list[Placement], float] | None = None
        self._arrays: list[NDArray[np.generic]] = []  # what the network reads while it runs
        self._running = False
        self._started = 0.0

    def entered(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def submit(self, frames: Sequence[Any], stream: Any = None) -> None:
        if stream is not None:
            raise SettingsError("stream: the model runs on openvino, which takes none")
        start = time.perf_counter()
        pixels = [host_bgr(frame) if isinstance(frame, Nv12) else frame for frame in frames]
        images, image_sizes, placements = self._preprocess(pixels)
        seconds = time.perf_counter() - start
        self.start(dict(zip(self._contract.inputs, (images, image_sizes), strict=True)))
        self._pending = placements, seconds

    def collect(self) -> LaneResult:
        assert self._pending is not None
        placements, seconds = self._pending
        ended_before = self._request.wait_for(0)  # then the clock here says nothing, and OpenVINO's does
        outputs = self.wait()
        network = self._request.latency / 1000.0 if ended_before else time.perf_counter() - self._started
        return LaneResult(
            outputs, placements, {"preprocess": seconds, "upload": 0.0, "network": network, "download": 0.0}
        )

    def start(self, inputs: Mapping[str, NDArray[np.generic]]) -> None:
        """Start the network on arrays by the contract's names, which are not copied."""
        tensor = load_openvino().Tensor
        try:
            self._arrays = [np.ascontiguousarray(inputs[name]) for name in self._contract.inputs]
            for name, array in zip(self._contract.inputs, self._arrays, strict=True):
                self._request.set_tensor(name, tensor(array, shared_memory=True))
            self._started = time.perf_counter()
            self._request.start_async()
        except RuntimeError as error:
            raise self._failure(error) from error
        self._running = True

    def wait(self) -> dict[str, NDArray[np.generic]]:
        """The outputs of the network that was started, by the contract's names."""
        self._running = False
        try:
            self._request.wait()
        except RuntimeError as error:
            raise self._failure(error) from error
        # Copies, for the next run fills the same memory.
        return {name: np.array(self._request.get_tensor(name).data) for name in self._contract.outputs}

    def drain(self) -> None:
        self._pending = None
        if self._running:
            self._running = False
            with contextlib.suppress(RuntimeError):
                self._request.wait()

    def close(self) -> None:
        if self._request is not None:
            self.drain()
        self._request, self._arrays = None, []

    def _failure(self, error: Exception) -> ArtefactError:
        reason = " ".join(str(error).split())[-300:]
        return ArtefactError(f"{self._path}: OpenVINO cannot run it ({reason}); use the provider cpu")
