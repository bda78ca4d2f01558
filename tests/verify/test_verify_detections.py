"""Detection by detection on made-up detectors, and what the comparison may excuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import ArtefactError, GpuError
from anchorline.verify.compare import TOLERANCES, compare_detections, summarise
from anchorline.verify.stages import Subject
from anchorline.verify.verification import DetectionCheck, check_detections

FP32, FP16 = TOLERANCES["fp32"], TOLERANCES["fp16"]
CONTRACT = Contract(
    task="detections", names=("cell", "dust"), canvas=(96, 96), mean=(0.0,) * 3, std=(1.0,) * 3
)
BOXES = [[10, 10, 30, 30], [50, 50, 80, 90]]


class Made:
    """A detector that gives each frame ``found``, or raises it."""

    provider, precision = "cpu", "fp32"

    def __init__(self, found: Detections | Exception, contract: Contract = CONTRACT) -> None:
        self.found, self.contract = found, contract

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        if isinstance(self.found, Exception):
            raise self.found
        return [dataclasses.replace(self.found, size=frame.shape[:2]) for frame in frames]


def made(scores: Sequence[float], names: tuple[str, ...] = CONTRACT.names) -> Detections:
    return Detections(BOXES[: len(scores)], scores, [0] * len(scores), names)


@pytest.fixture
def check(make_image: Callable[..., LabelledImage]) -> Callable[..., DetectionCheck]:
    """``check(reference, candidate, labelled)`` on one image of 100x100 pixels."""

    def check(reference: Made, candidate: Made, labelled: bool = False) -> DetectionCheck:
        image = make_image(BOXES if labelled else ())
        dataset = Dataset("data", CONTRACT.names, (image,))
        return check_detections(*(Subject(Path("x"), each) for each in (reference, candidate)), dataset, FP32)

    return check


def test_nothing_found_on_both_sides_agrees(check: Callable[..., DetectionCheck]) -> None:
    found = check(Made(made([])), Made(made([])))
    assert found.passed
    assert found.to_json()["box_error_px"] == {"p50": 0.0, "p95": 0.0, "p99": 0.0, "max": 0.0}
    assert not found.comparisons[0].wrong


@pytest.mark.parametrize("scores", [[], [0.9]], ids=["nothing to find", "one to find"])
def test_a_candidate_that_fails_is_a_difference(
    check: Callable[..., DetectionCheck], scores: list[float]
) -> None:
    found = check(Made(made(scores)), Made(ArtefactError("model.onnx: cannot run it")), labelled=True)
    assert not found.passed
    assert found.detail.endswith("the candidate failed: model.onnx: cannot run it")
    assert found.summary.total.missed == len(scores)


def test_a_reference_or_a_gpu_that_fails_is_an_error(check: Callable[..., DetectionCheck]) -> None:
    with pytest.raises(ArtefactError):
        check(Made(ArtefactError("reference")), Made(made([])))
    with pytest.raises(GpuError):
        check(Made(made([])), Made(GpuError("out of memory")))


def test_classes_of_other_names_are_a_difference(check: Callable[..., DetectionCheck]) -> None:
    """Also where nothing is found, and where the data has classes that the candidate does not know."""
    names = ("cell", "dirt")
    other = Made(made([], names), dataclasses.replace(CONTRACT, names=names))
    for labelled in (False, True):
        found = check(Made(made([])), other, labelled)
        assert not found.passed
        assert "the class names differ: only one side has dirt, dust" in found.detail


def test_the_same_classes_in_another_order_are_none(check: Callable[..., DetectionCheck]) -> None:
    names = CONTRACT.names[::-1]
    theirs = Detections(BOXES, [0.9, 0.4], [1, 1], names)
    contract = dataclasses.replace(CONTRACT, names=names)
    assert check(Made(made([0.9, 0.4])), Made(theirs, contract), labelled=True).passed


def test_lost_accuracy_is_said_and_a_gain_is_no_loss(check: Callable[..., DetectionCheck]) -> None:
    lost = check(Made(made([0.4, 0.3])), Made(made([0.4])), labelled=True)
    assert lost.loss == "mAP50 falls from 1.0000 to 0.5000"
    gained = check(Made(made([0.4])), Made(made([0.4, 0.3])), labelled=True)
    assert gained.loss is None
    assert not gained.passed  # an extra detection


def alike(count: int, score: float, shift: float = 0.0) -> Detections:
    corners = np.stack([np.arange(count) * 20.0, np.zeros(count)], axis=1) + shift
    return Detections(
        np.concatenate([corners, corners + 12], axis=1), [score] * count, [0] * count, ("cell", "dust")
    )


def test_the_boxes_of_many_with_one_score_are_not_compared_unless_they_are_sure() -> None:
    """A network that has learnt nothing has no scores near 1; one that has learnt a lot has many."""
    assert compare_detections(alike(12, 0.5), alike(12, 0.5, 3.0)).agrees
    assert compare_detections(alike(12, 0.5), alike(12, 0.5, 15.0)).agrees
    for shift in (3.0, 15.0):
        assert compare_detections(alike(12, 0.99995), alike(12, 0.99995, shift)).wrong >= 12


def test_many_with_one_score_on_one_side_only_are_not_excused() -> None:
    none = Detections.empty(("cell", "dust"))
    assert compare_detections(none, alike(12, 0.5)).extra == 12
    assert compare_detections(alike(12, 0.5), none).missed == 12


def test_one_may_differ_but_not_all_there_are() -> None:
    one, none = made([0.8]), made([])
    two, three = (
        made([0.8, 0.7]),
        Detections([*BOXES, [1, 1, 9, 9]], [0.8, 0.7, 0.6], [0] * 3, CONTRACT.names),
    )
    assert summarise([compare_detections(three, two)], FP16.traps).agrees
    assert not summarise([compare_detections(three, two)]).agrees
    assert not summarise([compare_detections(one, none)], FP16.traps).agrees
    assert not summarise([compare_detections(none, one)], FP16.traps).agrees
