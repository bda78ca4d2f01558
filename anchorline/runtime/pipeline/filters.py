"""Which of the detections are kept: classes, scores, regions, how many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import Detections
from anchorline.runtime.errors import SettingsError

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
