"""Large frames in slices: each slice goes through the network as a frame of its own, beside the whole frame.

A detector that scales a frame of 3840 x 2160 to its canvas leaves three pixels of an object of twelve. Slices
(SAHI, Akyon et al. 2022) keep them. Where the overlap of two slices is at least as large as an object, one of
them shows all of it; what the others show are cuts, which end at an edge that is no edge of the frame, and
for that reason alone give way to whole ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import by_canvas, usual_canvas
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import FrameError, SettingsError, shown
from anchorline.runtime.nv12 import Nv12, bgr_of, frame_size
from anchorline.runtime.video.options import LEAST_SLICE, SliceOptions

OBJECT_SIDES = "object_sides"
"""In ``Contract.source``: the roots of the areas of the objects trained on, 10th, 50th and 90th percentile:
``{"image": [...], "canvas": [...]}``, in pixels of the images and of the canvas."""

MOST_VIEWS = 4096  # of one frame: more is a mistake in the size or the overlap
_NEAR_EDGE = 0.01  # of a slice's side: what ends so near its edge may go on behind it
_UNIT = 32  # what a derived size is a multiple of
_LARGEST = 1 << 20  # pixels of a side, beyond any frame
_ROWS, _PAIRS = 2048, 1 << 21  # boxes, and pairs of them, that are looked at together

Views = NDArray[np.int64]  # [N, 4] xyxy in pixels of the frame
Detect = Callable[[list[Any]], list[Detections]]  # of frames, each in its own pixels


def slice_views(size: tuple[int, int], sides: tuple[int, int], overlap: float, full: bool) -> Views:
    """The slices [N, 4] of a frame of ``size`` (height, width), row by row, and last with ``full`` all of it.

    All are of the ``sides`` (height, width), and neighbours share ``overlap`` of one; the last row and column
    are moved inwards. Where one slice holds the whole frame it is the frame. Raises ``FrameError`` for more
    than ``MOST_VIEWS``.
    """
    places = [_places(*each, overlap) for each in zip(size, sides, strict=True)]
    count = len(places[0]) * len(places[1])
    if count > MOST_VIEWS:
        raise FrameError(
            f"a frame of {size[0]}x{size[1]} has {count} slices of {sides[0]}x{sides[1]} with an overlap of "
            f"{overlap:g}; expected at most {MOST_VIEWS}: take larger ones, or less overlap"
        )
    tops, lefts = (each.ravel() for each in np.meshgrid(*places, indexing="ij"))
    height, width = (min(pair) for pair in zip(size, sides, strict=True))
    views = np.stack([lefts, tops, lefts + width, tops + height], axis=1)
    return np.concatenate([views, [[0, 0, size[1], size[0]]]]) if full and count > 1 else views


def _places(length: int, side: int, overlap: float) -> NDArray[np.int64]:
    """Where slices begin along one axis."""
    if length <= side:
        return np.zeros(1, np.int64)
    step = side - int(side * overlap)
    count = 1 + -(-(length - side) // step)
    return np.minimum(np.arange(count, dtype=np.int64) * step, length - side)


def derived_sides(contract: Contract, overlap: float) -> tuple[int, int]:
    """The size (height, width) of slices in which objects have the size that the network was trained on.

    It is the canvas over the scale at which the training saw its objects, if they are as large in frames as
    they were in its images; and no less than it takes for nine of ten to fit into the overlap. Raises
    ``SettingsError`` where the contract does not tell.
    """
    sides = contract.source.get(OBJECT_SIDES)
    try:
        image, canvas = (np.array(sides[of], np.float64) for of in ("image", "canvas"))  # type: ignore[index]
    except (LookupError, TypeError, ValueError):
        image = canvas = np.zeros(0)
    if image.shape != (3,) or canvas.shape != (3,) or not (np.stack([image, canvas]) > 0).all():
        raise SettingsError(
            "the size of the slices is to be derived, but the model does not tell how large the objects were "
            "that it was trained on; name a size, such as --slice 640x640"
        )
    scale = canvas[1] / image[1]
    least = min(image[2] / overlap if overlap else 0.0, float(_LARGEST))
    wanted = (max(LEAST_SLICE, least, side / scale) for side in usual_canvas(contract))
    height, width = (_UNIT * math.ceil(min(side, _LARGEST) / _UNIT) for side in wanted)
    return height, width


@dataclass(frozen=True)
class Found:
    """What all views of one frame show, in its pixels: ``boxes`` float64 [N, 4], ``scores``, ``labels``,
    the number of the view that each comes from, and which of them a view may have ``cut``."""

    boxes: NDArray[np.float64]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    views: NDArray[np.int64]
    cut: NDArray[np.bool_]


class Slicer:
    """Frames through a detector in slices, by ``options`` and for the model of ``contract``.

    ``sides`` is the slices' (height, width). Raises ``SettingsError`` for a model of another task than
    detections, and where the size has to be derived and cannot be.
    """

    def __init__(self, options: SliceOptions, contract: Contract) -> None:
        if not isinstance(options, SliceOptions):
            raise SettingsError(f"slices is {shown(options)}; expected SliceOptions(height, width), or None")
        if contract.task != "detections":
            raise SettingsError(
                f"slices are merged by class, but the model's task is {contract.task}; leave out slices"
            )
        self.options, self.contract = options, contract
        self.sides = (
            derived_sides(contract, options.overlap)
            if options.height is None or options.width is None
            else (options.height, options.width)
        )
        self._together = min(options.at_once, contract.max_batch or options.at_once)

    def views(self, size: tuple[int, int]) -> Views:
        """What the network is shown of a frame of ``size`` (height, width); see ``slice_views``."""
        return slice_views(size, self.sides, self.options.overlap, self.options.full)

    def batch(self, frames: Sequence[Any], detect: Detect) -> list[Detections]:
        """The detections of each frame, by ``detect``, which maps frames of one canvas to their detections.

        Views of all frames go together where they share a canvas, in groups as equal as can be of at most
        ``options.at_once``. Frames that one slice holds are shown as they are: it is plain detection.
        """
        plans = [self.views(frame_size(frame)) for frame in frames]
        if all(len(plan) == 1 for plan in plans):
            return detect([*frames])
        views: list[Any] = []
        for frame, plan in zip(frames, plans, strict=True):
            views += [frame] if len(plan) == 1 else _cut_out(frame, plan)
        found = self._detect_together(views, detect)
        merged, start = [], 0
        for frame, plan in zip(frames, plans, strict=True):
            own = found[start : start + len(plan)]
            start += len(plan)
            merged.append(own[0] if len(plan) == 1 else self.merge(own, plan, frame_size(frame)))
        return merged

    def _detect_together(self, views: list[Any], detect: Detect) -> list[Detections]:
        found: dict[int, Detections] = {}
        for places in by_canvas(self.contract, views):
            for group in np.array_split(places, -(-len(places) // self._together)):
                found.update(zip(group.tolist(), detect([views[place] for place in group]), strict=True))
        return [found[place] for place in range(len(views))]

    def merge(self, found: Sequence[Detections], views: Views, size: tuple[int, int]) -> Detections:
        """One frame's detections, best score first, of what was found in each of its ``views``."""
        together = gather(found, views, size)
        stands_for = suppress(together, self.options.merge_threshold, self.options.merge_by)
        boxes = together.boxes
        if self.options.merge == "weighted":
            boxes = weighted_boxes(together, stands_for)
        kept = np.flatnonzero(stands_for == np.arange(len(stands_for)))
        kept = kept[np.argsort(-together.scores[kept], kind="stable")]
        return Detections(
            boxes=boxes[kept].astype(np.float32),
            scores=together.scores[kept],
            labels=together.labels[kept],
            class_names=found[0].class_names,
            category_ids=found[0].category_ids,
            size=size,
        )


