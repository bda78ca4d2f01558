"""COCO JSON: boxes, crowds, category ids, and what is refused."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorline.data.boxes import REVERSED
from anchorline.data.coco import WITHOUT_BOX, _box_of_runs
from anchorline.data.dataset import MOSTLY_OUTSIDE, load_dataset
from anchorline.data.summary import summarise_data
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
        (_set(("images", 0, "id"), "seven"), "image 1: id is 'seven'; expected a whole number"),
        (_set(("images", 0, "id"), 7.5), "image 1: id is 7.5; expected a whole number"),
        (_set(("images", 0, "id"), 2**63), "image 1: id is 9223372036854775808; expected a whole number"),
        (_set(("images", 0, "id"), "3"), "image id 3 stands twice"),
        (_set(("images", 0, "width"), "wide"), "image 1: width is 'wide'; expected a whole number of pixels"),
        (
            _set(("images", 0, "height"), 10**400),
            r"image 1: height is 1000+\.\.\.0+; expected a whole number",
        ),
        (_set(("images", 0, "height"), float("inf")), "image 1: height is inf; expected"),
        (_set(("images", 0), [1]), r"image 1: is \[1\]; expected an object with id"),
        (_set(("images", 0, "id"), 3), "image id 3 stands twice"),
        (_set(("images", 0, "file_name"), "c.png"), "lists 2 images and 1 are not in .*'c.png'"),
        (_set(("images", 0, "file_name"), None), "image 1: file_name is None"),
        (_set(("images", 0, "file_name"), "a" * 5000), "lists 2 images and 1 are not in"),
        (_set(("images", 0, "file_name"), "a\0.png"), r"lists 2 images and 1 are not in .*'a\\x00\.png'"),
        (_set(("images", 0, "file_name"), "a\ud800.png"), r"lists 2 images and 1 are not in .*ud800\.png'"),
        (_set(("annotations", 2, "image_id"), 99), "annotation 3: image_id 99 is not among the images"),
        (_set(("annotations", 2, "category_id"), 99), "annotation 3: category_id 99 is not among the"),
        (_set(("annotations", 0, "bbox"), [1, 2, 3]), r"annotation 1: bbox is \[1, 2, 3\]; expected x, y"),
        (_set(("annotations", 0, "bbox"), [1, 2, 3, float("nan")]), "annotation 1: bbox is"),
        (_set(("annotations", 0, "bbox"), [1, 2, 3, 10**400]), "annotation 1: bbox is"),
        (_set(("annotations", 0, "bbox"), [1, 2, 3, "4 px"]), "annotation 1: bbox is"),
        (_set(("annotations", 0, "bbox"), {"x": 1}), "annotation 1: bbox is"),
        (_set(("annotations", 0, "iscrowd"), "no"), "annotation 1: iscrowd is 'no'; expected 0 or 1"),
        (_set(("annotations", 0, "iscrowd"), 2), "annotation 1: iscrowd is 2; expected 0 or 1"),
        (_set(("annotations", 0, "iscrowd"), [0]), r"annotation 1: iscrowd is \[0\]; expected 0 or 1"),
        (_set(("annotations", 0), "dog"), "annotation 1: is 'dog'; expected an object with image_id"),
        (_set(("categories", 0, "name"), ""), "class name 1 is ''; expected 1 to 200 characters"),
        (_set(("categories", 0, "name"), "a\nb"), r"class name 1 is 'a\\nb'; expected 1 to 200 characters"),
        (_set(("categories", 0, "name"), "\ud800"), "class name 1 is .*ud800'; expected 1 to 200 characters"),
        (_set(("categories", 0, "name"), 5), "class name 1 is 5; expected 1 to 200 characters"),
        (_set(("categories", 0, "name"), "person"), "class name 'person' stands twice"),
        (_set(("categories", 0, "id"), 1), "category 2: id 1 stands twice"),
        (
            _set(("categories", 0, "id"), 2**53),
            r"category 1: id is 9007199254740992; expected .* under 2\^53",
        ),
    ],
)
def test_contradictions_are_refused_in_one_line(
    make_coco: MakeCoco, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(make_coco(edit))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stated", "crowd"),
    [(value, False) for value in ("0", 0.0, "0.0", False, "false", None)]
    + [(value, True) for value in ("1", 1.0, " 1 ", True, "True")],
)
def test_flags_in_any_spelling(make_coco: MakeCoco, stated: Any, crowd: bool) -> None:
    dataset = load_dataset(make_coco(_set(("annotations", 0, "iscrowd"), stated)))
    assert dataset.images[0].crowd.tolist() == [crowd, True]


def test_numbers_written_as_text(make_coco: MakeCoco) -> None:
    def as_text(content: dict[str, Any]) -> None:
        for kind, keys in {
            "images": ("id", "width", "height"),
            "categories": ("id",),
            "annotations": ("image_id", "category_id"),
        }.items():
            for record in content[kind]:
                record.update({key: str(record[key]) for key in keys})
        content["categories"][0]["id"] = 18.0
        for record in content["annotations"]:
            record["bbox"] = [f" {value}.0" for value in record["bbox"]]

    written, plain = load_dataset(make_coco(as_text)), load_dataset(make_coco())
    assert written.category_ids == plain.category_ids
    for one, other in zip(written, plain, strict=True):
        assert (one.id, one.size) == (other.id, other.size)
        assert one.boxes.tolist() == other.boxes.tolist()
        assert one.labels.tolist() == other.labels.tolist()


def test_ids_are_exact_beyond_what_a_float_holds(make_coco: MakeCoco) -> None:
    def enlarge(content: dict[str, Any]) -> None:
        content["images"][0]["id"], content["images"][1]["id"] = str(2**62 + 1), 2**62
        for number, id in enumerate([2**62 + 1, str(2**62 + 1), 2**62]):
            content["annotations"][number]["image_id"] = id

    assert [image.id for image in load_dataset(make_coco(enlarge))] == [str(2**62 + 1), str(2**62)]


def _mask(runs: Any, size: tuple[int, int] = (60, 80)) -> dict[str, Any]:
    return {"size": list(size), "counts": runs}


@pytest.mark.parametrize("bbox", [None, [], "absent"])
@pytest.mark.parametrize(
    "segmentation",
    [
        [[5, 6, 25, 6, 25, 36, 5, 36]],
        [5, 6, 25, 6, 25, 36, 5, 36],
        [["5", "6", "10", "6", "5", "20"], [24, 30, 25, 36, 20, 30]],
        _mask([5 * 60 + 6] + [30, 30] * 19 + [30, 4800 - 24 * 60 - 36]),
    ],
)
def test_an_object_without_a_box_has_that_of_its_segmentation(
    make_coco: MakeCoco, bbox: Any, segmentation: Any
) -> None:
    def outline(content: dict[str, Any]) -> None:
        record = content["annotations"][0]
        record.update(bbox=bbox, segmentation=segmentation)
        if bbox == "absent":
            del record["bbox"]

    dataset = load_dataset(make_coco(outline))
    assert dataset.images[0].boxes.tolist() == [[5, 6, 25, 36], [0, 0, 80, 60]]
    assert not dataset.dropped


@settings(max_examples=40)
@given(pixels=st.lists(st.booleans(), min_size=1, max_size=60), height=st.integers(1, 6))
def test_boxes_of_masks_are_those_of_pycocotools(pixels: list[bool], height: int) -> None:
    from pycocotools import mask

    width = -(-len(pixels) // height)
    flat = np.zeros(height * width, np.uint8)
    flat[: len(pixels)] = pixels
    encoded = mask.encode(flat.reshape(width, height).T)
    changes = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
    runs = np.diff(changes, prepend=0).tolist()
    x, y, w, h = mask.toBbox(encoded)
    for stated in (runs, encoded["counts"].decode()):
        assert _box_of_runs(_mask(stated, (height, width))) == (x, y, x + w, y + h)


@pytest.mark.parametrize(
    "segmentation",
    [
        "polygon",
        [[5, 6, 25]],
        [[5, 6], "7"],
        [[5, float("nan"), 6, 7]],
        _mask([4799]),
        _mask([-1, 4801]),
        _mask("PPP"),
        _mask("0" * 9),
        _mask([1, 1], (0, 80)),
        _mask([10**400]),
        {"counts": [4800]},
    ],
)
def test_a_damaged_segmentation_is_refused_where_it_is_needed(make_coco: MakeCoco, segmentation: Any) -> None:
    def outline(content: dict[str, Any]) -> None:
        content["annotations"][0].update(bbox=None, segmentation=segmentation)

    with pytest.raises(DataError, match="annotation 1: has no bbox, and its segmentation is") as caught:
        load_dataset(make_coco(outline))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("segmentation", [None, [], [[]]])
def test_an_object_with_neither_is_left_out_and_counted(make_coco: MakeCoco, segmentation: Any) -> None:
    def empty(content: dict[str, Any]) -> None:
        content["annotations"][0].update(bbox=[], segmentation=segmentation)

    dataset = load_dataset(make_coco(empty))
    assert dataset.dropped == {WITHOUT_BOX: 1}
    assert dataset.images[0].boxes.tolist() == [[0, 0, 80, 60]]


def test_boxes_that_are_fractions_are_refused(make_coco: MakeCoco) -> None:
    def scale(content: dict[str, Any]) -> None:
        for record in content["annotations"]:
            x, y, w, h = record["bbox"]
            record["bbox"] = [x / 80, y / 60, w / 80, h / 60]

    with pytest.raises(DataError, match=r"all boxes \(3\) lie between 0 and 1, as fractions of the image"):
        load_dataset(make_coco(scale))
    dataset = load_dataset(make_coco(_set(("annotations", 0, "bbox"), [0.25, 0.25, 0.5, 0.5])))
    assert dataset.remarks == {"boxes between 0 and 1, as fractions of the image, read as pixels": 1}


@pytest.mark.parametrize(
    ("categories", "names", "ids"),
    [
        ([(0, "cells", "none"), (1, "rbc", "cells"), (18, "wbc", "cells")], ("rbc", "wbc"), (1, 18)),
        ([(0, "rbc", "none"), (1, "rbc", "rbc"), (18, "wbc", "rbc")], ("rbc", "wbc"), (1, 18)),
        ([(0, "sky", "none"), (1, "rbc", "cells"), (18, "wbc", "cells")], ("sky", "rbc", "wbc"), (0, 1, 18)),
        ([(0, "cells", "none"), (1, "rbc", "cells"), (18, "x", "y")], ("cells", "rbc", "x"), (0, 1, 18)),
    ],
)
def test_the_root_above_all_categories_is_no_class(
    make_coco: MakeCoco, categories: list[tuple[int, str, str]], names: tuple[str, ...], ids: tuple[int, ...]
) -> None:
    keys = ("id", "name", "supercategory")
    records = [dict(zip(keys, each, strict=True)) for each in categories]
    dataset = load_dataset(make_coco(_set(("categories",), records)))
    assert (dataset.names, dataset.category_ids) == (names, ids)
    assert sum(dataset.remarks.values()) == (0 not in ids)


def test_a_root_with_objects_is_a_class(make_coco: MakeCoco) -> None:
    def root(content: dict[str, Any]) -> None:
        content["categories"] = [
            {"id": 0, "name": "cells", "supercategory": "none"},
            {"id": 1, "name": "rbc", "supercategory": "cells"},
        ]
        for number, record in enumerate(content["annotations"]):
            record["category_id"] = number % 2

    assert load_dataset(make_coco(root)).names == ("cells", "rbc")


@pytest.mark.parametrize(
    ("name", "place", "remark"),
    [
        ("./sub/c.png", "sub/c.png", ""),
        ("sub/../c.png", "c.png", ""),
        ("sub\\c.png", "sub/c.png", "backslashes"),
        (".\\sub\\c.png", "sub/c.png", "backslashes"),
        ("/sub/c.png", "sub/c.png", "by their end"),
        ("/mnt/other/images/sub/c.png", "sub/c.png", "by their end"),
        ("D:\\other\\images\\sub\\c.png", "sub/c.png", "by their end"),
        ("s3://bucket/sub/c.png", "sub/c.png", "by their end"),
        ("sub/c%20%C3%BC.png", "sub/c \u00fc.png", "URL-encoded"),
        ("/data/local-files/?d=sub/c.png", "sub/c.png", "Label Studio"),
        ("/data/local-files/?d=store/sub%2Fc.png", "sub/c.png", "Label Studio"),
        ("upload/1/0123abcd-c.png", "c.png", "Label Studio"),
        ("/data/upload/1/0123abcd-c.png", "0123abcd-c.png", "Label Studio"),
        ("data/upload/1/0123abcd-c.png", "1/0123abcd-c.png", "Label Studio"),
    ],
)
def test_names_as_other_tools_write_them(
    make_coco: MakeCoco, tmp_path: Path, name: str, place: str, remark: str
) -> None:
    spec = make_coco(_set(("images", 0, "file_name"), name))
    (tmp_path / "images/sub").mkdir()
    path = tmp_path / "images" / place
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "images/a.png").rename(path)
    dataset = load_dataset(spec)
    assert dataset.images[0].load().shape == (60, 80, 3)
    assert [count for text, count in dataset.remarks.items() if remark in text] == ([1] if remark else [])
    assert len(dataset.remarks) == bool(remark)


def test_the_plain_name_goes_first(make_coco: MakeCoco, tmp_path: Path) -> None:
    spec = make_coco(_set(("images", 0, "file_name"), "a%20b.png"))
    cv2.imwrite(str(tmp_path / "images/a%20b.png"), np.full((60, 80, 3), 9, np.uint8))
    cv2.imwrite(str(tmp_path / "images/a b.png"), np.zeros((60, 80, 3), np.uint8))
    dataset = load_dataset(spec)
    assert dataset.images[0].load().max() == 9
    assert not dataset.remarks


def test_two_names_that_would_be_one_file_are_refused(make_coco: MakeCoco) -> None:
    with pytest.raises(DataError, match=r"2 images are read as .*a\.png, one of them from .* '/x/a\.png'"):
        load_dataset(make_coco(_set(("images", 1, "file_name"), "/x/a.png")))


@pytest.mark.parametrize("form", ["absolute", "relative", "backslashes"])
def test_names_that_leave_the_folder_are_refused_unless_allowed(
    make_coco: MakeCoco, tmp_path: Path, form: str
) -> None:
    secret = tmp_path / "secret.png"
    cv2.imwrite(str(secret), np.full((60, 80, 3), 9, np.uint8))
    names = {"absolute": str(secret), "relative": "../secret.png", "backslashes": "..\\secret.png"}
    spec = make_coco(_set(("images", 0, "file_name"), names[form]))
    with pytest.raises(DataError, match=r"leads out of|are not in") as caught:
        load_dataset(spec)
    assert "\n" not in str(caught.value)
    if form != "backslashes":  # which are no way out where / is
        assert ",anywhere for a file that you trust" in str(caught.value)
        assert load_dataset(f"{spec},anywhere").images[0].load().max() == 9


def test_a_pipe_named_like_an_image_is_refused(make_coco: MakeCoco, tmp_path: Path) -> None:
    spec = make_coco(_set(("images", 0, "file_name"), "pipe.png"))
    os.mkfifo(tmp_path / "images/pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png: is a pipe, expected a file"):
        load_dataset(spec)


def test_many_categories(make_coco: MakeCoco) -> None:
    count = 20_000

    def multiply(content: dict[str, Any]) -> None:
        content["categories"] = [{"id": id, "name": f"class {id}"} for id in range(count)]

    dataset = load_dataset(make_coco(multiply))
    assert dataset.images[0].labels.tolist() == [18, 1]
    summary = summarise_data(dataset)
    assert [name for name, each in summary.per_class.items() if each.boxes] == ["class 1", "class 18"]


_ODD_VALUES: list[Any] = [
    *[None, True, -1, 0, 0.5, 1e308, float("inf"), float("nan"), 10**400, 2**64],
    *["", "0", "1e999", "a\0b", "\ud800", "../../x", "/etc/passwd", "x" * 5000, "%2e%2e%2f"],
    *[[], {}, [[]], [None], [1, "2", 3.5, 4], [[1, 2, 3, 4, 5, 6]]],
    *[{"counts": "0P"}, {"size": [60, 80], "counts": "PPPPPPPP0"}],
]


def _mutated(value: Any, draw: random.Random) -> Any:
    """The JSON with one of its places, chosen at random, changed, taken out or doubled."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        copy = value.copy()
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        action = draw.random()
        if action < 0.1:
            del copy[key]
        elif action < 0.2 and isinstance(copy, list):
            copy.append(copy[key])
        else:
            copy[key] = _mutated(value[key], draw)
        return copy
    return draw.choice(_ODD_VALUES)


