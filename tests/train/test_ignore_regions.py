"""Ignore regions in the losses: what they cover is neither object nor background."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pycocotools import mask
from torch import Tensor

from anchorline.train.model import assign, roi_heads, rpn
from anchorline.train.model.anchors import AnchorGenerator
from anchorline.train.model.assign import BACKGROUND, IGNORED, Targets, ignore_covered
from anchorline.train.model.boxes import pairwise_ioa
from anchorline.train.model.rpn import Proposals
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import TrainingSettings

CANVAS = (64, 96)
ANCHORS = torch.cat(
    [
        level[:]
        for level in AnchorGenerator([(16.0,), (40.0,)], (0.5, 1.0, 2.0), "torchvision", (8, 16))(
            [(8, 12), (4, 6)]
        )
    ]
)
Masks = list[tuple[Tensor, Tensor]]


def rpn_losses(
    objectness: Tensor, deltas: Tensor, anchors: Tensor, targets: Targets, settings: TrainingSettings
) -> dict[str, Tensor]:
    network = rpn.RPN(4, (4, 8, 16, 32, 64), ModelSettings())
    scored = rpn.AnchorScores([objectness], [deltas], [anchors])
    sizes = torch.tensor([CANVAS] * len(objectness)).float()
    return network.losses(scored, sizes, targets, settings)


def sample_rois(
    proposals: Proposals, targets: Targets, model: ModelSettings, settings: TrainingSettings
) -> assign.Samples:
    return roi_heads.RoIHeads(1, (4,), 3, model).sample(proposals, targets, settings)


# x1, y1, x2, y2 of a candidate and a region, and the share of the candidate in the region.
SHARES = [
    ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
    ((2, 3, 6, 5), (0, 0, 10, 10), 1.0),
    ((0, 0, 10, 10), (5, 0, 40, 40), 0.5),
    ((0, 0, 10, 10), (2, 3, 6, 5), 0.08),
    ((0, 0, 10, 10), (8, 5, 40, 40), 0.1),
    ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
    ((0, 0, 10, 10), (30, 30, 40, 40), 0.0),
    ((4, 4, 4, 9), (0, 0, 10, 10), 0.0),
    ((0, 0, 10, 10), (0, 0, 0, 0), 0.0),
    ((0, 0, 0, 0), (0, 0, 0, 0), 0.0),
]


@pytest.mark.parametrize(("candidate", "region", "share"), SHARES)
def test_the_share_of_a_candidate_by_hand(
    candidate: tuple[int, ...], region: tuple[int, ...], share: float
) -> None:
    found = pairwise_ioa(torch.tensor([[candidate]]).float(), torch.tensor([[region]]).float())
    assert found.shape == (1, 1, 1)
    assert float(found) == pytest.approx(share)


def test_shares_equal_pycocotools_overlaps_with_crowds() -> None:
    candidates, regions = random_boxes(40), random_boxes(15)
    as_xywh = [
        torch.cat((b[:, :2], b[:, 2:] - b[:, :2]), dim=1).double().numpy() for b in (candidates, regions)
    ]
    expected = torch.from_numpy(mask.iou(*as_xywh, [1] * len(regions)))
    found = pairwise_ioa(candidates[None], torch.stack((regions, regions.flip(0))))
    assert found.shape == (2, 40, 15)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1].double(), expected.flip(1), rtol=1e-5, atol=1e-6)


def random_boxes(count: int) -> Tensor:
    corner = torch.rand(count, 2) * torch.tensor([CANVAS[1] - 8, CANVAS[0] - 8])
    return torch.cat((corner, corner + 2 + torch.rand(count, 2) * 40), dim=1)


def test_what_is_covered_by_hand() -> None:
    matches = torch.tensor([[BACKGROUND, BACKGROUND, BACKGROUND, BACKGROUND, IGNORED, IGNORED, 0, 3]])
    coverage = torch.tensor(
        [[[0.0, 0.0], [0.49, 0.49], [0.5, 0.0], [0.1, 1.0], [0.9, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.6]]]
    )
    expected = [BACKGROUND, BACKGROUND, IGNORED, IGNORED, IGNORED, IGNORED, 0, 3]
    assert ignore_covered(matches, coverage).tolist() == [expected]
    assert torch.equal(ignore_covered(matches, coverage[:, :, :0]), matches)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Masks:
    """The candidates [B, N], positive and negative, at each draw."""
    real, found = assign.sample, []

    def recorded(positive: Tensor, negative: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        found.append((positive, negative))
        return real(positive, negative, *rest)

    monkeypatch.setattr(assign, "sample", recorded)
    return found


# Anchors, what each is to the object (0, 0, 20, 20) without a region, and with (20, 0, 60, 40) ignored.
ANCHOR_TABLE = [
    ((0, 0, 20, 20), "positive", "positive"),
    ((0, 0, 20, 16), "positive", "positive"),  # IoU 0.8
    ((0, 0, 20, 10), "neither", "neither"),  # IoU 0.5
    ((24, 4, 44, 24), "negative", "neither"),  # inside the region
    ((10, 20, 30, 40), "negative", "neither"),  # half inside
    ((8, 20, 28, 40), "negative", "negative"),  # 0.4 inside
    ((70, 40, 90, 60), "negative", "negative"),  # far from it
    ((0, 0, 96, 64), "negative", "negative"),  # around the region, of which it has all
]


def kinds(positive: Tensor, negative: Tensor) -> list[str]:
    """The candidates of the first image in words."""
    assert not (positive & negative).any()
    pairs = zip(positive[0].tolist(), negative[0].tolist(), strict=True)
    return ["positive" if p else "negative" if n else "neither" for p, n in pairs]


def test_anchors_by_hand(masks: Masks) -> None:
    anchors = torch.tensor([anchor for anchor, _, _ in ANCHOR_TABLE]).float()
    objectness, deltas = torch.randn(1, len(anchors)), torch.randn(1, len(anchors), 4)
    boxes, labels = [torch.tensor([[0.0, 0.0, 20.0, 20.0]])], [torch.tensor([0])]
    for ignored in (None, [torch.tensor([[20.0, 0.0, 60.0, 40.0]])]):
        targets = Targets.pad(boxes, labels, ignored=ignored)
        rpn_losses(objectness, deltas, anchors, targets, TrainingSettings())
    assert kinds(*masks[0]) == [without for _, without, _ in ANCHOR_TABLE]
    assert kinds(*masks[1]) == [with_region for _, _, with_region in ANCHOR_TABLE]


def test_the_best_anchor_of_an_object_inside_a_region_stays_positive(masks: Masks) -> None:
    """A small object in the midst of a crowd: its only anchor, of a low IoU, is still its own."""
    anchors = torch.tensor([[30.0, 30.0, 46.0, 46.0], [50.0, 50.0, 66.0, 66.0]])
    targets = Targets.pad(
        [torch.tensor([[34.0, 34.0, 40.0, 40.0]])],
        [torch.tensor([1])],
        ignored=[torch.tensor([[20.0, 20.0, 80.0, 80.0]])],
    )
    rpn_losses(torch.zeros(1, 2), torch.zeros(1, 2, 4), anchors, targets, TrainingSettings())
    assert kinds(*masks[0]) == ["positive", "neither"]


# Proposals, and what each is to the object (0, 0, 20, 20) with the region (20, 0, 60, 40) ignored.
PROPOSAL_TABLE = [
    ((0, 0, 20, 14), "positive"),  # IoU 0.7
    ((0, 0, 20, 8), "negative"),  # IoU 0.4
    ((16, 0, 36, 20), "neither"),  # 0.8 inside the region
    ((20, 0, 60, 40), "neither"),  # the region itself
    ((11, 0, 29, 20), "neither"),  # half inside the region, IoU 0.31
    ((70, 40, 90, 60), "negative"),
]


def test_proposals_by_hand(small_settings: Callable[..., ModelSettings], masks: Masks) -> None:
    boxes = torch.tensor([[box for box, _ in PROPOSAL_TABLE] + [(0, 0, 0, 0)]]).float()
    proposals = Proposals(boxes, torch.tensor([[0.9] * len(PROPOSAL_TABLE) + [-1.0]]))
    region = torch.tensor([[20.0, 0.0, 60.0, 40.0]])
    targets = Targets.pad([torch.tensor([[0.0, 0.0, 20.0, 20.0]])], [torch.tensor([2])], ignored=[region])
    samples = sample_rois(proposals, targets, small_settings(), TrainingSettings(roi_samples=32))
    empty_slot, ground_truth = "neither", "positive"
    assert kinds(*masks[0]) == [*(kind for _, kind in PROPOSAL_TABLE), empty_slot, ground_truth]
    drawn = samples.boxes[samples.drawn].tolist()
    expected = [list(box) for box, kind in PROPOSAL_TABLE if kind != "neither"] + [[0, 0, 20, 20]]
    assert sorted(drawn) == sorted(expected)


@pytest.mark.parametrize("objects", [0, 2])
def test_regions_never_act_as_proposals(small_settings: Callable[..., ModelSettings], objects: int) -> None:
    """Without any proposal, the objects alone are drawn."""
    boxes, labels = random_boxes(objects), torch.zeros(objects, dtype=torch.int64)
    targets = Targets.pad([boxes], [labels], ignored=[random_boxes(3)])
    nothing = Proposals(torch.zeros(1, 5, 4), torch.full((1, 5), -1.0))
    samples = sample_rois(nothing, targets, small_settings(), TrainingSettings(roi_samples=8))
    assert sorted(samples.boxes[samples.drawn].tolist()) == sorted(boxes.tolist())
    assert (samples.labels[samples.drawn] > 0).all()


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Boxes, labels and ignore regions of two images, whole pixels, partly over the canvas's edge."""
    side = st.integers(1, 50)

    def some(most: int) -> Tensor:
        corners = draw(
            st.lists(st.tuples(st.integers(-10, 90), st.integers(-10, 60), side, side), max_size=most)
        )
        return torch.tensor([(x, y, x + w, y + h) for x, y, w, h in corners]).float().reshape(-1, 4)

    boxes = [some(4), some(4)]
    return boxes, [torch.zeros(len(each), dtype=torch.int64) for each in boxes], [some(3), some(3)]


