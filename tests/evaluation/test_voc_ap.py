"""VOC average precision: a table worked by hand, and a plain second implementation."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from anchorline.evaluation.metrics import average_precision, voc_curves
from anchorline.runtime.detections import Detections


def test_hand_worked_table() -> None:
    truth = [np.array([[0, 0, 10, 10], [20, 20, 30, 30]]), np.array([[0, 0, 10, 10], [50, 50, 60, 60]])]
    ignored = [np.array([False, False]), np.array([False, True])]
    boxes = [
        # right; the same object again; nothing there; an IoU of exactly one half
        np.array([[0, 0, 10, 10], [0, 0, 10, 11], [70, 70, 80, 80], [20, 20, 30, 25]]),
        np.array([[50, 50, 60, 61], [0, 0, 10, 10]]),  # a difficult object; right
    ]
    scores = [np.array([0.9, 0.8, 0.5, 0.4]), np.array([0.7, 0.6])]
    curve = average_precision(truth, ignored, boxes, scores)
    assert curve.objects == 3
    np.testing.assert_allclose(curve.precision, [1, 1 / 2, 2 / 3, 1 / 2, 3 / 5])
    np.testing.assert_allclose(curve.recall, [1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])
    np.testing.assert_allclose(curve.scores, [0.9, 0.8, 0.6, 0.5, 0.4])
    assert curve.area == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert curve.eleven_point == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11)


def test_each_detection_looks_at_its_best_object_only() -> None:
    # As in the devkit: the second box overlaps B by 0.54, but A more, and A is taken.
    truth = [np.array([[0, 0, 10, 10], [3, 0, 13, 10]])]
    boxes = [np.array([[0, 0, 10, 10], [0.5, 0, 10.5, 10]])]
    curve = average_precision(truth, [np.array([False, False])], boxes, [np.array([0.9, 0.8])])
    assert curve.recall.tolist() == [0.5, 0.5]


def test_three_of_ten_is_a_recall_of_three_tenths() -> None:
    truth = [np.array([[20.0 * i, 0, 20 * i + 10, 10] for i in range(10)])]
    curve = average_precision(truth, [np.zeros(10, bool)], [truth[0][:3]], [np.array([0.9, 0.8, 0.7])])
    assert curve.eleven_point == pytest.approx(4 / 11)


def test_nothing_to_find_and_nothing_found() -> None:
    none, one = np.zeros((0, 4)), np.array([[0.0, 0, 1, 1]])
    nothing = average_precision([none], [np.zeros(0, bool)], [one], [np.ones(1)])
    assert np.isnan(nothing.area)
    assert np.isnan(nothing.eleven_point)
    only_difficult = average_precision([one], [np.ones(1, bool)], [one], [np.ones(1)])
    assert np.isnan(only_difficult.area)
    missed = average_precision([one], [np.zeros(1, bool)], [none], [np.zeros(0)])
    assert (missed.area, missed.eleven_point, missed.objects) == (0.0, 0.0, 1)
    assert average_precision([], [], [], []).objects == 0


@pytest.mark.parametrize("seed", range(8))
def test_equals_a_plain_implementation(random_results: Callable[..., Any], seed: int) -> None:
    images, detections = random_results(seed)
    for label, curve in enumerate(voc_curves(images, detections, 3)):
        area, eleven = _plain_average_precision(images, detections, label)
        assert curve.area == pytest.approx(float(area))
        assert curve.eleven_point == pytest.approx(float(eleven))


def test_the_order_of_detections_does_not_matter(random_results: Callable[..., Any]) -> None:
    images, detections = random_results(3)
    rng = np.random.default_rng(0)
    # Distinct scores: ties are decided by order, in the devkit as well.
    distinct = [Detections(d.boxes, rng.random(len(d)), d.labels) for d in detections]
    shuffled = [d[rng.permutation(len(d))] for d in distinct]
    before, after = voc_curves(images, distinct, 3), voc_curves(images, shuffled, 3)
    assert [curve.area for curve in before] == [curve.area for curve in after]


def _plain_average_precision(images: Any, detections: Any, label: int) -> tuple[Fraction, Fraction]:
    """Both averages by their definitions, one detection at a time and in exact fractions."""
    ranked = [
        (-score, number, box)
        for number, each in enumerate(detections)
        for box, score, of in zip(each.boxes.tolist(), each.scores.tolist(), each.labels, strict=True)
        if of == label
    ]
    ranked.sort(key=lambda each: each[0])
    objects = sum(int(((i.labels == label) & ~i.difficult).sum()) for i in images)
    taken: set[tuple[int, int]] = set()
    hits = misses = 0
    points: list[tuple[Fraction, Fraction]] = []
    for _, number, box in ranked:
        image = images[number]
        candidates = [
            (_iou(box, truth), k) for k, truth in enumerate(image.boxes.tolist()) if image.labels[k] == label
        ]
        overlap, best = max(candidates, default=(0.0, -1), key=lambda each: each[0])
        if overlap >= 0.5 and image.difficult[best]:
            continue
        if overlap >= 0.5 and (number, best) not in taken:
            taken.add((number, best))
            hits += 1
        else:
            misses += 1
        points.append((Fraction(hits, objects), Fraction(hits, hits + misses)))

    def best_from(recall: Fraction) -> Fraction:
        return max((p for r, p in points if r >= recall), default=Fraction(0))

    area = sum((best_from(Fraction(k, objects)) for k in range(1, objects + 1)), Fraction(0)) / objects
    return area, sum((best_from(Fraction(k, 10)) for k in range(11)), Fraction(0)) / 11


def _iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0.0) * max(height, 0.0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)
