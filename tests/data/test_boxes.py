"""Box geometry of the evaluation against pycocotools and by its properties."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anchorline.data.boxes import clip_labelled_boxes, iou_matrix

_coordinates = st.floats(-50, 150, width=32)


def _boxes(count: int) -> st.SearchStrategy[np.ndarray]:
    raw = arrays(np.float64, (count, 4), elements=_coordinates)
    return raw.map(lambda a: np.sort(a.reshape(-1, 2, 2), axis=1).reshape(-1, 4))


@given(a=_boxes(3), b=_boxes(4))
def test_iou_equals_pycocotools(a: np.ndarray, b: np.ndarray) -> None:
    from pycocotools.mask import iou

    def as_xywh(boxes: np.ndarray) -> np.ndarray:
        return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)

    expected = iou(as_xywh(a), as_xywh(b), [0] * len(b))
    both_areas = (a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1)[None]
    defined = both_areas > 1e-9  # pycocotools divides 0 by 0
    np.testing.assert_allclose(iou_matrix(a, b)[defined], np.asarray(expected)[defined], atol=1e-6)
    np.testing.assert_array_equal(iou_matrix(a, b), iou_matrix(b, a).T)


def test_iou_of_nothing() -> None:
    assert iou_matrix(np.zeros((0, 4)), np.zeros((3, 4))).shape == (0, 3)
    assert iou_matrix(np.array([[5.0, 5, 5, 5]]), np.array([[5.0, 5, 5, 5]])).tolist() == [[0.0]]


@given(boxes=arrays(np.float64, (5, 4), elements=_coordinates))
def test_kept_boxes_lie_inside_and_the_rest_is_counted(boxes: np.ndarray) -> None:
    clipped, kept, dropped = clip_labelled_boxes(boxes, (60, 80))
    assert len(clipped) == kept.sum()
    assert len(boxes) - len(clipped) == dropped.total()
    assert (clipped >= 0).all()
    assert (clipped[:, 2:] > clipped[:, :2]).all()
    assert (clipped[:, [0, 2]] <= 80).all()
    assert (clipped[:, [1, 3]] <= 60).all()
    inside = np.array([(b[:2] >= 0).all() and b[2] <= 80 and b[3] <= 60 for b in boxes[kept]], dtype=bool)
    np.testing.assert_array_equal(clipped[inside], boxes[kept][inside].astype(np.float32))
