"""COCO average precision: both packages agree, and cases with a known answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorline.evaluation.metrics import coco_figures
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import SettingsError

BACKENDS = ("faster-coco-eval", "pycocotools")


@pytest.mark.parametrize("seed", range(4))
def test_the_two_packages_agree(random_results: Callable[..., Any], seed: int) -> None:
    images, detections = random_results(seed)
    faster, original = (coco_figures(images, detections, 3, backend)["all"].ap for backend in BACKENDS)
    np.testing.assert_allclose(faster, original, atol=1e-9)


def test_equals_pycocotools_on_files(
    random_results: Callable[..., Any], pycocotools_on_files: Callable[..., Any], tmp_path: Path
) -> None:
    """The documented way: annotation and result files, ``summarize`` and its first figure."""
    images, detections = random_results(11)
    evaluation = pycocotools_on_files(images, detections, tmp_path)
    expected = evaluation.stats[0]
    assert np.mean(coco_figures(images, detections, 3)["all"].ap) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answers(make_image: Callable[..., Any], backend: Any) -> None:
    images = [make_image([[0, 0, 10, 10]], [0]), make_image()]
    none = Detections.empty()
    exact = Detections([[0, 0, 10, 10]], [0.9], [0])
    loose = Detections([[0, 0, 10, 7.2]], [0.9], [0])  # IoU 0.72 passes .50 to .70, five of ten
    assert coco_figures(images, [exact, none], 2, backend)["all"].ap[0] == pytest.approx(1.0)
    assert coco_figures(images, [loose, none], 2, backend)["all"].ap[0] == pytest.approx(0.5)
    assert coco_figures(images, [none, none], 2, backend)["all"].ap[0] == 0.0
    assert np.isnan(coco_figures(images, [exact, none], 2, backend)["all"].ap[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_difficult_and_crowd_objects_do_not_count(make_image: Callable[..., Any], backend: Any) -> None:
    boxes = [[0, 0, 10, 10], [30, 30, 60, 60], [70, 70, 90, 90]]
    images = [make_image(boxes, difficult=[False, True, False], crowd=[False, False, True])]
    found = Detections(boxes, [0.5, 0.9, 0.8], [0, 0, 0])
    assert coco_figures(images, [found], 1, backend)["all"].ap == pytest.approx([1.0])
    assert coco_figures(images, [found[[0]]], 1, backend)["all"].ap == pytest.approx([1.0])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, make_image: Callable[..., Any]) -> None:
    import sys

    images, found = [make_image([[0, 0, 10, 10]], [0])], [Detections([[0, 0, 10, 10]], [0.9], [0])]
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert coco_figures(images, found, 1)["all"].ap == pytest.approx([1.0])  # the other one
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(SettingsError, match="pip install faster-coco-eval"):
        coco_figures(images, found, 1)


def test_nothing_is_printed(make_image: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    images, found = [make_image([[0, 0, 10, 10]], [0])], [Detections([[0, 0, 10, 10]], [0.9], [0])]
    for backend in BACKENDS:
        coco_figures(images, found, 1, backend)  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")
