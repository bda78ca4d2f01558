from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import DataError, SettingsError


@pytest.fixture
def three() -> Detections:
    return Detections(
        boxes=[[0, 0, 10, 20], [5, 5, 5, 9], [1.234567, 2, 3, 4]],
        scores=[0.9, 0.5, 0.123456789],
        labels=[1, 0, 1],
        class_names=("cat", "dog"),
        category_ids=(17, 18),
        size=(30, 40),
    )


def test_lists_become_arrays_of_the_stated_types(three):
    assert (three.boxes.dtype, three.boxes.shape) == (np.float32, (3, 4))
    assert (three.scores.dtype, three.labels.dtype) == (np.float32, np.int64)
    assert len(three) == 3
    assert three.names == ["dog", "cat", "dog"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"boxes": [[0, 0, 1]]}, r"boxes of shape \[N, 4\], got \[1, 3\]"),
        ({"boxes": [0, 0, 1, 1]}, r"boxes of shape \[N, 4\], got \[4\]"),
        ({"boxes": [[0, 0, 1, 1]] * 2}, r"scores of shape \[2\], one for each box, got \[1\]"),
        ({"scores": [[0.5]]}, r"scores of shape \[1\]"),
        ({"labels": []}, r"labels of shape \[1\], one for each box, got \[0\]"),
        ({"boxes": [[2, 0, 1, 1]]}, r"x2 >= x1 and y2 >= y1, got \[2.0, 0.0, 1.0, 1.0\] at index 0"),
        ({"boxes": [[0, 2, 1, 1]]}, "y2 >= y1"),
        ({"boxes": [[0, 0, np.nan, 1]]}, "finite boxes, got nan"),
        ({"scores": [np.inf]}, "finite scores, got inf"),
        ({"labels": [2]}, "labels below 2, the number of class names, got 2"),
        ({"labels": [-1]}, "labels of at least 0, got -1"),
        ({"labels": [0.5]}, "labels as whole numbers, got 0.5"),
        ({"labels": ["cat"]}, "labels as an array of whole numbers"),
        ({"boxes": "no boxes"}, "boxes as an array of numbers, got 'no boxes'"),
        ({"boxes": [[0, 0, 1, 1], [0]]}, "boxes as an array of numbers"),
        ({"category_ids": (1,)}, "2 category ids, one for each class name, got 1"),
        ({"track_ids": [1, 2]}, r"track_ids of shape \[1\], one for each box, got \[2\]"),
        ({"track_ids": [-2]}, "track_ids of at least -1, got -2"),
        ({"track_ids": [1.5]}, "track_ids as whole numbers, got 1.5"),
        ({"track_ids": ["a"]}, "track_ids as an array of whole numbers"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    values = {"boxes": [[0, 0, 1, 1]], "scores": [0.5], "labels": [0], "class_names": ("cat", "dog")}
    with pytest.raises(DataError, match=message):
        Detections(**{**values, **changed})


def test_without_class_names_any_label_goes_and_is_its_own_name():
    assert Detections(boxes=[[0, 0, 1, 1]], scores=[1], labels=[80]).names == ["80"]


@pytest.mark.parametrize(
    ("index", "kept"),
    [
        (np.array([True, False, True]), [0, 2]),
        ([True, False, True], [0, 2]),
        ([2, 0], [2, 0]),
        (slice(1, None), [1, 2]),
        (1, [1]),
        (np.int64(-1), [2]),
        ([], []),
        (np.zeros(3, bool), []),
    ],
)
def test_indexing_keeps_the_rows_and_what_they_mean(three, index, kept):
    chosen = three[index]
    np.testing.assert_array_equal(chosen.boxes, three.boxes[kept])
    np.testing.assert_array_equal(chosen.scores, three.scores[kept])
    assert chosen.labels.tolist() == three.labels[kept].tolist()
    assert (chosen.class_names, chosen.category_ids, chosen.size) == (("cat", "dog"), (17, 18), (30, 40))


def test_a_mask_of_another_length_is_refused(three):
    with pytest.raises(DataError, match=r"mask of shape \[3\], got \[2\]"):
        three[np.array([True, False])]


def test_filtering_by_score(three):
    assert three[three.scores > 0.4].names == ["dog", "cat"]


def test_empty():
    empty = Detections.empty(("cat",), size=(4, 5))
    assert len(empty) == 0
    assert empty.boxes.shape == (0, 4)
    assert empty.names == []
    assert empty.to_records() == empty.to_coco(3) == []
    assert Detections(boxes=[], scores=[], labels=[]).boxes.shape == (0, 4)


def test_coco_results_have_width_and_height(three):
    first = three.to_coco(image_id=42)[0]
    assert first == {"image_id": 42, "category_id": 18, "bbox": [0, 0, 10, 20], "score": pytest.approx(0.9)}
    unknown = Detections(boxes=[[0, 0, 1, 1]], scores=[1], labels=[4])
    assert unknown.to_coco(1)[0]["category_id"] == 5


def test_coco_results_load_in_pycocotools(three, capsys):
    coco_module = pytest.importorskip("pycocotools.coco")
    truth = coco_module.COCO()
    truth.dataset = {"images": [{"id": 42}], "annotations": [], "categories": [{"id": 17}, {"id": 18}]}
    truth.createIndex()
    loaded = truth.loadRes(three.to_coco(42))
    assert [a["area"] for a in loaded.loadAnns([1, 2])] == [200.0, 0.0]


def test_records_are_plain_json(three):
    record = json.loads(json.dumps(three.to_records()))[2]
    assert record == {
        "box": [1.23, 2.0, 3.0, 4.0],
        "score": 0.12346,
        "label": 1,
        "name": "dog",
        "track_id": None,
    }


def test_to_supervision(three):
    pytest.importorskip("supervision")
    converted = three.to_supervision()
    np.testing.assert_array_equal(converted.xyxy, three.boxes)
    np.testing.assert_array_equal(converted.confidence, three.scores)
    assert converted.class_id.tolist() == [1, 0, 1]
    assert converted.data["class_name"].tolist() == ["dog", "cat", "dog"]
    assert len(Detections.empty(("cat",)).to_supervision()) == 0


def test_to_supervision_without_the_package_names_the_remedy(three, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(SettingsError, match="pip install supervision"):
        three.to_supervision()


def test_track_ids_go_where_their_rows_go(three):
    tracked = replace(three, track_ids=[7, -1, 9])
    assert tracked.track_ids.dtype == np.int64
    assert three.track_ids is None
    assert three[[0]].track_ids is None
    assert tracked[tracked.scores < 0.6].track_ids.tolist() == [-1, 9]
    assert tracked[2].track_ids.tolist() == [9]
    assert tracked[[]].track_ids.shape == (0,)
    assert [record["track_id"] for record in tracked.to_records()] == [7, None, 9]
    assert replace(Detections.empty(), track_ids=[]).track_ids.dtype == np.int64


def test_track_ids_in_supervision(three):
    pytest.importorskip("supervision")
    assert three.to_supervision().tracker_id is None
    assert replace(three, track_ids=[7, -1, 9]).to_supervision().tracker_id.tolist() == [7, -1, 9]
