"""COCO's figures by size: equal to pycocotools, and cases with a known answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorline.data.dataset import Dataset
from anchorline.data.summary import in_size_class, size_class_counts
from anchorline.evaluation.evaluation import report_detections
from anchorline.evaluation.metrics import coco_figures
from anchorline.runtime.detections import Detections

BACKENDS = ("faster-coco-eval", "pycocotools")
SIZES = ("all", "small", "medium", "large")


def _scaled(results: Any, seed: int) -> tuple[list[Any], list[Detections]]:
    """The random results at 1, 3 or 6 times their size, so that every size class occurs."""
    rng = np.random.default_rng(seed)
    images, detections = [], []
    for image, found in zip(*results, strict=True):
        scale = rng.choice([1, 3, 6])
        images.append(dataclasses.replace(image, boxes=image.boxes * np.float32(scale)))
        detections.append(Detections(found.boxes * scale, found.scores, found.labels))
    return images, detections


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_pycocotools_on_files(
    random_results: Callable[..., Any],
    pycocotools_on_files: Callable[..., Any],
    tmp_path: Path,
    seed: int,
    backend: Any,
) -> None:
    images, detections = _scaled(random_results(seed, count=30), seed)
    evaluation = pycocotools_on_files(images, detections, tmp_path)
    figures = coco_figures(images, detections, 3, backend)
    assert tuple(figures) == SIZES
    for size, expected in zip(SIZES, evaluation.stats[[0, 3, 4, 5]], strict=True):
        assert expected > 0
        assert np.nanmean(figures[size].ap) == pytest.approx(expected, abs=1e-6)
    assert np.nanmean(figures["all"].ap50) == pytest.approx(evaluation.stats[1], abs=1e-6)
    precision = evaluation.eval["precision"]  # [IoU, recall, class, area, detections]
    for area, size in enumerate(SIZES):
        for label in range(3):
            assert figures[size].ap[label] == pytest.approx(precision[:, :, label, area, 2].mean(), abs=1e-6)
            assert figures[size].ap50[label] == pytest.approx(
                precision[0, :, label, area, 2].mean(), abs=1e-6
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_by_hand(make_image: Callable[..., Any], backend: Any) -> None:
    small, medium, large = [0, 0, 20, 20], [100, 0, 150, 50], [200, 0, 300, 100]
    images = [make_image([small, medium, large])]
    # The small one is found, the medium one only loosely (IoU 0.72), the large one missed; a false
    # detection of medium size, more certain than the others, costs the medium ones precision alone.
    found = Detections([[0, 0, 20, 20], [100, 0, 150, 36], [0, 200, 50, 250]], [0.8, 0.7, 0.9], [0, 0, 0])
    figures = coco_figures(images, [found], 1, backend)
    assert (figures["small"].ap50, figures["small"].ap) == ([pytest.approx(1.0)], [pytest.approx(1.0)])
    assert figures["medium"].ap50 == [pytest.approx(0.5)]
    assert figures["medium"].ap == [pytest.approx(0.25)]  # five of ten thresholds
    assert figures["large"].ap50 == [0.0]
    # All of them: recall 1/3 and 2/3 at precision 1/2 and 2/3, so 2/3 up to recall 0.66 (67 of 101 points).
    assert figures["all"].ap50 == [pytest.approx(67 / 101 * 2 / 3)]


def test_the_report_by_size(make_image: Callable[..., Any]) -> None:
    boxes = [[0, 0, 20, 20], [100, 0, 150, 50], [200, 0, 232, 32], [0, 100, 10, 110]]
    images = (make_image(boxes, [0, 1, 1, 0], difficult=[False, False, False, True]), make_image())
    found = Detections(boxes[:2], [0.9, 0.8], [0, 1])
    data = Dataset("two", ("a", "b"), images)
    report = report_detections([found, Detections.empty()], data, "cpu")
    small, medium, large = (report.per_size[size] for size in SIZES[1:])
    # 32 x 32 pixels are small and medium; the difficult object counts nowhere.
    assert {name: each.objects for name, each in small.per_class.items()} == {"a": 1, "b": 1}
    assert {name: each.objects for name, each in medium.per_class.items()} == {"a": 0, "b": 2}
    assert (small.objects, medium.objects, large.objects) == (2, 2, 0)
    assert small.map50 == pytest.approx(0.5)
    assert np.isnan(medium.per_class["a"].ap)
    assert medium.map50 == medium.per_class["b"].ap50 == pytest.approx(51 / 101)
    assert np.isnan(large.map)


def test_size_classes() -> None:
    areas = np.array([0.5, 1023.9, 1024.0, 9215.9, 9216.0, 1e9])
    assert size_class_counts(areas) == {"small": 2, "medium": 2, "large": 2}
    assert in_size_class(areas, "small").tolist() == [True, True, True, False, False, False]
    assert in_size_class(areas, "medium").tolist() == [False, False, True, True, True, False]
    assert in_size_class(areas, "large").tolist() == [False, False, False, False, True, True]
