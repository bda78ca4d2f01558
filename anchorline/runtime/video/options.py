"""The settings of a pipeline, checked: how it runs, what is kept, what it needs of a detector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.tracking import TrackOptions, check_tracking
from anchorline.runtime.video.frames import Result
from anchorline.runtime.video.intake import Intake
from anchorline.runtime.video.paths import check_outputs
from anchorline.runtime.video.readers import check_decoder
from anchorline.runtime.video.sinks import AnnotatedFiles, Callback, JsonLines, Sink, is_stdout
from anchorline.runtime.video.source import Decoder, Source
from anchorline.runtime.video.tracks import Following


class FrameDetector(Protocol):
    """What the pipeline calls: ``Detector``, or anything of its shape.

    ``timings``, where there, holds the seconds of this thread's last ``batch`` by stage; ``contract``
    gives the class names and the largest batch; ``provider`` and ``precision`` go to the summary;
    ``concurrent_calls`` is how many threads may usefully call ``batch`` at once (1 where not there).
    """

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]: ...


# Which of the detections are kept: classes, scores, regions, how many.


Polygon = tuple[tuple[float, float], ...]
_MIN_CORNERS = 3


@dataclass(frozen=True)
class Filters:
    """What to keep of a detector's results. A context-free function of one frame's detections.

    ``classes`` are the names to keep (empty: all). ``min_scores`` maps class names to the lowest
    score; the key ``""`` is for every class that is not named. A detection is kept when the centre of
    its box lies in one of the ``regions`` (empty: anywhere), polygons of (x, y) as fractions of the
    frame's width and height from 0 to 1, so that one region fits every size of picture. Then the
    ``max_detections`` of highest score are kept.
    """

    classes: tuple[str, ...] = ()
    min_scores: Mapping[str, float] = field(default_factory=dict)
    regions: tuple[Polygon, ...] = ()
    max_detections: int | None = None

    def __post_init__(self) -> None:
        for name, score in self.min_scores.items():
            if not 0.0 <= score <= 1.0:
                raise SettingsError(
                    f"the lowest score{f' of {name}' if name else ''} is {score!r}; expected 0 to 1"
                )
        for region in self.regions:
            inside = all(0.0 <= value <= 1.0 for corner in region for value in corner)
            if len(region) < _MIN_CORNERS or not inside:
                raise SettingsError(
                    f"region {region!r}; expected at least three corners (x, y) as fractions from 0 to 1"
                )
        if self.max_detections is not None and self.max_detections < 1:
            raise SettingsError(f"max_detections is {self.max_detections!r}; expected at least 1")

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ``SettingsError`` for a class that a model with these class names does not know."""
        for name in (*self.classes, *self.min_scores):
            if name and names and name not in names:
                raise SettingsError(f"the model knows no class {name!r}; it knows {', '.join(names)}")

    def __call__(self, detections: Detections, size: tuple[int, int]) -> Detections:
        """The detections to keep, in their order; ``size`` is the frame's (height, width)."""
        kept = np.ones(len(detections), bool)
        if self.classes:
            kept &= np.array([name in self.classes for name in detections.names], bool)
        if self.min_scores:
            general = self.min_scores.get("", 0.0)
            lowest = [self.min_scores.get(name, general) for name in detections.names]
            kept &= detections.scores >= np.array(lowest, np.float32)
        if self.regions:
            kept &= _in_regions(detections.boxes, self.regions, size)
        if self.max_detections is not None and kept.sum() > self.max_detections:
            order = np.argsort(-np.where(kept, detections.scores, -np.inf), kind="stable")
            kept[order[self.max_detections :]] = False
        return detections if kept.all() else detections[kept]


def _in_regions(
    boxes: NDArray[np.float32], regions: Sequence[Polygon], size: tuple[int, int]
) -> NDArray[np.bool_]:
    height, width = size
    corners = [np.array(region, np.float32) * np.array([width, height], np.float32) for region in regions]
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2).tolist()
    return np.array(
        [any(cv2.pointPolygonTest(area, (x, y), False) >= 0 for area in corners) for x, y in centres], bool
    )


def parse_filters(
    classes: Iterable[str] | None,
    min_score: Iterable[str] | None,
    region: Iterable[str] | None,
    max_detections: int | None,
) -> Filters:
    """The filters as the command line writes them. Raises ``SettingsError``."""
    return Filters(
        classes=tuple(classes or ()),
        min_scores=parse_min_scores(min_score or ()),
        regions=tuple(parse_region(each) for each in region or ()),
        max_detections=max_detections,
    )