def in_slices(detect: Detect, slices: SliceOptions | None, contract: Contract) -> Detect:
    """``detect``, a model's batch of frames to their detections, in ``slices`` where there are any."""
    if slices is None:
        return detect
    slicer = Slicer(slices, contract)
    return lambda frames: slicer.batch(frames, detect)


def _cut_out(frame: Any, views: Views) -> list[NDArray[np.uint8]]:
    """The views of a frame of the host, without copies."""
    pixels = bgr_of(frame) if isinstance(frame, Nv12) else frame
    return [pixels[top:bottom, left:right] for left, top, right, bottom in views.tolist()]


def gather(found: Sequence[Detections], views: Views, size: tuple[int, int]) -> Found:
    """The detections of all views in the pixels of their frame, whose ``size`` is (height, width)."""
    owners = np.repeat(np.arange(len(found)), [len(each) for each in found])
    own = np.concatenate([each.boxes.astype(np.float64) for each in found])
    windows = views[owners].astype(np.float64)
    boxes = own + np.tile(windows[:, :2], 2)
    sides = windows[:, 2:] - windows[:, :2]
    near = np.maximum(1.0, _NEAR_EDGE * sides)
    limits = np.array([size[1], size[0]])
    begins_before = (own[:, :2] <= near) & (windows[:, :2] > 0)
    goes_on = (sides - own[:, 2:] <= near) & (windows[:, 2:] < limits)
    return Found(
        boxes,
        np.concatenate([each.scores for each in found]),
        np.concatenate([each.labels for each in found]),
        owners,
        (begins_before | goes_on).any(axis=1),
    )


