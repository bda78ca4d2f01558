"""Pascal VOC: box convention, what is dropped, what is refused."""

from __future__ import annotations

import math
import os
import pickle
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorline.data.boxes import REVERSED
from anchorline.data.dataset import load_dataset
from anchorline.data.voc import OTHER_SIZE, POLYGON, ROTATED, _finder, _read_annotation
from anchorline.runtime.io.errors import AnchorlineError, DataError

MakeVoc = Callable[..., Path]
Fuzz = Callable[[str, list[Path]], None]
CAT = [("cat", (5, 6, 30, 40))]


def test_inclusive_pixels_become_continuous_edges(make_voc: MakeVoc) -> None:
    root = make_voc({"a": [("cat", (1, 1, 80, 60)), ("dog", (11, 21, 30, 40)), ("cat", (71, 51, 95, 66))]})
    image = load_dataset(f"voc:{root}@train").images[0]
    assert image.boxes.tolist() == [[0, 0, 80, 60], [10, 20, 30, 40], [70, 50, 80, 60]]
    assert image.boxes.dtype == np.float32
    assert image.labels.tolist() == [0, 1, 0]
    assert image.labels.dtype == np.int64
    assert image.size == (60, 80)
    assert image.load().shape == (60, 80, 3)


def test_names_are_sorted_or_as_given(make_voc: MakeVoc) -> None:
    root = make_voc({"a": [("dog", (1, 1, 9, 9)), ("cat", (1, 1, 9, 9))]})
    assert load_dataset(f"voc:{root}@train").names == ("cat", "dog")
    given_names = load_dataset(f"voc:{root}@train", names=["dog", "bird", "cat"])
    assert given_names.images[0].labels.tolist() == [0, 2]
    with pytest.raises(DataError, match=r"a\.xml: unknown class 'cat'; expected one of dog, bird"):
        load_dataset(f"voc:{root}@train", names=["dog", "bird"])


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((5, 5, 5, 5), "zero area"),
        ((5, 5, 5, 20), "zero area"),
        ((20, 5, 10, 30), REVERSED),
        ((5, 30, 10, 20), REVERSED),
        ((81, 5, 90, 20), "outside the image"),
        ((-20, -20, 0, 0), "outside the image"),
        ((1e300, 5, 1.1e300, 20), None),
    ],
)
def test_useless_boxes_are_dropped_and_counted(make_voc: MakeVoc, box: tuple, reason: str | None) -> None:
    root = make_voc({"a": [("cat", box), ("cat", (11, 11, 20, 20))]})
    if reason is None:
        with pytest.raises(DataError, match="expected a number of pixels"):
            load_dataset(f"voc:{root}@train")
        return
    dataset = load_dataset(f"voc:{root}@train")
    assert dataset.dropped == {reason: 1}
    assert dataset.images[0].boxes.tolist() == [[10, 10, 20, 20]]
    assert len(dataset.images[0].labels) == len(dataset.images[0].difficult) == 1


def test_difficult_objects_are_marked(make_voc: MakeVoc) -> None:
    root = make_voc({"a": [("cat", (1, 1, 9, 9))]}, difficult=True)
    assert load_dataset(f"voc:{root}@train").images[0].difficult.tolist() == [True]


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".JPG"])
def test_images_are_found_by_id(make_voc: MakeVoc, suffix: str) -> None:
    root = make_voc({"some id": [("cat", (1, 1, 9, 9))]}, suffix=suffix)
    assert load_dataset(f"voc:{root}@train").images[0].load().shape == (60, 80, 3)


def test_the_size_is_the_images_own(make_voc: MakeVoc) -> None:
    root = make_voc({"a": [("cat", (1, 1, 500, 500))]})
    xml = root / "Annotations/a.xml"
    xml.write_text(xml.read_text().replace("<object>", "<size><width>0</width></size><object>"))
    assert load_dataset(f"voc:{root}@train").images[0].size == (60, 80)


