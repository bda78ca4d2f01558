"""The preset resnet50-fpn against torchvision's own Faster R-CNN and its reference schedule."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from anchorline.train.loop.optim import build_schedule
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.settings import load_preset

PRESET = load_preset("resnet50-fpn")


def test_parameters_are_torchvisions_and_the_same_ones_are_trained() -> None:
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    model = FasterRCNN(PRESET.model, 3)
    shapes = {name: parameter.shape for name, parameter in theirs.named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes

    model.backbone.body.freeze(PRESET.training.frozen_stages)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert {
        name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad
    } == trained


def test_the_schedule_is_the_recipe_s() -> None:
    """16 images a step at 0.02, a tenth from epoch 16 on and a hundredth from epoch 22, of 26."""
    training = PRESET.training
    assert training.batch * training.accumulate == 16
    steps_an_epoch = 500
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([weight], lr=training.learning_rate)
    schedule = build_schedule(optimiser, training, training.epochs * steps_an_epoch)
    rates = []
    for _ in range(training.epochs * steps_an_epoch):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    middles = [rates[epoch * steps_an_epoch + steps_an_epoch // 2] for epoch in range(training.epochs)]
    assert middles[1:16] == pytest.approx([0.02] * 15)
    assert middles[16:22] == pytest.approx([0.002] * 6)
    assert middles[22:] == pytest.approx([0.0002] * 4)
    assert rates[0] == pytest.approx(0.02 / 1000)
    for epoch, before, after in ((16, 0.02, 0.002), (22, 0.002, 0.0002)):
        assert rates[epoch * steps_an_epoch - 2] == pytest.approx(before)
        assert rates[epoch * steps_an_epoch] == pytest.approx(after)
