"""Proposals with parts of the RPN switched off, and dense windows, worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from paper_experiments.proposals import ABLATIONS, Ablation, ablated_proposals, best_of, dense_windows
from torch import Tensor

from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.runtime.detections import Detections
from anchorline.train.model.rpn import RPN as Network
from anchorline.train.model.rpn import AnchorScores
from anchorline.train.model.settings import ModelSettings

RPN, NO_NMS, NO_CLS, NO_REG = ABLATIONS
SETTINGS = ModelSettings(
    neck="single", canvas=(64, 64), anchor_sizes=((16.0,),), aspect_ratios=(1.0,), rpn_min_side=2.0
)
NETWORK = Network(4, (16,), SETTINGS)
ANCHORS = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 0, 60, 20], [100, 100, 110, 110]])
# The first anchor moves right by its width; the second moves onto where the first one goes; the third grows
# to twice its width, past the image's edge at 64; the last lies outside and becomes too small to keep.
DELTAS = torch.tensor([[[1.0, 0, 0, 0], [-1, -2, 0, 0], [0, 0, math.log(2), 0], [0, 0, 0, 0]]])
SCORES = torch.tensor([[2.0, 1.0, 0.0, 5.0]])
SIZES = torch.tensor([[64.0, 64.0]])
MOVED, GROWN = [10.0, 0.0, 20.0, 10.0], [30.0, 0.0, 64.0, 20.0]


def proposals(ablation: Ablation, count: int, noise: Tensor | None = None) -> tuple[list, list]:
    scored = AnchorScores([SCORES], [DELTAS], [ANCHORS])
    found = ablated_proposals(NETWORK, scored, SIZES, ablation, count, noise)
    there = found.present[0]
    return found.boxes[0, there].round(decimals=3).tolist(), found.scores[0, there].tolist()


def test_all_of_the_rpn_suppresses_the_duplicate() -> None:
    boxes, scores = proposals(RPN, 3)
    assert boxes == [MOVED, GROWN]
    assert scores == pytest.approx([torch.sigmoid(torch.tensor(2.0)).item(), 0.5])
    assert proposals(RPN, 1)[0] == [MOVED]


def test_without_nms_the_duplicate_stays() -> None:
    assert proposals(NO_NMS, 4)[0] == [MOVED, MOVED, GROWN]
    assert proposals(NO_NMS, 2)[0] == [MOVED, MOVED]


def test_without_scores_the_draw_decides_whatever_the_scores_say() -> None:
    noise = torch.tensor([[0.1, 0.2, 0.9, 0.99]])  # the last anchor is drawn first, but is outside the image
    boxes, scores = proposals(NO_CLS, 2, noise)
    assert boxes == [GROWN, MOVED]
    assert scores == pytest.approx([0.9, 0.2])
    assert proposals(NO_CLS, 4, noise)[0] == [GROWN, MOVED, MOVED]  # regressed, and nothing suppressed
    with pytest.raises(ValueError, match="noise"):
        proposals(NO_CLS, 2)


def test_without_regression_they_are_the_anchors_by_score() -> None:
    boxes, scores = proposals(NO_REG, 3)
    assert boxes == [[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0], [40.0, 0.0, 60.0, 20.0]]
    assert scores == sorted(scores, reverse=True)
    # Two anchors that overlap by more than 0.7: the regression is off, NMS is not.
    near = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11]])
    scored = AnchorScores([SCORES[:, :2]], [DELTAS[:, :2]], [near])
    found = ablated_proposals(NETWORK, scored, SIZES, NO_REG, 2)
    assert found.boxes[0, found.present[0]].tolist() == [[0.0, 0.0, 10.0, 10.0]]


def test_dense_windows_are_all_anchors_clipped_to_their_image() -> None:
    anchors = torch.tensor([[-8.0, -8, 8, 8], [24, 24, 40, 40], [48, 48, 64, 64]])
    found = dense_windows(NETWORK, anchors, torch.tensor([[64.0, 64.0], [32.0, 30.0]]))
    assert found.boxes[0].tolist() == [[0, 0, 8, 8], [24, 24, 40, 40], [48, 48, 64, 64]]
    assert found.boxes[1].tolist() == [[0, 0, 8, 8], [24, 24, 30, 32], [0, 0, 0, 0]]
    assert found.present.tolist() == [[True, True, True], [True, True, False]]


def test_the_best_are_kept_in_falling_order() -> None:
    flags = np.zeros(0, bool)
    image = LabelledImage(
        "a", (10, 20), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), flags, flags, lambda: np.zeros(0)
    )
    boxes = [[0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]]
    (kept,) = best_of(Dataset("", (), (image,)), [Detections(boxes, [0.1, 0.9, 0.5], [0, 0, 0])], 2)
    assert (kept.id, kept.size) == ("a", (10, 20))
    assert kept.boxes.tolist() == [[0, 0, 2, 2], [0, 0, 3, 3]]
    assert kept.scores.tolist() == pytest.approx([0.9, 0.5])
