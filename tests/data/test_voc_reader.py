"""Pascal VOC: box convention, what is dropped, what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorline.data.boxes import REVERSED
from anchorline.data.dataset import load_dataset
from anchorline.data.voc import _read_annotation
from anchorline.runtime.io.errors import AnchorlineError, DataError

MakeVoc = Callable[..., Path]


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


def test_class_flags_and_blank_lines_in_a_split(make_voc: MakeVoc) -> None:
    root = make_voc({"a": [("cat", (1, 1, 9, 9))], "b": []}, splits={"cat_train": ["a  1", "", "b -1"]})
    assert [image.id for image in load_dataset(f"voc:{root}@cat_train")] == ["a", "b"]


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
    with pytest.raises(DataError, match=r"lists 3 images and 2 are not in JPEGImages, the first is 'x'"):
        load_dataset(f"voc:{root}@train")
    with pytest.raises(DataError, match="no split 'test'; use one of bare, none, train, val"):
        load_dataset(f"voc:{root}@test")
    with pytest.raises(DataError, match="the split is empty"):
        load_dataset(f"voc:{root}@none")
    (root / "Annotations/b.xml").unlink()
    with pytest.raises(DataError, match=r"lists 2 images and 1 have no annotation, the first is 'b'"):
        load_dataset(f"voc:{root}@bare")
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(f"voc:{tmp_path}/absent@train")
    with pytest.raises(DataError, match=r"has no JPEGImages folder.*did you mean .*voc\?"):
        load_dataset(f"voc:{tmp_path}@train")


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("", "broken XML"),
        ("<annotation><object>", "broken XML"),
        ("<html></html>", "root element is <html>"),
        ("<annotation><object><bndbox/></object></annotation>", "object 1 has no name"),
        ("<annotation><object><name>cat</name></object></annotation>", "bndbox/xmin is None"),
        (
            "<annotation><object><name>cat</name><bndbox><xmin>left</xmin></bndbox></object></annotation>",
            "bndbox/xmin is 'left'; expected a number of pixels",
        ),
        (
            "<annotation><object><name>cat</name><bndbox><xmin>nan</xmin></bndbox></object></annotation>",
            "bndbox/xmin is 'nan'",
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
        _read_annotation(path)
