"""The antialiased resize against Pillow itself, to the last bit, and against weights worked by hand."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from anchorline.runtime.canvas import place, to_canvas
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.resize import _blocks, resize_antialiased

SIDES = st.integers(1, 90)
PILLOW = int(PIL.__version__.split(".")[0])


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pillow(frame: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """One call of Pillow 13; two of an earlier one, which never goes down first, where 13 does."""
    rows, columns = frame.shape[:2]
    if PILLOW < 13 and rows > height and rows - height > 2 * (columns - width):
        return resized(frame, (height, columns), (height, width))
    return resized(frame, (height, width))


def resized(frame: NDArray[np.uint8], *sizes: tuple[int, int]) -> NDArray[np.uint8]:
    picture = Image.fromarray(frame)
    for height, width in sizes:
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def ours(frame: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    out = np.empty((height, width, 3), np.uint8)
    assert resize_antialiased(frame, out) is out
    return out


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((480, 640), (800, 1067)),
        ((427, 640), (800, 1199)),
        ((1080, 1920), (750, 1333)),
        ((360, 640), (180, 320)),
        ((700, 90), (533, 69)),  # tall and shrinking: down first
        ((3000, 200), (1333, 89)),
        ((201, 100), (101, 50)),  # loses 100 rows and 50 columns: across first
        ((203, 100), (102, 50)),  # loses 101 and 50: down first
        ((90, 60), (70, 80)),
        ((7, 9), (33, 5)),
        ((1, 1), (3, 100)),
        ((1, 50), (9, 450)),
        ((50, 1), (450, 9)),
        ((3, 70000), (3, 1)),  # so many taps that each weight has one or two digits
        ((3, 70000), (2, 9)),
        ((40000, 3), (65, 7)),
        ((33, 640), (33, 641)),  # only across
        ((640, 33), (639, 33)),  # only down
        ((48, 64), (48, 64)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_to_the_last_bit(source: tuple[int, int], target: tuple[int, int], seed: int) -> None:
    frame = noise(*source, seed)
    np.testing.assert_array_equal(ours(frame, *target), pillow(frame, *target))


@pytest.mark.parametrize(
    ("source", "target", "down_first"),
    [
        ((700, 90), (533, 69), True),
        ((90, 700), (69, 533), False),
        ((201, 100), (101, 50), False),
        ((203, 100), (102, 50), True),
        ((90, 60), (70, 80), True),
        ((60, 90), (80, 70), False),
    ],
)
def test_which_way_first(source: tuple[int, int], target: tuple[int, int], down_first: bool) -> None:
    """Pillow 13's condition as a table, on any Pillow: rows lost > 0 and rows lost > 2 * columns lost."""
    frame = noise(*source)
    first, other = (target[0], source[1]), (source[0], target[1])
    if not down_first:
        first, other = other, first
    np.testing.assert_array_equal(ours(frame, *target), resized(frame, first, target))
    assert (ours(frame, *target) != resized(frame, other, target)).any()


@given(
    SIDES, SIDES, SIDES, SIDES, st.sampled_from([(0, 255), (250, 255), (0, 1), (127, 128)]), st.integers(0, 9)
)
@settings(max_examples=300, deadline=None)
def test_any_sizes(
    height: int, width: int, rows: int, columns: int, levels: tuple[int, int], seed: int
) -> None:
    """Few grey levels make many sums that lie just beside a half."""
    frame = np.random.default_rng(seed).choice(np.array(levels, np.uint8), (height, width, 3))
    np.testing.assert_array_equal(ours(frame, rows, columns), pillow(frame, rows, columns))


@given(st.integers(1, 700), st.integers(1, 700))
@settings(max_examples=40, deadline=None)
def test_frames_on_their_canvas_are_what_pillow_gives(height: int, width: int) -> None:
    rule = ResizeRule(96, 160, interpolation="antialiased", rounding="nearest")
    placement = place((height, width), (160, 160), rule)
    canvas = np.full((160, 160, 3), 9, np.uint8)
    frame = noise(height, width)
    to_canvas(frame, placement, canvas)
    rows, columns = placement.valid
    np.testing.assert_array_equal(canvas[:rows, :columns], pillow(frame, rows, columns))
    assert not canvas[rows:].any()
    assert not canvas[:, columns:].any()


@pytest.mark.parametrize("level", [0, 1, 128, 255])
@pytest.mark.parametrize("target", [1, 3, 40, 300])
def test_one_grey_level_stays(level: int, target: int) -> None:
    frame = np.full((57, 57, 3), level, np.uint8)
    assert (ours(frame, target, target) == level).all()


def test_halving_by_hand() -> None:
    """Of four pixels in a row: the triangle over three and a half of them, 3/7, 3/7 and 1/7."""
    frame = np.array([[[70, 0, 7], [0, 70, 7], [0, 0, 7], [0, 7, 7]]], np.uint8)
    assert ours(frame, 1, 2).tolist() == [[[30, 30, 7], [0, 13, 7]]]


def test_doubling_by_hand() -> None:
    """Three quarters of the nearer pixel and a quarter of the other; at the edge the pixel itself."""
    frame = np.array([[[0] * 3], [[100] * 3]], np.uint8)
    assert ours(frame, 4, 1)[:, 0, 0].tolist() == [0, 25, 75, 100]


def test_a_float_canvas_holds_the_same_whole_grey_levels() -> None:
    frame = noise(60, 80)
    canvas = np.full((50, 60, 3), np.nan, np.float32)
    resize_antialiased(frame, canvas[:45, :59])
    np.testing.assert_array_equal(canvas[:45, :59], pillow(frame, 45, 59))
    assert np.isnan(canvas[45:]).all()
    assert np.isnan(canvas[:, 59:]).all()


@pytest.mark.parametrize("view", [lambda f: f[:, ::-1], lambda f: f[::2, ::3], lambda f: f[..., ::-1]])
def test_any_memory_layout(view) -> None:
    frame = view(noise(61, 83))
    placement = place(frame.shape[:2], (48, 64), ResizeRule(interpolation="antialiased"))
    canvas = np.empty((48, 64, 3), np.uint8)
    to_canvas(frame, placement, canvas)
    rows, columns = placement.valid
    np.testing.assert_array_equal(canvas[:rows, :columns], pillow(np.ascontiguousarray(frame), rows, columns))


@given(st.integers(1, 4000), st.integers(1, 4000))
@settings(deadline=None)
def test_the_halves_of_the_weights_are_exact(source: int, target: int) -> None:
    """The promise behind float32: whole numbers, whose sums with grey levels stay below 2**24."""
    for _, _, weights in _blocks(source, target):
        high, low = np.split(weights.astype(np.float64), 2)
        assert (high == np.floor(high)).all()
        assert (low == np.floor(low)).all()
        assert ((low >= 0) & (low < 2**11)).all()
        total = (high * 2**11 + low).sum(axis=1)
        np.testing.assert_allclose(total, 2**22, atol=weights.shape[1])
        if weights.dtype == np.float32:
            assert 255 * high.sum(axis=1).max() + 2**10 + 255 < 2**24
            assert 255 * low.sum(axis=1).max() < 2**24
