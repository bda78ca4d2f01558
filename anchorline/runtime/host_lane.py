"""A lane whose preprocessing is done by OpenCV and whose network takes arrays of the host."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from anchorline.runtime.backend import Backend, LaneResult
from anchorline.runtime.errors import SettingsError
from anchorline.runtime.gpu.device_frames import Nv12, host_bgr
from anchorline.runtime.preprocess import Preprocessor


class HostLane:
    """Preprocesses when a batch is submitted and runs the network when it is collected."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._preprocess = Preprocessor(backend.contract)
        self._batch: tuple[Any, ...] | None = None

    def entered(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def submit(self, frames: Sequence[Any], stream: Any = None) -> None:
        if stream is not None:
            raise SettingsError(f"stream: the model runs on {self._backend.provider}, which takes none")
        start = time.perf_counter()
        pixels = [host_bgr(frame) if isinstance(frame, Nv12) else frame for frame in frames]
        self._batch = (*self._preprocess(pixels), time.perf_counter() - start)

    def collect(self) -> LaneResult:
        assert self._batch is not None
        images, image_sizes, placements, seconds = self._batch
        names = self._backend.contract.inputs
        outputs = self._backend.infer(dict(zip(names, (images, image_sizes), strict=True)))
        return LaneResult(outputs, placements, {"preprocess": seconds, **self._backend.timings})

    def drain(self) -> None:
        self._batch = None

    def close(self) -> None:
        self._batch = None
