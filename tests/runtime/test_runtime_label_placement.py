"""Where labels go, against what is to be seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorline.runtime.drawing import fitted, lettering, place_labels

FRAME = (200, 300)


def rectangles(corners, sizes):
    return np.concatenate([corners, corners + sizes], axis=1)


def shared(a, b):
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(np.prod(np.maximum(sides, 0)))


def place(boxes, size=(40, 12), frame=FRAME):
    sizes = np.tile(size, (len(boxes), 1))
    corners, readable = place_labels(np.array(boxes, np.float32), sizes, frame)
    return rectangles(corners, sizes), readable


def test_alone_it_lies_on_its_box():
    plates, readable = place([[100, 60, 200, 150]])
    assert plates.tolist() == [[100, 48, 140, 60]]
    assert readable.all()


@pytest.mark.parametrize(
    ("box", "corner"),
    [
        ([100, 0, 200, 150], [100, 0]),  # no room above: inside
        ([280, 60, 300, 150], [260, 48]),  # no room to the right
        ([-50, -50, 400, 400], [0, 0]),
        ([100, 2, 130, 12], [100, 12]),  # no room above, and inside it would hide what it names
    ],
)
def test_at_the_frame_s_edge_it_stays_inside(box, corner):
    plates, _ = place([box])
    assert plates[0, :2].tolist() == corner


def test_two_at_one_box_do_not_overlap():
    plates, readable = place([[100, 60, 200, 150]] * 4)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    assert [shared(plates[a], plates[b]) for a, b in pairs] == [0.0] * 6
    assert plates[0].tolist() == [100, 48, 140, 60]  # the first has the best place
    assert readable.all()


def test_a_small_object_is_not_covered_by_its_own_second_label():
    box = [100, 60, 142, 76]
    plates, _ = place([box, box])
    assert [shared(plate, np.array(box)) for plate in plates] == [0.0, 0.0]


def test_where_there_is_no_room_the_rest_cannot_be_read():
    plates, readable = place([[0, 0, 60, 20]] * 30, frame=(20, 60))
    assert readable[0]
    assert 1 <= readable.sum() <= 4
    shown = plates[readable]
    for a in range(1, len(shown)):
        assert sum(shared(shown[a], shown[b]) for b in range(a)) <= 0.2 * 40 * 12


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-50, 350), st.floats(-50, 250), st.floats(0, 200), st.floats(0, 200)),
        min_size=1,
        max_size=25,
    ),
    st.integers(8, 90),
)
def test_always_inside_and_the_first_one_always_readable(drawn, width):
    boxes = [[x, y, x + w, y + h] for x, y, w, h in drawn]
    plates, readable = place(boxes, size=(width, 12))
    assert (plates[:, :2] >= 0).all()
    assert (plates[:, 2:] <= [FRAME[1], FRAME[0]]).all()
    assert readable[0]


def test_fifty_labels_of_a_crowd_mostly_do_not_overlap():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, [1700, 900], (50, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(40, 200, (50, 2))], axis=1)
    plates, readable = place(boxes, size=(170, 30), frame=(1080, 1920))
    overlapping = sum(shared(plates[a], plates[b]) > 0 for a in range(50) for b in range(a))
    naive = [[x, max(0, y - 30), x + 170, max(0, y - 30) + 30] for x, y in corners]
    before = sum(shared(np.array(naive[a]), np.array(naive[b])) > 0 for a in range(50) for b in range(a))
    assert before >= 15
    assert overlapping == 0
    assert readable.all()


@pytest.mark.parametrize("unit", [0.05, 0.17, 0.35, 1.0, 3.6])
def test_text_is_legible_at_any_resolution(unit):
    """At least 9 pixels, and at least a 60th of a square picture's side, which has 800 pixels at unit 1."""
    letters = lettering(unit)
    assert letters.plate_height - letters.margin >= max(9, 800 * unit / 60)


def test_a_name_that_is_too_long_is_cut():
    letters = lettering(0.2)
    text, width = fitted("a very long class name indeed 0.93", letters, 120)
    assert width <= 120
    assert text.startswith("a very")
    assert text.endswith("...")
    assert fitted("cat", letters, 120)[0] == "cat"
    assert fitted("cat", letters, 3)[0] == "c..."  # there is always something
    assert fitted("", letters, 3)[0] == ""
