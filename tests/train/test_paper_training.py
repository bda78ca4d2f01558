"""RPN training as the paper writes it: equation (1) by hand, sampling rules, awkward images."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from anchorline.train.loop.optim import build_optimiser
from anchorline.train.model.anchors import AnchorGenerator
from anchorline.train.model.assign import BACKGROUND, IGNORED, Matcher, Targets
from anchorline.train.model.boxes import inside_images
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.rpn import RPN, AnchorScores
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import TrainingSettings, load_preset

PAPER = load_preset("vgg16-paper").training
CANVAS = torch.tensor([[608.0, 1024.0]])
GENERATOR = AnchorGenerator([(128.0, 256.0, 512.0)], (0.5, 1.0, 2.0), "caffe", (16,))
MATCHER = Matcher(PAPER.rpn_positive_iou, PAPER.rpn_negative_iou, keep_best_of_each_box=True)
ANCHORS = GENERATOR([(38, 64)])[0][:]


def of(boxes: list[list[float]]) -> Targets:
    return Targets.pad(
        [torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)],
        [torch.zeros(len(boxes), dtype=torch.int64)],
    )


def rpn_losses(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    targets: Targets,
    settings: TrainingSettings,
    image_sizes: Tensor,
    anchors_per_place: int = 1,
) -> dict[str, Tensor]:
    sizes = tuple(range(1, anchors_per_place + 1))
    network = RPN(4, (16,), ModelSettings(neck="single", anchor_sizes=(sizes,), aspect_ratios=(1.0,)))
    return network.losses(AnchorScores([logits], [deltas], [anchors]), image_sizes, targets, settings)


def test_the_loss_is_equation_1() -> None:
    """Four anchors, two at each of two places: N_cls = 4 (the size of the batch drawn), N_reg = 2, lambda 10.

    The object is (0, 0, 20, 10). Anchor 0, (0, 0, 10, 10), overlaps it by 1/2 and is its best; anchors 1
    to 3 are far away. L_cls at logit 0 is log 2 each. Of anchor 0: t = ((10 - 5) / 10, 0, log 2, 0) =
    (0.5, 0, 0.6931, 0). With the prediction (0, 0, 2.6931, 0) the smooth L1 terms (beta 1) are
    0.5 * 0.5^2 = 0.125 and |2| - 0.5 = 1.5, in sum 1.625.
    L = 4 log 2 / 4 + 10 * 1.625 / 2 = 0.6931 + 8.125.
    """
    anchors = torch.tensor(
        [[0.0, 0, 10, 10], [50, 50, 60, 60], [70, 50, 80, 60], [50, 70, 60, 80]], dtype=torch.float32
    )
    deltas = torch.zeros(1, 4, 4)
    deltas[0, 0, 2] = math.log(2) + 2
    settings = dataclasses.replace(PAPER, rpn_samples=4)
    losses = rpn_losses(
        torch.zeros(1, 4),
        deltas,
        anchors,
        of([[0, 0, 20, 10]]),
        settings,
        image_sizes=torch.tensor([[100.0, 100.0]]),
        anchors_per_place=2,
    )
    assert losses["loss_objectness"].item() == pytest.approx(math.log(2))
    assert losses["loss_rpn_box"].item() == pytest.approx(8.125, rel=1e-5)


def test_fewer_drawn_anchors_do_not_change_the_papers_divisor() -> None:
    """The one anchor inside stands for log 2 / 256; divided by what was drawn it would be log 2."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [-5, 0, 5, 10]])
    arguments = (torch.zeros(1, 2), torch.zeros(1, 2, 4), anchors, of([]))
    sizes = torch.tensor([[20.0, 20.0]])
    paper = rpn_losses(*arguments, PAPER, image_sizes=sizes)
    assert paper["loss_objectness"].item() == pytest.approx(math.log(2) / 256)
    drawn = dataclasses.replace(PAPER, rpn_normalisation="drawn")
    found = rpn_losses(*arguments, drawn, image_sizes=sizes)
    assert found["loss_objectness"].item() == pytest.approx(math.log(2))


