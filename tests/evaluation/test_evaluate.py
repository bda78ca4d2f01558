"""``evaluate``: names, batches, the report and its JSON; proposal recall."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

from anchorline.data.dataset import Dataset
from anchorline.evaluation.evaluation import evaluate, evaluate_proposals, proposal_recall
from anchorline.evaluation.metrics import confusion_matrix
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import DataError, SettingsError


class Oracle:
    """Returns prepared detections in the order of the images."""

    def __init__(self, results: list[Detections]) -> None:
        self.results = list(results)
        self.batches: list[int] = []

    def __call__(self, frames: list[np.ndarray]) -> list[Detections]:
        self.batches.append(len(frames))
        taken, self.results = self.results[: len(frames)], self.results[len(frames) :]
        return taken


@pytest.fixture
def data(make_image: Callable[..., Any]) -> Dataset:
    """Three images with a cat, a dog, and nothing; no bird anywhere."""
    images = (make_image([[0, 0, 10, 10]], [0]), make_image([[20, 20, 40, 40]], [1]), make_image())
    return Dataset("three images", ("cat", "dog", "bird"), images)


@pytest.fixture
def answers() -> list[Detections]:
    """The right answers of a model that has other labels for the same names, and one class more."""
    names = ("bird", "horse", "dog", "cat")
    return [
        Detections([[0, 0, 10, 10], [50, 50, 90, 90]], [0.9, 0.99], [3, 1], names),
        Detections([[20, 20, 40, 40]], [0.8], [2], names),
        Detections.empty(names),
    ]


def test_classes_meet_by_name(data: Dataset, answers: list[Detections]) -> None:
    report = evaluate(Oracle(answers), data, provider="cpu")
    assert (report.map50, report.voc07, report.map) == pytest.approx((1.0, 1.0, 1.0))
    assert report.per_class["cat"].objects == 1
    assert np.isnan(report.per_class["bird"].ap50)


def test_the_json_is_the_designs(data: Dataset, answers: list[Detections]) -> None:
    report = evaluate(Oracle(answers), data, provider="openvino", precision="bf16").to_json()
    right = {"ap50": pytest.approx(1.0), "ap": pytest.approx(1.0), "objects": 1}
    nothing = {"ap50": None, "ap": None, "objects": 0}
    empty = {"map50": None, "map": None, "objects": 0, "per_class": dict.fromkeys(data.names, nothing)}
    assert json.loads(json.dumps(report, allow_nan=False)) == {
        "map50": 1.0,
        "voc07": 1.0,
        "map": pytest.approx(1.0),
        "per_class": {
            "cat": {"ap50": 1.0, "voc07": 1.0, "ap": pytest.approx(1.0), "objects": 1},
            "dog": {"ap50": 1.0, "voc07": 1.0, "ap": pytest.approx(1.0), "objects": 1},
            "bird": {"ap50": None, "voc07": None, "ap": None, "objects": 0},
        },
        "per_size": {
            "small": {
                "map50": pytest.approx(1.0),
                "map": pytest.approx(1.0),
                "objects": 2,
                "per_class": {"cat": right, "dog": right, "bird": nothing},
            },
            "medium": empty,
            "large": empty,
        },
        "images": 3,
        "provider": "openvino",
        "precision": "bf16",
        "data": data.spec,
        "model": None,
        "slices": None,
    }


def test_batches_and_progress(data: Dataset, answers: list[Detections]) -> None:
    oracle, steps = Oracle(answers), []
    batched = evaluate(oracle, data, 2, lambda done, total: steps.append((done, total)), provider="cpu")
    assert oracle.batches == [2, 1]
    assert steps == [(2, 3), (3, 3)]
    assert batched.to_json() == evaluate(Oracle(answers), data, provider="cpu").to_json()


def test_the_table_shows_every_class(data: Dataset, answers: list[Detections]) -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(evaluate(Oracle(answers), data, provider="cpu").render())
    for word in ("cat", "dog", "bird", "mean", "1.000", "3 images, cpu, fp32"):
        assert word in capture.get()


def test_the_report_keeps_the_detections_by_the_datas_labels(
    data: Dataset, answers: list[Detections]
) -> None:
    kept = evaluate(Oracle(answers), data, provider="cpu").detections
    assert [found.labels.tolist() for found in kept] == [[0], [1], []]
    assert [found.class_names for found in kept] == [data.names] * 3


def test_false_detections_on_an_empty_image_cost_precision(data: Dataset, answers: list[Detections]) -> None:
    names = answers[0].class_names
    false = Detections([[0, 0, 10, 10]], [0.95], [3], names)  # a cat, more certain than the right one
    report = evaluate(Oracle([*answers[:2], false]), data, provider="cpu")
    assert report.per_class["cat"].ap50 == pytest.approx(0.5)
    assert report.per_class["cat"].ap == pytest.approx(0.5, abs=0.01)
    assert report.per_class["dog"].ap50 == 1.0


def test_a_class_name_is_no_markup(data: Dataset) -> None:
    odd = Dataset("odd", ("[/bold]", "[red]dog"), data.images)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(evaluate(Oracle([Detections.empty()] * 3), odd, provider="cpu").render())
    assert "[/bold]" in capture.get()
    assert "[red]dog" in capture.get()


def test_a_class_the_model_does_not_know(data: Dataset) -> None:
    results = [Detections.empty(("cat", "dog"))] * 3
    with pytest.raises(DataError, match="the data has the class 'bird', the model knows only cat, dog"):
        evaluate(Oracle(results), data, provider="cpu")


def test_labels_without_names(data: Dataset) -> None:
    results = [Detections([[0, 0, 1, 1]], [0.5], [7])] * 3
    with pytest.raises(DataError, match="label 7 and no class names; expected a label below 3"):
        evaluate(Oracle(results), data, provider="cpu")
    right = [Detections([[0, 0, 10, 10]], [0.9], [0]), Detections.empty(), Detections.empty()]
    assert evaluate(Oracle(right), data, provider="cpu").per_class["cat"].ap50 == 1.0


def test_unusable_calls(data: Dataset) -> None:
    with pytest.raises(SettingsError, match="batch is 0"):
        evaluate(Oracle([]), data, 0, provider="cpu")
    with pytest.raises(SettingsError, match="0 results for 1 frames"):
        evaluate(Oracle([]), data, provider="cpu")
    with pytest.raises(DataError, match="nothing: has no images"):
        evaluate(Oracle([]), Dataset("nothing", ("cat",), ()), provider="cpu")


def test_no_objects_at_all(make_image: Callable[..., Any]) -> None:
    empty = Dataset("blank", ("cat",), (make_image(),))
    report = evaluate(Oracle([Detections([[0, 0, 9, 9]], [0.9], [0])]), empty, provider="cpu")
    assert report.to_json()["map50"] is None
    assert report.to_json()["map"] is None


def test_proposal_recall_by_hand(make_image: Callable[..., Any]) -> None:
    objects = [[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 90, 90], [0, 90, 9, 99]]
    images = [make_image(objects, difficult=[False, False, False, True]), make_image()]
    proposals = Detections(
        [[0, 0, 10, 10], [20, 20, 30, 27.2], [60, 0, 70, 10], [50, 50, 90, 90]], [0.9, 0.8, 0.7, 0.1], [0] * 4
    )
    report = proposal_recall(images, [proposals, Detections.empty()], counts=(1, 3, 100))
    assert report.objects == 3
    assert report.recall[1] == pytest.approx(dict.fromkeys(report.recall[1], 1 / 3))
    assert report.recall[3][0.7] == pytest.approx(2 / 3)
    assert report.recall[3][0.75] == pytest.approx(1 / 3)
    assert report.recall[100][0.5] == pytest.approx(1.0)
    assert report.ar == pytest.approx((5 * 1.0 + 5 * 2 / 3) / 10)
    assert report.to_json()["recall"]["100"]["0.5"] == 1.0


def test_recall_rises_with_proposals_and_falls_with_iou(random_results: Callable[..., Any]) -> None:
    images, detections = random_results(5)
    report = evaluate_proposals(
        Oracle(detections), Dataset("random", ("a", "b", "c"), tuple(images)), batch=5
    )
    counts = list(report.recall)
    for few, many in itertools.pairwise(counts):
        assert all(report.recall[few][iou] <= report.recall[many][iou] for iou in report.recall[few])
    for by_iou in report.recall.values():
        assert list(by_iou.values()) == sorted(by_iou.values(), reverse=True)
    assert 0 < report.ar < 1


def test_a_vocabulary_of_many_classes_costs_what_is_used(make_image: Callable[..., Any]) -> None:
    """20,000 names, few of them in an image: neither work nor memory grows with their square."""
    names = tuple(f"class {number}" for number in range(20_000))
    images = tuple(make_image([[0, 0, 10, 10], [20, 20, 40, 40]], [7, 19_000]) for _ in range(50))
    right = Detections([[0, 0, 10, 10], [20, 20, 40, 40]], [0.9, 0.8], [7, 19_999], names)
    data = Dataset("many", names, images)
    report = evaluate(Oracle([right] * 50), data, provider="cpu")
    assert (report.per_class["class 7"].ap50, report.per_class["class 19000"].ap50) == (1.0, 0.0)
    assert (report.map50, report.map) == pytest.approx((0.5, 0.5))
    assert sum(not np.isnan(each.ap) for each in report.per_class.values()) == 2
    confusion = confusion_matrix(data, report.detections)
    assert confusion.names == ("class 7", "class 19000", "class 19999")
    assert confusion.counts.tolist() == [[50, 0, 0, 0], [0, 0, 50, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report.render())
    assert "the first 200 of 20000 classes" in " ".join(capture.get().split())


@pytest.mark.parametrize(("canvas", "runs"), [(None, [[0, 2], [1]]), ((128, 128), [[0, 1, 2]])])
def test_a_detector_is_given_images_of_one_canvas_at_a_time(
    data: Dataset, answers: list[Detections], canvas: tuple[int, int] | None, runs: list[list[int]]
) -> None:
    """Padded to its neighbours, as a batch is, an image would have other results for another ``batch``."""
    sizes = [(100, 100), (60, 100), (97, 120)]
    images = tuple(
        dataclasses.replace(image, load=lambda number=number: np.full((*sizes[number], 3), number, np.uint8))
        for number, image in enumerate(data.images)
    )

    class Model:
        contract = Contract("detections", ("cat",), canvas, (0, 0, 0), (1, 1, 1))
        runs: ClassVar[list[list[int]]] = []

        def batch(self, frames: list[np.ndarray]) -> list[Detections]:
            self.runs.append([int(frame[0, 0, 0]) for frame in frames])
            return [answers[number] for number in self.runs[-1]]

    report = evaluate(Model().batch, dataclasses.replace(data, images=images), 3, provider="cpu")
    assert Model.runs == runs
    assert report.map50 == pytest.approx(1.0)  # each image got its own