def parse_min_scores(texts: Iterable[str]) -> dict[str, float]:
    """``["0.3", "person=0.6"]`` as ``{"": 0.3, "person": 0.6}``; else ``SettingsError``."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        found[name.strip()] = _number(number, f"the lowest score {text!r}; expected 0.5 or CLASS=0.5")
    return found


def parse_region(text: str) -> Polygon:
    """``"0,0.5 1,0.5 1,1 0,1"`` as a polygon; four numbers ``"x1,y1,x2,y2"`` are a rectangle."""
    complaint = f"region {text!r}; expected fractions of the frame, x1,y1,x2,y2 or x,y x,y x,y ..."
    corners = [[_number(part, complaint) for part in corner.split(",")] for corner in text.split()]
    if len(corners) == 1 and len(corners[0]) == 4:
        x1, y1, x2, y2 = corners[0]
        return ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
    if len(corners) < _MIN_CORNERS or any(len(corner) != 2 for corner in corners):
        raise SettingsError(complaint)
    return tuple((x, y) for x, y in corners)


def _number(text: str, complaint: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise SettingsError(complaint) from None
    if not math.isfinite(value):
        raise SettingsError(complaint)
    return value


# The settings of a pipeline, checked, and what follows from them.


@dataclass(frozen=True)
class PipelineSettings:
    """See ``VideoPipeline``. Raises ``SettingsError`` for a value that cannot be used."""

    batch: int | None = None
    max_wait: float = 0.01
    workers: int | None = None
    filters: Filters = field(default_factory=Filters)
    save: str | Path | None = None
    jsonl: str | Path | None = None
    sinks: Sequence[Sink] = ()
    callback: Callable[[Result], object] | None = None
    shown_score: float = 0.5
    decoder: Decoder = "opencv"
    stall: float = 10.0
    patience: float = 20.0
    track: bool | TrackOptions = False
    trails: bool = False

    def __post_init__(self) -> None:
        check_decoder(self.decoder)
        _check_seconds("max_wait", self.max_wait, 0.0)
        _check_seconds("stall", self.stall, 0.1)
        _check_seconds("patience", self.patience, 0.0)
        _check_score(self.shown_score)
        _check_count("batch", self.batch)
        _check_count("workers", self.workers)
        self._check_tracking()

    def _check_tracking(self) -> None:
        if not isinstance(self.track, bool | TrackOptions):
            raise SettingsError(f"track is {self.track!r}; expected True, False or TrackOptions")
        if self.track:
            check_tracking()
        elif self.trails:
            raise SettingsError("trails are those of tracks; turn tracking on as well (track=True, --track)")

    def following(self, sources: Sequence[Source]) -> Following | None:
        """What gives the detections their track ids, where that is wanted."""
        if not self.track:
            return None
        options = self.track if isinstance(self.track, TrackOptions) else TrackOptions()
        return Following(sources, options, self.trails)

    def workers_for(self, sources: Sequence[Source], detector: object) -> int:
        """How many threads call the detector: one, unless it says that more are of use."""
        if self.workers is not None:
            return self.workers
        return getattr(detector, "concurrent_calls", 1) if _all_wait(sources) else 1

    def intake_for(self, sources: Sequence[Source], detector: object, workers: int) -> Intake:
        """The queues of these sources, for batches that the detector takes."""
        largest = getattr(getattr(detector, "contract", None), "max_batch", None)
        batch = self.batch or min(len(sources), largest or len(sources))
        if largest is not None and batch > largest:
            raise SettingsError(f"batch is {batch}, but the model takes at most {largest} frames at once")
        # One batch in each worker, and one that is drawn, written and handed out each; live frames
        # that wait in between would only get older.
        under_way = batch * (workers + (3 if _all_wait(sources) else 2))
        return Intake([source.chosen_policy for source in sources], batch, self.max_wait, under_way)

    def open_sinks(self, sources: Sequence[Source]) -> list[Sink]:
        """All sinks, opened only when the pipeline starts, so that a mistake before leaves no file."""
        opened: list[Sink] = [] if self.jsonl is None else [JsonLines(self.jsonl)]
        if self.save is not None:
            opened.append(AnnotatedFiles(_targets(sources)))
        opened += self.sinks
        if self.callback is not None:
            opened.append(Callback(self.callback))
        return opened


def _all_wait(sources: Sequence[Source]) -> bool:
    return all(source.chosen_policy == "wait" for source in sources)


def _targets(sources: Sequence[Source]) -> list[Path]:
    """Where the copies of all sources go."""
    places = [source.target for source in sources]
    places += [item.target for source in sources for item in source.items]
    return [place for place in places if place is not None]


def check_outputs_of(
    sources: Sequence[Source], jsonl: str | Path | None, report: str | Path | None = None
) -> None:
    """Raise ``SettingsError`` where lines or report would overwrite a source, a copy, or each other."""
    read = [item.path for source in sources for item in source.items]
    check_files([jsonl, report], [*read, *_targets(sources)])


def check_files(outputs: Iterable[str | Path | None], kept: Iterable[str | Path]) -> None:
    """``sources.check_outputs`` where an output may be stdout."""
    check_outputs([None if is_stdout(output) else output for output in outputs], kept)


def _check_score(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise SettingsError(f"shown_score is {value!r}; expected a number from 0 to 1")


def _check_seconds(name: str, value: float, lowest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value < float("inf"):
        raise SettingsError(f"{name} is {value!r}; expected seconds from {lowest:g}")


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise SettingsError(f"{name} is {value!r}; expected a whole number of at least 1")
