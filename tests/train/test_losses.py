"""Losses and their gradients against torchvision's ``compute_loss`` and ``fastrcnn_loss``."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from anchorline.train.model import assign, losses, rpn
from anchorline.train.model.anchors import AnchorGenerator as OurGenerator
from anchorline.train.model.assign import Targets
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import TrainingSettings

CANVAS = (64, 96)
ANCHORS = torch.cat(
    [
        level[:]
        for level in OurGenerator([(8.0,), (32.0,)], (0.5, 1.0, 2.0), "torchvision", (4, 8))(
            [(16, 24), (8, 12)]
        )
    ]
)
NOTHING = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
SOME = (
    torch.tensor([[10.0, 10.0, 40.0, 35.0], [50.0, 5.0, 58.0, 13.0], [60.0, 30.0, 96.0, 64.0]]),
    torch.tensor([0, 2, 1]),
)
ONE = (torch.tensor([[3.0, 4.0, 9.0, 9.0]]), torch.tensor([1]))


def our_losses(
    objectness: torch.Tensor, deltas: torch.Tensor, targets: Targets, settings: TrainingSettings
) -> dict[str, torch.Tensor]:
    network = rpn.RPN(4, (4, 8, 16, 32, 64), ModelSettings())
    sizes = torch.tensor([CANVAS] * len(objectness))
    return network.losses(rpn.AnchorScores([objectness], [deltas], [ANCHORS]), sizes, targets, settings)


def torchvision_rpn() -> RegionProposalNetwork:
    ratios = (0.5, 1.0, 2.0)
    counts = {"training": 100, "testing": 100}
    generator = AnchorGenerator(((8.0,), (32.0,)), (ratios,) * 2)
    return RegionProposalNetwork(generator, RPNHead(8, 3), 0.7, 0.3, 64, 0.5, counts, counts, 0.7)


@pytest.mark.parametrize("images", [(SOME, NOTHING, ONE), (NOTHING, NOTHING), (ONE,), (SOME, SOME)])
def test_rpn_losses_equal_torchvisions(
    images: tuple[tuple[torch.Tensor, torch.Tensor], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets, losses and gradients; the draws are random, so torchvision is handed ours."""
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recorded(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        drawn.append(real(*arguments))
        return drawn[-1]

    real = assign.sample
    monkeypatch.setattr(assign, "sample", recorded)
    batch = len(images)
    objectness = torch.randn(batch, len(ANCHORS), requires_grad=True)
    deltas = torch.randn(batch, len(ANCHORS), 4, requires_grad=True)
    settings = TrainingSettings(rpn_samples=64)
    targets = Targets.pad([boxes for boxes, _ in images], [labels for _, labels in images])
    ours = our_losses(objectness, deltas, targets, settings)

    network = torchvision_rpn()
    indices, slots = drawn[0]
    chosen = torch.zeros(batch, len(ANCHORS), dtype=torch.bool).scatter(1, indices, slots)

    def same_draws(labels: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        pairs = list(zip(labels, chosen, strict=True))
        return [(lab == 1) & c for lab, c in pairs], [(lab == 0) & c for lab, c in pairs]

    network.fg_bg_sampler = same_draws
    labels, matched = network.assign_targets_to_anchors(
        [ANCHORS] * batch, [{"boxes": boxes} for boxes, _ in images]
    )
    goals = network.box_coder.encode(matched, [ANCHORS] * batch)
    theirs = network.compute_loss(objectness.flatten()[:, None], deltas.reshape(-1, 4), labels, goals)
    torch.testing.assert_close(ours["loss_objectness"], theirs[0])
    torch.testing.assert_close(ours["loss_rpn_box"], theirs[1])
    check_gradients(sum(ours.values()), sum(theirs), [objectness, deltas])


def check_gradients(ours: torch.Tensor, theirs: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    for mine, other in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("positives", [(10, 4), (0, 7), (0, 0), (16, 16)])
@pytest.mark.parametrize("drawn_slots", [(16, 16), (16, 5), (3, 0)])
def test_roi_losses_equal_torchvisions(positives: tuple[int, int], drawn_slots: tuple[int, int]) -> None:
    slots, classes = 16, 4
    logits = torch.randn(2, slots, classes + 1, requires_grad=True)
    deltas = torch.randn(2, slots, classes + 1, 4, requires_grad=True)
    labels = torch.randint(1, classes + 1, (2, slots))
    drawn = torch.arange(slots) < torch.tensor(drawn_slots)[:, None]
    labels[torch.arange(slots) >= torch.tensor(positives)[:, None]] = 0
    goals = torch.randn(2, slots, 4)
    ours = losses.roi_losses(logits, deltas, labels, drawn, goals, beta=1 / 9)
    theirs = fastrcnn_loss(
        logits[drawn],
        deltas[drawn].flatten(1),
        [lab[d] for lab, d in zip(labels, drawn, strict=True)],
        [g[d] for g, d in zip(goals, drawn, strict=True)],
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    check_gradients(sum(ours), sum(theirs), [logits, deltas])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_unused_slots_may_hold_anything(poison: float) -> None:
    """Neither the losses nor any gradient sees what stands in a slot that was not drawn."""
    slots, classes = 8, 3
    drawn = torch.arange(slots)[None] < 5
    clean = {
        "objectness": torch.randn(1, slots),
        "logits": torch.randn(1, slots, classes + 1),
        "box": torch.randn(1, slots, 4),
        "boxes": torch.randn(1, slots, classes + 1, 4),
        "goals": torch.randn(1, slots, 4),
    }
    dirty = {name: value.clone() for name, value in clean.items()}
    for value in dirty.values():
        value[:, 5:] = poison
    # The target of a background slot counts no more than that of an empty one.
    dirty["goals"][:, 2:] = poison
    positive = torch.arange(slots)[None] < 2
    labels = torch.where(positive, 2, 0)
    results = []
    for values in (clean, dirty):
        inputs = [values[name].requires_grad_() for name in ("objectness", "box", "logits", "boxes")]
        objectness, box, logits, boxes = inputs
        rpn_pair = losses.rpn_losses(objectness, box, positive, drawn, values["goals"], 1 / 9)
        roi_pair = losses.roi_losses(logits, boxes, labels, drawn, values["goals"], 1 / 9)
        total = torch.stack([*rpn_pair, *roi_pair])
        results.append((total, torch.autograd.grad(total.sum(), inputs)))
    assert torch.isfinite(results[0][0]).all()
    assert (results[0][0] > 0).all()
    assert torch.equal(results[0][0], results[1][0])
    for expected, found in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(found, expected)
        assert not found[:, 5:].any()


def test_without_a_single_draw_the_losses_are_zero() -> None:
    drawn = torch.zeros(2, 6, dtype=torch.bool)
    logits = torch.randn(2, 6, 3, requires_grad=True)
    pair = losses.roi_losses(
        logits,
        torch.randn(2, 6, 3, 4),
        torch.zeros(2, 6, dtype=torch.int64),
        drawn,
        torch.randn(2, 6, 4),
        1.0,
    )
    assert [float(loss.detach()) for loss in pair] == [0.0, 0.0]
    assert not torch.autograd.grad(sum(pair), logits)[0].any()


def test_smooth_l1_by_hand() -> None:
    """0.5 x^2 / beta below beta, |x| - 0.5 beta above."""
    one, logits, deltas = torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2, 4)
    found = []
    for place, value in enumerate([0.0, 0.25, 0.5, -3.0]):
        target = torch.zeros(1, 1, 4)
        target[0, 0, place] = value
        found.append(losses.roi_losses(logits, deltas, one, one.bool(), target, beta=0.5)[1].item())
    assert found == [0.0, 0.0625, 0.25, 2.75]


def test_weights_scale_the_losses() -> None:
    targets = Targets.pad([SOME[0]], [SOME[1]])
    objectness, deltas = torch.randn(1, len(ANCHORS)), torch.randn(1, len(ANCHORS), 4)
    found = []
    for weight in (1.0, 2.5):
        torch.manual_seed(5)
        found.append(our_losses(objectness, deltas, targets, TrainingSettings(rpn_loss_weight=weight)))
    for name, value in found[0].items():
        assert float(found[1][name]) == pytest.approx(2.5 * float(value))
