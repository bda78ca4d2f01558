"""Two pictures of one image beside each other, for contact sheets that compare two results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.evaluation.plots import contact_sheet
from anchorline.runtime.detections import Detections

PANEL = (360, 480)
"""Height and width in pixels of one of the two pictures of an image."""
_GAP = 4
GREY = (110, 110, 110)  # visible on light and on dark images

Pixels = NDArray[np.uint8]


def fit_panel(pixels: Pixels) -> tuple[Pixels, float]:
    """The image in a panel's size, and the factor; drawn on afterwards, so that lines and letters have
    the sheet's size and not the image's."""
    scale = min(PANEL[0] / pixels.shape[0], PANEL[1] / pixels.shape[1])
    width, height = (max(1, round(side * scale)) for side in (pixels.shape[1], pixels.shape[0]))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=method), dtype=np.uint8), scale


def outline(
    picture: Pixels,
    boxes: NDArray[np.float32],
    scale: float,
    colour: tuple[int, int, int] = GREY,
    thickness: int = 1,
) -> None:
    """Draw boxes without labels into the panel; thin and grey is what needs no attention."""
    for box in np.round(boxes * scale).astype(int).tolist():
        cv2.rectangle(picture, (box[0], box[1]), (box[2] - 1, box[3] - 1), colour, thickness)


def to_panel(detections: Detections, scale: float) -> Detections:
    """The detections in the panel's pixels."""
    return Detections(detections.boxes * scale, detections.scores, detections.labels, detections.class_names)


def pair(left: Pixels, right: Pixels) -> Pixels:
    """Two panels of one image as one picture."""
    gap = np.full((len(left), _GAP, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def pair_sheet(pairs: Sequence[Pixels], titles: Sequence[str], path: str | Path, columns: int) -> None:
    """Write pairs with their titles as one picture."""
    contact_sheet(pairs, path, columns=columns, titles=titles, cell=(PANEL[0], 2 * PANEL[1] + _GAP))
