"""Drawing and encoding the newest result of each watched source, once for all viewers."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.backends.cpu_options import usable_cores
from anchorline.runtime.drawing import draw
from anchorline.runtime.video.frames import Result
from anchorline.serving.controls import Controls

_log = logging.getLogger("anchorline.live")
_LONGEST_SIDE = 1280  # pixels; a larger frame is scaled down before it is drawn
_QUALITY = 80  # of the JPEG
_MOST_FPS = 30.0  # of each source
# Of the cores' time for drawing, encoding and sending, so that the pipeline keeps its own: where the network
# computes on all cores, each one that is taken from it holds up the others.
_SHARE = 0.03
_SENDING = 0.00015  # seconds for one picture to one viewer
_LONGEST_PAUSE = 1.0  # seconds


@dataclass(frozen=True, eq=False)
class Picture:
    """An encoded frame. ``number`` rises with each one, over all sources; ``captured`` is the frame's."""

    number: int
    jpeg: bytes
    index: int
    captured: float


class Painter:
    """One thread that paints; ``offer`` only lays a result down, whoever is behind.

    A newer result takes the place of one that was not painted yet, so a slow painter shows fewer
    pictures and never old ones. Sources that nobody watches are not painted. ``painted`` is called,
    from the thread, whenever there is a new picture.
    """

    def __init__(self, controls: Controls, painted: Callable[[], object]) -> None:
        self._controls, self._painted = controls, painted
        self._changed = threading.Condition()
        self._newest: dict[str, Result] = {}
        self._fresh: set[str] = set()  # sources whose newest result is not painted
        self._watched: Counter[str] = Counter()
        self._last: dict[str, float] = {}  # when each was painted
        self._failed: set[str] = set()
        self._ended = False
        self._share = _SHARE * usable_cores()
        self._interval = 1.0 / _MOST_FPS  # between any two pictures
        self._thread = threading.Thread(target=self._run, name="anchorline live painter", daemon=True)
        self.pictures: dict[str, Picture] = {}
        self.count = 0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for it."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def offer(self, result: Result) -> None:
        """This is the newest result of its source."""
        with self._changed:
            self._newest[result.source] = result
            self._fresh.add(result.source)
            if self._watched[result.source]:
                self._changed.notify()
            else:
                self.pictures.pop(result.source, None)  # or the next viewer would see an old one first

    def watch(self, sources: Iterable[str]) -> None:
        """One viewer more looks at these."""
        with self._changed:
            self._watched.update(sources)
            self._changed.notify()

    def unwatch(self, sources: Iterable[str]) -> None:
        """One viewer less looks at these."""
        with self._changed:
            self._watched.subtract(sources)

    def repaint(self) -> None:
        """Something other than the frames has changed."""
        with self._changed:
            self._fresh.update(self._newest)
            self._changed.notify()

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            source, result = taken
            begun, used = time.monotonic(), time.thread_time()
            try:
                jpeg = self._paint(result)
            except Exception:  # one source that cannot be drawn is no reason to leave the others
                if source not in self._failed:
                    _log.exception("%s: its frames cannot be shown", source)
                self._failed.add(source)
                jpeg = None
            self._last[source] = begun
            if jpeg is not None:
                self.count += 1
                self.pictures[source] = Picture(self.count, jpeg, result.index, result.captured)
                self._painted()
            self._rest(begun, time.thread_time() - used + _SENDING * self._watched[source])

    def _take(self) -> tuple[str, Result] | None:
        """Of the watched sources with something new the one that has waited longest; ``None`` at the end."""
        with self._changed:
            while not self._ended:
                due = [source for source in self._fresh if self._watched[source] > 0]
                if due:
                    self._interval = 1.0 / (_MOST_FPS * sum(each > 0 for each in self._watched.values()))
                    source = min(due, key=lambda each: self._last.get(each, 0.0))
                    self._fresh.discard(source)
                    return source, self._newest[source]
                self._changed.wait()
            return None

    def _paint(self, result: Result) -> bytes:
        shown = self._controls.shown
        if shown is self._controls.initial and result.annotated is not None:
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

    def _rest(self, begun: float, used: float) -> None:
        """Wait until the next picture fits the rate and the share of the processors."""
        pause = max(self._interval, min(used / self._share, _LONGEST_PAUSE))
        left = begun + pause - time.monotonic()
        if left > 0:
            time.sleep(left)


def _fitted(frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
    """The frame, or a smaller copy where it is too large, and its scale."""
    height, width = frame.shape[:2]
    scale = _LONGEST_SIDE / max(height, width)
    if scale >= 1.0:
        return frame, 1.0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8), scale