def test_a_batch_has_the_mean_of_its_images_losses() -> None:
    torch.manual_seed(3)
    boxes = [torch.tensor([[100.0, 100, 300, 250]]), torch.tensor([[400.0, 50, 700, 500]])]
    labels = [torch.zeros(1, dtype=torch.int64)] * 2
    logits, deltas = torch.randn(2, len(ANCHORS)), torch.randn(2, len(ANCHORS), 4)

    def losses(which: slice) -> dict[str, Tensor]:
        targets = Targets.pad(boxes[which], labels[which], (11, 12)[which])
        count = len(boxes[which])
        return rpn_losses(
            logits[which],
            deltas[which],
            ANCHORS,
            targets,
            PAPER,
            image_sizes=CANVAS.expand(count, 2),
            anchors_per_place=9,
        )

    both, first, second = losses(slice(0, 2)), losses(slice(0, 1)), losses(slice(1, 2))
    for name, value in both.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)


def test_anchors_across_the_edge_have_no_part() -> None:
    """About 6000 of the 20000 anchors of a 600 x 1000 image remain (section 3.1.3)."""
    sizes = torch.tensor([[600.0, 1000.0]])
    matches = MATCHER(ANCHORS[None], of([[-40, -40, 80, 80]]), inside_images(ANCHORS, sizes))[0]
    inside = (ANCHORS[:, :2] >= 0).all(1) & (ANCHORS[:, 2] <= 1000) & (ANCHORS[:, 3] <= 600)
    assert 5000 < int(inside.sum()) < 9000
    assert (matches[~inside] == IGNORED).all()
    assert (matches[inside] != IGNORED).any()


def test_the_best_anchor_inside_is_positive_however_small_its_overlap() -> None:
    tiny = of([[300.0, 300, 304, 303]])
    matches = MATCHER(ANCHORS[None], tiny, inside_images(ANCHORS, CANVAS))[0]
    assert (matches >= 0).any()
    assert (matches == BACKGROUND).any()


def test_proposals_far_from_every_object_are_no_background() -> None:
    iou = torch.tensor([[[0.0], [0.05], [0.1], [0.49], [0.5]]])
    present = torch.ones(1, 1, dtype=torch.bool)
    found = Matcher(0.5, 0.5, background_iou=0.1).match(iou, present)[0].tolist()
    assert found == [IGNORED, IGNORED, BACKGROUND, BACKGROUND, 0]
    assert Matcher(0.5, 0.5).match(iou, present)[0].tolist() == [BACKGROUND] * 4 + [0]


def test_biases_learn_twice_as_fast_and_do_not_decay() -> None:
    model = FasterRCNN(load_preset("zf-paper", ["model.canvas=[96, 128]", "model.representation=8"]).model, 2)
    optimiser = build_optimiser(model, PAPER)
    of_parameter = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = of_parameter[id(parameter)]
        bias = name.endswith(".bias")
        assert (group["lr"], group["weight_decay"]) == ((0.002, 0.0) if bias else (0.001, 0.0005)), name
        assert group["momentum"] == 0.9


AWKWARD = {
    "no objects": [],
    "hundreds": [[x * 4.0, y * 4.0, x * 4.0 + 9, y * 4.0 + 9] for x in range(25) for y in range(16)],
    "smaller than a stride": [[50.0, 40, 51, 41.5], [3, 3, 3.5, 3.5]],
    "larger than the image": [[-500.0, -400, 900, 800]],
    "duplicated": [[20.0, 20, 60, 70]] * 5,
    "the whole image": [[0.0, 0, 128, 96]],
}


@pytest.fixture(scope="module")
def small_paper_model() -> FasterRCNN:
    torch.manual_seed(1)
    overrides = [
        "model.canvas=[96, 128]",
        "model.representation=8",
        "model.anchor_sizes=[[16.0, 32.0, 64.0]]",
    ]
    return FasterRCNN(load_preset("zf-paper", overrides).model, 2).train()


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("normalisation", ["paper", "drawn"])
def test_awkward_images_give_finite_losses_and_gradients(
    small_paper_model: FasterRCNN, name: str, normalisation: str
) -> None:
    settings: TrainingSettings = dataclasses.replace(PAPER, rpn_normalisation=normalisation)
    images, sizes = torch.rand(1, 96, 128, 3) * 255, torch.tensor([[96.0, 128.0]])
    small_paper_model.zero_grad()
    losses = small_paper_model.losses(images, sizes, of(AWKWARD[name]), settings)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert torch.isfinite(total)
    for parameter in small_paper_model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def test_no_anchor_inside_a_small_image_is_survived(small_paper_model: FasterRCNN) -> None:
    sizes = torch.tensor([[12.0, 12.0]])
    images = torch.rand(1, 96, 128, 3) * 255
    losses = small_paper_model.losses(images, sizes, of([[2.0, 2, 9, 9]]), PAPER)
    assert losses["loss_objectness"].item() == 0.0
    assert all(torch.isfinite(value) for value in losses.values())