def test_exif_orientation_turns_size_and_pixels(make_voc: MakeVoc) -> None:
    root = make_voc({"a": [("cat", (1, 1, 60, 80))]})
    path = root / "JPEGImages/a.jpg"
    tiff = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    jpeg = path.read_bytes()
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + (len(tiff) + 2).to_bytes(2, "big") + tiff + jpeg[2:])
    image = load_dataset(f"voc:{root}@train").images[0]
    assert image.size == (80, 60)
    assert image.load().shape == (80, 60, 3)


def test_exif_behind_many_pixels(make_voc: MakeVoc, turn_png: Callable[[Path], None]) -> None:
    root = make_voc({"a": CAT}, size=(120, 200), suffix=".png")
    path = root / "JPEGImages/a.png"
    noise = np.random.default_rng(0).integers(0, 256, (120, 200, 3), np.uint8)
    path.write_bytes(cv2.imencode(".png", noise)[1].tobytes())
    turn_png(path)
    assert path.stat().st_size > 65536
    image = load_dataset(f"voc:{root}@train").images[0]
    assert image.size == (200, 120)
    assert image.load().shape == (200, 120, 3)


def test_class_flags_and_blank_lines_in_a_split(make_voc: MakeVoc) -> None:
    root = make_voc({"a": [("cat", (1, 1, 9, 9))], "b": []}, splits={"cat_train": ["a  1", "", "b -1"]})
    assert [image.id for image in load_dataset(f"voc:{root}@cat_train")] == ["a", "b"]