def test_a_mutated_file_loads_or_is_refused_in_one_line(make_coco: MakeCoco, tmp_path: Path) -> None:
    def outlines(content: dict[str, Any]) -> None:
        content["annotations"][0]["segmentation"] = [[5, 6, 25, 6, 25, 36]]
        content["annotations"][2].update(bbox=None, segmentation=_mask([4790, 10]))

    spec, path, draw = make_coco(outlines), tmp_path / "annotations.json", random.Random(0)
    valid = path.read_bytes()
    refused = []
    for number in range(240):
        if number % 2:
            text = json.dumps(_mutated(json.loads(valid), draw)).encode()
        else:
            at = draw.randrange(len(valid))
            new = bytes(draw.choices(b'0129.-e"[]{},:\\\x00\xff\xed', k=draw.randint(0, 2)))
            text = valid[:at] + new + valid[at + draw.randint(0, 2) :]
        path.write_bytes(text)
        try:
            load_dataset(spec)
        except DataError as error:
            refused.append(str(error))
    assert 60 < len(refused) < 220
    assert not [line for line in refused if "\n" in line or len(line) > 1000]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", json.dumps({"images": []}), "[" * 100_000, "9" * 5000]
)
def test_damaged_json_is_refused(make_coco: MakeCoco, tmp_path: Path, text: str) -> None:
    spec = make_coco()
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(DataError, match=r"annotations\.json"):
        load_dataset(spec)


