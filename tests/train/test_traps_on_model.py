"""The traps on a real network: none for the model itself, and a planted leak is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from anchorline.runtime.detections import Detections
from anchorline.train.checkpoint import contract_of
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.predict import TorchDetector
from anchorline.verify.compare import ComparisonSummary, compare_all
from anchorline.verify.traps import TrapResult, run_traps, traps

CLASSES = ("a", "b", "c")


@pytest.fixture
def detector(small_model: Callable[..., FasterRCNN]) -> TorchDetector:
    model = small_model("fpn", len(CLASSES))
    return TorchDetector(model, contract_of(model.settings, CLASSES))


def on_canvas(detector: TorchDetector, found: Sequence[Detections]) -> list[Detections]:
    """Boxes in canvas pixels, the unit in which a network's rounding has one size for all frames."""
    height, width = detector.contract.resize.within
    scales = [min(height / each.size[0], width / each.size[1]) for each in found]
    return [
        Detections(each.boxes * scale, each.scores, each.labels, each.class_names)
        for each, scale in zip(found, scales, strict=True)
    ]


def run(reference: TorchDetector, candidate: object) -> dict[str, TrapResult]:
    """All traps by name, with a batch of 3."""
    thresholds = reference.contract.thresholds

    def compare(ours: list[Detections], theirs: list[Detections]) -> ComparisonSummary:
        cuts = partial(compare_all, nms_iou=thresholds.nms_iou, max_detections=thresholds.max_detections)
        return cuts(on_canvas(reference, ours), on_canvas(reference, theirs))

    return {each.name: each for each in run_traps(traps(3), reference, candidate, compare)}


def test_a_model_falls_into_none_of_its_own(detector: TorchDetector) -> None:
    results = run(detector, detector)
    assert {name: each.detail for name, each in results.items() if not each.passed} == {}
    assert results["crowd"].comparison.total.matched > 10


def test_a_leak_in_the_backbone_is_found(
    detector: TorchDetector, small_model: Callable[..., FasterRCNN]
) -> None:
    model = small_model("fpn", len(CLASSES))

    def leak(module: object, inputs: object, maps: list[Tensor]) -> list[Tensor]:
        return [each + 0.05 * each.roll(1, dims=0) if len(each) > 1 else each for each in maps]

    model.backbone.register_forward_hook(leak)
    results = run(detector, TorchDetector(model, detector.contract))
    assert {name for name, each in results.items() if not each.passed} == {
        "mixed sizes in a batch",
        "largest batch",
    }
    assert " became a " in results["largest batch"].detail


def test_a_drift_below_the_tolerance_is_not_bit_stable(detector: TorchDetector) -> None:
    class Drifting:
        calls = 0

        def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
            self.calls += 1
            drift = np.float32(1e-6 * (self.calls % 3))
            return [
                Detections(each.boxes, each.scores + drift, each.labels, each.class_names, size=each.size)
                for each in detector.batch(frames)
            ]

    results = run(detector, Drifting())
    assert {name for name, each in results.items() if not each.passed} == {"repeated calls"}
