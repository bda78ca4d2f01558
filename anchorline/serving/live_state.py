"""What all requests share: the run as the page, the metrics and the health check see it, and its viewers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.io.files import json_text
from anchorline.runtime.video.figures import RecentRates, SourceFigures
from anchorline.runtime.video.frames import Result
from anchorline.runtime.video.options import is_share
from anchorline.runtime.video.pipeline import VideoPipeline
from anchorline.serving.painting import Painter, Shown

_KEPT = 0.9  # seconds that a status is good for
_OF_PHASES = {
    "starting": "the model is being loaded",
    "ended": "the run has ended",
    "failed": "the run has failed",
}
_OF_SOURCES = {"lost": "is lost; it is tried again", "stalled": "delivers nothing"}


class LiveState:
    """The watched run, its painter, and what the viewers chose to see.

    The run is safe to be read by any thread, and so is ``wake``; ``viewers`` and the controls belong to the
    server's loop.
    """

    def __init__(self) -> None:
        self.phase: Literal["starting", "running", "ended", "failed"] = "starting"
        self.pipeline: VideoPipeline | None = None
        self.sources: dict[str, SourceFigures] = {}  # in the order of the command line
        self.newest: dict[str, float] = {}  # when each source's newest result was captured
        self.painter = Painter(self.wake)
        self.viewers: set[asyncio.Event] = set()  # each set where there may be something new
        self.dropped = 0  # viewers that read too slowly
        self.closed = False
        self.loop: asyncio.AbstractEventLoop | None = None  # the server's, since there were viewers
        self._lowest_score = 0.0
        self._names: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[str]] = {}
        self._rates: RecentRates | None = None
        self._last_result = self._begun = time.monotonic()
        self._status, self._made, self._version = b"", 0.0, -1

    def watch(self, pipeline: VideoPipeline) -> None:
        """This is the run. Raises ``SettingsError`` where there is one already."""
        if self.pipeline is not None:
            raise SettingsError("this live view watches a pipeline already; make another LiveView for it")
        detector, options = pipeline.detector, pipeline.options
        contract = getattr(detector, "contract", None)
        let_through = (
            getattr(getattr(contract, "thresholds", None), "score", 0.0),
            getattr(detector, "score_threshold", 0.0),
            options.filters.min_scores.get("", 0.0),
        )
        self._lowest_score = min(max(let_through), 1.0)
        self._names = tuple(getattr(contract, "names", ()))
        self._counts = {name: Counter() for name in pipeline.figures.sources}
        self._rates = RecentRates(pipeline.figures)
        self._last_result = time.monotonic()
        score = max(self._lowest_score, options.shown_score)
        self.painter.initial = Shown(score, version=self.painter.shown.version + 1)
        self.painter.show(self.painter.initial)
        self.pipeline, self.sources = pipeline, pipeline.figures.sources
        self.phase = "running"
        self.wake()

    def note(self, result: Result) -> None:
        """A result has come. Raises ``SettingsError`` where the run is not known."""
        if self.pipeline is None:
            raise SettingsError("a live view has to know its pipeline; call view.watch(pipeline) first")
        with self._lock:
            self._counts[result.source].update(result.detections.names)
            self._last_result = time.monotonic()
            self.newest[result.source] = result.captured
        self.painter.offer(result)

    def wake(self) -> None:
        """Tell every viewer that something is new."""

        def wake() -> None:
            for viewer in self.viewers:
                viewer.set()

        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(wake)

    def class_counts(self) -> dict[str, dict[str, int]]:
        """How many detections of each class each source had, classes in the order they first came."""
        with self._lock:
            return {source: dict(counts) for source, counts in self._counts.items()}

    def problems(self) -> dict[str, str]:
        """What is wrong, by source, or under ``pipeline`` where it is all of it; empty is healthy."""
        phase, pipeline = self.phase, self.pipeline
        if pipeline is None or phase != "running":
            return {"pipeline": _OF_PHASES[phase]}
        found = {}
        for name, each in self.sources.items():
            if each.state == "ended" and each.first_error is not None and not each.frames_in:
                found[name] = "cannot be read"
            elif each.state in _OF_SOURCES:
                found[name] = _OF_SOURCES[each.state]
        silent = time.monotonic() - max(self._last_result, pipeline.figures.start)
        waiting = any(each.queue is not None and each.queue.frames for each in self.sources.values())
        if silent > pipeline.options.stall and (
            waiting or all(each.state == "ended" for each in self.sources.values())
        ):
            found["pipeline"] = f"no result for {silent:.0f} s, though frames are there"
        elif not pipeline.figures.anything_came() and not found:
            found["pipeline"] = "no source has delivered a frame yet"
        return found

    def change(self, wanted: object) -> None:
        """Take ``{"min_score": number, "hidden": [class names]}``, either or both, for all viewers.

        It acts on what is shown only, after the pipeline's own filters; a score below what these let
        through becomes theirs. Raises ``SettingsError`` for anything else, and then changes nothing.
        """
        if not isinstance(wanted, Mapping) or not wanted or set(wanted) - {"min_score", "hidden"}:
            raise SettingsError('expected {"min_score": 0.5, "hidden": ["class", ...]}, either or both')
        shown = changed = self.painter.shown
        if "min_score" in wanted:
            score = wanted["min_score"]
            if not is_share(score):
                raise SettingsError("min_score is no score; expected a number from 0 to 1")
            changed = replace(changed, min_score=max(float(score), self._lowest_score))
        if "hidden" in wanted:
            names = wanted["hidden"]
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise SettingsError("hidden is no list of classes; expected their names")
            if unknown := set(names) - set(self._known_classes()):
                raise SettingsError(f"hidden names {len(unknown)} classes that this run does not know")
            changed = replace(changed, hidden=frozenset(names))
        if changed != shown:
            self.painter.show(replace(changed, version=shown.version + 1))
            self.wake()

    def controls(self) -> dict[str, Any]:
        """What is shown, as plain values."""
        shown = self.painter.shown
        return {**asdict(shown), "lowest_score": self._lowest_score, "hidden": sorted(shown.hidden)}

    def status(self) -> bytes:
        """The status as JSON, made once a second for all viewers, and after each change of a control."""
        now, version = time.monotonic(), self.painter.shown.version
        if now - self._made > _KEPT or version != self._version:
            self._made, self._version = now, version
            rates = self._rates.now() if self._rates else {}
            status = {
                "phase": self.phase,
                "problems": self.problems(),
                "seconds": round(now - self._begun, 1),
                "viewers": len(self.viewers),
                "sources": [self._row(each, now, rates[each.name]) for each in self.sources.values()],
                "controls": self.controls(),
                "classes": [{"name": name, "count": n} for name, n in self._known_classes().items()],
            }
            self._status = json_text(status).encode()
        return self._status

    def _known_classes(self) -> dict[str, int]:
        """The classes of the model, and how many detections of each there were."""
        found = Counter(dict.fromkeys(self._names, 0))
        for counts in self.class_counts().values():
            found.update(counts)
        return found

    def _row(self, source: SourceFigures, now: float, rates: tuple[float, float]) -> dict[str, Any]:
        """What the page shows of a source; ages in milliseconds, rates in frames a second."""
        newest = self.newest.get(source.name)
        same = ("name", "state", "detections", "dropped", "reconnects", "stalls")
        return {
            **{key: getattr(source, key) for key in same},
            "fps_in": round(rates[0], 2),
            "fps": round(rates[1], 2),
            "age": {key: round(value, 1) for key, value in source.age.percentiles().items()},
            "frames": source.frames_out,
            "newest_s": None if newest is None else round(now - newest, 3),
        }
