"""Weights of VGG-16's classifier: the body, fc6 and fc7, and the change from RGB to the model's input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.train.model.backbones import build_backbone
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.settings import IMAGENET_MEAN, IMAGENET_STD, ModelSettings
from anchorline.train.pretrained import IMAGENET, adapt_first_convolution, load_pretrained
from anchorline.train.settings import load_preset


def settings_of(name: str = "vgg16", *overrides: str) -> ModelSettings:
    narrow = ["model.canvas=[64, 96]", "model.representation=8", "model.roi_size=2"]
    return load_preset(f"{name}-paper", [*narrow, *overrides]).model


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A state dict with torchvision's keys, and a classifier as narrow as the settings above."""
    torch.manual_seed(4)
    features = make_layers(cfgs["D"])
    found = {f"features.{key}": value for key, value in features.state_dict().items()}
    for key, layer in (("0", nn.Linear(512 * 4, 8)), ("3", nn.Linear(8, 8)), ("6", nn.Linear(8, 1000))):
        found |= {f"classifier.{key}.{name}": value.detach() for name, value in layer.named_parameters()}
    return found


@pytest.fixture(scope="module")
def path(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(state, path)
    return path


def reference_features(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """torchvision's features up to conv5_3 of BGR ``images`` in grey levels."""
    features = make_layers(cfgs["D"])
    features.load_state_dict({k.removeprefix("features."): v for k, v in state.items() if "features" in k})
    rgb = images.permute(0, 3, 1, 2).flip(1)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        found: Tensor = features[:-1]((rgb - mean) / std)
    return found


def test_the_paper_model_sees_what_torchvisions_network_saw(state: dict[str, Tensor], path: Path) -> None:
    """BGR with caffe's means and no scale, and yet the features of RGB with ImageNet's statistics."""
    model = FasterRCNN(settings_of(), 2).eval()
    load_pretrained(model, path)
    images = torch.rand(1, 64, 96, 3) * 255
    with torch.no_grad():
        (found,) = model.features(images, torch.tensor([[64.0, 96.0]]))
    expected = reference_features(state, images)
    # Zero padding stands for another mean, by less than a grey level: hence no exact equality.
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    exact = FasterRCNN(
        settings_of("vgg16", f"model.mean={list(IMAGENET_MEAN[::-1])}", "model.std=[1.0, 1.0, 1.0]"), 2
    ).eval()
    load_pretrained(exact, path)
    with torch.no_grad():
        (found,) = exact.features(images, torch.tensor([[64.0, 96.0]]))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_fc6_and_fc7_come_along(state: dict[str, Tensor], path: Path) -> None:
    model = FasterRCNN(settings_of(), 2)
    load_pretrained(model, path)
    head = model.roi_heads.box_head
    assert torch.equal(head.fc6.weight, state["classifier.0.weight"])
    assert torch.equal(head.fc7.bias, state["classifier.3.bias"])
    assert head.fc6.weight.requires_grad


@pytest.mark.parametrize("change", ["other width", "not finite", "no classifier"])
def test_a_box_head_that_cannot_have_them_stays_new(
    state: dict[str, Tensor], tmp_path: Path, change: str
) -> None:
    """torchvision's IMAGENET1K_FEATURES has NaN in its classifier."""
    state, settings = dict(state), settings_of()
    if change == "other width":
        settings = settings_of("vgg16", "model.representation=12")
    elif change == "not finite":
        state["classifier.0.weight"] = torch.full_like(state["classifier.0.weight"], float("nan"))
    else:
        state = {key: value for key, value in state.items() if "classifier" not in key}
    torch.save(state, tmp_path / "some.pth")
    model = FasterRCNN(settings, 2)
    before = model.roi_heads.box_head.fc6.weight.clone()
    load_pretrained(model, tmp_path / "some.pth")
    assert torch.equal(model.roi_heads.box_head.fc6.weight, before)


def test_weights_of_the_models_own_input_are_taken_as_they_are(state: dict[str, Tensor], path: Path) -> None:
    model = FasterRCNN(settings_of(), 2)
    load_pretrained(model, path, "model")
    first = next(model.backbone.body.children())
    assert torch.equal(first.weight, state["features.0.weight"])


def test_torchvisions_own_input_changes_nothing() -> None:
    settings = ModelSettings(backbone="resnet18", canvas=(64, 64))
    body = build_backbone(settings).body
    before = body.conv1.weight.clone()
    adapt_first_convolution(body, settings)
    assert torch.equal(body.conv1.weight, before)


def test_zf_takes_a_file_with_caffes_names(tmp_path: Path) -> None:
    settings = settings_of("zf")
    giver, taker = FasterRCNN(settings, 2), FasterRCNN(settings, 2)
    state = dict(giver.backbone.body.state_dict())
    state |= giver.roi_heads.box_head.state_dict()
    torch.save(state, tmp_path / "zf.pth")
    load_pretrained(taker, tmp_path / "zf.pth", "model")
    assert torch.equal(taker.backbone.body.conv1.weight, giver.backbone.body.conv1.weight)
    assert torch.equal(taker.roi_heads.box_head.fc6.weight, giver.roi_heads.box_head.fc6.weight)


def test_wrong_weights_are_refused_in_one_line(path: Path) -> None:
    model = FasterRCNN(settings_of("zf"), 2)
    with pytest.raises(ArtefactError, match=r"vgg16\.pth"):
        load_pretrained(model, path)
    with pytest.raises(SettingsError, match="zf"):
        load_pretrained(model, IMAGENET)
