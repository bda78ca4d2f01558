"""Labelled images, whatever file format they came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LabelledImage:
    """One image and its ground truth.

    ``boxes`` float32 [N, 4], xyxy in pixels with continuous edges (a box that covers the first
    pixel only is 0, 0, 1, 1); ``labels`` int64 [N] index the dataset's ``names``; ``difficult`` and
    ``crowd`` bool [N] mark objects that an evaluation ignores. ``size`` is (height, width).
    ``load`` returns the pixels, uint8 BGR [H, W, 3], upright (EXIF orientation applied).
    """

    id: str
    size: tuple[int, int]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    load: Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True)
class Dataset:
    """Labelled images in a fixed order, with the class names their labels index.

    ``spec`` is the text it was opened with. ``category_ids`` are COCO's ids of ``names`` where the
    data has them. ``dropped`` counts what was left out by reason, such as boxes of ``"zero area"``.
    ``unlabelled`` counts the images without annotations of their own (YOLO's label file), which are
    taken as images without objects.
    """

    spec: str
    names: tuple[str, ...]
    images: tuple[LabelledImage, ...]
    category_ids: tuple[int, ...] | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    unlabelled: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[LabelledImage]:
        return iter(self.images)
