"""Matching against torchvision's ``Matcher``."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from anchorline.train.model.anchors import AnchorGenerator
from anchorline.train.model.assign import BACKGROUND
from anchorline.train.model.assign import Matcher as OurMatcher
from anchorline.train.model.boxes import pairwise_iou

CANVAS = (96, 128)
ANCHORS = torch.cat(
    [
        level[:]
        for level in AnchorGenerator([(16.0,), (48.0,)], (0.5, 1.0, 2.0), "torchvision", (8, 16))(
            [(12, 16), (6, 8)]
        )
    ]
)


def objects(count: int) -> torch.Tensor:
    centre = torch.rand(count, 2) * torch.tensor([CANVAS[1], CANVAS[0]])
    half = torch.rand(count, 2) * 40 + 2
    return torch.cat((centre - half, centre + half), dim=1)


SCENES = {
    "one": objects(1),
    "few": objects(5),
    "hundreds": objects(300),
    "duplicates": objects(2).repeat(3, 1),
    "under a stride": torch.tensor([[40.0, 40.0, 43.0, 42.0], [9.9, 9.9, 10.1, 10.1]]),
    "over the image": torch.tensor([[-500.0, -500.0, 700.0, 900.0]]),
    "equal to an anchor": ANCHORS[[100, 3]],
}


def ours(
    iou: torch.Tensor, present: torch.Tensor | None = None, *, low: float, high: float, keep: bool
) -> torch.Tensor:
    if present is None:
        present = torch.ones(iou.shape[0], iou.shape[2], dtype=torch.bool)
    return OurMatcher(high, low, keep).match(iou, present)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(("low", "high", "keep"), [(0.3, 0.7, True), (0.5, 0.5, False), (0.2, 0.9, False)])
def test_matches_equal_torchvisions(scene: str, low: float, high: float, keep: bool) -> None:
    boxes = SCENES[scene]
    # torchvision lets an untouched box claim every far anchor: see the test of that name.
    boxes = boxes[box_iou(boxes, ANCHORS).amax(dim=1) > 0]
    assert len(boxes)
    expected = Matcher(high, low, allow_low_quality_matches=keep)(box_iou(boxes, ANCHORS))
    found = ours(pairwise_iou(ANCHORS[None], boxes[None]), low=low, high=high, keep=keep)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("keep", [True, False])
def test_empty_slots_change_nothing(keep: bool) -> None:
    boxes = torch.zeros(2, 9, 4)
    boxes[0, :5], boxes[1, [2, 6]] = SCENES["few"], SCENES["few"][:2]
    boxes[1, 4] = ANCHORS[50]  # an empty slot that holds a perfect box all the same
    present = torch.zeros(2, 9, dtype=torch.bool)
    present[0, :5] = present[1, [2, 6]] = True
    found = ours(pairwise_iou(ANCHORS[None], boxes), present, low=0.3, high=0.7, keep=keep)
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=keep)
    assert torch.equal(found[0], matcher(box_iou(SCENES["few"], ANCHORS)))
    second = matcher(box_iou(SCENES["few"][:2], ANCHORS))
    slots = torch.tensor([2, 6])
    assert torch.equal(found[1], torch.where(second >= 0, slots[second.clamp(min=0)], second))


@pytest.mark.parametrize("slots", [0, 1, 4])
def test_without_objects_everything_is_background(slots: int) -> None:
    """torchvision's matcher refuses an empty table; its callers treat such images apart, alike."""
    present = torch.zeros(2, slots, dtype=torch.bool)
    found = ours(pairwise_iou(ANCHORS[None], torch.zeros(2, slots, 4)), present, low=0.3, high=0.7, keep=True)
    assert found.shape == (2, len(ANCHORS))
    assert (found == BACKGROUND).all()


def test_a_box_that_no_anchor_touches_claims_none() -> None:
    """The one difference from torchvision, where the best IoU of 0 makes every far anchor positive."""
    boxes = torch.tensor([[40.0, 40.0, 60.0, 60.0], [900.0, 900.0, 910.0, 910.0]])
    iou = box_iou(boxes, ANCHORS)
    theirs = Matcher(0.7, 0.3, allow_low_quality_matches=True)(iou)
    found = ours(iou.T[None], low=0.3, high=0.7, keep=True)[0]
    assert (theirs >= 0).all()
    assert (found == 1).sum() == 0
    alone = Matcher(0.7, 0.3, allow_low_quality_matches=True)(iou[:1])
    assert torch.equal(found, alone)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_ious_at_the_limits_and_ties_match_as_in_torchvision(seed: int, keep: bool) -> None:
    """Tables of few values: exactly at a limit, equal for several boxes, equal for several candidates."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.7, 1.0])
    iou = values[torch.randint(0, len(values), (12, 4), generator=generator)]
    iou[0] = iou[0].clamp(min=0.1)  # no box without an overlap
    expected = Matcher(0.7, 0.3, allow_low_quality_matches=keep)(iou.T)
    assert torch.equal(ours(iou[None], low=0.3, high=0.7, keep=keep)[0], expected)
