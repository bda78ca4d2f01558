"""Matching and the confusion matrix, by hand and by their properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from anchorline.data.dataset import Dataset
from anchorline.evaluation.metrics import confusion_matrix, match_image
from anchorline.runtime.detections import Detections

NAMES = ("cat", "dog", "bird")


def test_confusion_by_hand(make_image: Callable[..., Any]) -> None:
    image = make_image([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]], [0, 0, 1, 2])
    found = Detections(
        [
            [0, 0, 10, 10],  # the first cat
            [0, 0, 10, 9],  # the same again
            [20, 0, 30, 10],  # the second cat as a dog
            [40, 0, 50, 4.9],  # the dog, too loosely
            [60, 0, 70, 10],  # the bird, too uncertain
            [80, 80, 90, 90],  # a bird out of nothing
        ],
        [0.9, 0.8, 0.7, 0.6, 0.49, 0.5],
        [0, 0, 1, 1, 2, 2],
    )
    confusion = confusion_matrix(Dataset("one", NAMES, (image,)), [found])
    assert confusion.counts.tolist() == [
        [1, 1, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 1],
        [1, 1, 1, 0],
    ]
    written = confusion.to_json()
    assert written["names"] == ["cat", "dog", "bird", "background"]
    assert written["counts"][0] == [1, 1, 0, 0]
    assert (written["min_score"], written["iou_threshold"]) == (0.5, 0.5)
    lenient = confusion_matrix(Dataset("one", NAMES, (image,)), [found], min_score=0.4, iou_threshold=0.45)
    assert lenient.counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0]]


def test_an_iou_and_a_score_of_exactly_the_threshold_count(make_image: Callable[..., Any]) -> None:
    image = make_image([[0, 0, 10, 10]], [0])
    matches = match_image(image, Detections([[0, 0, 10, 5]], [0.5], [0]), min_score=0.5)
    assert matches.pairs.tolist() == [[0, 0]]


def test_the_better_overlap_wins_and_the_own_class_among_equals(make_image: Callable[..., Any]) -> None:
    image = make_image([[0, 0, 10, 10], [2, 0, 12, 10], [0, 0, 10, 10]], [0, 1, 2])
    found = Detections([[0, 0, 10, 10], [2, 0, 12, 10], [0, 0, 10, 10]], [0.9, 0.8, 0.7], [2, 0, 1])
    any_class = match_image(image, found, 0.5, any_class=True)
    assert any_class.pairs.tolist() == [[0, 2], [1, 1], [2, 0]]
    own_class = match_image(image, found, 0.5)
    assert own_class.pairs.tolist() == [[0, 2], [1, 0], [2, 1]]


def test_the_best_scored_takes_the_object(make_image: Callable[..., Any]) -> None:
    image = make_image([[0, 0, 10, 10]])
    found = Detections([[0, 0, 10, 10], [0, 0, 10, 8]], [0.6, 0.9], [0, 0])
    matches = match_image(image, found, 0.5)
    assert matches.pairs.tolist() == [[1, 0]]
    assert matches.false_positives.tolist() == [0]


def test_difficult_and_crowd_objects_count_neither_way(make_image: Callable[..., Any]) -> None:
    image = make_image(
        [[0, 0, 10, 10], [20, 20, 80, 80], [0, 90, 10, 100]],
        [0, 0, 1],
        difficult=[True, False, False],
        crowd=[False, True, False],
    )
    found = Detections(
        # on the difficult one; inside the crowd; half inside; a third inside; another class in the crowd
        [[0, 0, 10, 9], [30, 30, 40, 40], [15, 30, 25, 40], [13, 50, 23, 60], [50, 50, 60, 60]],
        [0.9, 0.8, 0.7, 0.6, 0.55],
        [0, 0, 0, 0, 1],
    )
    own_class = match_image(image, found, 0.5)
    assert own_class.pairs.shape == (0, 2)
    assert own_class.missed.tolist() == [2]
    assert own_class.false_positives.tolist() == [3, 4]
    assert match_image(image, found, 0.5, any_class=True).false_positives.tolist() == [3]


@pytest.mark.parametrize("seed", range(5))
def test_every_object_and_detection_is_counted_once(random_results: Callable[..., Any], seed: int) -> None:
    images, detections = random_results(seed, count=20)
    confusion = confusion_matrix(Dataset("random", NAMES, tuple(images)), detections, min_score=0.3)
    counted = [image.labels[~image.difficult] for image in images]
    np.testing.assert_array_equal(confusion.counts[:-1].sum(axis=1), np.bincount(np.concatenate(counted)))
    detected = np.concatenate([each.labels[each.scores >= np.float32(0.3)] for each in detections])
    left_out = np.bincount(detected) - confusion.counts[:, :-1].sum(axis=0)
    assert (left_out >= 0).all()
    on_difficult = sum(int(image.difficult.sum()) for image in images)
    assert 0 < left_out.sum() <= 4 * on_difficult  # at most two copies near each, and some that overlap
    assert confusion.counts[-1, -1] == 0


def test_empty_images(make_image: Callable[..., Any]) -> None:
    found = Detections([[0, 0, 10, 10]], [0.9], [2])
    data = Dataset("empty", NAMES, (make_image(), make_image(), make_image([[0, 0, 9, 9]], [1])))
    counts = confusion_matrix(data, [found, Detections.empty(), Detections.empty()]).counts
    assert counts.sum() == 2
    assert counts[3, 2] == counts[1, 3] == 1
