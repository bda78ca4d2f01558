"""Following objects from frame to frame with ByteTrack of the package ``trackers``.

Zhang et al., "ByteTrack: Multi-Object Tracking by Associating Every Detection Box", ECCV 2022: a Kalman
filter predicts each track's box, strong detections are assigned to tracks by overlap first, then weak
ones to the tracks that are left, which holds an object through an occlusion.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import NO_TRACK, Detections
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.options import TrackOptions, is_number

if TYPE_CHECKING:
    import supervision

_MIN_MISSES = 3  # frames that may lack an object before its track ends, however far apart they are
_PACKAGE_RATE = 30.0  # frames a second in which the package counts how long a track is kept
_REMEDY = "pip install 'anchorline[track]' && pip install --no-deps 'trackers>=2.6'"


def check_tracking() -> None:
    """Raise ``SettingsError`` where the package ``trackers`` is missing or too old."""
    _byte_track()


def _byte_track() -> Any:
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
        self._make = _byte_track()
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
        self._trackers: dict[int | None, Any] = {}
        self._numbers: dict[Hashable, tuple[int, float]] = {}  # our id and the last time by the package's

    def update(self, detections: Detections, frames: float = 1.0) -> Detections:
        """The same detections in the same order, with track ids; -1 where a detection is no part of one.

        ``frames`` is how far this frame lies from the one before: more than 1 where some were dropped.
        """
        if not frames > 0:
            raise SettingsError(f"frames is {frames!r}; expected the step from the frame before, above 0")
        lost = self.options.lost_seconds
        self._clock += min(frames / self._fps, lost / _MIN_MISSES)
        found = np.full(len(detections), NO_TRACK, np.int64)
        usable = detections.scores >= self.options.low_score
        labels = detections.labels if self.options.by_class else np.zeros(len(detections), np.int64)
        for label in sorted({*labels[usable].tolist(), *self._trackers}):
            rows = np.flatnonzero(usable & (labels == label))
            self._update_class(label, detections, rows, found)
        self._numbers = {
            key: held for key, held in self._numbers.items() if self._clock - held[1] <= 2 * lost
        }
        return replace(detections, track_ids=found)

    def _update_class(
        self, label: int, detections: Detections, rows: NDArray[np.int64], found: NDArray[np.int64]
    ) -> None:
        """Give the detections at ``rows`` to the class's tracker and note their ids in ``found``."""
        tracker = self._trackers.get(label)
        if tracker is None:
            tracker = self._trackers[label] = self._new_tracker()
        tracked = tracker.update(_for_package(detections, rows), timestamp=self._clock)
        if len(tracked) == 0:
            return
        for row, number in zip(tracked.data["row"].tolist(), tracked.tracker_id.tolist(), strict=True):
            if number != NO_TRACK:
                found[row] = self._number((label, number))

    def _new_tracker(self) -> Any:
        options = self.options
        return self._make(
            lost_track_buffer=math.ceil(options.lost_seconds * _PACKAGE_RATE),
            frame_rate=self._fps,
            track_activation_threshold=options.new_score,
            high_conf_det_threshold=options.new_score,
            minimum_iou_threshold=options.min_iou,
        )

    def _number(self, key: Hashable) -> int:
        """Our id of a track, which the package counts from 0 in each class."""
        number, _ = self._numbers.get(key, (self._given + 1, 0.0))
        self._given = max(self._given, number)
        self._numbers[key] = number, self._clock
        return number


def _for_package(detections: Detections, rows: NDArray[np.int64]) -> supervision.Detections:
    import supervision

    return supervision.Detections(
        xyxy=detections.boxes[rows], confidence=detections.scores[rows], data={"row": rows}
    )