def is_inside(candidates: Tensor, regions: Tensor) -> Tensor:
    """Bool [N]: which ``candidates`` [N, 4] have half their area in one of ``regions`` [I, 4]."""
    inside = torch.zeros(len(candidates), dtype=torch.bool)
    for x1, y1, x2, y2 in regions.tolist():
        width = candidates[:, 2].clamp(max=x2) - candidates[:, 0].clamp(min=x1)
        height = candidates[:, 3].clamp(max=y2) - candidates[:, 1].clamp(min=y1)
        own = (candidates[:, 2] - candidates[:, 0]) * (candidates[:, 3] - candidates[:, 1])
        inside |= 2 * width.clamp(min=0) * height.clamp(min=0) >= own
    return inside


@hypothesis_settings(max_examples=40, deadline=None)
@given(scenes(), st.integers(0, 2**31))
def test_a_region_takes_its_background_out_of_the_rpn_s_loss_and_nothing_else(
    scene: tuple[list[Tensor], list[Tensor], list[Tensor]], seed: int
) -> None:
    boxes, labels, regions = scene
    objectness = torch.randn(2, len(ANCHORS), generator=torch.Generator().manual_seed(seed))
    settings = TrainingSettings(rpn_samples=2 * len(ANCHORS))  # all candidates are drawn
    pushed = []
    for ignored in (None, regions):
        logits = objectness.clone().requires_grad_()
        targets = Targets.pad(boxes, labels, (seed, seed + 1), ignored)
        found = rpn_losses(logits, torch.zeros(2, len(ANCHORS), 4), ANCHORS, targets, settings)
        pushed.append(torch.autograd.grad(found["loss_objectness"], logits)[0].sign())
    for image in range(2):
        before, after = pushed[0][image], pushed[1][image]
        inside = is_inside(ANCHORS, regions[image])
        # The gradient raises the objectness of positives (-1), lowers that of negatives (1).
        assert torch.equal(after, torch.where(inside & (before > 0), torch.zeros_like(before), before))


