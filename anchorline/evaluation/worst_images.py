"""The images a detector does worst on, as a contact sheet of ground truth beside detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.evaluation.dataset import Dataset
from anchorline.evaluation.matching import ImageMatches, match_image
from anchorline.evaluation.plots import contact_sheet
from anchorline.runtime.detections import Detections
from anchorline.runtime.drawing import draw

PANEL = (360, 480)
"""Height and width in pixels of one of the two pictures of an image."""
_GAP = 4
_GREY = (110, 110, 110)  # visible on light and on dark images


@dataclass(frozen=True)
class ImageErrors:
    """How many objects of an image were missed and how many detections are false.

    ``index`` is the image's place in the data set. An object detected as another class is both: one
    missed and one false.
    """

    index: int
    id: str
    missed: int
    false_positives: int

    def to_json(self) -> dict[str, Any]:
        return {"image": self.id, "missed": self.missed, "false_positives": self.false_positives}


def rank_images(
    dataset: Dataset, detections: Sequence[Detections], min_score: float = 0.5, iou_threshold: float = 0.5
) -> list[ImageErrors]:
    """All images, those with the most errors first; detections count from ``min_score`` on.

    ``detections``, one for each image, have labels that index ``dataset.names``. Difficult and crowd
    objects count neither way.
    """
    errors = []
    for index, (image, found) in enumerate(zip(dataset, detections, strict=True)):
        matches = match_image(image, found, min_score, iou_threshold)
        errors.append(ImageErrors(index, image.id, len(matches.missed), len(matches.false_positives)))
    return sorted(errors, key=lambda each: -(each.missed + each.false_positives))


def worst_images_sheet(
    dataset: Dataset,
    detections: Sequence[Detections],
    path: str | Path,
    count: int = 12,
    min_score: float = 0.5,
    iou_threshold: float = 0.5,
) -> list[ImageErrors]:
    """Write the ``count`` worst images side by side: ground truth left, detections right.

    Only errors carry a label and their class's colour: missed objects left, false detections right.
    What was found is drawn in grey. Returns the images shown.
    """
    worst = rank_images(dataset, detections, min_score, iou_threshold)[:count]
    pictures = []
    for each in worst:
        image, found = dataset.images[each.index], detections[each.index]
        truth = Detections(image.boxes, np.ones(len(image.boxes), np.float32), image.labels, dataset.names)
        named = Detections(found.boxes, found.scores, found.labels, dataset.names)
        matches = match_image(image, found, min_score, iou_threshold)
        pictures.append(_side_by_side(image.load(), truth, named, matches))
    titles = [
        f"{each.id}: {each.missed} missed (left), {each.false_positives} false (right)" for each in worst
    ]
    contact_sheet(pictures, path, columns=2, titles=titles, cell=(PANEL[0], 2 * PANEL[1] + _GAP))
    return worst


def _side_by_side(
    pixels: NDArray[np.uint8], truth: Detections, found: Detections, matches: ImageMatches
) -> NDArray[np.uint8]:
    """Shrunk first, so that lines and letters have the sheet's size and not the image's."""
    scale = min(PANEL[0] / pixels.shape[0], PANEL[1] / pixels.shape[1])
    width, height = (max(1, round(side * scale)) for side in (pixels.shape[1], pixels.shape[0]))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = np.asarray(cv2.resize(pixels, (width, height), interpolation=method), dtype=np.uint8)
    not_missed = np.setdiff1d(np.arange(len(truth)), matches.missed)
    left = _panel(small, truth[not_missed], truth[matches.missed], scale, scores=False)
    right = _panel(small, found[matches.pairs[:, 0]], found[matches.false_positives], scale, scores=True)
    gap = np.full((height, _GAP, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def _panel(
    pixels: NDArray[np.uint8], right: Detections, wrong: Detections, scale: float, scores: bool
) -> NDArray[np.uint8]:
    picture = pixels.copy()
    for box in np.round(right.boxes * scale).astype(int).tolist():
        cv2.rectangle(picture, (box[0], box[1]), (box[2] - 1, box[3] - 1), _GREY, 1)
    scaled = Detections(wrong.boxes * scale, wrong.scores, wrong.labels, wrong.class_names)
    return draw(picture, scaled, scores=scores)
