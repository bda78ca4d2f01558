"""Running an engine with TensorRT or TensorRT for RTX, on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.backends.base import Outputs
from anchorline.runtime.io.errors import GpuError, SettingsError
from anchorline.runtime.tensorrt.cuda import Cuda, NoGpuError, open_cuda
from anchorline.runtime.tensorrt.engine import CannotRunHereError, TensorRTEngine, check_fit, check_flavour
from anchorline.runtime.tensorrt.lane import LaneOptions, TensorRTLane
from anchorline.runtime.tensorrt.library import load_tensorrt
from anchorline.runtime.tensorrt.manifest import EngineManifest
from anchorline.runtime.tensorrt.options import GpuOptions


class TensorRTBackend:
    """An engine on a GPU; see ``backend.Backend``.

    Raises ``CannotRunHereError`` where there is no GPU, no TensorRT or another release of it, or where the
    engine is for another GPU; ``ArtefactError`` for an engine that is damaged.
    """

    device_frames = True

    def __init__(self, path: Path, manifest: EngineManifest, options: GpuOptions | None = None) -> None:
        options = options or GpuOptions()
        check_flavour(manifest)
        self.path = path
        self.contract = dataclasses.replace(manifest.contract, max_batch=manifest.batch[2])
        self.provider, self.precision = manifest.flavour, manifest.precision
        self._options = LaneOptions(options.graph is not False, options.timings)
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._infer_lane: TensorRTLane | None = None
        self._failure: str | None = None
        try:
            trt = load_tensorrt(manifest.flavour)
        except SettingsError as error:
            raise CannotRunHereError(str(error)) from None
        try:
            self._cuda: Cuda = open_cuda(options.cuda, options.device)
        except NoGpuError as error:
            raise CannotRunHereError(str(error)) from None
        self._engine: TensorRTEngine | None = None
        try:
            cuda = self._cuda
            check_fit(manifest, str(trt.__version__), cuda.compute_capability, cuda.device_name)
            with cuda.current():
                self._engine = TensorRTEngine(path, manifest, trt, cuda)
        except BaseException:
            self.close()
            raise

    @property
    def timings(self) -> dict[str, float]:
        """Of this thread's last ``infer``."""
        found: dict[str, float] = getattr(self._thread, "timings", {})
        return {stage: found.get(stage, 0.0) for stage in ("upload", "network", "download")}

    def create_lane(self) -> TensorRTLane:
        """A lane; raises ``OutOfDeviceMemoryError`` where its buffers do not fit."""
        if self._engine is None:
            raise SettingsError(f"{self.path}: the model is closed; open it again")
        return TensorRTLane(self._engine, self._cuda, self._options)

    def infer(self, inputs: Outputs) -> dict[str, NDArray[np.generic]]:
        """Prepared inputs to outputs, one call at a time, in a lane of its own."""
        with self._lock:
            if self._failure is not None:
                raise GpuError(f"{self.path}: refused after an earlier failure: {self._failure}")
            try:
                if self._infer_lane is None:
                    self._infer_lane = self.create_lane()
                outputs, self._thread.timings = self._infer_lane.infer(dict(inputs))
                return outputs
            except SettingsError:
                raise
            except BaseException as error:
                if getattr(error, "sticky", False):
                    self._failure = str(error)
                self._close_infer_lane()
                raise

    def close(self) -> None:
        """Release lane, engine and runtime, then the GPU. Other lanes must be closed before."""
        with self._lock:
            self._close_infer_lane()
            if self._engine is not None:
                with contextlib.suppress(GpuError), self._cuda.current():
                    self._engine.save_cache()
                    self._engine.close()
                self._engine.close()  # whatever became of the GPU: it must not outlive it
                self._engine = None
            self._cuda.close()

    def _close_infer_lane(self) -> None:
        if self._infer_lane is not None:
            self._infer_lane.close()
            self._infer_lane = None
