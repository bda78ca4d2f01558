from __future__ import annotations

import dataclasses
import re

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorline.runtime.canvas import (
    CanvasRange,
    Placement,
    boxes_to_canvas,
    boxes_to_source,
    by_canvas,
    canvas_of,
    fit,
    frame_canvas,
    held_to,
    place,
    to_canvas,
)
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.io.errors import FrameError, SettingsError
from anchorline.runtime.resize import resize_float

SIDES = st.integers(1, 6000)
BOUNDS = st.none() | st.integers(1, 2000)
RULES = st.builds(ResizeRule, shorter_side=BOUNDS, longer_side=BOUNDS)


@pytest.mark.parametrize(
    ("source", "canvas", "rule", "valid"),
    [
        ((480, 640), (480, 640), ResizeRule(), (480, 640)),
        ((480, 640), (800, 1344), ResizeRule(), (800, 1066)),
        ((480, 640), (800, 1344), ResizeRule(800, 1333), (800, 1066)),
        ((480, 640), (320, 320), ResizeRule(320, 640), (240, 320)),
        ((640, 480), (800, 1344), ResizeRule(800, 1333), (800, 600)),
        ((1080, 1920), (800, 1344), ResizeRule(800, 1333), (749, 1333)),
        ((1080, 1920), (540, 960), ResizeRule(), (540, 960)),
        ((1, 1), (480, 640), ResizeRule(), (480, 480)),
        ((1, 5000), (480, 640), ResizeRule(), (1, 640)),
        ((5000, 1), (480, 640), ResizeRule(), (480, 1)),
        ((100, 200), (480, 640), ResizeRule(shorter_side=50), (50, 100)),
        ((100, 200), (480, 640), ResizeRule(longer_side=50), (25, 50)),
    ],
)
def test_place_by_hand(source, canvas, rule, valid):
    assert place(source, canvas, rule) == Placement(source, valid)


@given(SIDES, SIDES, st.integers(1, 1500), st.integers(1, 1500), RULES)
def test_a_placed_frame_fits_and_touches_a_bound(height, width, canvas_height, canvas_width, rule):
    placement = place((height, width), (canvas_height, canvas_width), rule)
    valid_height, valid_width = placement.valid
    assert 1 <= valid_height <= canvas_height
    assert 1 <= valid_width <= canvas_width
    short, long = sorted(placement.valid)
    touched = [valid_height == canvas_height, valid_width == canvas_width]
    for side, bound in ((short, rule.shorter_side), (long, rule.longer_side)):
        assert bound is None or side <= bound
        # In double precision, as in torchvision, a side may come out one pixel short of its bound.
        touched += [bound is not None and side >= bound - 1]
    assert any(touched)


@given(SIDES, SIDES)
def test_a_frame_of_the_canvas_size_is_not_resized(height, width):
    assert place((height, width), (height, width), ResizeRule()).valid == (height, width)


@given(st.integers(16, 3000), st.integers(16, 3000))
def test_the_scale_is_torchvisions(height, width):
    """GeneralizedRCNNTransform: floor of the side times min(min_size / shorter, max_size / longer)."""
    scale = min(800 / min(height, width), 1333 / max(height, width))
    expected = (max(1, int(height * scale)), max(1, int(width * scale)))
    assert place((height, width), (1344, 1344), ResizeRule(800, 1333)).valid == expected


def test_a_rule_that_does_not_fit_the_canvas_gives_way() -> None:
    rule = ResizeRule(800, 1333)
    assert place((480, 640), (800, 1088), rule).valid == (800, 1066)
    assert place((480, 640), (800, 1056), rule).valid == (792, 1056)
    assert place((97, 97), (800, 800), rule).valid == (799, 799)


@pytest.mark.parametrize(
    ("size", "canvas"), [((1, 1), (32, 32)), ((32, 33), (32, 64)), ((800, 1066), (800, 1088))]
)
def test_the_smallest_canvas_is_a_multiple_of_32(size, canvas):
    contract = Contract("detections", ("a",), None, (0.0,) * 3, (1.0,) * 3)
    assert frame_canvas(size, contract) == canvas


def ranges_of(*canvases: tuple[int, int]) -> list[CanvasRange]:
    return [(canvas, canvas, canvas) for canvas in canvases]


@pytest.mark.parametrize(
    ("size", "number", "canvas", "valid"),
    [
        ((1080, 1920), 0, (768, 1344), (749, 1333)),
        ((480, 640), 1, (800, 1088), (800, 1066)),
        ((640, 480), 2, (1088, 800), (1066, 800)),
        ((500, 500), 1, (800, 1088), (800, 800)),  # whole on both of the last two: the first of equal ones
        ((720, 960), 1, (800, 1088), (800, 1066)),
        ((1000, 1500), 0, (768, 1344), (768, 1152)),  # 799 x 1199 fits none: 0.96 of it, 0.91 on the second
        ((3000, 100), 2, (1088, 800), (1088, 36)),
    ],
)
def test_a_frame_goes_where_it_keeps_most_of_its_size(size, number, canvas, valid):
    contract = Contract("detections", ("a",), None, (0.0,) * 3, (1.0,) * 3, resize=ResizeRule(800, 1333))
    found = fit([size], ranges_of((768, 1344), (800, 1088), (1088, 800)), contract)
    assert found == (number, canvas, [Placement(size, valid)])


