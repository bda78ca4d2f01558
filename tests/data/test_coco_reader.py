"""COCO JSON: boxes, crowds, category ids, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anchorline.data.boxes import REVERSED
from anchorline.data.dataset import load_dataset
from anchorline.runtime.io.errors import DataError

MakeCoco = Callable[..., str]


def test_boxes_crowds_and_ids(make_coco: MakeCoco) -> None:
    dataset = load_dataset(make_coco())
    assert dataset.names == ("person", "dog")
    assert dataset.category_ids == (1, 18)
    first, second = dataset.images
    assert first.id == "7"
    assert first.boxes.tolist() == [[10, 5, 30, 35], [0, 0, 80, 60]]
    assert first.labels.tolist() == [1, 0]
    assert first.crowd.tolist() == [False, True]
    assert second.boxes.tolist() == [[70, 50, 80, 60]]
    assert first.load().shape == (60, 80, 3)


def test_agrees_with_pycocotools(make_coco: MakeCoco) -> None:
    from pycocotools.coco import COCO

    spec = make_coco()
    dataset = load_dataset(spec)
    coco = COCO(spec.rpartition(",")[2])
    for image in dataset:
        records = coco.loadAnns(coco.getAnnIds(imgIds=int(image.id)))
        assert [dataset.category_ids[label] for label in image.labels] == [r["category_id"] for r in records]
        assert image.crowd.tolist() == [bool(r.get("iscrowd", 0)) for r in records]


def test_names_given(make_coco: MakeCoco) -> None:
    dataset = load_dataset(make_coco(), names=["dog", "cat", "person"])
    assert dataset.images[0].labels.tolist() == [0, 2]
    assert dataset.category_ids is None
    assert load_dataset(make_coco(), names=["dog", "person"]).category_ids == (18, 1)
    with pytest.raises(DataError, match="unknown class 'person'; expected one of dog"):
        load_dataset(make_coco(), names=["dog"])


def test_a_category_nobody_uses_may_be_unknown(make_coco: MakeCoco) -> None:
    def one_unused(content: dict[str, Any]) -> None:
        content["categories"].append({"id": 90, "name": "toothbrush"})

    assert load_dataset(make_coco(one_unused), names=["dog", "person"]).names == ("dog", "person")


def test_useless_boxes_are_dropped_and_counted(make_coco: MakeCoco) -> None:
    def spoil(content: dict[str, Any]) -> None:
        content["annotations"][0]["bbox"] = [10, 5, 0, 30]
        content["annotations"][1]["bbox"] = [10, 5, -4, 30]
        content["annotations"][2]["bbox"] = [100, 5, 4, 30]

    dataset = load_dataset(make_coco(spoil))
    assert dataset.dropped == {"zero area": 1, REVERSED: 1, "outside the image": 1}
    assert sum(len(image.boxes) for image in dataset) == 0


def test_the_size_is_read_from_the_image_when_the_file_has_none(make_coco: MakeCoco) -> None:
    def forget(content: dict[str, Any]) -> None:
        del content["images"][0]["height"]
        content["images"][1]["width"] = 0

    assert [image.size for image in load_dataset(make_coco(forget))] == [(60, 80), (60, 80)]


def _set(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set(("images",), {}), "has no list 'images'"),
        (_set(("images",), []), "lists no images"),
        (_set(("categories",), []), "lists no categories"),
        (_set(("images", 0, "id"), "7"), "image 1: id is '7'; expected a whole number"),
        (_set(("images", 0, "id"), 3), "image id 3 stands twice"),
        (_set(("images", 0, "file_name"), "c.png"), "lists 2 images and 1 are not in .*'c.png'"),
        (_set(("images", 0, "file_name"), None), "image 1: file_name is None"),
        (_set(("annotations", 2, "image_id"), 99), "annotation 3: image_id 99 is not among the images"),
        (_set(("annotations", 2, "category_id"), 99), "annotation 3: category_id 99 is not among the"),
        (_set(("annotations", 0, "bbox"), [1, 2, 3]), r"annotation 1: bbox is \[1, 2, 3\]; expected x, y"),
        (_set(("annotations", 0, "bbox"), [1, 2, 3, float("nan")]), "annotation 1: bbox is"),
        (_set(("annotations", 0, "bbox"), [1, 2, 3, 10**400]), "annotation 1: bbox is"),
        (_set(("annotations", 0), "dog"), "annotation 1: image_id is None"),
        (_set(("categories", 0, "name"), ""), "category 1: name is ''"),
        (_set(("categories", 0, "id"), 1), "category 2: id 1 or name 'person' stands twice"),
    ],
)
def test_contradictions_are_refused_in_one_line(
    make_coco: MakeCoco, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(make_coco(edit))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", json.dumps({"images": []}), "[" * 100_000])
def test_damaged_json_is_refused(make_coco: MakeCoco, tmp_path: Path, text: str) -> None:
    spec = make_coco()
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(DataError, match=r"annotations\.json"):
        load_dataset(spec)


def test_missing_places_are_named(make_coco: MakeCoco, tmp_path: Path) -> None:
    make_coco()
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(f"coco:{tmp_path}/absent,{tmp_path}/annotations.json")
    with pytest.raises(DataError, match="no such file"):
        load_dataset(f"coco:{tmp_path}/images,{tmp_path}/absent.json")
