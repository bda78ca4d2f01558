"""How long each stage takes: collected per frame, reported as percentiles."""

from __future__ import annotations

import bisect
import itertools
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.errors import SettingsError

DETECTOR_STAGES = ("preprocess", "upload", "network", "download", "postprocess")
STAGES = ("decode", *DETECTOR_STAGES, "track", "draw", "write")
PERCENTILES = (50, 95, 99)
_EXACT = 8192  # durations kept as they are; more than these are counted in bins
_SHORTEST = 1e-7  # seconds; the first bin's lower edge
_BIN_RATIO = 1.01
_BIN_COUNT = math.ceil(math.log(1e5 / _SHORTEST) / math.log(_BIN_RATIO))  # the last bin ends past a day
# In seconds, inclusive: fine where a stage of one frame lies, up to where a source counts as stalled.
HISTOGRAM_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Histogram:
    """How many durations were at most each of ``HISTOGRAM_BOUNDS``, and last of any length; and their sum."""

    at_most: tuple[int, ...]
    seconds: float


class Durations:
    """Any number of durations in seconds, in bounded memory.

    Percentiles are exact for the first 8192 durations; from then on all of them are counted in
    bins 1 % wide. Safe to be filled and asked by several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._exact: list[float] = []
        self._bins: NDArray[np.int64] | None = None
        self._by_bound = [0] * (len(HISTOGRAM_BOUNDS) + 1)
        self._seconds = 0.0

    def __len__(self) -> int:
        return sum(self._by_bound)

    def add(self, seconds: float) -> None:
        """Note one duration."""
        with self._lock:
            self._by_bound[bisect.bisect_left(HISTOGRAM_BOUNDS, seconds)] += 1
            self._seconds += seconds
            self._exact.append(seconds)
            if len(self._exact) >= _EXACT:
                self._bins = self._counts()
                self._exact = []

    def percentiles(self) -> dict[str, float]:
        """``{"p50", "p95", "p99"}`` in milliseconds; empty where nothing was noted."""
        with self._lock:
            if not len(self):
                return {}
            if self._bins is None:
                found = np.percentile(self._exact, PERCENTILES)
            else:
                cumulated = np.cumsum(self._counts())
                index = np.searchsorted(cumulated, np.array(PERCENTILES) / 100.0 * cumulated[-1])
                found = _SHORTEST * _BIN_RATIO ** (index + 0.5)
        return {f"p{p}": 1000.0 * seconds for p, seconds in zip(PERCENTILES, found.tolist(), strict=True)}

    def histogram(self) -> Histogram:
        """All durations, counted by their length; never less than before."""
        with self._lock:
            return Histogram(tuple(itertools.accumulate(self._by_bound)), self._seconds)

    def _counts(self) -> NDArray[np.int64]:
        """The bins with the durations that are still kept one by one."""
        places = np.log(np.maximum(self._exact, _SHORTEST) / _SHORTEST) / math.log(_BIN_RATIO)
        counts = np.bincount(places.astype(np.int64).clip(0, _BIN_COUNT - 1), minlength=_BIN_COUNT)
        return counts if self._bins is None else self._bins + counts


class StageTimes:
    """Durations by stage, in seconds. The stages' names are those of ``STAGES``, in that order."""

    def __init__(self) -> None:
        self._durations = {stage: Durations() for stage in STAGES}

    def add(self, timings: Mapping[str, float]) -> None:
        """Note one duration for each stage of ``timings``, such as ``Detector.timings``."""
        for stage, seconds in timings.items():
            if stage not in self._durations:
                raise SettingsError(f"unknown stage {stage!r}; expected one of {', '.join(STAGES)}")
            self._durations[stage].add(seconds)

    def percentiles(self) -> dict[str, dict[str, float]]:
        """``{stage: {"p50", "p95", "p99"}}`` in milliseconds, for the stages that were seen."""
        found = {stage: durations.percentiles() for stage, durations in self._durations.items()}
        return {stage: times for stage, times in found.items() if times}

    def histograms(self) -> dict[str, Histogram]:
        """The durations of each stage that was seen, counted by their length."""
        return {stage: each.histogram() for stage, each in self._durations.items() if len(each)}
