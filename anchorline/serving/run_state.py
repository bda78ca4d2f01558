"""The run that is watched, as the page, the metrics and the health check see it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any, Literal

from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.figures import Figures, RecentRates, SourceFigures
from anchorline.runtime.video.frames import Result
from anchorline.runtime.video.pipeline import VideoPipeline

Phase = Literal["starting", "running", "ended", "failed"]
_FAILING = {"lost": "is lost; it is tried again", "stalled": "delivers nothing"}
_WHY_NOT = {
    "starting": "the model is being loaded",
    "ended": "the run has ended",
    "failed": "the run has failed",
}


class RunState:
    """The watched pipeline's figures, and what only the viewers ask for. Safe to be read by any thread."""

    def __init__(self) -> None:
        self.phase: Phase = "starting"
        self.pipeline: VideoPipeline | None = None
        self.names: tuple[str, ...] = ()
        self.newest: dict[str, float] = {}  # when each source's newest result was captured
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[str]] = {}
        self._rates: RecentRates | None = None
        self._last_result = self._begun = time.monotonic()

    def watch(self, pipeline: VideoPipeline) -> None:
        """This is the run. Raises ``SettingsError`` where there is one already."""
        if self.pipeline is not None:
            raise SettingsError("this live view watches a pipeline already; make another LiveView for it")
        self.names = tuple(getattr(getattr(pipeline.detector, "contract", None), "names", ()))
        self._counts = {name: Counter() for name in pipeline.figures.sources}
        self._rates = RecentRates(pipeline.figures)
        self._last_result = time.monotonic()
        self.phase, self.pipeline = "running", pipeline

    def note(self, result: Result) -> None:
        """A result has come. Raises ``SettingsError`` where the run is not known."""
        if self.pipeline is None:
            raise SettingsError("a live view has to know its pipeline; call view.watch(pipeline) first")
        with self._lock:
            self._counts[result.source].update(result.detections.names)
            self._last_result = time.monotonic()
            self.newest[result.source] = result.captured

    @property
    def figures(self) -> Figures | None:
        """The run's figures, once it is known."""
        return None if self.pipeline is None else self.pipeline.figures

    @property
    def sources(self) -> dict[str, SourceFigures]:
        """The sources' figures by name, in the order of the command line."""
        return {} if self.pipeline is None else self.pipeline.figures.sources

    def class_counts(self) -> dict[str, dict[str, int]]:
        """How many detections of each class each source had, classes in the order they first came."""
        with self._lock:
            return {source: dict(counts) for source, counts in self._counts.items()}

    def known_classes(self) -> dict[str, int]:
        """The classes of the model, and how many detections of each there were."""
        found = dict.fromkeys(self.names, 0)
        for counts in self.class_counts().values():
            for name, count in counts.items():
                found[name] = found.get(name, 0) + count
        return found

    def problems(self) -> dict[str, str]:
        """What is wrong, by source, or under ``pipeline`` where it is all of it; empty is healthy."""
        if self.pipeline is None or self.phase != "running":
            return {"pipeline": _WHY_NOT.get(self.phase, self.phase)}
        found = {name: what for name, each in self.sources.items() if (what := _problem(each))}
        silent = time.monotonic() - max(self._last_result, self.pipeline.figures.start)
        if self._owes_results() and silent > self.pipeline.options.stall:
            found["pipeline"] = f"no result for {silent:.0f} s, though frames are there"
        elif not self.pipeline.figures.anything_came() and not found:
            found["pipeline"] = "no source has delivered a frame yet"
        return found

    def _owes_results(self) -> bool:
        """Whether frames wait, or all have been read and the run goes on."""
        sources = self.sources.values()
        waiting = any(each.queue is not None and each.queue.frames for each in sources)
        return waiting or all(each.state == "ended" for each in sources)

    def figures_of_sources(self) -> list[dict[str, Any]]:
        """What the page shows of each source; ages in milliseconds, rates in frames a second."""
        now, rates = time.monotonic(), self._rates.now() if self._rates else {}
        found = []
        for name, each in self.sources.items():
            captured = self.newest.get(name)
            found.append(
                {
                    "name": name,
                    "state": each.state,
                    "fps_in": round(rates[name].read, 2),
                    "fps": round(rates[name].answered, 2),
                    "age": {key: round(value, 1) for key, value in each.age().items()},
                    "frames": each.frames_out,
                    "detections": each.detections,
                    "dropped": each.dropped,
                    "reconnects": each.reconnects,
                    "stalls": each.stalls,
                    "newest_s": None if captured is None else round(now - captured, 3),
                }
            )
        return found

    def seconds(self) -> float:
        """Since the server started."""
        return time.monotonic() - self._begun


def _problem(source: SourceFigures) -> str | None:
    if source.state == "ended" and source.first_error is not None and not source.frames_in:
        return "cannot be read"
    return _FAILING.get(source.state)
