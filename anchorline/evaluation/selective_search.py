"""Proposals without learning: selective search (Uijlings et al., 2013), as Fast R-CNN trained on.

It is OpenCV's, which only the contrib build has.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import Detections
from anchorline.runtime.errors import SettingsError
from anchorline.runtime.postprocess import PROPOSAL_NAMES

LEAST_SIDE = 2  # pixels of the image; OpenCV also finds single rows of pixels


class SelectiveSearch:
    """``batch(frames)`` gives up to ``count`` proposals a frame, in OpenCV's order.

    OpenCV gives no scores: they fall evenly from 1, with the rank, which OpenCV draws in part at random,
    so that two runs differ. Raises ``SettingsError`` without
    the contrib build.
    """

    def __init__(self, count: int = 2000) -> None:
        if not hasattr(cv2, "ximgproc"):
            raise SettingsError(
                "selective search needs OpenCV's contrib build, and the installed one has no ximgproc; "
                "pip install opencv-contrib-python-headless in place of opencv-python-headless"
            )
        self.count = count

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Proposals of each BGR frame [H, W, 3], boxes in its pixels."""
        return [self._search(frame) for frame in frames]

    def _search(self, frame: NDArray[np.uint8]) -> Detections:
        segmentation = cv2.ximgproc.segmentation  # type: ignore[attr-defined]
        search = segmentation.createSelectiveSearchSegmentation()
        search.setBaseImage(frame)
        search.switchToSelectiveSearchFast()
        found = np.asarray(search.process(), np.float32).reshape(-1, 4)  # x, y, width, height
        found = found[(found[:, 2:] >= LEAST_SIDE).all(axis=1)][: self.count]
        boxes = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]], axis=1)
        height, width = frame.shape[:2]
        boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
        scores = (1.0 - np.arange(len(boxes)) / self.count).astype(np.float32)
        labels = np.zeros(len(boxes), np.int64)
        return Detections(boxes, scores, labels, PROPOSAL_NAMES, size=(height, width))
