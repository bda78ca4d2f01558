"""Objects followed from frame to frame with ByteTrack of the package ``trackers``.

Zhang et al., "ByteTrack: Multi-Object Tracking by Associating Every Detection Box", ECCV 2022: a Kalman
filter predicts each track's box, strong detections are assigned to tracks by overlap first, then weak
ones to the tracks that are left, which holds an object through an occlusion.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import NO_TRACK, Detections
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.frames import Result, Stream
from anchorline.runtime.video.options import TrackOptions, is_number
from anchorline.runtime.video.source import Source

_MIN_MISSES = 3  # frames that may lack an object before its track ends, however far apart they are
_PACKAGE_RATE = 30.0  # frames a second in which the package counts how long a track is kept
_STILLS_FPS = 25.0  # the pictures of a folder are taken as the frames of a video of this rate
_SUDDEN = 4.0  # a gap this many times as long as the one before is no slow model
_TRAIL_SECONDS = 2.0
_LONGEST_TRAIL = 100  # points
_REMEDY = "pip install 'anchorline[track]' && pip install --no-deps 'trackers>=2.6'"


def import_byte_track() -> Any:
    """The package's tracker. Raises ``SettingsError`` where ``trackers`` is missing or too old."""
    try:
        from trackers import ByteTrackTracker
    except ImportError as error:
        raise SettingsError(f"tracking needs the package trackers ({error}); {_REMEDY}") from error
    if "timestamp" not in inspect.signature(ByteTrackTracker.update).parameters:
        raise SettingsError(f"the package trackers is too old to be told of dropped frames; {_REMEDY}")
    return ByteTrackTracker


class ObjectTracker:
    """The tracks of one video or camera. Not for several threads at once.

    >>> tracker = ObjectTracker(fps=25.0)
    >>> detections = tracker.update(detector(frame))
    >>> detections.track_ids

    Ids count from 1 and are never given twice, ``reset`` or not.
    """

    def __init__(self, fps: float = 25.0, options: TrackOptions | None = None) -> None:
        """``fps`` is the rate of the frames that ``update`` counts. Raises ``SettingsError``."""
        self.options = options or TrackOptions()
        self._make = import_byte_track()
        self._given = 0
        self._fps = 0.0
        self.reset(fps)

    def reset(self, fps: float | None = None) -> None:
        """Forget all tracks: another scene begins, at another rate where one is given."""
        if fps is not None:
            if not is_number(fps) or not 0.0 < fps < math.inf:
                raise SettingsError(f"fps is {fps!r}; expected frames a second above 0")
            self._fps = float(fps)
        self._clock = 0.0
        self._trackers: dict[int, Any] = {}  # by class
        # Our id of a track, which the package counts from 0 in each class, and its last time.
        self._numbers: dict[tuple[int, int], tuple[int, float]] = {}

    def update(self, detections: Detections, frames: float = 1.0) -> Detections:
        """The same detections in the same order, with track ids; -1 where a detection is no part of one.

        ``frames`` is how far this frame lies from the one before: more than 1 where some were dropped.
        """
        import supervision

        if not frames > 0:
            raise SettingsError(f"frames is {frames!r}; expected the step from the frame before, above 0")
        lost = self.options.lost_seconds
        self._clock += min(frames / self._fps, lost / _MIN_MISSES)
        found = np.full(len(detections), NO_TRACK, np.int64)
        usable = detections.scores >= self.options.low_score
        labels = detections.labels if self.options.by_class else np.zeros(len(detections), np.int64)
        for label in sorted({*labels[usable].tolist(), *self._trackers}):
            rows = np.flatnonzero(usable & (labels == label))
            given = supervision.Detections(
                xyxy=detections.boxes[rows], confidence=detections.scores[rows], data={"row": rows}
            )
            tracked = self._tracker_of(label).update(given, timestamp=self._clock)
            if len(tracked) == 0:
                continue
            for row, number in zip(tracked.data["row"].tolist(), tracked.tracker_id.tolist(), strict=True):
                if number != NO_TRACK:
                    ours, _ = self._numbers.get((label, number), (self._given + 1, 0.0))
                    self._given = max(self._given, ours)
                    self._numbers[label, number] = ours, self._clock
                    found[row] = ours
        self._numbers = {
            key: held for key, held in self._numbers.items() if self._clock - held[1] <= 2 * lost
        }
        return replace(detections, track_ids=found)

    def _tracker_of(self, label: int) -> Any:
        if label not in self._trackers:
            options = self.options
            self._trackers[label] = self._make(
                lost_track_buffer=math.ceil(options.lost_seconds * _PACKAGE_RATE),
                frame_rate=self._fps,
                track_activation_threshold=options.new_score,
                high_conf_det_threshold=options.new_score,
                minimum_iou_threshold=options.min_iou,
            )
        return self._trackers[label]


class Tracks:
    """The tracks of one source in a pipeline. They end where another file or connection begins, the picture's
    size changes, the frames go back, or time has passed in which nothing was seen."""

    def __init__(self, source: Source, options: TrackOptions, trails: bool) -> None:
        self._stride = source.stride
        # Unless it is live, what the caller's own code delivers is timed by when it was asked for it.
        self._is_timed = bool(source.live) or isinstance(source.where, str | int | Path)
        self._lost = options.lost_seconds
        self._tracker = ObjectTracker(options=options)
        self._with_trails = trails
        self._stream: Stream | None = None
        self._index, self._time_s = -1, 0.0
        self._gap = math.inf  # seconds between the last two frames
        self._clock = 0.0
        self._points: dict[int, deque[tuple[float, float, float]]] = {}  # time, x, y by track id

    def follow(self, result: Result) -> None:
        """Set the track ids and trails of the source's next frame."""
        rate = result.stream.fps if result.stream.is_video else _STILLS_FPS
        frames = 1.0
        if self._breaks_off(result):
            self._tracker.reset(rate)
            self._gap = math.inf
        else:
            self._gap = result.time_s - self._time_s
            if result.stream.is_video:
                frames = (result.index - self._index) / self._stride
        self._stream, self._index, self._time_s = result.stream, result.index, result.time_s
        result.detections = self._tracker.update(result.detections, frames)
        if self._with_trails:
            self._clock += frames / rate
            result.trails = self._trails(result.detections)

    def _breaks_off(self, result: Result) -> bool:
        """Whether nothing of the frame before can be found in this one again."""
        before, stream = self._stream, result.stream
        if before is None or before.size != stream.size:
            return True
        if not before.is_video and not stream.is_video:
            return False
        if before is not stream or result.index <= self._index:
            return True
        # A slow model's frames lie far apart as well, but evenly, and there the tracks go on.
        gap = result.time_s - self._time_s
        return self._is_timed and gap > max(self._lost, _SUDDEN * self._gap)

    def _trails(self, detections: Detections) -> dict[int, NDArray[np.float32]]:
        """Where the centres of the boxes tracked now have been of late, the newest point last."""
        assert detections.track_ids is not None
        centres = (detections.boxes[:, :2] + detections.boxes[:, 2:]) / 2
        seen = []
        for number, (x, y) in zip(detections.track_ids.tolist(), centres.tolist(), strict=True):
            if number != NO_TRACK:
                seen.append(number)
                points = self._points.setdefault(number, deque(maxlen=_LONGEST_TRAIL))
                points.append((self._clock, x, y))
                while points[0][0] < self._clock - _TRAIL_SECONDS:
                    points.popleft()
        self._points = {
            number: points
            for number, points in self._points.items()
            if self._clock - points[-1][0] <= self._lost
        }
        return {number: np.array([xy for _, *xy in self._points[number]], np.float32) for number in seen}
