"""Drawing and encoding the newest result of each watched source, once for all viewers."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.backends.cpu_options import usable_cores
from anchorline.runtime.detections import Detections
from anchorline.runtime.drawing import draw
from anchorline.runtime.video.frames import Result

_log = logging.getLogger("anchorline.live")
_LONGEST_SIDE = 1280  # pixels; a larger frame is scaled down before it is drawn
_QUALITY = 80  # of the JPEG
_MOST_FPS = 30.0  # of each source
# Of the cores' time for drawing, encoding and sending, so that the pipeline keeps its own: where the network
# computes on all cores, each one that is taken from it holds up the others.
_SHARE = 0.03
_SENDING = 0.00015  # seconds for one picture to one viewer
_LONGEST_PAUSE = 1.0  # seconds


@dataclass(frozen=True)
class Shown:
    """Detections from ``min_score`` on whose class is not ``hidden``. ``version`` rises with each change."""

    min_score: float = 0.5
    hidden: frozenset[str] = frozenset()
    version: int = 0

    def __call__(self, detections: Detections) -> Detections:
        """The detections to draw."""
        kept = detections.scores >= self.min_score
        if self.hidden:
            kept &= np.array([name not in self.hidden for name in detections.names], bool)
        return detections[kept]


class Painter(threading.Thread):
    """A thread that paints; ``offer`` only lays a result down, whoever is behind.

    A newer result takes the place of one that was not painted yet, so a slow painter shows fewer
    pictures and never old ones. Sources that nobody watches are not painted. ``painted`` is called,
    from the thread, whenever there is a new picture.
    """

    def __init__(self, painted: Callable[[], object]) -> None:
        super().__init__(name="anchorline live painter", daemon=True)
        self.shown = self.initial = Shown()  # initial: as the pipeline draws its own copies
        self.pictures: dict[str, bytes] = {}  # the newest JPEG of each watched source
        self.count = 0
        self._painted = painted
        self._changed = threading.Condition()
        self._newest: dict[str, Result] = {}
        self._fresh: set[str] = set()  # sources whose newest result is not painted
        self._watched: Counter[str | None] = Counter()  # how many viewers look at a source; None: at all
        self._last: dict[str, float] = {}  # when each was painted
        self._failed: set[str] = set()
        self._ended = False

    def stop(self) -> None:
        """End, and wait for it."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self.join()

    def offer(self, result: Result) -> None:
        """This is the newest result of its source."""
        with self._changed:
            self._newest[result.source] = result
            self._fresh.add(result.source)
            if self._viewers(result.source):
                self._changed.notify()
            else:
                self.pictures.pop(result.source, None)  # or the next viewer would see an old one first

    def watch(self, source: str | None, more: int = 1) -> None:
        """So many viewers more (or fewer, below 0) look at this source, or at all of them (``None``)."""
        with self._changed:
            self._watched[source] += more
            self._changed.notify()

    def _viewers(self, source: str) -> int:
        return self._watched[source] + self._watched[None]

    def show(self, shown: Shown) -> None:
        """Paint these detections only, from the newest results on."""
        with self._changed:
            self.shown = shown
            self._fresh.update(self._newest)
            self._changed.notify()

    def run(self) -> None:
        """The thread's work, until ``stop``."""
        share = _SHARE * usable_cores()
        while (result := self._take()) is not None:
            source, begun, used = result.source, time.monotonic(), time.thread_time()
            try:
                jpeg = self._paint(result)
            except Exception:  # one source that cannot be drawn is no reason to leave the others
                if source not in self._failed:
                    _log.exception("%s: its frames cannot be shown", source)
                self._failed.add(source)
            else:
                self.count += 1
                self.pictures[source] = jpeg
                self._painted()
            self._last[source] = begun
            with self._changed:
                used = time.thread_time() - used + _SENDING * self._viewers(source)
                sources = sum(self._viewers(each) > 0 for each in self._newest)
            interval = 1.0 / (_MOST_FPS * max(sources, 1))
            pause = max(interval, min(used / share, _LONGEST_PAUSE))
            time.sleep(max(0.0, begun + pause - time.monotonic()))

    def _take(self) -> Result | None:
        """Of the watched sources with something new the one that has waited longest; ``None`` at the end."""
        with self._changed:
            while not self._ended:
                if due := [source for source in self._fresh if self._viewers(source) > 0]:
                    source = min(due, key=lambda each: self._last.get(each, 0.0))
                    self._fresh.remove(source)
                    return self._newest[source]
                self._changed.wait()
            return None

    def _paint(self, result: Result) -> bytes:
        shown = self.shown
        if shown is self.initial and result.annotated is not None:
            picture = _fitted(result.annotated)[0]  # drawn already, for a file
        else:
            frame, scale = _fitted(result.frame)
            kept, trails = shown(result.detections), result.trails
            if scale != 1.0:
                kept = replace(kept, boxes=kept.boxes * scale)
                trails = {number: points * scale for number, points in trails.items()}
            picture = draw(frame, kept, trails=trails)
        encoded, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
        if not encoded:
            raise ValueError(f"a frame of shape {list(picture.shape)} cannot be encoded as JPEG")
        return jpeg.tobytes()


def _fitted(frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
    """The frame, or a smaller copy where it is too large, and its scale."""
    height, width = frame.shape[:2]
    scale = _LONGEST_SIDE / max(height, width)
    if scale >= 1.0:
        return frame, 1.0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8), scale
