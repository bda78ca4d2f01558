"""Random results to measure, and COCO's own evaluation of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorline.data.dataset import LabelledImage
from anchorline.runtime.detections import Detections


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
