"""Learning rates, parameter groups and the moving average, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from anchorline.train.loop.optim import MovingAverage, build_optimiser, build_schedule
from anchorline.train.model.backbones import FrozenBatchNorm
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import TrainingSettings

SINGLE = ModelSettings(
    neck="single", anchor_sizes=((16.0,),), canvas=(64, 64), representation=8, backbone_norm="live"
)


def rates(steps: int, **training: object) -> list[float]:
    """The factor on the learning rate in each step."""
    settings = TrainingSettings(learning_rate=1.0, **training)  # type: ignore[arg-type]
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimiser, settings, steps)
    found = []
    for _ in range(steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return found


def test_warm_up_is_linear() -> None:
    found = rates(1000, warmup_steps=4, warmup_factor=0.2, lr_schedule="step", milestones=(1.0,))
    assert found[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert rates(10, warmup_steps=0, lr_schedule="step", milestones=(1.0,))[:2] == [1.0, 1.0]


def test_cosine_falls_from_one_to_zero() -> None:
    found = rates(8, warmup_steps=0)
    root = math.sqrt(0.5)
    assert found[0] == 1.0
    assert found[2] == pytest.approx((1 + root) / 2)
    assert found[4] == pytest.approx(0.5)
    assert found[6] == pytest.approx((1 - root) / 2)
    assert 0 < found[7] < 0.05
    assert found == sorted(found, reverse=True)


def test_warm_up_and_cosine_multiply() -> None:
    assert rates(4, warmup_steps=2, warmup_factor=0.0) == pytest.approx(
        [0.0, 0.5 * (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )


def test_steps_divide_by_ten_at_the_milestones() -> None:
    found = rates(10, warmup_steps=0, lr_schedule="step", milestones=(0.5, 0.8))
    assert found == pytest.approx([1.0] * 5 + [0.1] * 3 + [0.01] * 2)


def test_a_schedule_is_taken_up_where_it_was() -> None:
    settings = TrainingSettings(warmup_steps=3)
    optimisers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2)]
    first, second = (build_schedule(optimiser, settings, 10) for optimiser in optimisers)
    for _ in range(4):
        optimisers[0].step()
        first.step()
    optimisers[1].load_state_dict(optimisers[0].state_dict())
    second.load_state_dict(first.state_dict())
    for optimiser, schedule in zip(optimisers, (first, second), strict=True):
        optimiser.step()
        schedule.step()
    assert optimisers[0].param_groups[0]["lr"] == optimisers[1].param_groups[0]["lr"]


def test_norms_and_biases_do_not_decay_and_the_backbone_has_its_own_rate() -> None:
    model = FasterRCNN(SINGLE, 2)
    optimiser = build_optimiser(
        model, TrainingSettings(learning_rate=0.5, backbone_rate=0.1, weight_decay=1e-3, momentum=0.8)
    )
    found = {}
    for group in optimiser.param_groups:
        assert group["momentum"] == 0.8
        for parameter in group["params"]:
            assert id(parameter) not in found, "in two groups"
            found[id(parameter)] = (group["lr"], group["weight_decay"])
    assert len(found) == len(list(model.parameters()))
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert norms
    for name, parameter in model.named_parameters():
        rate, decay = found[id(parameter)]
        assert rate == pytest.approx(0.05 if name.startswith("backbone.body.") else 0.5), name
        assert decay == (0.0 if name.endswith(".bias") or id(parameter) in norms else 1e-3), name


def test_what_is_frozen_is_not_optimised() -> None:
    frozen_norm = ModelSettings(**{**SINGLE.__dict__, "backbone_norm": "frozen"})
    model = FasterRCNN(frozen_norm, 2)
    body = model.backbone.body
    body.freeze(2)
    groups = build_optimiser(model, TrainingSettings()).param_groups
    optimised = {id(parameter) for group in groups for parameter in group["params"]}
    frozen = {id(p) for m in model.modules() if isinstance(m, FrozenBatchNorm) for p in m.parameters()}
    norms = len(frozen)
    for name, layer in body.named_children():  # stage 2 ends where the stride is 4
        frozen |= {id(parameter) for parameter in layer.parameters()}
        if name == body.stage_ends[1]:
            break
    assert 0 < norms < len(frozen)
    assert optimised == {id(parameter) for parameter in model.parameters()} - frozen


def test_the_optimiser_is_chosen_by_the_settings() -> None:
    model = FasterRCNN(SINGLE, 2)
    assert isinstance(build_optimiser(model, TrainingSettings()), torch.optim.SGD)
    adamw = build_optimiser(model, TrainingSettings(optimiser="adamw", momentum=0.8, learning_rate=1e-3))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.8, 0.999)
    assert adamw.param_groups[0]["lr"] == 1e-3


def test_the_moving_average_by_hand() -> None:
    """w_k is min(decay, (1 + k) / (10 + k)), the share of the old average in update k."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = MovingAverage(model, decay=0.2)
    model.weight.data.fill_(3.0)
    average.update(model)
    first = 1.0 * 2 / 11 + 3.0 * 9 / 11
    assert average.state["weight"].item() == pytest.approx(first)
    model.weight.data.fill_(-1.0)
    average.update(model)
    assert average.state["weight"].item() == pytest.approx(first * 0.2 - 1.0 * 0.8)  # 3 / 12 is above 0.2
    assert model.weight.item() == -1.0


def test_the_moving_average_follows_statistics_and_copies_counters() -> None:
    model = nn.BatchNorm2d(2)
    average = MovingAverage(model, decay=0.9)
    model.running_mean.fill_(11.0)  # type: ignore[union-attr, operator]
    model.num_batches_tracked.fill_(7)  # type: ignore[union-attr, operator]
    average.update(model)
    assert average.state["running_mean"].tolist() == pytest.approx([9.0, 9.0])
    assert average.state["num_batches_tracked"].item() == 7


def test_the_moving_average_is_taken_up_where_it_was() -> None:
    model = nn.Linear(2, 1)
    one, other = MovingAverage(model, 0.99), MovingAverage(model, 0.99)
    for _ in range(3):
        model.weight.data.normal_()
        one.update(model)
    mine = dict(other.state)
    other.load({name: tensor.clone() for name, tensor in one.state.items()}, one.updates)
    assert all(other.state[name] is tensor for name, tensor in mine.items()), "the device may change"
    for average in (one, other):
        average.update(model)
    assert torch.equal(one.state["weight"], other.state["weight"])
