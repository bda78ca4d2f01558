"""Count the objects that cross the middle of the picture, in both directions.

    anchorline demo
    python examples/count_crossings.py demo/model.onnx demo/scene.mp4

Works on any source of ``anchorline detect``, a camera included. An object is followed from frame to
frame by taking the nearest detection of its class; that is enough where objects move less than their
distance between frames.
"""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np

from anchorline.runtime import Detector, Filters, VideoPipeline

REACH = 0.1  # of the picture's width: how far an object may move between two frames
PATIENCE = 10  # frames that an object may be hidden


class LineCounter:
    """Follows the centres of boxes and counts by class and direction where they pass ``line`` (0 to 1)."""

    def __init__(self, line: float = 0.5) -> None:
        self.line, self.counts, self.tracks = line, Counter(), []

    def update(self, detections, width: int, index: int) -> None:
        """Take the detections of frame ``index``, in falling order of score."""
        self.tracks = [track for track in self.tracks if index - track["seen"] <= PATIENCE]
        for box, name in zip(detections.boxes, detections.names, strict=True):
            centre = (box[:2] + box[2:]) / 2 / width
            free = [track for track in self.tracks if track["name"] == name and track["seen"] < index]
            track = min(free, key=lambda each: np.hypot(*(each["at"] - centre)), default=None)
            if track is None or np.hypot(*(track["at"] - centre)) > REACH:
                self.tracks.append({"name": name, "at": centre, "seen": index})
                continue
            if (track["at"][0] < self.line) != (centre[0] < self.line):
                self.counts[name, "right" if centre[0] >= self.line else "left"] += 1
            track.update(at=centre, seen=index)


def count_crossings(detector, source, line: float = 0.5) -> Counter:
    """``{(class, "left" or "right"): crossings}`` over the whole source."""
    counter = LineCounter(line)
    with VideoPipeline(detector, [source], filters=Filters(min_scores={"": 0.5})) as pipeline:
        for result in pipeline:
            counter.update(result.detections, result.frame.shape[1], result.index)
    return counter.counts


if __name__ == "__main__":
    model, source = sys.argv[1:3]
    with Detector(model) as detector:
        for (name, direction), count in sorted(count_crossings(detector, source).items()):
            print(f"{name:12} {direction:6} {count}")
