"""The images a detector does worst on, as a contact sheet of ground truth beside detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchorline.evaluation.dataset import Dataset
from anchorline.evaluation.matching import ImageMatches, match_image
from anchorline.evaluation.panels import Pixels, fit_panel, outline, pair, pair_sheet, to_panel
from anchorline.runtime.detections import Detections
from anchorline.runtime.drawing import draw


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
    pair_sheet(pictures, titles, path, columns=2)
    return worst


def _side_by_side(pixels: Pixels, truth: Detections, found: Detections, matches: ImageMatches) -> Pixels:
    small, scale = fit_panel(pixels)
    not_missed = np.setdiff1d(np.arange(len(truth)), matches.missed)
    left = _panel(small, truth[not_missed], truth[matches.missed], scale, scores=False)
    right = _panel(small, found[matches.pairs[:, 0]], found[matches.false_positives], scale, scores=True)
    return pair(left, right)


def _panel(small: Pixels, right: Detections, wrong: Detections, scale: float, scores: bool) -> Pixels:
    picture = small.copy()
    outline(picture, right.boxes, scale)
    return draw(picture, to_panel(wrong, scale), scores=scores)
