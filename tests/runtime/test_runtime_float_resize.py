"""The float resize against the formula written out, to the last bit, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest

from anchorline.runtime.resize import _taps, resize_float


def plain(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """All rows mixed first, then the columns."""
    upper, lower, down = _taps(frame.shape[0], height)
    left, right, across = _taps(frame.shape[1], width)
    values = frame.astype(np.float32)
    rows = (values[lower] - values[upper]) * down[:, None, None] + values[upper]
    return rows[:, left] + (rows[:, right] - rows[:, left]) * across[:, None]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((1080, 1920), (288, 512)),
        ((60, 80), (100, 133)),
        ((7, 9), (33, 5)),
        ((1, 1), (3, 100)),
        ((64, 64), (32, 32)),
        ((50, 3), (31, 40000)),  # beyond what cv2.remap can address
        ((5, 40000), (4, 77)),
        ((40000, 3), (65, 7)),
    ],
)
def test_to_the_last_bit(source, target):
    frame = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    canvas = np.full((target[0] + 3, target[1] + 2, 3), np.nan, np.float32)
    resize_float(frame, canvas[: target[0], : target[1]])
    np.testing.assert_array_equal(canvas[: target[0], : target[1]], plain(frame, *target))
    assert np.isnan(canvas[target[0] :]).all()
    assert np.isnan(canvas[: target[0], target[1] :]).all()


def test_a_view_of_a_larger_frame():
    frame = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)[3:33, 5:50]
    out = np.empty((21, 33, 3), np.float32)
    resize_float(frame, out)
    np.testing.assert_array_equal(out, plain(np.ascontiguousarray(frame), 21, 33))
