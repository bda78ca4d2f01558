"""The detector: frames in, detections in the frames' own pixels out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.backend import Backend
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.errors import ArtefactError, FrameError, SettingsError
from anchorline.runtime.onnxruntime_backend import OnnxRuntimeBackend
from anchorline.runtime.postprocess import to_detections
from anchorline.runtime.preprocess import Preprocessor, check_frame

PROVIDERS = ("auto", "cpu")
_INPUT_COUNT = 2
_OUTPUT_COUNTS = {"detections": 4, "proposals": 3}
_STAGES = ("preprocess", "upload", "network", "download", "postprocess")

_NOT_HERE = {
    ".engine": "TensorRT engines cannot be run by this version; give the ONNX file it was built from",
    ".safetensors": "checkpoints are not run directly; first anchorline export {path} --out model.onnx",
}


class Detector:
    """A model file, ready to be called with frames. A context manager; not for use by two threads at once.

    ``model`` is an ONNX file written by ``anchorline export``. ``provider`` is ``"auto"`` (the best
    one here) or ``"cpu"``. Detections with a score under ``score_threshold`` are dropped; by default
    all that the graph lets through (its own cut is ``contract.thresholds.score``) are returned.
    ``threads`` bounds the CPU threads. Raises ``ArtefactError`` and ``SettingsError``.
    """

    def __init__(
        self,
        model: str | Path,
        provider: str = "auto",
        score_threshold: float | None = None,
        threads: int | None = None,
    ) -> None:
        self._backend = _open_backend(Path(model), provider, threads)
        try:
            _check_tensors(Path(model), self._backend.contract)
            self._score_threshold = _choose_threshold(score_threshold, self._backend.contract)
        except BaseException:
            self._backend.close()
            raise
        self._preprocess = Preprocessor(self.contract)
        self.timings: dict[str, float] = dict.fromkeys(_STAGES, 0.0)

    @property
    def contract(self) -> Contract:
        """What the model promises: task, class names, canvas, thresholds, origin."""
        return self._backend.contract

    @property
    def provider(self) -> str:
        """What the network runs on, such as ``"cpu"``."""
        return self._backend.provider

    @property
    def precision(self) -> str:
        """The network's arithmetic, such as ``"fp32"``."""
        return self._backend.precision

    def __call__(self, frame: NDArray[np.uint8]) -> Detections:
        """Detect in one frame: uint8 BGR [H, W, 3] of any size; else ``FrameError``."""
        return self.batch([frame])[0]

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detect in several frames, whose sizes may differ, in runs of at most ``contract.max_batch``.

        Each frame's result is the one it has alone. ``timings`` holds the seconds of the whole call.
        """
        checked = [_check_one(index, frame, len(frames)) for index, frame in enumerate(frames)]
        timings = dict.fromkeys(_STAGES, 0.0)
        step = self.contract.max_batch or max(1, len(checked))
        found: list[Detections] = []
        for first in range(0, len(checked), step):
            found += self._run(checked[first : first + step], timings)
        self.timings = timings
        return found

    def _run(self, frames: list[NDArray[np.uint8]], timings: dict[str, float]) -> list[Detections]:
        start = time.perf_counter()
        images, image_sizes, placements = self._preprocess(frames)
        timings["preprocess"] += time.perf_counter() - start
        outputs = self._backend.infer(dict(zip(self.contract.inputs, (images, image_sizes), strict=True)))
        for stage, seconds in self._backend.timings.items():
            timings[stage] += seconds
        start = time.perf_counter()
        found = to_detections(outputs, placements, self.contract, self._score_threshold)
        timings["postprocess"] += time.perf_counter() - start
        return found

    def close(self) -> None:
        """Release the model. Safe to call twice."""
        self._backend.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_backend(path: Path, provider: str, threads: int | None) -> Backend:
    if provider not in PROVIDERS:
        raise SettingsError(f"provider is {provider!r}; available here: {', '.join(PROVIDERS)}")
    remedy = _NOT_HERE.get(path.suffix.lower())
    if remedy is not None:
        raise ArtefactError(f"{path}: {remedy.format(path=path)}")
    return OnnxRuntimeBackend(path, "cpu" if provider == "auto" else provider, threads)


def _check_tensors(path: Path, contract: Contract) -> None:
    for kind, names, count in (
        ("inputs", contract.inputs, _INPUT_COUNT),
        ("outputs", contract.outputs, _OUTPUT_COUNTS[contract.task]),
    ):
        if len(names) != count:
            raise ArtefactError(
                f"{path}: its contract lists the {kind} {', '.join(names)}; the task {contract.task} has "
                f"{count}; export the model again"
            )


def _choose_threshold(wanted: float | None, contract: Contract) -> float:
    if wanted is None:
        return 0.0
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0.0 <= wanted <= 1.0:
        raise SettingsError(f"score_threshold is {wanted!r}; expected a number from 0 to 1")
    floor = contract.thresholds.score
    if contract.task == "detections" and wanted < floor:
        raise SettingsError(
            f"score_threshold is {wanted:g}, but the model's graph already drops scores up to {floor:g}; "
            f"ask for at least {floor:g}, or export the model with a lower threshold"
        )
    return float(wanted)


def _check_one(index: int, frame: object, count: int) -> NDArray[np.uint8]:
    try:
        return check_frame(frame)
    except FrameError as error:
        if count == 1:
            raise
        raise FrameError(f"frame {index} of the batch: {error}") from None
