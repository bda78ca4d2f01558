"""Small labelled data sets on disk, made for each test."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import pytest

from anchorline.data.dataset import load_dataset
from anchorline.runtime.io.errors import AnchorlineError

VocObject = tuple[str, tuple[Any, Any, Any, Any]]


@pytest.fixture
def make_voc(tmp_path: Path) -> Callable[..., Path]:
    """Write a VOC folder: ``images`` maps ids to objects (name, (xmin, ymin, xmax, ymax))."""

    def make(
        images: dict[str, Sequence[VocObject]],
        splits: dict[str, Sequence[str]] | None = None,
        size: tuple[int, int] = (60, 80),
        suffix: str = ".jpg",
        difficult: bool = False,
    ) -> Path:
        root = tmp_path / "voc"
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / part).mkdir(parents=True, exist_ok=True)
        for id, objects in images.items():
            pixels = np.full((*size, 3), 128, np.uint8)
            (root / "JPEGImages" / f"{id}{suffix}").write_bytes(
                cv2.imencode(suffix.lower(), pixels)[1].tobytes()
            )
            tags = ("xmin", "ymin", "xmax", "ymax")
            body = "".join(
                f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox>"
                + "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(tags, box, strict=True))
                + "</bndbox></object>"
                for name, box in objects
            )
            (root / "Annotations" / f"{id}.xml").write_text(f"<annotation>{body}</annotation>")
        for split, ids in (splits or {"train": list(images)}).items():
            (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
        return root

    return make


@pytest.fixture
def make_coco(tmp_path: Path) -> Callable[..., str]:
    """Write two 60 x 80 images and COCO annotations changed by ``edit``; returns the spec."""

    def make(edit: Callable[[dict[str, Any]], None] = lambda content: None) -> str:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for name in ("a.png", "b.png"):
            (folder / name).write_bytes(cv2.imencode(".png", np.zeros((60, 80, 3), np.uint8))[1].tobytes())
        content: dict[str, Any] = {
            "images": [
                {"id": 7, "file_name": "a.png", "height": 60, "width": 80},
                {"id": 3, "file_name": "b.png", "height": 60, "width": 80},
            ],
            "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
            "annotations": [
                {"id": 1, "image_id": 7, "category_id": 18, "bbox": [10, 5, 20, 30], "iscrowd": 0},
                {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 80, 60], "iscrowd": 1},
                {"id": 3, "image_id": 3, "category_id": 1, "bbox": [70, 50, 12, 13]},
            ],
        }
        edit(content)
        (tmp_path / "annotations.json").write_text(json.dumps(content))
        return f"coco:{folder},{tmp_path / 'annotations.json'}"

    return make


@pytest.fixture
def make_yolo(tmp_path: Path) -> Callable[..., Path]:
    """Write a YOLO folder: ``images`` maps ids to the text of the label file, None for no file."""

    def make(
        images: dict[str, str | None],
        split: str = "train",
        size: tuple[int, int] = (60, 80),
        names: str | None = "names: [cat, dog, bird]\n",
        roboflow: bool = False,
        suffix: str = ".png",
    ) -> Path:
        root = tmp_path / "yolo"
        image_folder, label_folder = (
            root / (f"{split}/{part}" if roboflow else f"{part}/{split}") for part in ("images", "labels")
        )
        label_folder.mkdir(parents=True, exist_ok=True)
        for id, labels in images.items():
            path = image_folder / f"{id}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode(suffix, np.full((*size, 3), 128, np.uint8))[1].tobytes())
            if labels is not None:
                (label_folder / f"{id}.txt").parent.mkdir(parents=True, exist_ok=True)
                (label_folder / f"{id}.txt").write_text(labels)
        if names is not None:
            (root / "data.yaml").write_text(names)
        return root

    return make


@pytest.fixture
def turn_png() -> Callable[[Path], None]:
    """Put an EXIF that turns it by a right angle behind a PNG's pixels, where ExifTool writes it."""

    def turn(path: Path) -> None:
        chunk = b"eXIfII*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
        ends = (len(chunk) - 4).to_bytes(4, "big"), zlib.crc32(chunk).to_bytes(4, "big")
        content = path.read_bytes()
        path.write_bytes(content[:-12] + chunk.join(ends) + content[-12:])

    return turn


def _mutated(content: bytes, random: Random) -> bytes:
    """A few bytes cut out, doubled, or replaced by what breaks readers."""
    bad = [
        b"",
        b"\0",
        b"nan",
        b"1e400",
        b"9" * 400,
        b"\xff\xfe",
        b"[{",
        b"/..",
        b"\n",
        b"&a *a",
        b"<a>",
        b"\xe9",
    ]
    for _ in range(random.randint(1, 3)):
        start = random.randrange(len(content) + 1)
        end = min(len(content), start + random.randint(0, 9))
        content = content[:start] + random.choice([*bad, content[start:end] * 2]) + content[end:]
    return content


@pytest.fixture
def expect_read_or_refused() -> Callable[[str, list[Path]], None]:
    """Mutate files of a data set, one at a time: its spec is read, or refused in one short line."""

    def expect(spec: str, paths: list[Path]) -> None:
        random = Random(5)
        refused = []
        for _ in range(150):
            path = random.choice(paths)
            content = path.read_bytes()
            path.write_bytes(_mutated(content, random))
            try:
                load_dataset(spec)
            except AnchorlineError as error:
                refused.append(str(error))
            path.write_bytes(content)
        assert 30 < len(refused) < 150
        assert not [line for line in refused if "\n" in line or len(line) > 600]

    return expect
