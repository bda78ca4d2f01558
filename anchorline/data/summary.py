"""What a labelled data set holds, to be looked at before training on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import box_areas
from anchorline.data.dataset import Dataset, list_counts, list_names
from anchorline.runtime.io.files import plain

if TYPE_CHECKING:
    from rich.table import Table

SIZE_CLASSES: dict[str, tuple[float, float]] = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, math.inf),
}
"""COCO's size classes of objects: from and to, in square pixels of the source image. COCO's annotations
measure the area of the mask; here it is always that of the box."""
MOST_ROWS = 200  # of classes in a table
SIDE_EDGES = (0.0, 8.0, 16.0, 32.0, 64.0, 96.0, 128.0, 256.0, 512.0, math.inf)
"""Edges of the histogram of object sizes: the square root of the area, in pixels of the image."""
ASPECT_EDGES = (0.0, 0.25, 0.5, 1 / math.sqrt(2), math.sqrt(2), 2.0, 4.0, math.inf)
"""Edges of the histogram of aspect ratios: height over width, as anchors have it."""
_BAR_LENGTH = 28


def in_size_class(areas: NDArray[np.floating], name: str) -> NDArray[np.bool_]:
    """Which of the areas [N] belong to a size class, both bounds included.

    As in COCO's evaluation, so a box of exactly 32 x 32 pixels is small and medium.
    """
    low, high = SIZE_CLASSES[name]
    return np.asarray((areas >= low) & (areas <= high))


def size_class_counts(areas: NDArray[np.floating]) -> dict[str, int]:
    """How many of the areas [N] each size class holds; a box on a bound counts in the larger class only."""
    return {name: int(((areas >= low) & (areas < high)).sum()) for name, (low, high) in SIZE_CLASSES.items()}


@dataclass(frozen=True)
class ClassCounts:
    """Boxes of one class, the images they are in, and how many of them are difficult, crowds, or of
    each COCO size class."""

    boxes: int
    images: int
    difficult: int
    crowd: int
    sizes: dict[str, int]


@dataclass(frozen=True)
class Bin:
    """One bar of a histogram: values from ``low`` up to, but not including, ``high``."""

    low: float
    high: float
    count: int

    def to_json(self) -> dict[str, Any]:
        return {"from": self.low, "to": self.high, "count": self.count}


@dataclass(frozen=True)
class DataSummary:
    """Counts over the boxes that are kept, difficult ones and crowds included.

    ``empty_images`` have no box; ``unlabelled_images`` are those of them without a label file.
    ``sides`` and ``aspects`` are histograms, see ``SIDE_EDGES`` and ``ASPECT_EDGES``. ``imbalance`` is
    the count of the most frequent class over that of the rarest one that occurs; None without boxes.
    ``absent_classes`` have not a single box. ``dropped`` counts what was left out, by
    reason, and ``remarks`` what was read otherwise than it stands.
    """

    spec: str
    images: int
    empty_images: int
    unlabelled_images: int
    boxes: int
    per_class: dict[str, ClassCounts]
    sizes: dict[str, int]
    sides: tuple[Bin, ...]
    aspects: tuple[Bin, ...]
    imbalance: float | None
    absent_classes: list[str]
    dropped: dict[str, int]
    remarks: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the open end of a histogram is None."""
        names = {"spec": "data", "sides": "side_histogram", "aspects": "aspect_histogram"}
        return {names.get(name, name): plain(value) for name, value in vars(self).items()}

    def render(self) -> Table:
        """The classes, the two histograms, and a line of remarks, for rich's console."""
        from rich.markup import escape
        from rich.table import Table

        classes = Table(
            title=escape(f"{self.spec}: {self.images} images, {self.boxes} boxes"), title_justify="left"
        )
        classes.add_column("class")
        for column in ("boxes", "images", *self.sizes, "difficult", "crowd"):
            classes.add_column(column, justify="right")
        by_boxes = sorted(self.per_class, key=lambda name: -self.per_class[name].boxes)
        shown = {*by_boxes[:MOST_ROWS]}
        for name, each in self.per_class.items():
            if name not in shown:
                continue
            row = (each.boxes, each.images, *each.sizes.values(), each.difficult, each.crowd)
            classes.add_row(escape(name), *map(str, row))
        layout = Table.grid(padding=(0, 0, 1, 0))
        layout.add_row(classes)
        for title, bins in (("size of objects, pixels", self.sides), ("height / width", self.aspects)):
            table = Table(title=title, title_justify="left")
            for column in ("from", "to", "boxes"):
                table.add_column(column, justify="right")
            table.add_column("", min_width=_BAR_LENGTH)
            most = max(1, *(bar.count for bar in bins))
            for bar in bins:
                high = "" if math.isinf(bar.high) else f"{bar.high:.3g}"
                length = math.ceil(_BAR_LENGTH * bar.count / most)
                table.add_row(f"{bar.low:.3g}", high, str(bar.count), "█" * length)
            layout.add_row(table)
        for remark in self._remarks():
            layout.add_row(escape(remark))
        return layout

    def _remarks(self) -> list[str]:
        remarks = []
        if len(self.per_class) > MOST_ROWS:
            remarks.append(f"shown are the {MOST_ROWS} most frequent of {len(self.per_class)} classes")
        if self.empty_images:
            unlabelled = self.unlabelled_images
            without = f", {unlabelled} of them without a label file" if unlabelled else ""
            remarks.append(f"{self.empty_images} images without objects{without}")
        if self.imbalance is not None and len(self.per_class) > 1:
            remarks.append(f"the most frequent class has {self.imbalance:.1f} times the boxes of the rarest")
        if self.absent_classes:
            remarks.append(f"no boxes of {list_names(self.absent_classes)}")
        if self.dropped:
            remarks.append(f"left out: {list_counts(self.dropped)}")
        if self.remarks:
            remarks.append(list_counts(self.remarks))
        return remarks


