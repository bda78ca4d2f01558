"""The detector: frames in, detections in the frames' own pixels out."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.backends.base import Lane, LanePool
from anchorline.runtime.backends.cpu_options import MOST_THREADS, CpuOptions
from anchorline.runtime.backends.selection import open_backend
from anchorline.runtime.canvas import Placement, Preprocessor, check_frame, to_detections
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import FrameError, SettingsError, check_count, shown
from anchorline.runtime.io.files import expect_regular
from anchorline.runtime.nv12 import Nv12, frame_size
from anchorline.runtime.slices import Slicer
from anchorline.runtime.tensorrt.cuda import GpuOptions
from anchorline.runtime.tensorrt.frames import is_device_frame
from anchorline.runtime.timing import DETECTOR_STAGES
from anchorline.runtime.video.options import SliceOptions, is_share

Frame = Any  # uint8 BGR [H, W, 3] on the host, the same on the GPU, or an Nv12 of either


class Detector:
    """A model file, ready to be called with frames, from any number of threads. A context manager.

    ``model`` is an ONNX file written by ``anchorline export`` or an engine by ``anchorline build``.
    ``provider`` is ``"auto"`` (the best one here: an engine runs on TensorRT or, where that cannot be, its
    ONNX file on the CPU, and the log says why; an ONNX file on CUDA, else on the quickest of OpenVINO and
    onnxruntime's CPU), ``"cpu"``, ``"openvino"``, ``"cuda"``, ``"tensorrt"`` or ``"tensorrt-rtx"``; one that
    is named and not to be had is an error. Detections with a score under ``score_threshold`` are dropped; by
    default all that the graph lets through (its own cut is ``contract.thresholds.score``) are returned.
    ``threads`` sets the CPU threads (None: one a core, or as measured), ``workers`` the calls that run at
    once (on a GPU each takes memory of its own). ``cpu_precision`` and ``tuning`` are those of
    ``CpuOptions``: the arithmetic on a processor, and latency or throughput. ``gpu`` says how a GPU is used.
    A file for frames of any size can be held to a ``canvas`` (height, width), onto which all frames are laid,
    or take another ``resize`` rule than its own: at a smaller scale it is faster and finds fewer small ones.
    With ``slices`` frames larger than a slice are looked at in several views (docs/slicing.md).
    Which is the quickest is measured when a model is opened for the first time on a machine, which takes
    seconds, and remembered (docs/performance.md); with ``measure=False`` it is assumed to be OpenVINO. None:
    as the environment variable ``ANCHORLINE_MEASURE`` says, 1 or 0; by default it is measured.

    ``contract`` is what the model promises (task, class names, canvas, thresholds, origin), ``provider`` what
    the network runs on, such as ``"cpu"``, ``precision`` its arithmetic, such as ``"fp32"``, and ``threads``
    how many threads of the processor it has, None for an engine.
    Pickled or copied it is its arguments, with which the file is opened anew.
    Raises ``ArtefactError``, ``SettingsError`` and ``GpuError``.
    """

    def __init__(
        self,
        model: str | Path,
        provider: str = "auto",
        score_threshold: float | None = None,
        threads: int | None = None,
        *,
        workers: int = 2,
        gpu: GpuOptions | None = None,
        cpu_precision: str = "auto",
        tuning: str = "latency",
        canvas: tuple[int, int] | None = None,
        resize: ResizeRule | None = None,
        slices: SliceOptions | None = None,
        measure: bool | None = None,
    ) -> None:
        expect_regular(model)
        check_count("workers", workers, most=MOST_THREADS)
        if gpu is not None and not isinstance(gpu, GpuOptions):
            raise SettingsError(f"gpu is {shown(gpu)}; expected GpuOptions(...), or None")
        self._arguments = {
            "model": os.path.abspath(model),
            "provider": provider,
            "score_threshold": score_threshold,
            "threads": threads,
            "workers": workers,
            "gpu": gpu,
            "cpu_precision": cpu_precision,
            "tuning": tuning,
            "canvas": canvas,
            "resize": resize,
            "slices": slices,
            "measure": measure,
        }
        cpu = CpuOptions(threads, cpu_precision, tuning)
        self._backend = open_backend(
            *(Path(model), provider, cpu, gpu or GpuOptions()), canvas=canvas, resize=resize, measure=measure
        )
        self.provider, self.precision = self._backend.provider, self._backend.precision
        self.threads = self._backend.threads
        self.contract = self._backend.contract
        try:
            # Detections below this are dropped; 0 where all that the graph lets through are returned.
            self.score_threshold = _choose_threshold(score_threshold, self.contract)
            self.slicer = None if slices is None else Slicer(slices, self.contract)
        except BaseException:
            self._backend.close()
            raise
        self._lanes = LanePool(self._backend.create_lane, workers, str(model))
        self._preprocess = Preprocessor(self.contract)
        self._last_timings = dict.fromkeys(DETECTOR_STAGES, 0.0)
        self._thread = threading.local()
        # How many threads may usefully call at once; a video pipeline has as many for files. Alone OpenVINO's
        # throughput mode uses half of the cores: one call for each of two streams.
        self.concurrent_calls = 2 if tuning == "throughput" and self.provider == "openvino" else 1

    @property
    def timings(self) -> dict[str, float]:
        """Seconds by stage of the call that ended last: of this thread's, or any's if it made none."""
        return getattr(self._thread, "timings", self._last_timings)

    def __call__(self, frame: Frame, stream: Any = None) -> Detections:
        """Detect in one frame: uint8 BGR [H, W, 3] of any size, or ``Nv12``; else ``FrameError``.

        Where the network runs on an engine the frame may lie on its GPU (see docs/runtime.md);
        ``stream`` is the CUDA stream it becomes ready on, if it does not say that itself.
        """
        return self.batch([frame], stream)[0]

    def batch(self, frames: Sequence[Frame], stream: Any = None) -> list[Detections]:
        """Detect in several frames, whose sizes may differ, in runs of at most ``contract.max_batch``.

        Where the canvas is free, frames of a run that are of other sizes are padded to the largest sides, as
        torchvision, Detectron2 and MMDetection do, which moves their boxes a little. ``timings`` holds the
        seconds of the whole call.
        """
        self._lanes.check()
        checked = self._checked(list(_several(frames)))
        timings = dict.fromkeys(DETECTOR_STAGES, 0.0)

        inside = 0.0  # seconds in lanes, or waiting for one

        def detect(views: list[Frame]) -> list[Detections]:
            nonlocal inside
            start = time.perf_counter()
            step = self.contract.max_batch or max(1, len(views))
            found: list[Detections] = []
            for first in range(0, len(views), step):
                with self._lanes.lane() as lane, lane.entered():
                    lane.submit(views[first : first + step], stream)
                    found += self._collect(lane, timings)
            inside += time.perf_counter() - start
            return found

        if self.slicer is None:
            found = detect(checked)
        else:
            start = time.perf_counter()
            found = self.slicer.batch(checked, detect)
            timings["postprocess"] += time.perf_counter() - start - inside  # cutting and merging
        self._thread.timings = self._last_timings = timings
        return found

    def views(self, size: tuple[int, int]) -> int:
        """How often the network looks at a frame of ``size`` (height, width): once, or in slices."""
        return 1 if self.slicer is None else len(self.slicer.views(size))

    def stream(self, frames: Iterable[Frame], batch: int = 1, in_flight: int = 2) -> Iterator[Detections]:
        """Detect in a sequence of frames, one result a frame, in order.

        ``batch`` frames go through the network at a time, and up to ``in_flight`` batches are under way at
        once: on a GPU the next one is copied while this one computes, at the cost of its memory. A frame
        is read ``batch * in_flight`` frames ahead of its result and must not be changed until that has
        come. With slices one batch of frames is under way at a time.
        """
        check_count("batch", batch)
        check_count("in_flight", in_flight)
        most = self.contract.max_batch
        if most is not None and batch > most:
            raise SettingsError(f"batch is {batch}; the model takes at most {most} at a time")
        self._lanes.check()
        if self.slicer is not None:
            return self._sliced(_several(frames), batch)
        return self._streamed(_several(frames), batch, in_flight)

    def prepare(
        self, frames: Sequence[NDArray[np.uint8]]
    ) -> tuple[dict[str, NDArray[np.generic]], list[Placement]]:
        """The network's inputs for checked frames, by the contract's names, and where each frame lies.

        ``images`` [B, H, W, 3] is overwritten by the next call.
        """
        return self._preprocess(frames)

    def _sliced(self, source: Iterator[Frame], batch: int) -> Iterator[Detections]:
        while chunk := list(itertools.islice(source, batch)):
            yield from self.batch(chunk)

    def _streamed(self, source: Iterator[Frame], batch: int, in_flight: int) -> Iterator[Detections]:
        """The lanes go back when the iterator ends, fails or is closed."""
        lanes, pending = self._lanes, deque[Lane]()
        try:
            while chunk := list(itertools.islice(source, batch)):
                checked = self._checked(chunk)
                pending.append(lanes.borrow())
                with pending[-1].entered():
                    pending[-1].submit(checked)
                if len(pending) == in_flight:  # now, and not after the next frames have been waited for
                    yield from self._oldest(pending)
            while pending:
                yield from self._oldest(pending)
        except BaseException as error:
            lanes.note(error)
            raise
        finally:
            while pending and not lanes.in_fork:
                lanes.abandon(pending.popleft())

    def _oldest(self, pending: deque[Lane]) -> list[Detections]:
        """The detections of the oldest batch under way; ``timings`` becomes that batch's."""
        self._lanes.check()
        timings = dict.fromkeys(DETECTOR_STAGES, 0.0)
        with pending[0].entered():
            found = self._collect(pending[0], timings)
        self._thread.timings = self._last_timings = timings
        self._lanes.give_back(pending.popleft())
        return found

    def _collect(self, lane: Lane, timings: dict[str, float]) -> list[Detections]:
        outputs, placements, stages = lane.collect()
        start = time.perf_counter()
        found = to_detections(outputs, placements, self.contract, self.score_threshold)
        for stage, seconds in stages.items():
            timings[stage] += seconds
        timings["postprocess"] += time.perf_counter() - start
        return found

    def _checked(self, frames: list[Frame]) -> list[Frame]:
        for index, frame in enumerate(frames):
            try:
                if is_device_frame(frame):
                    if not self._backend.device_frames:
                        raise FrameError(
                            f"the frame lies on a GPU, but this model runs on {self.provider}; copy the "
                            "frame to the host, or run an engine"
                        )
                    if self.slicer is not None:
                        raise FrameError(
                            "the frame lies on a GPU, and slices are cut on the host; copy the frame to the "
                            "host, or open the model without slices"
                        )
                elif isinstance(frame, Nv12):
                    frame_size(frame)
                else:
                    check_frame(frame)
            except FrameError as error:
                if len(frames) == 1:
                    raise
                raise FrameError(f"frame {index} of the batch: {error}") from None
        return frames

    def close(self) -> None:
        """Release the model, once the calls of other threads have ended. Safe to call twice."""
        if self._lanes.close():
            self._backend.close()

    def __del__(self) -> None:
        """Whoever forgets to close it gets the GPU's memory back all the same."""
        with contextlib.suppress(Exception):  # it may be half made, or Python at its end
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as its arguments: whoever takes it opens the file anew."""
        return _opened, (type(self), self._arguments)

    def __enter__(self) -> Detector:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def _opened(kind: type[Detector], arguments: dict[str, Any]) -> Detector:
    return kind(**arguments)


def _several(frames: Iterable[Frame]) -> Iterator[Frame]:
    """An iterator of ``frames``; ``FrameError`` where they are none, or a single one."""
    if getattr(frames, "ndim", None) == 3:
        raise FrameError("Expected several frames, got a single one; give [frame], or call the detector")
    try:
        return iter(frames)
    except TypeError:
        raise FrameError(f"Expected several frames, got a {type(frames).__name__}; give a list") from None


def _choose_threshold(wanted: float | None, contract: Contract) -> float:
    if wanted is None:
        return 0.0
    if not is_share(wanted):
        raise SettingsError(f"score_threshold is {shown(wanted)}; expected a number from 0 to 1")
    floor = contract.thresholds.score
    if contract.task == "detections" and wanted < floor:
        raise SettingsError(
            f"score_threshold is {wanted:g}, but the model's graph already drops scores up to {floor:g}; "
            f"ask for at least {floor:g}, or export the model with a lower threshold"
        )
    return float(wanted)
