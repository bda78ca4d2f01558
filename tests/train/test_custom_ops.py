"""The custom ops in eager PyTorch: NMS against a plain greedy reference, RoIAlign against torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from anchorline.train.model import ops

Floats = NDArray[np.float32]


def greedy_nms(boxes: Floats, scores: Floats, iou_threshold: float, score_threshold: float) -> Floats:
    """One group, as the design defines it: float32 throughout, IoU = inter / union, suppressed above."""
    limit, kept, result = np.float32(iou_threshold), list[int](), np.full_like(scores, -1.0)
    with np.errstate(all="ignore"):
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        area = width * height
        counts = (scores > np.float32(score_threshold)) & (width > 0) & (area > 0) & np.isfinite(area)
        for i in np.flatnonzero(counts):
            top_left = np.maximum(boxes[kept, :2], boxes[i, :2])
            size = np.maximum(np.minimum(boxes[kept, 2:], boxes[i, 2:]) - top_left, np.float32(0))
            inter = size[:, 0] * size[:, 1]
            if not (inter / (area[kept] + area[i] - inter) > limit).any():
                kept.append(int(i))
                result[i] = scores[i]
    return result


def check_nms(boxes: Floats, scores: Floats, iou_threshold: float, score_threshold: float) -> Floats:
    """``batched_nms`` equals the reference group by group; returns its result [G, N]."""
    found = ops.batched_nms(
        torch.from_numpy(boxes),
        torch.from_numpy(scores),
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
    ).numpy()
    for group in range(len(scores)):
        expected = greedy_nms(boxes[group], scores[group], iou_threshold, score_threshold)
        np.testing.assert_array_equal(found[group], expected)
    return found


# Boxes on a coarse grid meet in exact ties of the IoU; some are points, lines or reversed.
coordinate = st.integers(0, 12)
box = st.tuples(coordinate, coordinate, coordinate, coordinate)
entry = st.tuples(box, st.sampled_from([-1.0, 0.0, 0.05, 0.3, 0.3, 0.9, float("nan")]), st.booleans())


@settings(max_examples=150, deadline=None)
@given(
    entries=st.lists(entry, min_size=1, max_size=14),
    iou_threshold=st.sampled_from([0.0, 0.3, 0.5, 0.6, 0.7, 1.0]),
    score_threshold=st.sampled_from([-1.0, 0.0, 0.05]),
)
def test_nms_equals_the_greedy_reference(
    entries: list[tuple[tuple[int, ...], float, bool]], iou_threshold: float, score_threshold: float
) -> None:
    boxes = np.array([[b for b, _, _ in entries]], np.float32)
    ordered = [score for _, score, _ in sorted(entries, key=lambda e: -np.nan_to_num(e[1]))]
    scores = np.array(
        [[-1.0 if absent else s for s, (_, _, absent) in zip(ordered, entries, strict=True)]], np.float32
    )
    check_nms(boxes, scores, iou_threshold, score_threshold)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_random_and_clustered_groups(threshold: float) -> None:
    random = np.random.default_rng(0)
    centre = random.uniform(0, 200, (4, 60, 2))
    centre[2:] = random.uniform(0, 200, (2, 5, 2)).repeat(12, axis=1) + random.normal(0, 3, (2, 60, 2))
    half = random.uniform(5, 30, (4, 60, 2))
    boxes = np.concatenate((centre - half, centre + half), axis=2).astype(np.float32)
    scores = -np.sort(-random.uniform(0, 1, (4, 60)).astype(np.float32), axis=1)
    found = check_nms(boxes, scores, threshold, 0.05)
    kept = (found >= 0).sum(axis=1)
    assert (kept[2:] < kept[:2].min()).all(), "clusters leave fewer boxes than scattered ones"


@pytest.mark.parametrize(
    ("threshold", "kept"), [(0.3, [True, True]), (0.6, [True, True]), (0.5, [True, False])]
)
def test_an_iou_at_the_threshold_is_kept(threshold: float, kept: list[bool]) -> None:
    """Boxes of IoU exactly 3/10 and 6/10 (in float32); torchvision alone, in double, would drop both."""
    width = 10 * threshold if threshold != 0.5 else 6
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 4.0], [0.0, 0.0, width, 4.0]]])
    scores = torch.tensor([[0.9, 0.8]])
    found = ops.batched_nms(boxes, scores, iou_threshold=threshold, score_threshold=0.0)
    assert (found[0] >= 0).tolist() == kept


def test_boxes_that_are_no_boxes_neither_count_nor_suppress() -> None:
    nan, inf = np.nan, np.inf
    bad = [
        (nan, 0, 10, 10), (0, 0, nan, 10), (0, nan, 10, 10), (nan,) * 4,
        (-inf, -inf, inf, inf), (0, 0, inf, 10), (inf, inf, inf, inf), (0, 0, 3e38, 3e38),
        (10, 10, 0, 0), (10, 0, 0, 10), (0, 10, 10, 0), (0, 0, 0, 10), (5, 5, 5, 5), (0, 0, 1e-30, 1e-30),
    ]  # fmt: skip
    boxes = np.array([[*bad, (0, 0, 10, 10), (0, 0, 9.9, 10)]], np.float32)
    scores = np.linspace(0.9, 0.2, boxes.shape[1], dtype=np.float32)[None]
    found = check_nms(boxes, scores, 0.5, 0.0)
    assert (found[0] > 0).tolist() == [False] * len(bad) + [True, False]


def test_scores_that_do_not_count_may_stand_anywhere() -> None:
    boxes = np.tile(np.array([[0, 0, 10, 10]], np.float32), (1, 6, 1))
    boxes[0, 4] += 50
    scores = np.array([[np.nan, -1.0, 0.8, np.nan, 0.7, 0.05]], np.float32)
    found = check_nms(boxes, scores, 0.5, 0.05)
    assert found.tolist() == [[-1.0, -1.0, np.float32(0.8), -1.0, np.float32(0.7), -1.0]]


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 300)])
def test_awkward_shapes(shape: tuple[int, int]) -> None:
    boxes = np.tile(np.array([0, 0, 5, 5], np.float32), (*shape, 1))
    assert (check_nms(boxes, np.full(shape, 0.5, np.float32), 0.5, 0.0) > 0).sum(axis=1).tolist() == [
        1
    ] * shape[0]
    assert (check_nms(boxes, np.full(shape, -1.0, np.float32), 0.5, 0.0) == -1).all()


def test_a_chain_of_overlaps_keeps_every_second_box() -> None:
    """Each box suppresses the next only: greedy, not all at once."""
    left = np.arange(30, dtype=np.float32) * 3
    boxes = np.stack((left, left * 0, left + 10, left * 0 + 10), axis=1)[None]
    scores = np.linspace(0.9, 0.1, 30, dtype=np.float32)[None]
    found = check_nms(boxes, scores, 0.5, 0.0)
    assert (found[0] > 0).tolist() == [True, False] * 15


def rois_on(height: int, width: int, images: int, count: int) -> torch.Tensor:
    corner = torch.rand(images, count, 2) * torch.tensor([width, height]) - 1
    return torch.cat((corner, corner + torch.rand(images, count, 2) * 12), dim=2)


@pytest.mark.parametrize(("size", "sampling"), [(7, 2), (1, 1), (14, 3)])
def test_roi_align_equals_torchvisions(size: int, sampling: int) -> None:
    features, rois = torch.randn(3, 4, 20, 30), rois_on(20, 30, 3, 11)
    found = ops.roi_align(features, rois, output_size=size, sampling_ratio=sampling)
    expected = torchvision.ops.roi_align(features, list(rois), size, 1.0, sampling, aligned=True)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_keep_exact_coordinates(dtype: torch.dtype) -> None:
    """Training under autocast: bfloat16 knows no coordinate between 150 and 151."""
    features = torch.randn(1, 4, 160, 200).to(dtype)
    rois = rois_on(160, 200, 1, 40)
    found = ops.roi_align(features, rois, output_size=7, sampling_ratio=2)
    assert found.dtype == dtype
    expected = torchvision.ops.roi_align(features.float(), list(rois), 7, 1.0, 2, aligned=True)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = ops.roi_align(features, rois, output_size=7, sampling_ratio=2)
    torch.testing.assert_close(again.float(), expected, rtol=1e-2, atol=1e-2)
