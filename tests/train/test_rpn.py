"""The RPN's head and proposals against torchvision's ``RegionProposalNetwork``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers

from anchorline.train.model import rpn
from anchorline.train.model.anchors import AnchorGenerator as OurGenerator
from anchorline.train.model.assign import Targets
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import TrainingSettings

CANVAS = (96, 160)
GRIDS = [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]
SIZES = ((8.0,), (16.0,), (32.0,), (64.0,), (128.0,))
RATIOS = (0.5, 1.0, 2.0)
ANCHORS = [level[:] for level in OurGenerator(SIZES, RATIOS, "torchvision", (4, 8, 16, 32, 64), True)(GRIDS)]
IMAGE_SIZES = torch.tensor([[96.0, 160.0], [50.0, 160.0], [96.0, 33.0]])


def torchvision_rpn(
    pre_nms: int, post_nms: int, nms_iou: float = 0.7, min_side: float = 1e-3
) -> RegionProposalNetwork:
    built = RegionProposalNetwork(
        AnchorGenerator(SIZES, (RATIOS,) * 5),
        RPNHead(8, 3),
        0.7,
        0.3,
        256,
        0.5,
        {"training": pre_nms, "testing": pre_nms},
        {"training": post_nms, "testing": post_nms},
        nms_iou,
    ).eval()
    built.min_size = min_side
    return built


def head_outputs(spread: float, images: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random objectness and deltas; a large ``spread`` throws boxes off the image."""
    objectness = [torch.randn(images, len(level)) * 3 for level in ANCHORS]
    deltas = [torch.randn(images, len(level), 4) * spread for level in ANCHORS]
    return objectness, deltas