def test_names_that_hold_the_folder_s_own(make_coco: MakeCoco, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'images/a\.png'; give .* as the folder") as caught:
        load_dataset(make_coco(_set(("images", 0, "file_name"), "images/a.png")))
    assert f"give {tmp_path} as the folder" in str(caught.value)


def test_boxes_that_are_two_corners_are_remarked(make_coco: MakeCoco) -> None:
    """[50, 40, 75, 55] as corners is a box of 25 x 15; as COCO's it is cut to 30 x 20 of its 75 x 55."""
    dataset = load_dataset(make_coco(_set(("annotations", 0, "bbox"), [50, 40, 75, 55])))
    assert dataset.remarks == {MOSTLY_OUTSIDE: 1}


def test_sizes_as_stored_of_an_image_that_exif_turns(
    make_coco: MakeCoco, turn_png: Callable[[Path], None], tmp_path: Path
) -> None:
    spec = make_coco()
    turn_png(tmp_path / "images/a.png")
    with pytest.raises(DataError, match=r"60x80, .* were made for 80x60; its EXIF turns it upright"):
        load_dataset(spec).images[0].load()


def test_places_with_commas(make_coco: MakeCoco, tmp_path: Path) -> None:
    make_coco()
    (tmp_path / "images").rename(tmp_path / "im,ages")
    (tmp_path / "annotations.json").rename(tmp_path / "an,notations.json")
    for end in ("", ",anywhere"):
        assert len(load_dataset(f"coco:{tmp_path}/im,ages,{tmp_path}/an,notations.json{end}")) == 2
    with pytest.raises(DataError, match="im,ages: no such folder"):
        load_dataset(f"coco:im,ages,{tmp_path}/annotations.json")


def test_missing_places_are_named(make_coco: MakeCoco, tmp_path: Path) -> None:
    make_coco()
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(f"coco:{tmp_path}/absent,{tmp_path}/annotations.json")
    with pytest.raises(DataError, match="no such file"):
        load_dataset(f"coco:{tmp_path}/images,{tmp_path}/absent.json")