@pytest.mark.parametrize(
    ("lines", "ids"),
    [
        (["photo", "photo 1", "photo 0", "photo -1"], ["photo", "photo 1", "photo 0", "photo -1"]),
        (["photo 0", " photo 1 "], ["photo 0", "photo 1"]),
        (["v1.2", "end.", "dots...", "A"], ["v1.2", "end.", "dots...", "A"]),
        (["v1.2.jpg", "end..jpg", "./photo 1.jpg"], ["v1.2", "end.", "photo 1"]),
        (["JPEGImages/photo", "images/photo 1", "/content/voc/JPEGImages/A.jpg"], ["photo", "photo 1", "A"]),
        (["C:\\voc\\JPEGImages\\v1.2.JPG", "a", "sub/in"], ["v1.2", "A", "sub/in"]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_of_a_split(make_voc: MakeVoc, lines: list[str], ids: list[str], encoding: str) -> None:
    names = ["photo", "photo 1", "photo 0", "photo -1", "v1.2", "end.", "dots...", "A"]
    root = make_voc({name: [("cat", (1, 1, 9, width))] for width, name in enumerate(names, start=10)})
    for part, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (root / part / "sub").mkdir()
        (root / part / f"sub/in.{suffix}").write_bytes((root / part / f"photo.{suffix}").read_bytes())
    (root / "ImageSets/Main/train.txt").write_text("\r\n".join(lines), encoding=encoding, newline="")
    dataset = load_dataset(f"voc:{root}@train")
    assert [image.id for image in dataset] == ids
    elsewhere = [line for line in lines if line.startswith(("images/", "/content", "C:"))]
    assert dataset.remarks == ({"file names found by their end": len(elsewhere)} if elsewhere else {})
    expected = {name: width for width, name in enumerate(names, start=10)} | {"sub/in": 10}
    assert [image.boxes[0, 3] for image in dataset] == [expected[id] for id in ids]


@pytest.mark.parametrize(
    ("split", "lines", "message"),
    [
        ("train", ["photo 1", "photo -1"], "lists 2 images and 2 are not in .*, the first is 'photo 1'"),
        ("my_own", ["photo 1"], "lists 1 images and 1 are not in .*, the first is 'photo 1'"),
        ("cat_val", ["photo 1", "gone 1"], "lists 2 images and 1 are not in .*, the first is 'gone'"),
        ("cat_val", ["photo 1", "photo 0"], "'photo 1' and 'photo 0' both name photo.jpg"),
        ("train", ["one/photo", "two/photo"], "'one/photo' and 'two/photo' both name photo.jpg"),
        ("train", ["x" * 5000], r"lists 1 images and 1 are not in .*, the first is 'x+\.\.\.x+'"),
        ("train", ["a/" * 5000], "lists 1 images and 1 are not in .*JPEGImages"),
        ("train", ["photo\0"], "holds NUL characters"),
    ],
)
def test_lines_that_name_no_image(make_voc: MakeVoc, split: str, lines: list[str], message: str) -> None:
    """A flag is one in the list of a class only."""
    root = make_voc({"photo": CAT}, splits={split: lines})
    with pytest.raises(DataError, match=rf"{split}\.txt: {message}") as caught:
        load_dataset(f"voc:{root}@{split}")
    assert len(str(caught.value)) < 400


def test_names_that_differ_in_case_only(tmp_path: Path) -> None:
    find = _finder([tmp_path / name for name in ("a.jpg", "A.jpg", "B.JPG", "b.png")], tmp_path)
    assert [find(text) for text in ("A", "a", "B", "b")] == [
        tmp_path / name for name in ("A.jpg", "a.jpg", "B.JPG", "b.png")
    ]


@pytest.mark.parametrize("split", [None, "train", "."])
def test_images_beside_their_annotations(make_voc: MakeVoc, tmp_path: Path, split: str | None) -> None:
    """As labelImg saves them, and Roboflow with a folder for each split."""
    root = make_voc({"a.b": CAT, "c": []})
    place = tmp_path / "flat" / ("train" if split == "train" else "")
    place.mkdir(parents=True)
    for name in ("JPEGImages/a.b.jpg", "JPEGImages/c.jpg", "Annotations/a.b.xml"):
        (root / name).rename(place / Path(name).name)
    (place / "gone.xml").write_text("<annotation></annotation>")
    dataset = load_dataset(f"voc:{tmp_path}/flat" + (f"@{split}" if split else ""))
    assert [image.id for image in dataset] == ["a.b", "c"]
    assert [image.boxes.tolist() for image in dataset] == [[[4, 5, 30, 40]], []]
    assert dataset.unlabelled == 1
    assert dataset.dropped == {"label file without an image": 1}
    (place / "some.txt").write_text("c.jpg\na.b.jpg")
    with pytest.raises(DataError, match=r"some\.txt: of its 2 images 1 have no annotation, the first is 'c'"):
        load_dataset(f"voc:{place}@some")
    (place / "a.b.png").write_bytes((place / "a.b.jpg").read_bytes())
    with pytest.raises(DataError, match=r"a\.b\.\w+: shares its label file with a"):
        load_dataset(f"voc:{place}")


def test_folders_without_splits(make_voc: MakeVoc, tmp_path: Path) -> None:
    root = make_voc({"b": CAT, "a": CAT}, splits={})
    (root / "ImageSets/Main/train.txt").unlink()
    assert [image.id for image in load_dataset(f"voc:{root}")] == ["a", "b"]
    with pytest.raises(DataError, match=r"no split 'train'.*voc:.* takes all images"):
        load_dataset(f"voc:{root}@train")
    (tmp_path / "bare/train").mkdir(parents=True)
    with pytest.raises(DataError, match="has no images; expected images and their annotations side by side"):
        load_dataset(f"voc:{tmp_path}/bare")
    (root / "JPEGImages/a.jpg").rename(tmp_path / "bare/train/a.jpg")
    with pytest.raises(DataError, match=r"has no images; did you mean voc:.*bare@train"):
        load_dataset(f"voc:{tmp_path}/bare")
    with pytest.raises(DataError, match=r"of its 1 images 1 have no annotation, .*add train/a\.xml"):
        load_dataset(f"voc:{tmp_path}/bare@train")


@pytest.mark.parametrize(
    "names", [("images", "annotations"), ("Images", "Annotations"), ("jpegimages", "ANNOTATIONS")]
)
def test_folders_of_other_names(make_voc: MakeVoc, names: tuple[str, str]) -> None:
    root = make_voc({"a": CAT, "b": CAT}, splits={})
    for former, name in zip(("JPEGImages", "Annotations"), names, strict=True):
        (root / former).rename(root / name)
    (root / "ImageSets/Main/train.txt").write_text("images/b.jpg")
    assert [image.id for image in load_dataset(f"voc:{root}@train")] == ["b"]
    (root / "ImageSets/Main/train.txt").unlink()
    assert [len(image.boxes) for image in load_dataset(f"voc:{root}")] == [1, 1]


@pytest.mark.parametrize(
    ("size", "remarks"),
    [("80 60", {}), ("0 60", {}), ("", {}), ("60 80", {OTHER_SIZE: 1}), ("1e2 75", {OTHER_SIZE: 1})],
)
def test_annotations_of_another_size_are_remarked(
    make_voc: MakeVoc, size: str, remarks: dict[str, int]
) -> None:
    """The image may have been made smaller, or EXIF turn it."""
    root = make_voc({"a": CAT, "b": CAT})
    stated = "".join(
        f"<{tag}>{side}</{tag}>" for tag, side in zip(("width", "height"), size.split(), strict=False)
    )
    xml = root / "Annotations/a.xml"
    xml.write_text(xml.read_text().replace("<object>", f"<size>{stated}</size><object>"))
    assert load_dataset(f"voc:{root}@train").remarks == remarks


def test_images_that_are_listed_again_are_remarked(make_voc: MakeVoc) -> None:
    root = make_voc({"a": CAT, "b": CAT}, splits={"train": ["a", "b", "a", "a"]})
    dataset = load_dataset(f"voc:{root}@train")
    assert len(dataset) == 4
    assert dataset.remarks == {"images listed again, which count each time": 2}


def _rotated(cx: float, cy: float, width: float, height: float, angle: float) -> str:
    numbers = {"cx": cx, "cy": cy, "w": width, "h": height, "angle": angle}
    return f"<robndbox>{''.join(f'<{tag}>{value}</{tag}>' for tag, value in numbers.items())}</robndbox>"


def _object(box: str, difficult: str = "0") -> str:
    return f"<object><name>cat</name><difficult>{difficult}</difficult>{box}</object>"


@pytest.mark.parametrize(
    ("box", "edges", "remark"),
    [
        (
            "<polygon><x1>21</x1><y1>6</y1><x2>30</x2><y2>9</y2><x3>25</x3><y3>40</y3></polygon>",
            [20, 5, 30, 40],
            POLYGON,
        ),
        (
            "<polygon><pt><x>25</x><y>40</y></pt><pt><x>30</x><y>6</y></pt><pt><x>21</x><y>9</y></pt>"
            "</polygon>",
            [20, 5, 30, 40],
            POLYGON,
        ),
        # Not turned, by a right angle, and a square of 20 by 45 degrees: its diagonal is 20 * sqrt(2).
        (_rotated(30, 20, 20, 10, 0), [20, 15, 40, 25], ROTATED),
        (_rotated(30, 20, 20, 10, math.pi / 2), [25, 10, 35, 30], ROTATED),
        (
            _rotated(30, 20, 20, 20, math.pi / 4),
            [30 - 200**0.5, 20 - 200**0.5, 30 + 200**0.5, 20 + 200**0.5],
            ROTATED,
        ),
    ],
)
def test_the_box_around_other_shapes(make_voc: MakeVoc, box: str, edges: list[float], remark: str) -> None:
    root = make_voc({"a": CAT})
    own = "<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
    objects = _object(box) + _object(box) + _object(box + own)
    (root / "Annotations/a.xml").write_text(f"<annotation>{objects}</annotation>")
    dataset = load_dataset(f"voc:{root}@train")
    np.testing.assert_allclose(dataset.images[0].boxes, [edges, edges, [4, 5, 30, 40]], atol=1e-4)
    assert dataset.remarks == {remark: 2}


@pytest.mark.parametrize("size", [(0, 10), (20, -1), (0.4, 0.4)])
def test_a_rotated_box_of_no_size_is_dropped(make_voc: MakeVoc, size: tuple[float, float]) -> None:
    root = make_voc({"a": CAT})
    objects = _object(_rotated(30, 20, *size, 0))
    (root / "Annotations/a.xml").write_text(f"<annotation>{objects}</annotation>")
    assert load_dataset(f"voc:{root}@train").dropped == {"zero area": 1}


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("0", False),
        (" 1 ", True),
        ("", False),
        ("true", True),
        ("False", False),
        ("Unspecified", False),
        ("2", None),
        ("maybe", None),
    ],
)
def test_flags_are_read_exactly(make_voc: MakeVoc, text: str, flag: bool | None) -> None:
    root = make_voc({"a": CAT})
    xml = root / "Annotations/a.xml"
    xml.write_text(xml.read_text().replace("<difficult>0<", f"<difficult>{text}<"))
    if flag is None:
        with pytest.raises(DataError, match=f"object 1: difficult is '{text}'; expected 0 or 1"):
            load_dataset(f"voc:{root}@train")
    else:
        assert load_dataset(f"voc:{root}@train").images[0].difficult.tolist() == [flag]


@pytest.mark.parametrize("declared", ["", "<?xml version='1.0' encoding='utf-8'?>"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_annotations_that_an_editor_saved_anew(make_voc: MakeVoc, declared: str, encoding: str) -> None:
    root = make_voc({"a": CAT})
    xml = root / "Annotations/a.xml"
    xml.write_text(declared + xml.read_text().replace("cat", "Löwe"), encoding=encoding)
    assert load_dataset(f"voc:{root}@train").names == ("Löwe",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
def test_entities_do_not_multiply(make_voc: MakeVoc, encoding: str) -> None:
    entities = "".join(f"<!ENTITY e{n} '{f'&e{n - 1};' * 10}'>" for n in range(1, 12))
    xml = f"<!DOCTYPE annotation [<!ENTITY e0 'cat'>{entities}]><annotation><name>&e11;</name></annotation>"
    root = make_voc({"a": CAT})
    (root / "Annotations/a.xml").write_text(xml, encoding=encoding)
    with pytest.raises(DataError, match=r"a\.xml: declares entities"):
        load_dataset(f"voc:{root}@train")


@pytest.mark.parametrize("name", ["JPEGImages/a.jpg", "Annotations/a.xml", "ImageSets/Main/train.txt"])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_file_is_refused(
    make_voc: MakeVoc, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_voc({"a": CAT})
    (root / name).unlink()
    monkeypatch.chdir((root / name).parent)  # the address of a socket is short
    if kind == "pipe":
        os.mkfifo(Path(name).name)
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(Path(name).name)
    with pytest.raises(DataError, match=f"{name}: is a {kind}"):
        load_dataset(f"voc:{root}@train")


def test_mutated_data_is_read_or_refused(make_voc: MakeVoc, expect_read_or_refused: Fuzz) -> None:
    root = make_voc({"a": [*CAT, *CAT], "b 1": CAT}, size=(6, 8))
    names = ("ImageSets/Main/train.txt", "Annotations/a.xml", "Annotations/b 1.xml", "JPEGImages/a.jpg")
    expect_read_or_refused(f"voc:{root}@train", [root / name for name in names])


def test_an_image_without_objects_stays(make_voc: MakeVoc) -> None:
    root = make_voc({"a": [], "b": [("cat", (1, 1, 9, 9))]})
    dataset = load_dataset(f"voc:{root}@train")
    assert dataset.images[0].boxes.shape == (0, 4)
    assert dataset.images[0].labels.dtype == np.int64


def test_images_can_be_sent_to_other_processes(make_voc: MakeVoc) -> None:
    root = make_voc({"a": [("cat", (1, 1, 9, 9))]})
    image = pickle.loads(pickle.dumps(load_dataset(f"voc:{root}@train").images[0]))
    assert image.load().shape == (60, 80, 3)


def test_missing_things_are_named(make_voc: MakeVoc, tmp_path: Path) -> None:
    root = make_voc(
        {"a": [("cat", (1, 1, 9, 9))], "b": [("cat", (1, 1, 9, 9))]},
        splits={"train": ["a", "x", "y"], "val": ["b"], "none": [""], "bare": ["a", "b"]},
    )
    with pytest.raises(DataError, match=r"train\.txt: lists 3 images and 2 are not in .*, the first is 'x'"):
        load_dataset(f"voc:{root}@train")
    with pytest.raises(DataError, match="no split 'test'; use one of bare, none, train, val"):
        load_dataset(f"voc:{root}@test")
    with pytest.raises(DataError, match="the list is empty"):
        load_dataset(f"voc:{root}@none")
    (root / "Annotations/b.xml").unlink()
    with pytest.raises(
        DataError,
        match=r"bare\.txt: of its 2 images 1 have no annotation, the first is 'b'; add Annotations/b",
    ):
        load_dataset(f"voc:{root}@bare")
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(f"voc:{tmp_path}/absent@train")
    for spec in (f"voc:{tmp_path}@train", f"voc:{tmp_path}"):
        with pytest.raises(DataError, match=r"has no JPEGImages folder, did you mean .*voc\?"):
            load_dataset(spec)
    with pytest.raises(DataError, match=r"has splits; expected voc:.*@SPLIT with one of bare, none, train"):
        load_dataset(f"voc:{root}")


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("", "broken XML"),
        ("<annotation><object>", "broken XML"),
        ("<html></html>", "root element is <html>"),
        ("<annotation><object><bndbox/></object></annotation>", "object 1 has no name"),
        ("<annotation><object><name>cat</name></object></annotation>", "object 1 has no bndbox"),
        ("<annotation><object><name>cat</name><bndbox/></object></annotation>", "bndbox/xmin is None"),
        (
            "<annotation><object><name>cat</name><bndbox><xmin>left</xmin></bndbox></object></annotation>",
            "bndbox/xmin is 'left'; expected a number of pixels",
        ),
        (
            "<annotation><object><name>cat</name><bndbox><xmin>nan</xmin></bndbox></object></annotation>",
            "bndbox/xmin is 'nan'",
        ),
        (
            f"<annotation><object><name>cat</name><bndbox><xmin>{'9' * 5000}</xmin></bndbox></object>"
            "</annotation>",
            r"bndbox/xmin is '9+\.\.\.9+'; expected a number of pixels",
        ),
        (
            "<annotation><object><name>cat</name><polygon><x1>1</x1><y1>2</y1></polygon></object></annotation>",
            "object 1: its polygon has no 3 corners",
        ),
        (
            "<annotation><object><name>cat</name><robndbox><cx>4</cx><cy>4</cy><w>2</w><h>2</h><angle>45</angle>"
            "</robndbox></object></annotation>",
            "object 1: robndbox/angle is 45; expected radians",
        ),
    ],
)
def test_broken_annotations_are_refused_in_one_line(make_voc: MakeVoc, xml: str, message: str) -> None:
    root = make_voc({"a": [("cat", (1, 1, 9, 9))]})
    (root / "Annotations/a.xml").write_text(xml)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(f"voc:{root}@train")
    assert "\n" not in str(caught.value)


def test_damaged_images_are_refused(make_voc: MakeVoc) -> None:
    root = make_voc({"a": [("cat", (1, 1, 9, 9))]})
    path = root / "JPEGImages/a.jpg"
    whole = path.read_bytes()
    path.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"a\.jpg"):
        load_dataset(f"voc:{root}@train")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jpg"):
        load_dataset(f"voc:{root}@train").images[0].load()


def test_an_image_that_changed_its_size_is_refused(make_voc: MakeVoc) -> None:
    root = make_voc({"a": [("cat", (1, 1, 9, 9))]})
    image = load_dataset(f"voc:{root}@train").images[0]
    (root / "JPEGImages/a.jpg").write_bytes(
        cv2.imencode(".jpg", np.zeros((30, 40, 3), np.uint8))[1].tobytes()
    )
    with pytest.raises(DataError, match="the image is 40x30, its annotations were made for 80x60"):
        image.load()


@given(content=st.binary(max_size=60))
def test_random_bytes_never_crash_the_reader(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.xml"
    path.write_bytes(content)
    with pytest.raises(AnchorlineError):
        _read_annotation(path, Counter())


def test_boxes_that_are_fractions_are_refused(make_voc: MakeVoc) -> None:
    root = make_voc({"a": [("cat", (0.1, 0.2, 0.6, 0.9))], "b": [("cat", (0, 0, 1, 1))]})
    with pytest.raises(DataError, match=r"all boxes \(2\) lie between 0 and 1, as fractions of the image"):
        load_dataset(f"voc:{root}@train")
