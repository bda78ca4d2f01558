"""Small labelled data sets on disk, and images for the metrics, made for each test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from anchorline.data.dataset import LabelledImage
from anchorline.runtime.detections import Detections

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
                {"id": 3, "image_id": 3, "category_id": 1, "bbox": [70, 50, 20, 20]},
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
def make_image() -> Callable[..., LabelledImage]:
    """A labelled image in memory, 100 x 100 grey pixels."""

    def make(
        boxes: Sequence[Sequence[float]] = (),
        labels: Sequence[int] | None = None,
        difficult: Sequence[bool] | None = None,
        crowd: Sequence[bool] | None = None,
        id: str = "image",
    ) -> LabelledImage:
        count = len(boxes)
        return LabelledImage(
            id=id,
            size=(100, 100),
            boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
            labels=np.array(labels if labels is not None else [0] * count, dtype=np.int64),
            difficult=np.array(difficult if difficult is not None else [False] * count, dtype=np.bool_),
            crowd=np.array(crowd if crowd is not None else [False] * count, dtype=np.bool_),
            load=lambda: np.full((100, 100, 3), 128, np.uint8),
        )

    return make


@pytest.fixture
def random_results(make_image: Callable[..., LabelledImage]) -> Callable[..., Any]:
    """Random labelled images and detections: some near the objects, some anywhere, scores often tied."""

    def make(seed: int, count: int = 12, classes: int = 3) -> tuple[list[LabelledImage], list[Detections]]:
        rng = np.random.default_rng(seed)
        images, detections = [], []
        for _ in range(count):
            boxes = _random_boxes(rng, int(rng.integers(0, 7)))
            labels = rng.integers(0, classes, len(boxes))
            images.append(make_image(boxes, labels, difficult=rng.random(len(boxes)) < 0.15))
            near = boxes.repeat(2, axis=0) + rng.normal(0, 3, (2 * len(boxes), 4))
            near = np.sort(near.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
            every = np.concatenate([near, _random_boxes(rng, 3)])
            near_labels = np.where(
                rng.random(len(near)) < 0.85, labels.repeat(2), rng.integers(0, classes, len(near))
            )
            every_label = np.concatenate([near_labels, rng.integers(0, classes, 3)])
            scores = np.round(rng.random(len(every)), 2)
            detections.append(Detections(every, scores, every_label))
        return images, detections

    return make


@pytest.fixture(scope="session")
def pycocotools_on_files() -> Callable[..., Any]:
    """``pycocotools_on_files(images, detections, folder)``: COCO's evaluation of three classes done the
    documented way, with annotation and result files and ``summarize``."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def run(images: list[LabelledImage], detections: list[Detections], folder: Path) -> Any:
        annotations, results = [], []
        for number, (image, found) in enumerate(zip(images, detections, strict=True), start=1):
            for (x1, y1, x2, y2), label, difficult in zip(
                image.boxes.tolist(), image.labels.tolist(), image.difficult.tolist(), strict=True
            ):
                box = [x1, y1, x2 - x1, y2 - y1]
                record = {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": box,
                }
                annotations.append({**record, "area": box[2] * box[3], "iscrowd": int(difficult)})
            results += found.to_coco(number)
        truth = {
            "images": [{"id": number + 1} for number in range(len(images))],
            "categories": [{"id": label + 1, "name": str(label)} for label in range(3)],
            "annotations": annotations,
        }
        (folder / "truth.json").write_text(json.dumps({**truth, "info": {}}))
        (folder / "results.json").write_text(json.dumps(results))
        coco = COCO(str(folder / "truth.json"))
        evaluation = COCOeval(coco, coco.loadRes(str(folder / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return evaluation

    return run


def _random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corner = rng.uniform(0, 60, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(8, 40, (count, 2))], axis=1)