def test_a_batch_goes_where_the_frame_that_loses_most_keeps_most():
    contract = Contract("detections", ("a",), None, (0.0,) * 3, (1.0,) * 3, resize=ResizeRule(800, 1333))
    number, canvas, placements = fit(
        [(1080, 1920), (480, 640)], ranges_of((800, 1088), (768, 1344)), contract
    )
    assert (number, canvas) == (1, (768, 1344))
    assert [placement.valid for placement in placements] == [(749, 1333), (768, 1024)]


def test_within_a_range_a_frame_has_its_own_canvas():
    rule = ResizeRule(800, 1333)
    contract = Contract("detections", ("a",), None, (0.0,) * 3, (1.0,) * 3, resize=rule)
    ranges = [((32, 64), (768, 1344), (1344, 1344))]
    for size in ((1080, 1920), (480, 640), (640, 480), (97, 97)):
        canvas = frame_canvas(size, contract)
        assert fit([size], ranges, contract) == (0, canvas, [place(size, None, rule)])
    # No larger than the range, and no smaller.
    assert fit([(1080, 1920)], [((32, 32), (320, 320), (640, 640))], contract)[1:] == (
        (384, 640),
        [Placement((1080, 1920), (360, 640))],
    )
    assert fit([(2000, 20)], ranges, contract)[1] == (1344, 64)
    held = dataclasses.replace(contract, canvas=(320, 640))
    assert fit([(1080, 1920)], ranges, held) == (0, (320, 640), [place((1080, 1920), (320, 640), rule)])


@given(SIDES, SIDES, RULES, st.integers(0, 2**32 - 1))
def test_a_box_comes_back_from_the_canvas(height, width, rule, seed):
    placement = place((height, width), (480, 640), rule)
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((20, 2, 2)), axis=1) * (width, height)
    boxes = corners.reshape(20, 4).astype(np.float32)
    returned = boxes_to_source(boxes_to_canvas(boxes, placement), placement)
    np.testing.assert_allclose(returned, boxes, rtol=1e-6, atol=1e-6 * max(height, width))
    assert returned.dtype == np.float32


def test_a_whole_frame_box_covers_the_valid_area_and_back():
    placement = Placement((1080, 1920), (749, 1333))
    whole = np.array([[0, 0, 1920, 1080]], np.float32)
    np.testing.assert_allclose(boxes_to_canvas(whole, placement), [[0, 0, 1333, 749]], rtol=1e-7)


def test_boxes_are_clipped_to_the_source():
    placement = Placement((100, 200), (50, 100))
    clipped = boxes_to_source(np.array([[-5, -5, 120, 60]], np.float32), placement)
    assert clipped.tolist() == [[0, 0, 200, 100]]
    assert boxes_to_source(np.zeros((0, 4), np.float32), placement).shape == (0, 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("size", [(60, 80), (20, 30), (48, 64), (1, 1), (1, 5000), (3000, 2)])
def test_to_canvas_fills_the_corner_and_zeroes_the_rest(size, dtype):
    frame = np.random.default_rng(1).integers(1, 256, (*size, 3), dtype=np.uint8)
    placement = place(size, (48, 64), ResizeRule(shorter_side=40))
    out = np.full((48, 64, 3), 77, dtype)
    to_canvas(frame, placement, out)
    height, width = placement.valid
    expected = cv2.resize(frame.astype(dtype), (width, height), interpolation=cv2.INTER_LINEAR)
    # In float the sampling places are PyTorch's, computed in single precision.
    np.testing.assert_allclose(out[:height, :width], expected, rtol=0, atol=0 if dtype == np.uint8 else 0.02)
    assert not out[height:].any()
    assert not out[:, width:].any()


def test_the_float_canvas_keeps_fractions():
    frame = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8).repeat(2, axis=0)
    out = np.zeros((7, 7, 3), np.float32)
    to_canvas(frame, place((2, 2), (7, 7), ResizeRule()), out)
    assert (out % 1 != 0).any()


