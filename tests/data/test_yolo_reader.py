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
        ("names: [a, '']", "the name of class 1 is ''; expected a text"),
        ("names: [a, [b]]", "the name of class 1 is a list"),
        ("names: [a, b, a]", "classes 0 and 2 are both 'a'"),
        ("names: {1: a, 2: b}", "names has the indices 1, 2; expected 0 to 1"),
        ("names: {a: 0, b: 1}", "names has the indices a, b; expected 0 to 1"),
        ("names: [a, b]\nnc: 3", "nc is '3' and names has 2"),
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
    (tmp_path / "data.yaml").write_text("\n".join([*lines, "names: *a11"]))
    with pytest.raises(DataError, match="the name of class 0 is a list"):
        read_yolo_config(tmp_path)


def test_a_gap_in_the_class_file_would_shift_the_names(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\n\ndog\n")
    with pytest.raises(DataError, match="the name of class 1 is ''"):
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
    with pytest.raises(DataError, match="no split 'val'; use one of train, valid"):
        load_dataset(f"yolo:{root}@val")
    with pytest.raises(DataError, match="no such folder"):
        load_dataset(f"yolo:{tmp_path}/absent@train")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="no split 'train'; expected its images in images/SPLIT"):
        load_dataset(f"yolo:{tmp_path}/bare@train")
    (tmp_path / "bare/images").mkdir()
    with pytest.raises(DataError, match=r"no split 'train'; its images have no splits, use @\. for all"):
        load_dataset(f"yolo:{tmp_path}/bare@train")
    (root / "images/empty").mkdir()
    with pytest.raises(DataError, match="has images/empty and no labels/empty"):
        load_dataset(f"yolo:{root}@empty")
    (root / "labels/empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        load_dataset(f"yolo:{root}@empty")
    (root / "labels/train/a.txt").unlink()
    with pytest.raises(DataError, match=r"none of the 1 images of 'train' has a label file.*a\.txt"):
        load_dataset(f"yolo:{root}@train")


def test_images_of_one_name_are_refused(make_yolo: MakeYolo) -> None:
    root = make_yolo({"a": "0 0.5 0.5 1 1"})
    (root / "images/train/a.jpg").write_bytes(b"another one")
    with pytest.raises(DataError, match=r"a\.png: shares its label file with a\.jpg"):
        load_dataset(f"yolo:{root}@train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
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
