"""``--data`` specs: forms, several at once, names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from anchorline.data.dataset import load_dataset, load_datasets
from anchorline.data.synthetic import CLASS_NAMES
from anchorline.runtime.io.errors import DataError


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "voc",
        "voc:",
        "voc:@train",
        "voc:folder@",
        "coco:images",
        "coco:,a.json",
        "coco:images,",
        "yolov9:folder",
        "yolo:@train",
        "yolo:folder@",
        "synthetic:",
        "synthetic:0",
        "synthetic:-3",
        "synthetic:many",
        "synthetic:3@x",
    ],
)
def test_wrong_forms_name_the_right_ones(spec: str) -> None:
    with pytest.raises(DataError, match="expected") as caught:
        load_dataset(spec)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize("spec", [None, 5, Path("voc:folder")])
def test_what_is_no_text_is_refused(spec: Any) -> None:
    for opened in (lambda: load_dataset(spec), lambda: load_datasets([spec])):
        with pytest.raises(DataError, match="expected voc:DIR@split"):
            opened()


def test_one_spec_is_no_list() -> None:
    with pytest.raises(DataError, match="data 'synthetic:2': expected a list"):
        load_datasets("synthetic:2")


@pytest.mark.parametrize("scheme", ["voc", "yolo"])
def test_a_split_is_no_other_place(make_voc: Callable[..., Path], tmp_path: Path, scheme: str) -> None:
    root = make_voc({"a": [("cat", (1, 1, 9, 9))]})
    (root / "classes.txt").write_text("cat")
    with pytest.raises(DataError, match="no split '/"):
        load_dataset(f"{scheme}:{root}@{tmp_path}/voc/JPEGImages")


def test_a_folder_may_hold_an_at_sign(make_voc: Callable[..., Path], tmp_path: Path) -> None:
    root = make_voc({"a": [("cat", (1, 1, 9, 9))]})
    root.rename(tmp_path / "data@home")
    assert len(load_dataset(f"voc:{tmp_path}/data@home@train")) == 1


def test_several_specs_share_the_union_of_names(
    make_voc: Callable[..., Path], make_coco: Callable[..., str]
) -> None:
    root = make_voc({"a": [("zebra", (1, 1, 9, 9)), ("dog", (2, 2, 2, 2))]})
    dataset = load_datasets([f"voc:{root}@train", make_coco()])
    assert dataset.names == ("dog", "zebra", "person")
    assert [image.labels.tolist() for image in dataset] == [[1], [0, 2], [2]]
    assert dataset.dropped == {"zero area": 1}
    assert dataset.category_ids is None
    assert load_datasets([make_coco(), make_coco()]).category_ids == (1, 18)
    with pytest.raises(DataError, match=r"data \[\]: expected a list of voc:DIR"):
        load_datasets([])


def test_a_user_nobody_knows_is_no_traceback() -> None:
    with pytest.raises(DataError, match="~nobody-of-that-name"):
        load_dataset("voc:~nobody-of-that-name/data@train")


def test_names_for_generated_scenes() -> None:
    plain = load_dataset("synthetic:3")
    names = ["other", *reversed(CLASS_NAMES)]
    renamed = load_dataset("synthetic:3", names=names)
    for one, other in zip(plain, renamed, strict=True):
        assert [CLASS_NAMES[label] for label in one.labels] == [names[label] for label in other.labels]
    with pytest.raises(DataError, match="unknown class 'arrow'"):
        load_dataset("synthetic:3", names=["cat"])


@pytest.mark.parametrize("names", [[], "cat", ["cat", "cat"], [1, 2], [None], ["a\nb"]])
def test_useless_names_are_refused(names: Any) -> None:
    with pytest.raises(DataError, match="class name"):
        load_dataset("synthetic:1", names=names)


def test_real_cells() -> None:
    shared = os.environ.get("ANCHORLINE_SHARED")
    if not shared or not (Path(shared) / "data/bccd").is_dir():
        pytest.skip("ANCHORLINE_SHARED names no folder with data/bccd")
    sizes = {"train": 205, "val": 87, "test": 72, "trainval": 292}
    boxes = {"Platelets": 0, "RBC": 0, "WBC": 0}
    for split, size in sizes.items():
        dataset = load_dataset(f"voc:{shared}/data/bccd@{split}")
        assert len(dataset) == size
        assert dataset.names == ("Platelets", "RBC", "WBC")
        for image in dataset if split in ("trainval", "test") else ():
            assert image.size == (480, 640)
            for label in image.labels:
                boxes[dataset.names[label]] += 1
        if split == "trainval":
            assert dataset.dropped == {"zero area": 2}
    # The counts of the data set's own table, less the two boxes of zero area.
    assert sum(boxes.values()) == 4155 + 372 + 361 - 2


def test_sixteen_bit_images_of_fewer_bits_are_counted(make_voc: Callable[..., Path]) -> None:
    root = make_voc({name: [("cat", (1, 1, 20, 20))] for name in "abc"}, suffix=".png")
    for name, brightest in (("a", 4095), ("b", 900)):
        deep = np.full((60, 80), brightest, np.uint16)
        cv2.imwrite(str(root / f"JPEGImages/{name}.png"), deep)
    dataset = load_dataset(f"voc:{root}@train")
    ((text, count),) = dataset.remarks.items()
    assert count == 2
    assert text.startswith("images with 16-bit samples use only 12 of the bits, and are read almost black")
    assert "multiply the samples by 16" in text
    assert dataset.images[0].load().max() == 4095 >> 8


def test_images_larger_than_the_limit_are_refused_when_the_data_is_opened(
    make_coco: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANCHORLINE_MAX_PIXELS", "4799")
    with pytest.raises(DataError, match=r"a\.png: the image is 80x60, more than the 4799 pixels"):
        load_dataset(make_coco())