@hypothesis_settings(max_examples=40, deadline=None)
@given(scenes(), st.integers(0, 2**31))
def test_no_sample_of_the_detection_loss_lies_in_a_region(
    scene: tuple[list[Tensor], list[Tensor], list[Tensor]], seed: int
) -> None:
    boxes, labels, regions = scene
    proposals = Proposals(ANCHORS[::3].expand(2, -1, -1), torch.full((2, len(ANCHORS[::3])), 0.5))
    model, settings = ModelSettings(), TrainingSettings(roi_samples=24)
    positives = []
    for ignored in (None, regions):
        targets = Targets.pad(boxes, labels, (seed, seed + 1), ignored)
        samples = sample_rois(proposals, targets, model, settings)
        positives.append(torch.where((samples.labels > 0)[..., None], samples.boxes, 0.0))
        if ignored is not None:
            for image in range(2):
                background = samples.boxes[image, samples.drawn[image] & (samples.labels[image] == 0)]
                assert not is_inside(background, regions[image]).any()
    assert torch.equal(*positives), "the same objects are drawn, region or none"


@hypothesis_settings(max_examples=25, deadline=None)
@given(scenes(), st.integers(0, 2**31))
def test_empty_slots_are_as_no_regions_at_all(
    scene: tuple[list[Tensor], list[Tensor], list[Tensor]], seed: int
) -> None:
    """Another image's regions make slots; losses, gradients and samples of this one stay what they are."""
    boxes, labels, _ = scene
    generator = torch.Generator().manual_seed(seed)
    objectness = torch.randn(2, len(ANCHORS), generator=generator)
    proposals = Proposals(ANCHORS[::3].expand(2, -1, -1), torch.full((2, len(ANCHORS[::3])), 0.5))
    results = []
    for ignored in (None, [torch.zeros(3, 4)] * 2):
        logits = objectness.clone().requires_grad_()
        targets = Targets.pad(boxes, labels, (seed, seed + 1), ignored)
        settings = TrainingSettings(rpn_samples=32, roi_samples=16)
        losses = rpn_losses(logits, torch.ones(2, len(ANCHORS), 4), ANCHORS, targets, settings)
        samples = sample_rois(proposals, targets, ModelSettings(), settings)
        gradient = torch.autograd.grad(losses["loss_objectness"], logits)[0]
        results.append((*losses.values(), gradient, *vars(samples).values()))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
