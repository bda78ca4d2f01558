"""Count the objects that cross the middle of the picture, by direction, and time their stay in a zone.

    anchorline demo
    python examples/count_crossings.py demo/model.onnx demo/scene.mp4

Works on any source of ``anchorline detect``, a camera included. Needs tracking (docs/video.md) and
``pip install 'anchorline[supervision]'``.
"""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import supervision as sv

from anchorline.runtime import DetectOptions, Detector, Filters, VideoPipeline

MIDDLE = ((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75))


class SceneCounter:
    """What crosses a vertical line, and who stays how long in a zone, both in fractions of the picture.

    ``crossings`` is ``{(class, "left" or "right"): objects}``, ``dwell`` ``{(class, track id): seconds}``.
    """

    def __init__(self, size: tuple[int, int], line: float = 0.5, zone=MIDDLE) -> None:
        height, width = size
        corners = np.rint(np.array(zone) * (width, height)).astype(np.int64)
        self._zone = sv.PolygonZone(corners, triggering_anchors=[sv.Position.CENTER])
        self._line = line * width
        self._on_right: dict[int, bool] = {}  # where each object was seen last
        self._inside: dict[int, float] = {}  # when each object that is in the zone was seen last
        self.crossings, self.dwell = Counter(), Counter()

    def update(self, detections, time_s: float) -> None:
        """Take the tracked detections of the frame at ``time_s``."""
        found = detections[detections.track_ids >= 0]
        # supervision's LineZone forgets the side of a track that is hidden for two frames; this does not.
        on_right = (found.boxes[:, 0] + found.boxes[:, 2]) / 2 >= self._line
        inside = self._zone.trigger(found.to_supervision())
        for name, number, is_right, is_inside in zip(
            found.names, found.track_ids.tolist(), on_right.tolist(), inside.tolist(), strict=True
        ):
            if self._on_right.get(number, is_right) != is_right:
                self.crossings[name, "right" if is_right else "left"] += 1
            self._on_right[number] = is_right
            before = self._inside.pop(number, time_s)
            if is_inside:
                self.dwell[name, number] += time_s - before
                self._inside[number] = time_s


def watch(detector, source, line: float = 0.5, zone=MIDDLE) -> SceneCounter:
    """Count over the whole source."""
    counter = None
    filters = Filters(min_scores={"": 0.5})
    with VideoPipeline(detector, [source], DetectOptions(filters=filters, track=True)) as pipeline:
        for result in pipeline:
            counter = counter or SceneCounter(result.frame.shape[:2], line, zone)
            counter.update(result.detections, result.time_s)
    return counter


if __name__ == "__main__":
    model, source = sys.argv[1:3]
    with Detector(model) as detector:
        counter = watch(detector, source)
    for (name, direction), count in sorted(counter.crossings.items()):
        print(f"{name:12} {direction:6} {count}")
    for (name, number), seconds in sorted(counter.dwell.items()):
        print(f"{name:12} #{number:<5} {seconds:.1f} s in the zone")