def suppress(found: Found, threshold: float, by: str) -> NDArray[np.int64]:
    """Greedy NMS: for each box the number of the one that stands for it, its own where it stays.

    Whole ones come first, then those that are cut, each by falling score. One that comes later gives way to
    one that stays, of its class and of another view, if they overlap by more than ``threshold``: ``by`` their
    ``iou``, or ``ios``, the intersection over the smaller of the two, which it is for a cut one always. What
    one view shows it has seen apart, so there is nothing to merge in it.
    """
    order = np.lexsort((-found.scores, found.cut))
    boxes, cut, views = found.boxes[order], found.cut[order], found.views[order]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    grid = Grid(boxes, found.labels[order])
    keeper = np.full(len(boxes), -1)
    start = 0
    while start < len(boxes):
        rows = start + np.flatnonzero(keeper[start : start + _ROWS] < 0)
        rows, first, second = grid.near(rows, _PAIRS)
        eligible = (second > first) & (keeper[second] < 0) & (views[first] != views[second])
        first, second = first[eligible], second[eligible]
        common = _common_areas(boxes[first], boxes[second])
        smaller = np.minimum(areas[first], areas[second])
        union = areas[first] + areas[second] - common
        over = np.where(cut[second] | (by == "ios"), smaller, union)
        close = common > threshold * over
        _take(keeper, rows, first[close], second[close])
        start = int(rows[-1]) + 1 if len(rows) else start + _ROWS
    stands_for = np.empty_like(keeper)
    stands_for[order] = order[keeper]
    return stands_for


def _take(
    keeper: NDArray[np.int64], rows: NDArray[np.int64], first: NDArray[np.int64], second: NDArray[np.int64]
) -> None:
    """Let each of the ``rows`` in turn that is not taken stay, and take what is close to it."""
    by_first = np.argsort(first, kind="stable")
    first, second = first[by_first], second[by_first]
    edges = np.searchsorted(first, np.stack([rows, rows + 1])).tolist()
    for row, begin, end in zip(rows.tolist(), *edges, strict=True):
        if keeper[row] < 0:
            keeper[row] = row
            if end > begin:
                taken = second[begin:end]
                keeper[taken[keeper[taken] < 0]] = row


