"""Slices of labelled images as images of their own, to train on what detection in slices will show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import box_areas
from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.runtime.canvas import place
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import DataError
from anchorline.runtime.slices import slice_views

_LEAST_SIDE = 1.0  # pixels: of an object that ends at an edge less than that is nothing to see
_QUANTILES = (0.1, 0.5, 0.9)


def sliced(
    dataset: Dataset,
    sides: tuple[int, int],
    overlap: float = 0.2,
    min_visible: float = 0.3,
    empty_share: float = 0.25,
    seed: int = 0,
) -> Dataset:
    """The slices of all images, of ``sides`` (height, width) and cut as in detection.

    Boxes are cut at the slices' edges. An object of which less than ``min_visible`` shows is neither to be
    learnt nor background: it is marked as difficult. Of the slices without an object stay at most
    ``empty_share`` times as many as have one, drawn by ``seed``. An image is read for each of its slices.
    Raises ``DataError`` where no slice has an object.
    """
    slices = [
        _slice(image, view, min_visible)
        for image in dataset
        for view in slice_views(image.size, sides, overlap, full=False).tolist()
    ]
    filled = np.array([not each.ignored.all() for each in slices], bool)
    if not filled.any():
        raise DataError(
            f"{dataset.spec}: no slice of {sides[0]}x{sides[1]} shows {min_visible:g} of an object; take "
            "larger slices, or a lower min_visible"
        )
    empty = np.flatnonzero(~filled)
    most = round(empty_share * int(filled.sum()))
    filled[np.random.default_rng(seed).permutation(empty)[:most]] = True
    images = tuple(each for each, kept in zip(slices, filled.tolist(), strict=True) if kept)
    return dataclasses.replace(dataset, images=images)


def _slice(image: LabelledImage, view: list[int], min_visible: float) -> LabelledImage:
    left, top, right, bottom = view
    if (right - left, bottom - top) == image.size[::-1]:
        return image
    boxes = np.clip(image.boxes, [left, top, left, top], [right, bottom, right, bottom])
    sides = image.boxes[:, 2:] - image.boxes[:, :2]
    seen = (boxes[:, 2:] - boxes[:, :2] >= np.minimum(sides, _LEAST_SIDE)).all(axis=1)
    hidden = box_areas(boxes) < min_visible * box_areas(image.boxes)
    return LabelledImage(
        id=f"{image.id} [{left}, {top}]",
        size=(bottom - top, right - left),
        boxes=(boxes[seen] - np.array([left, top, left, top])).astype(np.float32),
        labels=image.labels[seen],
        difficult=(image.difficult | hidden)[seen],
        crowd=image.crowd[seen],
        load=partial(_load, image.load, (slice(top, bottom), slice(left, right))),
        path=image.path,
    )


def _load(load: Callable[[], NDArray[np.uint8]], window: tuple[slice, slice]) -> NDArray[np.uint8]:
    return load()[window].copy()  # so that the whole image can go


def object_sides(dataset: Dataset, contract: Contract) -> dict[str, list[float]] | None:
    """What ``runtime.slices.OBJECT_SIDES`` holds of a training on this data; None without an object."""
    image, canvas = [], []
    for each in dataset:
        sides = np.sqrt(box_areas(each.boxes[~each.ignored]))
        placement = place(each.size, contract.canvas, contract.resize)
        image.append(sides)
        canvas.append(sides * np.sqrt(placement.scales[0] * placement.scales[1]))
    if not sum(map(len, image)):
        return None
    return {
        name: np.quantile(np.concatenate(each), _QUANTILES).round(3).tolist()
        for name, each in (("image", image), ("canvas", canvas))
    }
