"""Slices of labelled images: their boxes, what is learnt, what is ignored, and which empty ones stay."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorline.data.boxes import box_areas
from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.data.slices import object_sides, sliced
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import DataError
from anchorline.runtime.slices import slice_views

CONTRACT = Contract(task="detections", names=("a",), canvas=(64, 64), mean=(0, 0, 0), std=(1, 1, 1))


def image_of(size: tuple[int, int], boxes: list[list[float]], id: str = "image") -> LabelledImage:
    rows, columns = np.indices(size, np.uint8)
    none = np.zeros(len(boxes), bool)
    return LabelledImage(
        id=id,
        size=size,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.zeros(len(boxes), np.int64),
        difficult=none,
        crowd=none,
        load=lambda: np.stack([rows, columns, rows ^ columns], axis=-1),
    )


def dataset_of(*images: LabelledImage) -> Dataset:
    return Dataset("data", ("a",), images)


def test_pixels_and_boxes_are_those_of_the_window():
    whole = image_of((100, 180), [[90, 20, 110, 40], [5, 5, 15, 15]])
    left, right = sliced(dataset_of(whole), (100, 100))
    assert [each.id for each in (left, right)] == ["image [0, 0]", "image [80, 0]"]
    assert left.size == right.size == (100, 100)
    np.testing.assert_array_equal(right.load(), whole.load()[:, 80:])
    assert right.load().base is None  # and holds nothing of the whole image
    assert left.boxes.tolist() == [[90, 20, 100, 40], [5, 5, 15, 15]]
    assert right.boxes.tolist() == [[10, 20, 30, 40]]
    assert not left.ignored.any()  # half of the first one shows


@pytest.mark.parametrize(("min_visible", "ignored"), [(0.49, [False]), (0.51, [True])])
def test_an_object_that_hardly_shows_is_ignored_and_no_background(min_visible, ignored):
    data = dataset_of(image_of((100, 180), [[90, 20, 110, 40]]))
    left, _ = sliced(data, (100, 100), min_visible=min_visible, empty_share=1.0)
    assert left.boxes.tolist() == [[90, 20, 100, 40]]
    assert left.ignored.tolist() == ignored


def test_an_image_that_a_slice_holds_is_itself():
    small = image_of((50, 60), [[1, 1, 9, 9]])
    assert list(sliced(dataset_of(small), (100, 100))) == [small]


@pytest.mark.parametrize(("share", "empty"), [(0.0, 0), (0.5, 1), (2.0, 4), (99.0, 15)])
def test_empty_slices_stay_at_a_ratio(share, empty):
    objects = image_of((64, 128), [[10, 10, 20, 20], [70, 10, 80, 20]], "objects")
    none = [image_of((64, 192), [], f"none-{number}") for number in range(5)]
    data = dataset_of(*none, objects)
    kept = sliced(data, (64, 64), overlap=0.0, empty_share=share)
    assert sum(each.ignored.all() for each in kept) == empty
    assert len(kept) == empty + 2
    again = sliced(data, (64, 64), overlap=0.0, empty_share=share)
    assert [each.id for each in kept] == [each.id for each in again]


def test_slices_without_any_object_are_refused():
    with pytest.raises(DataError, match=r"data: no slice of 64x64 shows 0\.9 of an object; take larger"):
        sliced(dataset_of(image_of((200, 200), [[0, 0, 200, 200]])), (64, 64), min_visible=0.9)


@settings(max_examples=60)
@given(seed=st.integers(0, 9999), overlap=st.floats(0, 0.9), min_visible=st.floats(0, 1))
def test_each_object_shows_as_much_as_it_is_said_to(seed, overlap, min_visible):
    rng = np.random.default_rng(seed)
    size = rng.integers(64, 200, 2)
    corners = rng.uniform(0, size[::-1] - 10, (6, 2))
    boxes = np.concatenate([corners, np.minimum(corners + rng.uniform(3, 80, (6, 2)), size[::-1])], axis=1)
    whole = image_of((int(size[0]), int(size[1])), boxes.tolist())
    try:
        slices = sliced(dataset_of(whole), (64, 80), overlap, min_visible, empty_share=100.0)
    except DataError:
        return
    for each in slices:
        height, width = each.size
        assert (each.boxes >= 0).all()
        assert (each.boxes <= [width, height, width, height]).all()
        assert (box_areas(each.boxes) > 0).all()
    learnt = 0
    for left, top, right, bottom in slice_views(whole.size, (64, 80), overlap, full=False).tolist():
        for x1, y1, x2, y2 in whole.boxes.astype(float).tolist():
            w, h = min(x2, right) - max(x1, left), min(y2, bottom) - max(y1, top)
            learnt += w >= 1 and h >= 1 and w * h >= min_visible * (x2 - x1) * (y2 - y1) * (1 - 1e-6)
    assert sum(int((~each.ignored).sum()) for each in slices) == learnt


def test_object_sides_are_those_of_the_images_and_of_the_canvas():
    data = dataset_of(
        image_of((128, 128), [[0, 0, 10, 40], [0, 0, 8, 8]]), image_of((32, 32), [[0, 0, 4, 4]])
    )
    sides = object_sides(data, CONTRACT)
    # 20 and 8 px at half the size, 4 px at twice.
    np.testing.assert_allclose(sides["image"], np.quantile([4, 8, 20], [0.1, 0.5, 0.9]))
    np.testing.assert_allclose(sides["canvas"], np.quantile([4, 8, 10], [0.1, 0.5, 0.9]))
    ignored = dataclasses.replace(data.images[1], difficult=np.array([True]))
    assert object_sides(dataset_of(ignored), CONTRACT) is None