def _common_areas(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    return np.asarray(np.maximum(sides, 0.0).prod(axis=1))


def weighted_boxes(found: Found, stands_for: NDArray[np.int64]) -> NDArray[np.float64]:
    """The boxes, those that stay moved to the mean of the ones they stand for, weighted by their scores.

    Of these count those that show the same, with an IoU of at least 0.5: a part moves no box of a whole.
    """
    kept = found.boxes[stands_for]
    common = _common_areas(found.boxes, kept)
    areas = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(axis=1)
    same = common >= 0.5 * (areas + areas[stands_for] - common)
    same &= ~found.cut | found.cut[stands_for]
    same |= stands_for == np.arange(len(stands_for))
    weights = np.where(same, np.maximum(found.scores, 1e-6), 0.0)
    total = np.bincount(stands_for, weights, len(stands_for))
    sums = [np.bincount(stands_for, weights * edge, len(stands_for)) for edge in found.boxes.T]
    moved = np.stack(sums, axis=1) / np.maximum(total, 1e-12)[:, None]
    return np.where((total > 0)[:, None], moved, found.boxes)


class Grid:
    """Which boxes may touch which, without looking at all pairs.

    A box of level L has its longer side in (2^(L-1), 2^L]. Two boxes that touch lie, by their top left
    corners, in the same or in neighbouring cells of the grid whose cells are as wide as the larger level.
    """

    def __init__(self, boxes: NDArray[np.float64], labels: NDArray[np.int64]) -> None:
        sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=1.0)
        self._levels = np.ceil(np.log2(sides)).astype(np.int64)
        self._corners = boxes[:, :2] - boxes[:, :2].min(axis=0, initial=0.0)
        self._labels = labels
        # For each level its cells, and the boxes of it and of those below, sorted by cell.
        self._layers = []
        for level in np.unique(self._levels).tolist():
            cells = np.floor(self._corners / 2.0**level).astype(np.int64) + 1
            across, down = (cells.max(axis=0) + 2).tolist()
            keys = (labels * down + cells[:, 1]) * across + cells[:, 0]
            sorted_members = []
            for members in (self._levels == level, self._levels < level):
                numbers = np.flatnonzero(members)
                numbers = numbers[np.argsort(keys[numbers], kind="stable")]
                sorted_members.append((numbers, keys[numbers]))
            self._layers.append((level, across, keys, sorted_members))

    def near(
        self, rows: NDArray[np.int64], most: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Pairs (first, second) of one of the ``rows`` and any box of its class that may touch it.

        Only as many of the rows as have at most ``most`` pairs together, at least one, which are returned
        before the pairs.
        """
        ranges = []  # of the places in sorted members, for each row
        total = np.zeros(len(rows), np.int64)
        for level, across, keys, (level_with, levels_below) in self._layers:
            own = self._levels[rows]
            for (numbers, sorted_keys), asking in ((level_with, own <= level), (levels_below, own == level)):
                asked = np.flatnonzero(asking)
                if not len(numbers) or not len(asked):
                    continue
                for step in (-across, 0, across):
                    centre = keys[rows[asked]] + step
                    begin = np.searchsorted(sorted_keys, centre - 1)
                    count = np.searchsorted(sorted_keys, centre + 1, side="right") - begin
                    total[asked] += count
                    ranges.append((numbers, asked, begin, count))
        allowed = max(1, int(np.searchsorted(total.cumsum(), most, side="right")))
        pairs = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for numbers, asked, begin, count in ranges:
            inside = asked < allowed
            asked, begin, count = asked[inside], begin[inside], count[inside]
            offsets = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
            pairs.append((rows[np.repeat(asked, count)], numbers[np.repeat(begin, count) + offsets]))
        first, second = (np.concatenate(each) for each in zip(*pairs, strict=True))
        return rows[:allowed], first, second