def summarise_data(dataset: Dataset) -> DataSummary:
    """Count what the data set holds; no image is loaded."""
    boxes = np.concatenate([np.zeros((0, 4)), *(image.boxes for image in dataset)])
    labels, difficult, crowd = (
        np.concatenate([np.zeros(0, np.int64), *(getattr(image, name) for image in dataset)])
        for name in ("labels", "difficult", "crowd")
    )
    owners = np.repeat(np.arange(len(dataset)), [len(image.boxes) for image in dataset])
    areas = box_areas(boxes)
    pairs = np.unique(labels * len(dataset) + owners)  # of a class and an image
    counted = [
        labels,
        pairs // max(len(dataset), 1),
        labels[difficult.astype(bool)],
        labels[crowd.astype(bool)],
    ]
    counted += [labels[(areas >= low) & (areas < high)] for low, high in SIZE_CLASSES.values()]
    tallies = (np.bincount(each, minlength=len(dataset.names)).tolist() for each in counted)
    per_class = {
        name: ClassCounts(total, images, hard, crowds, dict(zip(SIZE_CLASSES, sizes, strict=True)))
        for name, total, images, hard, crowds, *sizes in zip(dataset.names, *tallies, strict=True)
    }
    counts = [each.boxes for each in per_class.values() if each.boxes]
    sides = boxes[:, 2:] - boxes[:, :2]
    histograms = []
    for values, edges in ((np.sqrt(areas), SIDE_EDGES), (sides[:, 1] / sides[:, 0], ASPECT_EDGES)):
        bars = zip(edges[:-1], edges[1:], np.histogram(values, edges)[0].tolist(), strict=True)
        histograms.append(tuple(Bin(*bar) for bar in bars))
    return DataSummary(
        spec=dataset.spec,
        images=len(dataset),
        empty_images=len(dataset) - len(np.unique(owners)),
        unlabelled_images=dataset.unlabelled,
        boxes=len(boxes),
        per_class=per_class,
        sizes=size_class_counts(areas),
        sides=histograms[0],
        aspects=histograms[1],
        imbalance=max(counts) / min(counts) if counts else None,
        absent_classes=[name for name, each in per_class.items() if not each.boxes],
        dropped=dict(dataset.dropped),
        remarks=dict(dataset.remarks),
    )
