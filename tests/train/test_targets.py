"""Padding of ground truth to fixed shapes."""

from __future__ import annotations

import torch

from anchorline.train.model.assign import Targets
from anchorline.train.model.boxes import rows_at


def test_images_are_padded_to_the_most_crowded_one() -> None:
    boxes = [torch.rand(2, 4), torch.zeros(0, 4), torch.rand(3, 4)]
    labels = [torch.tensor([1, 0]), torch.zeros(0, dtype=torch.int64), torch.tensor([2, 2, 0])]
    targets = Targets.pad(boxes, labels)
    assert targets.boxes.shape == (3, 3, 4)
    assert targets.labels.tolist() == [[1, 0, -1], [-1, -1, -1], [2, 2, 0]]
    assert targets.present.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert torch.equal(targets.boxes[0, :2], boxes[0])
    assert not targets.boxes[1].any()


def test_a_batch_without_objects_has_one_empty_slot() -> None:
    targets = Targets.pad([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    assert targets.boxes.shape == (2, 1, 4)
    assert not targets.present.any()


def test_rows_are_those_of_each_images_own_slots() -> None:
    labels = torch.zeros(2, 3, dtype=torch.int64)
    targets = Targets(torch.arange(24.0).reshape(2, 3, 4), labels, torch.zeros(2, 0, 4))
    chosen = rows_at(targets.boxes, torch.tensor([[2, 2], [0, 1]]))
    assert torch.equal(chosen, torch.stack((targets.boxes[0, [2, 2]], targets.boxes[1, [0, 1]])))


def test_ignore_regions_are_padded_apart_from_the_objects() -> None:
    regions = [torch.zeros(0, 4), torch.rand(2, 4), torch.rand(1, 4)]
    boxes, labels = [torch.rand(1, 4)] * 3, [torch.zeros(1, dtype=torch.int64)] * 3
    targets = Targets.pad(boxes, labels, (1, 2, 3), regions)
    assert targets.boxes.shape == (3, 1, 4)
    assert targets.ignored.shape == (3, 2, 4)
    assert torch.equal(targets.ignored[1], regions[1])
    assert torch.equal(targets.ignored[2, 0], regions[2][0])
    assert not targets.ignored[0].any()
    assert not targets.ignored[2, 1].any()
    moved = targets.to(torch.device("cpu"))
    assert torch.equal(moved.ignored, targets.ignored)
    assert moved.seeds == (1, 2, 3)


def test_without_ignore_regions_there_are_no_slots_for_them() -> None:
    boxes, labels = [torch.rand(2, 4)] * 2, [torch.zeros(2, dtype=torch.int64)] * 2
    assert Targets.pad(boxes, labels).ignored.shape == (2, 0, 4)
    assert Targets.pad(boxes, labels, ignored=[torch.zeros(0, 4)] * 2).ignored.shape == (2, 0, 4)
