"""What travels through the pipeline: a frame, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import Detections
from anchorline.runtime.drawing import draw


@dataclass(frozen=True, eq=False)
class Stream:
    """One opening of a source: a file, or one connection to a camera with one size of picture.

    ``origin`` is what the JSON lines call it: the file's path, or the source's name. ``size`` is the
    frames' (height, width), ``fps`` the rate that the stream states, over the stride, ``target`` where
    its annotated copy goes.
    """

    source: str
    origin: str
    size: tuple[int, int]
    fps: float
    is_video: bool = True
    is_live: bool = False
    target: Path | None = None


@dataclass(eq=False)
class Result:
    """A frame on its way through the pipeline, and what was found in it.

    ``frame`` is uint8 BGR [H, W, 3]. ``index`` counts the frames of the source from 0, those that are
    skipped or dropped included; ``time_s`` is the place in the file, or the seconds since a live source's
    first frame; ``captured`` is ``time.monotonic()`` when the frame was there. ``times`` holds the seconds
    of each stage so far: ``decode`` includes the wait for a camera, those of the network are of the whole
    batch the frame was in. ``age`` is the seconds from capture to the caller, or in a callback and a sink
    until then. ``annotated`` is the drawn copy where a sink asked for one, ``trails`` where the tracked
    objects in the frame have been of late, (x, y) float32 [K, 2] by track id, where trails are drawn.
    """

    frame: NDArray[np.uint8]
    detections: Detections
    stream: Stream
    index: int
    time_s: float
    captured: float
    times: dict[str, float] = field(default_factory=dict)
    age: float = 0.0
    annotated: NDArray[np.uint8] | None = None
    trails: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The name of the source."""
        return self.stream.source

    def draw(self, shown_score: float = 0.5) -> NDArray[np.uint8]:
        """A copy of the frame with the detections of at least ``shown_score``."""
        return draw(self.frame, self.detections[self.detections.scores >= shown_score], trails=self.trails)
