"""Stored proposals: the file, damaged ones, and their way through every random view into the batch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from anchorline.data.dataset import Dataset
from anchorline.data.proposals import ImageProposals, SelectiveSearch, read_proposals, write_proposals
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import DataError
from anchorline.train.data.dataset import CanvasDataset, collate
from anchorline.train.settings import TrainingSettings


def truth_as_proposals(data: Dataset) -> list[ImageProposals]:
    scores = [np.linspace(1, 0.5, len(image.boxes), dtype=np.float32) for image in data]
    return [ImageProposals(i.id, i.size, i.boxes, s) for i, s in zip(data, scores, strict=True)]


@pytest.mark.parametrize(
    "changes",
    [
        {"flip": 1.0},
        {"vertical_flip": 1.0},
        {"zoom": (0.4, 0.9)},
        {"zoom": (1.2, 2.5)},
        {"iou_crop": 1.0},
        {"mosaic": 1.0},
        {"mosaic": 0.5, "iou_crop": 0.5, "zoom": (0.6, 1.6), "photometric": 0.5, "vertical_flip": 0.5},
    ],
)
def test_proposals_move_exactly_as_the_objects(scenes: Dataset, changes: dict[str, object]) -> None:
    """Objects given as proposals: each target is among them, and no view changes by their being there."""
    settings = TrainingSettings(rpn_post_nms=40, **changes)  # type: ignore[arg-type]
    plain = CanvasDataset(scenes, (64, 96), ResizeRule(), settings)
    views = CanvasDataset(scenes, (64, 96), ResizeRule(), settings, truth_as_proposals(scenes))
    for epoch in range(4):
        for index in range(len(scenes)):
            item, without = views[epoch, index], plain[epoch, index]
            assert item["proposal_boxes"].shape == (40, 4)
            assert all(torch.equal(item[name], without[name]) for name in ("image", "boxes", "labels"))
            present = item["proposal_scores"] >= 0
            boxes = {tuple(box) for box in item["proposal_boxes"][present].tolist()}
            assert {tuple(box) for box in item["boxes"].tolist()} <= boxes
            x1, y1, x2, y2 = item["proposal_boxes"][present].unbind(1)
            assert ((x2 > x1) & (y2 > y1)).all()
            assert (x2 <= item["size"][1] + 1e-3).all()
            assert (item["proposal_scores"].diff() <= 0).all()
            assert not item["proposal_boxes"][~present].any()
    batch = collate([views[0, 0], views[0, 1]])
    assert batch.proposals is not None
    assert batch.proposals.boxes.shape == (2, 40, 4)


def test_the_file_gives_back_what_was_written(scenes: Dataset, tmp_path: Path) -> None:
    given = truth_as_proposals(scenes)
    write_proposals(tmp_path / "p.jsonl", scenes, [each.to_detections() for each in given])
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"id", "size", "boxes", "scores"}] * len(scenes)
    for each, found in zip(given, read_proposals(tmp_path / "p.jsonl", scenes), strict=True):
        assert (each.id, tuple(each.size)) == (found.id, found.size)
        assert np.abs(each.boxes - found.boxes).max(initial=0) <= 0.0051
    half = dataclasses.replace(scenes, images=scenes.images[4:])
    assert [each.id for each in read_proposals(tmp_path / "p.jsonl", half)] == [i.id for i in half]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no line for 8 of 8"),
        ("{", "line 1"),
        ("[]", "line 1"),
        ("null\n", "line 1"),
        ('{"id": "a", "size": [4, 4], "scores": []}', "'boxes' is missing"),
        ('{"id": "a", "size": [4, 4], "boxes": [[0, 0, 9, 2]], "scores": [1]}', "line 1"),
        ('{"id": "a", "size": [4, 4], "boxes": [[3, 0, 1, 2]], "scores": [1]}', "line 1"),
        ('{"id": "a", "size": [4, 4], "boxes": [[0, 0, 1, NaN]], "scores": [1]}', "finite"),
        ('{"id": "a", "size": [4, 4], "boxes": [[0, 0, 1, 1]], "scores": []}', "line 1"),
        ('{"id": "a", "size": [4, 0], "boxes": [], "scores": []}', "size"),
    ],
)
def test_damaged_files_are_one_line(scenes: Dataset, tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_proposals(path, scenes)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_proposals_of_an_image_of_another_size(scenes: Dataset, tmp_path: Path) -> None:
    write_proposals(
        tmp_path / "p.jsonl", scenes, [each.to_detections() for each in truth_as_proposals(scenes)]
    )
    first = dataclasses.replace(scenes.images[0], size=(97, 128))
    with pytest.raises(DataError, match="97x128"):
        read_proposals(tmp_path / "p.jsonl", dataclasses.replace(scenes, images=(first, *scenes.images[1:])))


def test_selective_search_finds_boxes(scenes: Dataset) -> None:
    import cv2

    if not hasattr(cv2, "ximgproc"):
        pytest.skip("needs OpenCV's contrib build")
    (found,) = SelectiveSearch(50).batch([scenes.images[0].load()])
    assert isinstance(found, Detections)
    assert 0 < len(found) <= 50
