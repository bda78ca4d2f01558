"""Tracks of all sources of a pipeline: each has its own, and learns of gaps, seeks and new scenes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import NO_TRACK, Detections
from anchorline.runtime.tracking import ObjectTracker
from anchorline.runtime.video.frames import Result, Stream
from anchorline.runtime.video.options import TrackOptions
from anchorline.runtime.video.source import Source

_STILLS_FPS = 25.0  # the pictures of a folder are taken as the frames of a video of this rate
_SUDDEN = 4.0  # a gap this many times as long as the one before is no slow model
_TRAIL_SECONDS = 2.0
_LONGEST_TRAIL = 100  # points

Trails = dict[int, NDArray[np.float32]]


class Following:
    """Gives each result's detections their track ids, and its trails where these are wanted.

    Of one source's results ``follow`` is called with one after the other, in the order of its frames.
    """

    def __init__(self, sources: Sequence[Source], options: TrackOptions, trails: bool) -> None:
        self._sources = {source.name: _SourceTracks(source, options, trails) for source in sources}

    def follow(self, result: Result) -> None:
        """Set the result's track ids and trails."""
        self._sources[result.source].follow(result)


class _SourceTracks:
    """The tracks of one source. They end where another file or connection begins, the picture's size
    changes, the frames go back, or time has passed in which nothing was seen."""

    def __init__(self, source: Source, options: TrackOptions, trails: bool) -> None:
        self._stride = source.stride
        # Unless it is live, what the caller's own code delivers is timed by when it was asked for it.
        self._is_timed = bool(source.live) or isinstance(source.where, str | int | Path)
        self._lost = options.lost_seconds
        self._tracker = ObjectTracker(options=options)
        self._trails = _TrailKeeper(options.lost_seconds) if trails else None
        self._stream: Stream | None = None
        self._index, self._time_s = -1, 0.0
        self._gap = math.inf  # seconds between the last two frames

    def follow(self, result: Result) -> None:
        """Take the next frame of the source."""
        rate = result.stream.fps if result.stream.is_video else _STILLS_FPS
        if self._breaks_off(result):
            self._tracker.reset(rate)
            self._gap, frames = math.inf, 1.0
        else:
            self._gap = result.time_s - self._time_s
            frames = (result.index - self._index) / self._stride if result.stream.is_video else 1.0
        self._stream, self._index, self._time_s = result.stream, result.index, result.time_s
        result.detections = self._tracker.update(result.detections, frames)
        if self._trails is not None:
            result.trails = self._trails.extend(result.detections, frames / rate)

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


class _TrailKeeper:
    """Where the centres of tracked boxes have been of late."""

    def __init__(self, lost_seconds: float) -> None:
        self._lost = lost_seconds
        self._clock = 0.0
        self._points: dict[int, deque[tuple[float, float, float]]] = {}  # time, x, y

    def extend(self, detections: Detections, seconds: float) -> Trails:
        """Note where tracks are, ``seconds`` after the call before; their trails, the newest point last."""
        self._clock += seconds
        assert detections.track_ids is not None
        centres = (detections.boxes[:, :2] + detections.boxes[:, 2:]) / 2
        numbers = [number for number in detections.track_ids.tolist() if number != NO_TRACK]
        for number, (x, y) in zip(detections.track_ids.tolist(), centres.tolist(), strict=True):
            if number != NO_TRACK:
                points = self._points.setdefault(number, deque(maxlen=_LONGEST_TRAIL))
                points.append((self._clock, x, y))
                while points[0][0] < self._clock - _TRAIL_SECONDS:
                    points.popleft()
        kept = {
            number: points
            for number, points in self._points.items()
            if self._clock - points[-1][0] <= self._lost
        }
        self._points = kept
        return {number: np.array([point[1:] for point in kept[number]], np.float32) for number in numbers}