def expected_proposals(
    network: RegionProposalNetwork,
    objectness: list[torch.Tensor],
    deltas: list[torch.Tensor],
    image_sizes: torch.Tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    images = len(image_sizes)
    boxes = network.box_coder.decode(torch.cat(deltas, dim=1).reshape(-1, 4), [torch.cat(ANCHORS)] * images)
    shapes = [(int(h), int(w)) for h, w in image_sizes.tolist()]
    levels = [len(level) for level in ANCHORS]
    return network.filter_proposals(
        boxes.reshape(images, -1, 4), torch.cat(objectness, dim=1), shapes, levels
    )


def proposals(
    settings: ModelSettings,
    objectness: list[torch.Tensor],
    deltas: list[torch.Tensor],
    anchors: list[torch.Tensor],
    image_sizes: torch.Tensor,
    pre_nms: int,
    post_nms: int,
) -> rpn.Proposals:
    """Ours from given outputs of the head."""
    scored = rpn.AnchorScores(objectness, deltas, anchors)
    return rpn.RPN(8, (4, 8, 16, 32, 64), settings).propose(scored, image_sizes, pre_nms, post_nms)


def check_equal(found: rpn.Proposals, boxes: list[torch.Tensor], scores: list[torch.Tensor]) -> None:
    assert found.present.sum(dim=1).tolist() == [len(s) for s in scores]
    for image, (their_boxes, their_scores) in enumerate(zip(boxes, scores, strict=True)):
        count = len(their_scores)
        assert found.present[image, :count].all(), "gaps between the proposals"
        torch.testing.assert_close(found.scores[image, :count], their_scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.boxes[image, :count], their_boxes, rtol=0, atol=1e-4)
        assert (found.scores[image, count:] == -1).all()
        assert not found.boxes[image, count:].any()


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
@pytest.mark.parametrize(
    ("pre_nms", "post_nms", "nms_iou"),
    [(200, 60, 0.7), (1000, 300, 0.5), (30, 1000, 0.7), (5000, 5000, 0.9), (1, 1, 0.7)],
)
def test_proposals_equal_torchvisions(
    small_settings: Callable[..., ModelSettings], spread: float, pre_nms: int, post_nms: int, nms_iou: float
) -> None:
    settings = small_settings(rpn_nms_iou=nms_iou)
    objectness, deltas = head_outputs(spread)
    expected = expected_proposals(
        torchvision_rpn(pre_nms, post_nms, nms_iou), objectness, deltas, IMAGE_SIZES
    )
    found = proposals(settings, objectness, deltas, ANCHORS, IMAGE_SIZES, pre_nms, post_nms)
    assert found.boxes.shape[1] <= post_nms
    check_equal(found, *expected)


def test_tiny_boxes_go_as_in_torchvision(small_settings: Callable[..., ModelSettings]) -> None:
    settings = small_settings(rpn_min_side=5.0)
    objectness, deltas = head_outputs(1.0)
    expected = expected_proposals(torchvision_rpn(200, 60, min_side=5.0), objectness, deltas, IMAGE_SIZES)
    found = proposals(settings, objectness, deltas, ANCHORS, IMAGE_SIZES, 200, 60)
    check_equal(found, *expected)
    sides = found.boxes[found.present][:, 2:] - found.boxes[found.present][:, :2]
    assert sides.min() >= 5.0


@pytest.mark.parametrize("logit", [90.0, -90.0, -200.0])
def test_certain_anchors_are_kept_as_in_torchvision(
    small_settings: Callable[..., ModelSettings], logit: float
) -> None:
    """A score of exactly 1 or 0 is a score like any other; one anchor a level avoids ties."""
    objectness = [torch.full((1, 1), logit + i) for i in range(5)]
    deltas = [torch.zeros(1, 1, 4) for _ in range(5)]
    anchors = [torch.tensor([[10.0 * i, 0.0, 10.0 * i + 5, 5.0]]) for i in range(5)]
    sizes = torch.tensor([[96.0, 160.0]])
    found = proposals(small_settings(), objectness, deltas, anchors, sizes, 10, 10)
    network = torchvision_rpn(10, 10)
    boxes, scores = network.filter_proposals(
        torch.cat(anchors)[None], torch.cat(objectness, dim=1), [CANVAS], [1] * 5
    )
    assert found.present.sum() == len(scores[0]) == 5
    assert sorted(found.boxes[0, found.present[0]].tolist()) == sorted(boxes[0].tolist())


def test_an_image_that_keeps_nothing_has_no_proposals(small_settings: Callable[..., ModelSettings]) -> None:
    objectness, deltas = head_outputs(0.1, images=2)
    sizes = torch.tensor([[0.0, 0.0], [96.0, 160.0]])
    found = proposals(small_settings(), objectness, deltas, ANCHORS, sizes, 50, 20)
    assert found.present.sum(dim=1).tolist() == [0, 20]
    assert not found.boxes[0].any()


def test_boxes_that_are_not_numbers_are_dropped(small_settings: Callable[..., ModelSettings]) -> None:
    objectness, deltas = head_outputs(0.1)
    for level in deltas:
        level[1, ::3] = torch.nan
        level[2, ::2] = torch.inf
    found = proposals(small_settings(), objectness, deltas, ANCHORS, IMAGE_SIZES, 50, 20)
    assert torch.isfinite(found.boxes).all()
    assert found.present.any(dim=1).all()


def test_each_image_is_filtered_as_if_alone(small_settings: Callable[..., ModelSettings]) -> None:
    objectness, deltas = head_outputs(1.0)
    settings = small_settings()
    together = proposals(settings, objectness, deltas, ANCHORS, IMAGE_SIZES, 100, 50)
    for image in range(3):
        own = [[level[image : image + 1] for level in levels] for levels in (objectness, deltas)]
        alone = proposals(settings, *own, ANCHORS, IMAGE_SIZES[image : image + 1], 100, 50)
        assert torch.equal(alone.boxes[0], together.boxes[image])
        assert torch.equal(alone.scores[0], together.scores[image])


@pytest.mark.parametrize("convs", [1, 2])
def test_head_equals_torchvisions_in_anchor_order(convs: int) -> None:
    theirs = RPNHead(8, 3, conv_depth=convs)
    ours = rpn.RPNHead(8, 3, convs)
    ours.load_state_dict(theirs.state_dict())
    features = [torch.randn(2, 8, *grid) for grid in GRIDS]
    objectness, deltas = ours(features)
    expected = concat_box_prediction_layers(*theirs(features))
    torch.testing.assert_close(torch.cat(objectness, dim=1).reshape(-1, 1), expected[0])
    torch.testing.assert_close(torch.cat(deltas, dim=1).reshape(-1, 4), expected[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores_of_some_anchors_equal_torchvisions_and_so_do_their_gradients(precision: str) -> None:
    """Anchors of all levels and at every edge, after a pass without gradients, as in training."""
    theirs = RPNHead(8, 3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = rpn.RPNHead(8, 3)
    ours.load_state_dict(theirs.state_dict())
    mine = [torch.randn(2, 8, *grid, requires_grad=True) for grid in GRIDS]
    others = [feature.detach().clone().requires_grad_() for feature in mine]
    index = torch.stack([torch.randperm(sum(map(len, ANCHORS)))[:1500] for _ in range(2)])
    index[0, :2], index[1, :2] = torch.tensor([0, sum(map(len, ANCHORS)) - 1]), index[0, 2:4]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        with torch.no_grad():
            ours(mine)
        found = torch.cat((ours.at(mine, index)[0][..., None], ours.at(mine, index)[1]), dim=2)
    objectness, deltas = concat_box_prediction_layers(*theirs(others))
    every = torch.cat((objectness, deltas), dim=1).unflatten(0, (2, -1))
    expected = every.gather(1, index[..., None].expand(-1, -1, 5))
    bounds = {"rtol": 1e-4, "atol": 1e-4} if precision == "fp32" else {"rtol": 0.05, "atol": 0.5}
    torch.testing.assert_close(found, expected, **bounds)
    weight = torch.randn_like(found)
    ours_by = torch.autograd.grad((found * weight).sum(), [*ours.parameters(), *mine])
    theirs_by = torch.autograd.grad((expected * weight).sum(), [*theirs.parameters(), *others])
    for a, b in zip(ours_by, theirs_by, strict=True):
        assert float((a - b).norm() / b.norm()) < (1e-4 if precision == "fp32" else 0.3)


def test_scores_in_pairs_of_some_anchors_are_those_of_all() -> None:
    head = rpn.RPNHead(8, 3, width=5, pairs=True)
    features = [torch.randn(2, 8, *grid) for grid in GRIDS]
    index = torch.randint(sum(map(len, ANCHORS)), (2, 50))
    objectness, deltas = head(features)
    found = head.at(features, index)
    torch.testing.assert_close(found[0], torch.cat(objectness, dim=1).gather(1, index))
    expected = torch.cat(deltas, dim=1).gather(1, index[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(found[1], expected)


@pytest.mark.parametrize("convs", [0, 1, 2])
def test_sampled_anchors_are_scored_again_by_a_head_of_one_convolution_only(
    small_settings: Callable[..., ModelSettings], convs: int
) -> None:
    """Other heads keep the gradients of the pass over the maps, however few anchors are sampled."""
    settings = TrainingSettings(rpn_samples=32)
    ours = rpn.RPN(8, (4, 8, 16, 32, 64), small_settings(rpn_convs=convs))
    features = [torch.randn(3, 8, *grid) for grid in GRIDS]
    boxes = [
        torch.tensor([[8.0, 4.0, 30.0, 40.0]]),
        torch.zeros(0, 4),
        torch.tensor([[0.0, 9.0, 33.0, 70.0]]),
    ]
    labels = [torch.zeros(len(each), dtype=torch.int64) for each in boxes]
    targets = Targets.pad(boxes, labels, (1, 2, 3))  # with draws of their own, the same each time
    scored = ours.score_to_train(features, settings)
    assert scored.objectness[0].requires_grad == (convs != 1)
    found = ours.losses(scored, IMAGE_SIZES, targets, settings, features)
    expected = ours.losses(ours.score(features), IMAGE_SIZES, targets, settings)
    torch.testing.assert_close(found, expected)
    by = [torch.autograd.grad(sum(losses.values()), [*ours.parameters()]) for losses in (found, expected)]
    torch.testing.assert_close(*by)


def test_settings_reach_the_selection(small_settings: Callable[..., ModelSettings]) -> None:
    objectness, deltas = head_outputs(0.1)
    counts = []
    for iou in (0.1, 0.9):
        settings = dataclasses.replace(small_settings(), rpn_nms_iou=iou)
        found = proposals(settings, objectness, deltas, ANCHORS, IMAGE_SIZES, 300, 900)
        counts.append(int(found.present.sum()))
    assert counts[0] < counts[1] / 2
