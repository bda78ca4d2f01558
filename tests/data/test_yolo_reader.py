"""YOLO's layouts, labels and class names: what is read, what is dropped, what is refused."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorline.data.boxes import REVERSED
from anchorline.data.dataset import load_dataset, load_datasets
from anchorline.data.yolo import YoloConfig, _read_labels, read_yolo_config
from anchorline.runtime.io.errors import AnchorlineError, DataError, SettingsError

MakeYolo = Callable[..., Path]
Fuzz = Callable[[str, list[Path]], None]


@pytest.mark.parametrize("roboflow", [False, True])
def test_fractions_become_pixels_in_both_layouts(make_yolo: MakeYolo, roboflow: bool) -> None:
    root = make_yolo({"a": "1 0.5 0.5 0.25 0.5\n\n0 0.5 0.5 1 1\n"}, roboflow=roboflow)
    dataset = load_dataset(f"yolo:{root}@train")
    (image,) = dataset.images
    assert dataset.names == ("cat", "dog", "bird")
    assert dataset.dropped == {}
    assert image.id == "a"
    assert image.size == (60, 80)
    assert image.boxes.tolist() == [[30, 15, 50, 45], [0, 0, 80, 60]]
    assert image.boxes.dtype == np.float32
    assert image.labels.tolist() == [1, 0]
    assert image.labels.dtype == np.int64
    assert image.load().shape == (60, 80, 3)


def test_polygons_become_their_bounding_boxes(make_yolo: MakeYolo) -> None:
    triangle, quadrangle = "0 0.25 0.5 0.5 0.25 0.75 1.0", "2 0 0.1 0.5 0 1 0.1 0.5 0.2"
    root = make_yolo({"a": f"{triangle}\n{quadrangle}\n"})
    (image,) = load_dataset(f"yolo:{root}@train").images
    np.testing.assert_allclose(image.boxes, [[20, 15, 60, 60], [0, 0, 80, 12]], atol=1e-4)


def test_keypoints_are_not_taken_for_a_polygon(make_yolo: MakeYolo) -> None:
    names = "names: {0: person}\nkpt_shape: [4, 2]\n"
    root = make_yolo({"a": "0 0.5 0.5 0.25 0.5 .9 .9 .8 .8 .7 .7 .6 .6\n"}, names=names)
    (image,) = load_dataset(f"yolo:{root}@train").images
    assert image.boxes.tolist() == [[30, 15, 50, 45]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("0 0.5 0.5 0 0.5", "zero area"),
        ("0 0.5 0.5 1e-9 0.5", "zero area"),  # in float32
        ("0 0.5 0.5 0.2 -0.5", REVERSED),
        ("0 1.5 0.5 0.2 0.2", "outside the image"),
        ("0 0.1 0.1 0.5 0.1 0.9 0.1", "zero area"),
    ],
)
def test_useless_boxes_are_dropped_and_counted(make_yolo: MakeYolo, line: str, reason: str) -> None:
    dataset = load_dataset(f"yolo:{make_yolo({'a': f'{line}{chr(10)}1 0.5 0.5 0.1 0.1'})}@train")
    assert dataset.dropped == {reason: 1}
    assert dataset.images[0].labels.tolist() == [1]
    assert len(dataset.images[0].difficult) == len(dataset.images[0].crowd) == 1


def test_boxes_over_the_edge_are_clipped(make_yolo: MakeYolo) -> None:
    root = make_yolo({"a": "0 0.0 1.0 0.5 0.5\n"})
    assert load_dataset(f"yolo:{root}@train").images[0].boxes.tolist() == [[0, 45, 20, 60]]


def test_images_without_labels_have_no_objects_and_are_counted(make_yolo: MakeYolo) -> None:
    root = make_yolo({"a": "0 0.5 0.5 1 1", "b": "", "c": None, "d": None})
    dataset = load_dataset(f"yolo:{root}@train")
    assert [len(image.boxes) for image in dataset] == [1, 0, 0, 0]
    assert dataset.images[2].boxes.shape == (0, 4)
    assert dataset.images[2].labels.dtype == np.int64
    assert dataset.unlabelled == 2
    assert load_datasets([f"yolo:{root}@train"] * 2).unlabelled == 4


def test_label_files_without_an_image_are_counted(make_yolo: MakeYolo) -> None:
    root = make_yolo({"a": "0 0.5 0.5 1 1"})
    (root / "labels/train/gone.txt").write_text("0 0.5 0.5 1 1")
    (root / "labels/train/classes.txt").write_text("cat")
    assert load_dataset(f"yolo:{root}@train").dropped == {"label file without an image": 1}


def test_subfolders_are_read_in_the_order_of_names(make_yolo: MakeYolo) -> None:
    line = "0 0.5 0.5 1 1"
    root = make_yolo({"b": line, "sub/a": line, "a.b.c": line}, suffix=".bmp")
    (root / "images/train/._b.bmp").write_bytes(b"left by a Mac")
    (root / "images/train/notes.md").write_text("no image")
    dataset = load_dataset(f"yolo:{root}@train")
    assert [image.id for image in dataset] == ["a.b.c", "b", "sub/a"]
    assert dataset.unlabelled == 0
    assert dataset.images[2].load().shape == (60, 80, 3)
    assert [image.id for image in load_dataset(f"yolo:{root}@.")] == ["train/a.b.c", "train/b", "train/sub/a"]


def test_names_given(make_yolo: MakeYolo) -> None:
    root = make_yolo({"a": "1 0.5 0.5 1 1\n0 0.5 0.5 0.5 0.5"})
    renamed = load_dataset(f"yolo:{root}@train", names=["dog", "fish", "cat"])
    assert renamed.names == ("dog", "fish", "cat")
    assert renamed.images[0].labels.tolist() == [0, 2]
    with pytest.raises(DataError, match=r"a\.txt: unknown class 'cat'; expected one of dog, bird"):
        load_dataset(f"yolo:{root}@train", names=["dog", "bird"])


@pytest.mark.parametrize(
    "text",
    [
        "names: [cat, 'no', 1]",
        "names:\n- cat\n- no\n- 1",
        "names:\n  0: cat\n  2: 1\n  1: no",
        "names: {0: cat, 1: no, 2: 1}\nnc: 3\ntrain: images/train",
        "\ufeffnames: [cat, 'no', '1']  # with a byte order mark",
    ],
)
def test_names_in_any_form_of_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.yaml").write_text(text, encoding="utf-8")
    assert read_yolo_config(tmp_path).names == ("cat", "no", "1")


def test_where_the_names_stand(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no class names; expected data\.yaml with names, or classes\.txt"):
        read_yolo_config(tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/classes.txt").write_text("cat\nbig dog\n\n")
    assert read_yolo_config(tmp_path).names == ("cat", "big dog")
    (tmp_path / "classes.txt").write_text("\ufeffbird\r\n", encoding="utf-8")
    assert read_yolo_config(tmp_path).names == ("bird",)
    (tmp_path / "settings.yaml").write_text("epochs: 3")
    (tmp_path / "coco8.yml").write_text("names: [fish]")
    assert read_yolo_config(tmp_path).names == ("fish",)
    (tmp_path / "coco9.yaml").write_text("names: [ant]")
    with pytest.raises(DataError, match=r"class names stand in coco8\.yml, coco9\.yaml; rename"):
        read_yolo_config(tmp_path)
    (tmp_path / "data.yaml").write_text("names: [cow]")
    assert read_yolo_config(tmp_path).names == ("cow",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [", "broken YAML"),
        ("names: [a]\n\x00", "broken YAML"),
        ("[" * 1000, "broken YAML"),
        ("- names", "got no mapping"),
        ("names:", "names is ''; expected a list"),
        ("names: 3", "names is '3'"),
        ("names: []", "holds no class names"),
        ("names: [a, '']", "class name 1 is ''; expected 1 to 200 characters"),
        ("names: [a, [b]]", r"class name 1 is \['b'\]"),
        ("names: [a, b, a]", "class name 'a' stands twice"),
        ("names: {1: a, 2: b}", "names has the indices 1, 2; expected 0 to 1"),
        ("names: {a: 0, b: 1}", "names has the indices a, b; expected 0 to 1"),
        ("names: [a, b]\nnc: 3", "nc is '3' and names has 2"),
        ("names: [a, b]\nnc: [2]", r"nc is \['2'\] and names has 2"),
        (f"names: [a]\nnc: {'9' * 5000}", r"nc is '9+\.\.\.9+' and names has 1"),
        ("names: " + "[" * 20_000, "over 10000 brackets"),
    ],
)
def test_broken_names_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_yolo_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert "data.yaml" in str(caught.value)


def test_yaml_that_multiplies_itself_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    for text, message in (("names: *a11", r"class name 0 is \[\["), ("names: [x]\nnc: *a11", r"nc is \[\[")):
        (tmp_path / "data.yaml").write_text("\n".join([*lines, text]))
        with pytest.raises(DataError, match=message) as caught:
            read_yolo_config(tmp_path)
        assert len(str(caught.value)) < 1000


def test_a_gap_in_the_class_file_would_shift_the_names(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\n\ndog\n")
    with pytest.raises(DataError, match="class name 1 is ''"):
        read_yolo_config(tmp_path)


def test_without_pyyaml(make_yolo: MakeYolo, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_yolo({"a": "0 0.5 0.5 1 1"})
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(SettingsError, match=r"data\.yaml: reading it needs PyYAML.*pip install pyyaml"):
        load_dataset(f"yolo:{root}@train")
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("cat")
    assert load_dataset(f"yolo:{root}@train").names == ("cat",)


def test_missing_things_are_named(make_yolo: MakeYolo, tmp_path: Path) -> None:
    root = make_yolo({"a": "0 0.5 0.5 1 1"})
    make_yolo({"b": "0 0.5 0.5 1 1"}, split="valid", roboflow=True)
    with pytest.raises(DataError, match="no split 'val'; use one of @train, @valid"):
        load_dataset(f"yolo:{root}@val")
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(f"yolo:{tmp_path}/absent@train")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"no class names; expected data\.yaml"):
        load_dataset(f"yolo:{tmp_path}/bare@train")
    (tmp_path / "bare/classes.txt").write_text("cat")
    with pytest.raises(DataError, match="no split 'train'; expected its images in images/SPLIT"):
        load_dataset(f"yolo:{tmp_path}/bare@train")
    (tmp_path / "bare/images").mkdir()
    with pytest.raises(DataError, match=r"no split 'train'; its images have no splits, use @\. for all"):
        load_dataset(f"yolo:{tmp_path}/bare@train")
    (root / "images/empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        load_dataset(f"yolo:{root}@empty")
    (root / "labels/train/a.txt").unlink()
    with pytest.raises(DataError, match=r"none of its 1 images has a label file.*labels.train.a\.txt"):
        load_dataset(f"yolo:{root}@train")


def test_images_of_one_name_are_refused(make_yolo: MakeYolo) -> None:
    root = make_yolo({"a": "0 0.5 0.5 1 1"})
    (root / "images/train/a.jpg").write_bytes(b"another one")
    with pytest.raises(DataError, match=r"a\.png: shares its label file with a\.jpg"):
        load_dataset(f"yolo:{root}@train")


LINE = "0 0.5 0.5 0.25 0.5"


def test_linked_folders_are_read(make_yolo: MakeYolo, tmp_path: Path) -> None:
    """Images and labels may lie in a store that the data set links to; no loop is followed twice."""
    root = make_yolo({"a": LINE, "store/b": LINE})
    for part in ("images", "labels"):
        (root / part / "train/store").rename(tmp_path / part)
        (root / part / "train/linked").symlink_to(tmp_path / part)
        (root / part / "train/again").symlink_to(root / part / "train")
        (tmp_path / part / "back").symlink_to(root / part)
    dataset = load_dataset(f"yolo:{root}@train")
    assert [image.id for image in dataset] == ["a", "linked/b"]
    assert [len(image.boxes) for image in dataset] == [1, 1]
    assert dataset.dropped == {}
    assert dataset.unlabelled == 0


@pytest.mark.parametrize("name", ["images/train/b.png", "labels/train/a.txt", "data.yaml", "train.txt"])
def test_what_is_no_file_is_refused(make_yolo: MakeYolo, name: str) -> None:
    root = make_yolo({"a": LINE}, names=f"names: [cat]{chr(10)}train: train.txt")
    (root / "train.txt").write_text("images/train/a.png")
    (root / name).unlink(missing_ok=True)
    os.mkfifo(root / name)
    split = "." if name.endswith(".png") else "train"
    with pytest.raises(DataError, match=rf"{name}: is a pipe"):
        load_dataset(f"yolo:{root}@{split}")


def test_a_link_to_nothing_is_no_image_left_out(make_yolo: MakeYolo) -> None:
    root = make_yolo({"a": LINE})
    (root / "images/train/b.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"b\.png: is a link to nothing"):
        load_dataset(f"yolo:{root}@train")


@pytest.mark.parametrize("split", [None, "train", "."])
def test_images_beside_their_labels(make_yolo: MakeYolo, split: str | None) -> None:
    """As labelImg saves them, with the class names among them."""
    root = make_yolo({"a.b": LINE, "c": None}, names=None)
    place = root / "train" if split == "train" else root / "flat"
    (root / "images/train").rename(place)
    (root / "labels/train/a.b.txt").rename(place / "a.b.txt")
    (place / "classes.txt").write_text("cat")
    folder = root if split == "train" else place
    dataset = load_dataset(f"yolo:{folder}" + (f"@{split}" if split else ""))
    assert [(image.id, len(image.boxes)) for image in dataset] == [("a.b", 1), ("c", 0)]
    assert dataset.names == ("cat",)
    assert dataset.dropped == {}
    assert dataset.unlabelled == 1


def test_a_folder_of_images_without_splits(make_yolo: MakeYolo) -> None:
    root = make_yolo({"a": LINE}, split=".")
    assert [image.id for image in load_dataset(f"yolo:{root}")] == ["a"]
    make_yolo({"b": LINE}, split="val")
    (root / "images/a.png").unlink()
    with pytest.raises(DataError, match="has no images with label files beside them; use one of @val"):
        load_dataset(f"yolo:{root}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "line",
    [
        "images/all/sub/a.b.png",
        "./images/all/sub/a.b.png",
        "all/sub/a.b.png",
        "images/all/sub/a.b",
        "images\\all\\sub\\a.b.png",
        "/content/cells/images/all/sub/a.b.png",
        "C:\\cells\\images\\all\\sub\\a.b.png",
        "../cells/images/all/sub/a.b.png ",
    ],
)
def test_a_list_of_images(make_yolo: MakeYolo, line: str, encoding: str) -> None:
    names = f"path: .{chr(10)}train: [./lists/train.txt]{chr(10)}names: [cat]"
    root = make_yolo({"sub/a.b": LINE, "c": LINE}, split="all", names=names)
    (root / "lists").mkdir()
    (root / "lists/train.txt").write_text(f"{line}\r\n\r\n", encoding=encoding, newline="")
    (root / "data.yaml").write_text(names, encoding=encoding)
    label = root / "labels/all/sub/a.b.txt"
    label.write_text(label.read_text(), encoding=encoding)
    dataset = load_dataset(f"yolo:{root}@train")
    (image,) = dataset.images
    assert image.id == "images/all/sub/a.b"
    assert image.boxes.tolist() == [[30, 15, 50, 45]]
    elsewhere = "cells" in line
    assert dataset.remarks == ({"file names found by their end": 1} if elsewhere else {})


def test_a_list_does_not_lead_out_of_the_data(make_yolo: MakeYolo, tmp_path: Path) -> None:
    root = make_yolo({"a": LINE}, names="names: [cat]\ntrain: lists/train.txt")
    (root / "lists").mkdir()
    (root / "images/train/a.png").rename(tmp_path / "b.png")
    for line in ("../../b.png", f"{tmp_path}/b.png"):
        (root / "lists/train.txt").write_text(line)
        with pytest.raises(DataError, match=r"are not in .*yolo, the first is .*link their folder into it"):
            load_dataset(f"yolo:{root}@train")
    (root / "images/train/linked").symlink_to(tmp_path)
    (root / "lists/train.txt").write_text("images/train/linked/b.png")
    (root / "labels/train/linked").mkdir()
    (root / "labels/train/linked/b.txt").write_text(LINE)
    assert len(load_dataset(f"yolo:{root}@train").images[0].boxes) == 1
    with pytest.raises(DataError, match="no split"):
        load_dataset(f"yolo:{root}@{tmp_path}")


def test_what_data_yaml_names_comes_before_the_usual_folder(make_yolo: MakeYolo) -> None:
    root = make_yolo({"a": LINE, "b": LINE}, names=f"names: [cat]{chr(10)}train: train.txt")
    (root / "train.txt").write_text(f"{root}/images/train/b.png")
    assert [image.id for image in load_dataset(f"yolo:{root}@train")] == ["images/train/b"]
    (root / "data.yaml").write_text("names: [cat]\ntrain: ../images/train")
    assert [image.id for image in load_dataset(f"yolo:{root}@train")] == ["a", "b"]
    (root / "data.yaml").write_text("names: [cat]\nval: [images/train, images/more]")
    with pytest.raises(DataError, match=r"its images of 'val' are .'images/train', 'images/more'.*not all"):
        load_dataset(f"yolo:{root}@val")
    make_yolo({"a": LINE}, split="more", names=None)
    make_yolo({"c": LINE}, split="val", names=None)
    found = [image.id for image in load_dataset(f"yolo:{root}@val")]
    assert found == ["images/train/a", "images/train/b", "images/more/a"]
    for nothing in ("", "null", "~", "[]", "/on/another/machine"):
        (root / "data.yaml").write_text(f"names: [cat]\nval: {nothing}\ntest: {nothing}")
        assert [image.id for image in load_dataset(f"yolo:{root}@val")] == ["c"]
        with pytest.raises(
            DataError, match="another/machine" if "on" in nothing else "no split 'test'; use one of"
        ):
            load_dataset(f"yolo:{root}@test")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "the list is empty"),
        ("a.png\nb.png\nc", r"lists 3 images and 2 are not in .*yolo, the first is 'b\.png'"),
        ("one/a.png\ntwo/a.png", r"'one/a\.png' and 'two/a\.png' both name a\.png"),
        ("x" * 5000, r"lists 1 images and 1 are not in .*yolo, the first is 'x+\.\.\.x+'; restore them"),
        ("a/" * 5000, "lists 1 images and 1 are not in .*yolo"),
        ("a\0.png", "holds NUL characters"),
        ("images", "lists 1 images and 1 are not in .*yolo, the first is 'images'"),
    ],
)
def test_a_list_without_its_images_is_refused(make_yolo: MakeYolo, lines: str, message: str) -> None:
    root = make_yolo({"a": LINE}, split=".")
    (root / "train.txt").write_text(lines)
    with pytest.raises(DataError, match=rf"train\.txt: {message}") as caught:
        load_dataset(f"yolo:{root}@train")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("prefix", ["data/", "", "build/"])
def test_cvat_export(make_yolo: MakeYolo, prefix: str) -> None:
    """YOLO 1.1: lists with a folder ``data`` that the archive does not have, labels beside the images."""
    root = make_yolo({"a": LINE}, names=None)
    (root / "images/train").rename(root / "obj_train_data")
    (root / "labels/train/a.txt").rename(root / "obj_train_data/a.txt")
    (root / "obj.names").write_text("cat\n")
    (root / "obj.data").write_text(f"classes = 1\ntrain = {prefix}train.txt\nnames = {prefix}obj.names\n")
    (root / "train.txt").write_text(f"{prefix}obj_train_data/a.png\n")
    dataset = load_dataset(f"yolo:{root}@train")
    assert [(image.id, len(image.boxes)) for image in dataset] == [("obj_train_data/a", 1)]
    assert dataset.names == ("cat",)
    (root / "obj.data").write_text("classes = 2\nnames = obj.names\n")
    with pytest.raises(DataError, match=r"obj\.data: classes is '2' and names has 1"):
        load_dataset(f"yolo:{root}@train")


@pytest.mark.parametrize("count", ["2", "' 2 '", "2.0", "'2'", ""])
def test_the_number_of_classes_as_text(tmp_path: Path, count: str) -> None:
    (tmp_path / "data.yaml").write_text(f"names: [cat, dog]\nnc: {count}")
    assert read_yolo_config(tmp_path).names == ("cat", "dog")


def test_mutated_data_is_read_or_refused(make_yolo: MakeYolo, expect_read_or_refused: Fuzz) -> None:
    names = "names: [cat, dog]\nnc: 2\ntrain: train.txt"
    root = make_yolo({"a": f"{LINE}\n{LINE}\n"}, names=names)
    (root / "train.txt").write_text("images/train/a.png\n")
    names_of_files = ("data.yaml", "train.txt", "labels/train/a.txt", "images/train/a.png")
    expect_read_or_refused(f"yolo:{root}@train", [root / name for name in names_of_files])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0_0 0.5 0.5 0.5 0.5", "class '0_0'"),
        ("0 0_1 0.5 0.5 0.5", "'0_1' is no fraction"),
        ("1e400 0.5 0.5 0.5 0.5", "class '1e400'"),
        (f"0 {'9' * 400} 0.5 0.5 0.5", r"'9+\.\.\.9+' is no fraction"),
        ("0 0.5 0.5 0.5", "has 4 values; expected class, centre x"),
        ("0 0.5 0.5 0.5 0.5 0.9", "has 6 values"),
        ("0 0.5 0.5 0.5 0.5 0.9 0.9 0.9", "has 8 values"),
        ("0", "has 1 values"),
        ("cat 0.5 0.5 0.5 0.5", "class 'cat'; expected a whole number from 0 to 2"),
        ("3 0.5 0.5 0.5 0.5", "class '3'; expected a whole number from 0 to 2, the names being cat, dog"),
        ("-1 0.5 0.5 0.5 0.5", "class '-1'"),
        ("0.5 0.5 0.5 0.5 0.5", "class '0.5'"),
        ("nan 0.5 0.5 0.5 0.5", "class 'nan'"),
        ("0 nan 0.5 0.5 0.5", "'nan' is no fraction"),
        ("0 0.5 inf 0.5 0.5", "'inf' is no fraction"),
        ("0 320 240 50 60", "'320' is no fraction of the image; expected 0 to 1, not pixels"),
        ("0 0.5 0.5 0,5 0.5", "'0,5' is no fraction"),
    ],
)
def test_damaged_lines_are_refused_by_file_and_line(make_yolo: MakeYolo, line: str, message: str) -> None:
    root = make_yolo({"a": f"0.0 0.5 0.5 1 1\n\n{line}\n"})
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(f"yolo:{root}@train")
    assert "a.txt: line 3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_images_are_refused(make_yolo: MakeYolo) -> None:
    root = make_yolo({"a": "0 0.5 0.5 1 1"})
    (root / "images/train/a.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"a\.png"):
        load_dataset(f"yolo:{root}@train")


def test_images_can_be_sent_to_other_processes(make_yolo: MakeYolo) -> None:
    image = pickle.loads(pickle.dumps(load_dataset(f"yolo:{make_yolo({'a': ''})}@train").images[0]))
    assert image.load().shape == (60, 80, 3)


@given(content=st.binary(max_size=60) | st.text("0123456789.- \n", max_size=60).map(str.encode))
def test_random_bytes_are_read_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random.txt"
    path.write_bytes(content)
    try:
        classes, boxes = _read_labels(path, YoloConfig(("cat", "dog")))
    except AnchorlineError:
        return
    assert boxes.shape == (len(classes), 4)
    assert (np.abs(boxes) <= 3).all()


@given(content=st.binary(max_size=60) | st.text("names: [a,b]{}0&*!-|\n", max_size=60).map(str.encode))
def test_random_yaml_is_read_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "random"
    folder.mkdir(exist_ok=True)
    (folder / "data.yaml").write_bytes(b"names" + content)
    try:
        config = read_yolo_config(folder)
    except AnchorlineError:
        return
    assert config.names
    assert all(isinstance(name, str) and name for name in config.names)


def test_real_cells_equal_their_voc_boxes(tmp_path: Path) -> None:
    """BCCD written in YOLO's form and read again."""
    shared = os.environ.get("ANCHORLINE_SHARED")
    if not shared or not (Path(shared) / "data/bccd").is_dir():
        pytest.skip("ANCHORLINE_SHARED names no folder with data/bccd")
    bccd = Path(shared) / "data/bccd"
    expected = load_dataset(f"voc:{bccd}@test")
    (tmp_path / "labels/test").mkdir(parents=True)
    (tmp_path / "images/test").mkdir(parents=True)
    (tmp_path / "data.yaml").write_text(f"names: [{', '.join(expected.names)}]")
    for image in expected:
        (tmp_path / f"images/test/{image.id}.jpg").symlink_to(bccd / f"JPEGImages/{image.id}.jpg")
        height, width = image.size
        lines = [
            f"{label} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f} "
            f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}"
            for (x1, y1, x2, y2), label in zip(image.boxes.tolist(), image.labels, strict=True)
        ]
        (tmp_path / f"labels/test/{image.id}.txt").write_text("\n".join(lines))
    found = load_dataset(f"yolo:{tmp_path}@test")
    assert found.names == expected.names
    assert len(found) == len(expected) == 72
    by_id = {image.id: image for image in expected}
    for image in found:
        np.testing.assert_allclose(image.boxes, by_id[image.id].boxes, atol=2e-3)
        np.testing.assert_array_equal(image.labels, by_id[image.id].labels)
