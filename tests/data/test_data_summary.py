"""The summary of a data set, counted by hand."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from anchorline.data.dataset import Dataset, load_dataset
from anchorline.data.summary import summarise_data


@pytest.fixture
def data(make_image: Callable[..., Any]) -> Dataset:
    """Three cats, a dog and no bird on two of four images, one of which has no label file."""
    boxes = [[0, 0, 10, 10], [0, 0, 32, 32], [0, 0, 100, 25]]
    images = (
        make_image(boxes, [0, 0, 1], difficult=[True, False, False], crowd=[False, False, True]),
        make_image([[0, 0, 96, 96]], [0]),
        make_image(),
        make_image(),
    )
    return Dataset(
        "four [images]",
        ("cat", "dog", "bird"),
        images,
        None,
        Counter({"zero area": 3}),
        1,
        Counter({"names in capitals": 2}),
    )


def _shown(data: Dataset) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(summarise_data(data).render())
    return capture.get()


def test_counts_by_hand(data: Dataset) -> None:
    summary = summarise_data(data)
    assert (summary.images, summary.empty_images, summary.unlabelled_images) == (4, 2, 1)
    assert summary.boxes == 4
    cat, dog, bird = (summary.per_class[name] for name in data.names)
    assert (cat.boxes, cat.images, cat.difficult, cat.crowd) == (3, 2, 1, 0)
    assert cat.sizes == {"small": 1, "medium": 1, "large": 1}
    assert (dog.boxes, dog.images, dog.difficult, dog.crowd) == (1, 1, 0, 1)
    assert dog.sizes == {"small": 0, "medium": 1, "large": 0}
    assert (bird.boxes, bird.images) == (0, 0)
    assert summary.sizes == {"small": 1, "medium": 2, "large": 1}
    assert summary.imbalance == 3.0
    assert summary.absent_classes == ["bird"]
    assert summary.dropped == {"zero area": 3}


def test_histograms_by_hand(data: Dataset) -> None:
    summary = summarise_data(data)
    # sides 10, 32, sqrt(2500) = 50 and 96: each edge belongs to the bar above it
    assert {each.low: each.count for each in summary.sides if each.count} == {8: 1, 32: 2, 96: 1}
    # 25 high and 100 wide; the others are squares
    assert {round(each.low, 3): each.count for each in summary.aspects if each.count} == {0.25: 1, 0.707: 3}
    for bins in (summary.sides, summary.aspects):
        assert bins[0].low == 0
        assert all(one.high == other.low for one, other in itertools.pairwise(bins))
        assert bins[-1].high == float("inf")


def test_json_and_table(data: Dataset) -> None:
    written = json.loads(json.dumps(summarise_data(data).to_json(), allow_nan=False))
    assert written["per_class"]["cat"]["sizes"] == {"small": 1, "medium": 1, "large": 1}
    assert written["side_histogram"][-1] == {"from": 512.0, "to": None, "count": 0}
    assert sum(each["count"] for each in written["aspect_histogram"]) == written["boxes"] == 4
    shown = _shown(data)
    for words in (
        "four [images]: 4 images, 4 boxes",
        "2 images without objects, 1 of them without a label file",
        "3.0 times the boxes of the rarest",
        "no boxes of bird",
        "left out: 3 zero area",
        "2 names in capitals",
    ):
        assert words in shown


def test_a_data_set_without_boxes(make_image: Callable[..., Any]) -> None:
    blank = Dataset("blank", ("cat",), (make_image(),))
    summary = summarise_data(blank)
    assert summary.imbalance is None
    assert summary.absent_classes == ["cat"]
    assert sum(each.count for each in summary.sides) == 0
    assert "1 images without objects" in _shown(blank)
    assert summarise_data(Dataset("nothing", (), ())).to_json()["images"] == 0


def test_what_a_reader_dropped_is_told(make_yolo: Callable[..., Path]) -> None:
    lines = "0 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.0 0.1\n"
    data = load_dataset(f"yolo:{make_yolo({'a': lines, 'b': None, 'c': ''})}@train")
    summary = summarise_data(data)
    assert (summary.images, summary.empty_images, summary.unlabelled_images) == (3, 2, 1)
    assert "left out: 1 zero area" in _shown(data)


def test_of_many_classes_the_most_frequent_are_shown(make_image: Callable[..., Any]) -> None:
    names = tuple(f"class {number}" for number in range(1000))
    shown = _shown(Dataset("many", names, (make_image([[0, 0, 10, 10]], [999]),)))
    assert "class 999 " in shown
    assert "class 500" not in shown
    assert "shown are the 200 most frequent of 1000 classes" in shown
    assert "and 987 more" in shown  # of those without boxes, after a dozen
