"""One model on one provider, measured in this process: ``python -m anchorline.bench.work``.

Reads its task as JSON from stdin and prints a row as JSON; a user's mistake is one line and exit code 2.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.backends.cpu_options import usable_cores
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import AnchorlineError, DataError
from anchorline.runtime.io.files import sha256_of
from anchorline.runtime.io.images import find_inputs
from anchorline.runtime.timing import DETECTOR_STAGES
from anchorline.runtime.video.options import SliceOptions
from anchorline.runtime.video.reader import open_file

TOTAL = "total"  # frames to boxes by the clock, what lies between the stages included
PERCENTILES = (50, 90, 95, 99)
QUANTITIES = (*(f"p{p}" for p in PERCENTILES), "max")
MAX_HELD = 64  # frames in memory; more batches see them again
_SCENES = 8
_SCENE_SIZE = (1080, 1920)

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Work:
    """What to measure; see ``bench``."""

    model: str
    source: str | None
    provider: str
    batch: int
    batches: int
    warmup: int
    threads: int | None
    cpu_precision: str
    measure: bool | None = None
    slices: Mapping[str, Any] | None = None  # the fields of SliceOptions


@dataclass(frozen=True)
class BenchRow:
    """One model on one provider.

    ``stages`` holds milliseconds a batch, ``{stage: {"p50", "p90", "p95", "p99", "max"}}``, ``total``
    included; ``batches`` were measured after ``warmup`` others. ``fps`` is frames by the sum of all totals.
    ``views`` is how often the network looked at a frame, once or in slices.
    ``open_s`` is the time to open the model, ``first_ms`` that of the first batch. ``peak_mib`` is the
    process's largest resident memory, of which ``base_mib`` was there before the model.
    """

    model: str
    sha256: str
    provider: str
    precision: str
    batch: int
    threads: int
    frame_size: str
    frames: int
    views: float
    batches: int
    warmup: int
    fps: float
    open_s: float
    first_ms: float
    peak_mib: float
    base_mib: float
    detections: float
    stages: Mapping[str, Mapping[str, float]]


def measure(work: Work) -> BenchRow:
    """Open the model, warm it up and time ``work.batches`` calls. Raises ``AnchorlineError``."""
    frames = load_frames(work.source)
    forget_peak()
    base = peak_memory()
    endless = cycle(frames)
    seconds: dict[str, list[float]] = {stage: [] for stage in (*DETECTOR_STAGES, TOTAL)}
    found = views = 0
    start = time.perf_counter()
    with Detector(
        *(work.model, work.provider),
        threads=work.threads,
        cpu_precision=work.cpu_precision,
        slices=None if work.slices is None else SliceOptions(**work.slices),
        measure=work.measure,
    ) as detector:
        open_s = time.perf_counter() - start
        warmup = max(1, work.warmup)
        for number in range(warmup + work.batches):
            group = list(islice(endless, work.batch))
            start = time.perf_counter()
            detections = detector.batch(group)
            took = time.perf_counter() - start
            if number == 0:
                first_ms = 1000.0 * took
            if number >= warmup:
                seconds[TOTAL].append(took)
                for stage in DETECTOR_STAGES:
                    seconds[stage].append(detector.timings[stage])
                found += sum(map(len, detections))
                views += sum(detector.views(frame.shape[:2]) for frame in group)
        count = work.batch * work.batches
        return BenchRow(
            model=Path(work.model).name,
            sha256=sha256_of(work.model),
            provider=detector.provider,
            precision=detector.precision,
            batch=work.batch,
            threads=detector.threads or work.threads or usable_cores(),
            frame_size=" ".join(sorted({f"{f.shape[1]}x{f.shape[0]}" for f in frames})),
            frames=count,
            views=views / count,
            batches=work.batches,
            warmup=warmup,
            fps=count / sum(seconds[TOTAL]),
            open_s=open_s,
            first_ms=first_ms,
            peak_mib=peak_memory(),
            base_mib=base,
            detections=found / count,
            stages={stage: summarise(values) for stage, values in seconds.items()},
        )


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles and the largest of all durations, in milliseconds. Nothing is left out."""
    values = (*np.percentile(seconds, PERCENTILES).tolist(), max(seconds))
    return {quantity: 1000.0 * value for quantity, value in zip(QUANTITIES, values, strict=True)}


def load_frames(source: str | None) -> list[Frame]:
    """The first frames of a video or folder, an image, or generated scenes. Raises ``DataError``."""
    if source is None:
        from anchorline.data.synthetic import generate_scene

        return [generate_scene(0, _SCENE_SIZE, index)[0] for index in range(_SCENES)]
    frames: list[Frame] = []
    for path, is_video in find_inputs(source)[:MAX_HELD]:
        with open_file(path, is_video) as reader:
            frames += [frame for _, _, frame in islice(reader, MAX_HELD)]
    if not frames:
        raise DataError(f"{source}: holds no frame; give a video, an image or a folder of images")
    return frames


def forget_peak() -> None:
    """Let ``peak_memory`` count from here, without what it took to make the frames (Linux only)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> float:
    """The largest resident memory of this process, in MiB; 0 where the system does not say."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(measure(Work(**json.load(sys.stdin))))))
    except AnchorlineError as error:
        print(error)
        sys.exit(2)
