"""How long each stage takes: collected per frame, reported as percentiles."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import numpy as np

from anchorline.runtime.errors import SettingsError

STAGES = ("decode", "preprocess", "upload", "network", "download", "postprocess", "draw", "write")
PERCENTILES = (50, 95, 99)


class StageTimes:
    """Durations by stage, in seconds. The stages' names are those of ``STAGES``, in that order."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def add(self, stage: str, seconds: float) -> None:
        """Note one duration."""
        if stage not in self._seconds:
            raise SettingsError(f"unknown stage {stage!r}; expected one of {', '.join(STAGES)}")
        self._seconds[stage].append(seconds)

    def add_all(self, timings: Mapping[str, float]) -> None:
        """Note one duration for each stage of ``timings``, such as ``Detector.timings``."""
        for stage, seconds in timings.items():
            self.add(stage, seconds)

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Note how long the block takes; a block that raises is not counted."""
        start = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - start)

    def percentiles(self) -> dict[str, dict[str, float]]:
        """``{stage: {"p50", "p95", "p99"}}`` in milliseconds, for the stages that were seen."""
        return {
            stage: {f"p{p}": 1000.0 * float(np.percentile(seconds, p)) for p in PERCENTILES}
            for stage, seconds in self._seconds.items()
            if seconds
        }