@pytest.mark.parametrize(
    "view",
    [
        lambda f: f[:, ::-1],
        lambda f: f[::-1],
        lambda f: f[..., ::-1],
        lambda f: f[5:30, 7:50],
        lambda f: f[::2, ::3],
        lambda f: np.asfortranarray(f),
        lambda f: np.broadcast_to(f[:1, :1], f.shape),
    ],
)
def test_any_memory_layout_gives_the_same_canvas(picture, view):
    frame = view(picture)
    placement = place(frame.shape[:2], (48, 64), ResizeRule())
    from_view, from_copy = np.zeros((2, 48, 64, 3), np.uint8)
    to_canvas(frame, placement, from_view)
    to_canvas(np.array(frame, order="C"), placement, from_copy)
    np.testing.assert_array_equal(from_view, from_copy)


@pytest.mark.parametrize(("canvas", "runs"), [(None, [[0, 1, 4], [2], [3], [5]]), ((64, 128), [[*range(6)]])])
def test_which_frames_share_a_canvas(contract, canvas, runs):
    sides = [(40, 60), (64, 33), (65, 33), (64, 65), (50, 40), (30, 30)]  # on 64x64, 96x64, 64x96 and 32x32
    frames = [np.zeros((*size, 3), np.uint8) for size in sides]
    contract = dataclasses.replace(contract, canvas=canvas)
    assert by_canvas(contract, frames) == runs
    assert by_canvas(contract, []) == []


@pytest.mark.parametrize(
    ("canvas", "told"),
    [
        (5, "canvas is 5; expected (height, width)"),
        ("64x96", "canvas is '64x96'; expected (height, width)"),
        (np.array([64, 96]), "expected (height, width)"),
        ((64, 96, 3), "expected (height, width)"),
        ((64, 100), "canvas is (64, 100); expected a height and a width that are multiples of 32"),
        ((0, 96), "multiples of 32"),
        ((64.0, 96), "multiples of 32"),
        ((1 << 20, 1 << 20), "canvas is 1048576x1048576; expected at most"),
    ],
    ids=str,
)
def test_a_canvas_that_no_model_is_held_to(contract, canvas, told):
    free = dataclasses.replace(contract, canvas=None)
    with pytest.raises(SettingsError, match=re.escape(told)):
        held_to(free, canvas, None)


def test_a_free_model_is_held_to_a_canvas_and_another_rule(contract):
    free = dataclasses.replace(contract, canvas=None)
    assert held_to(free, [64, 96], None).canvas == (64, 96)
    held = held_to(free, None, ResizeRule(100, padding=1))
    assert held.canvas is None
    assert held.resize == ResizeRule(100, padding=32)  # what the network needs stays
    fixed = dataclasses.replace(contract, canvas=(64, 96))
    assert held_to(fixed, None, None) is fixed
    with pytest.raises(SettingsError, match=r"made for one canvas, \(64, 96\)"):
        held_to(fixed, (64, 96), None)
    with pytest.raises(SettingsError, match=r"resize is 100; expected ResizeRule"):
        held_to(fixed, None, 100)


@pytest.mark.parametrize(
    ("sizes", "remedy"),
    [
        ([(1, 9000)], "bound the resize rule's longer side"),
        ([(9000, 1), (1, 90)], "give frames of like shapes"),
    ],
)
def test_a_canvas_of_more_pixels_than_images_may_have(contract, sizes, remedy):
    free = dataclasses.replace(contract, canvas=None, resize=ResizeRule(800))
    with pytest.raises(
        FrameError, match=rf"would need a canvas of .*; {remedy}, or set ANCHORLINE_MAX_PIXELS="
    ):
        canvas_of(free, [place(size, None, free.resize) for size in sizes])


def test_pixels_and_boxes_move_together():
    """An edge in the picture lands where the box transform says it does."""
    frame = np.zeros((90, 120, 3), np.uint8)
    frame[30:60, 40:90] = 255
    placement = place((90, 120), (45, 64), ResizeRule())
    out = np.zeros((45, 64, 3), np.uint8)
    to_canvas(frame, placement, out)
    x1, y1, x2, y2 = boxes_to_canvas(np.array([[40, 30, 90, 60]], np.float32), placement)[0]
    rows, columns = np.nonzero(out[..., 0] > 127)
    assert abs(rows.min() - y1) <= 0.5
    assert abs(rows.max() + 1 - y2) <= 0.5
    assert abs(columns.min() - x1) <= 0.5
    assert abs(columns.max() + 1 - x2) <= 0.5


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 90), st.integers(1, 90))
def test_a_float_resize_mixes_the_nearest_pixels(height, width, rows, columns):
    """Worked in double precision: half-pixel centres, edges repeated; nothing is rounded to grey levels."""
    frame = np.random.default_rng(height * 41 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = np.empty((rows, columns, 3), np.float32)
    resize_float(frame, out)

    def weights(source, target):
        places = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(source)))

    tall = np.tensordot(weights(height, rows), frame.astype(np.float64), axes=(1, 0))
    expected = np.tensordot(tall, weights(width, columns), axes=(1, 1)).transpose(0, 2, 1)
    np.testing.assert_allclose(out, expected, atol=0.01)
