"""Stride in the 1x1 convolution, a dilated last stage, a last stage as box head, against torchvision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from anchorline.runtime.io.errors import ArtefactError
from anchorline.train.model.backbones import (
    BACKBONES,
    FrozenBatchNorm,
    build_backbone,
    build_last_stage,
    dilate_last_stage,
    stride_in_1x1,
)
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.settings import ModelSettings
from anchorline.train.pretrained import load_pretrained

SIZES = ((32.0, 64.0, 128.0),)


def settings_of(**changes: object) -> ModelSettings:
    fields: dict[str, object] = {"neck": "single", "anchor_sizes": SIZES, "canvas": (64, 96), **changes}
    return ModelSettings(**fields)  # type: ignore[arg-type]


def bottleneck(stride: int) -> Bottleneck:
    projection = nn.Sequential(nn.Conv2d(16, 32, 1, stride, bias=False), nn.BatchNorm2d(32))
    return Bottleneck(16, 8, stride, projection).eval()


def pixels_of(block: Bottleneck, reads: torch.Tensor) -> torch.Tensor:
    """Which pixels of an input [1, 16, 9, 9] the output at ``reads`` (y, x) depends on."""
    x = torch.rand(1, 16, 9, 9, requires_grad=True)
    block(x)[0, :, reads[0], reads[1]].sum().backward()
    return x.grad.abs().sum(dim=(0, 1)) > 0


def test_the_stride_moves_to_the_first_convolution() -> None:
    """By hand: striding first leaves every second pixel unread, as far as the 3x3 convolution reaches."""
    block = bottleneck(2)
    before = block(torch.ones(1, 16, 9, 9)).shape
    around = torch.zeros(9, 9, dtype=torch.bool)
    around[3:6, 3:6] = True
    assert torch.equal(pixels_of(block, torch.tensor([2, 2])), around)
    stride_in_1x1(block, "a block")
    assert block(torch.ones(1, 16, 9, 9)).shape == before
    every_second = torch.zeros(9, 9, dtype=torch.bool)
    every_second[2:7:2, 2:7:2] = True
    assert torch.equal(pixels_of(block, torch.tensor([2, 2])), every_second)
    assert (block.conv1.stride, block.conv2.stride, block.downsample[0].stride) == ((2, 2), (1, 1), (2, 2))


def test_a_block_that_strides_first_is_one_that_gets_every_second_pixel() -> None:
    """The projection strides the same way, so the whole block does."""
    block, plain = bottleneck(2), bottleneck(1)
    plain.load_state_dict(block.state_dict())
    stride_in_1x1(block, "a block")
    x = torch.randn(2, 16, 9, 11)
    torch.testing.assert_close(block(x), plain(x[:, :, ::2, ::2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("neck", ["single", "dc5", "fpn"])
def test_only_the_bottlenecks_that_stride_change(neck: str) -> None:
    sizes = ((32.0,),) * 5 if neck == "fpn" else SIZES
    settings = settings_of(backbone="resnet50", neck=neck, anchor_sizes=sizes, bottleneck_stride="1x1")
    with torch.device("meta"):
        body = build_backbone(settings).body
    strides = {
        f"{stage}.{index}": (block.conv1.stride[0], block.conv2.stride[0])
        for stage, layer in body.named_children()
        if stage.startswith("layer")
        for index, block in enumerate(layer)
    }
    expected = dict.fromkeys(strides, (1, 1))
    expected.update({"layer2.0": (2, 1), "layer3.0": (2, 1)})
    if neck == "fpn":
        expected["layer4.0"] = (2, 1)
    assert strides == expected


def test_the_dilated_stage_is_torchvisions_but_for_the_first_block() -> None:
    """torchvision's ``replace_stride_with_dilation`` begins to dilate in the second block."""
    torch.manual_seed(0)
    ours = ResNet(Bottleneck, [1, 1, 1, 2]).eval()
    dilate_last_stage(ours, "a network")
    theirs = ResNet(Bottleneck, [1, 1, 1, 2], replace_stride_with_dilation=[False, False, True]).eval()
    theirs.load_state_dict(ours.state_dict())
    first = theirs.layer4[0].conv2
    assert (first.dilation, first.padding, first.stride) == ((1, 1), (1, 1), (1, 1))
    x = torch.randn(1, 1024, 6, 8)
    with torch.no_grad():
        assert (ours.layer4(x) - theirs.layer4(x)).abs().max() > 1e-2
        first.dilation = first.padding = (2, 2)
        torch.testing.assert_close(ours.layer4(x), theirs.layer4(x), rtol=0, atol=0)


def test_dc5_has_one_map_of_stride_16() -> None:
    settings = settings_of(backbone="resnet50", neck="dc5", bottleneck_stride="1x1", canvas=(64, 96))
    with torch.device("meta"):
        backbone = build_backbone(settings).eval()
        (feature,) = backbone(torch.randn(1, 3, 64, 96))
    assert feature.shape == (1, 2048, 4, 6)
    assert (backbone.strides, backbone.out_channels, backbone.pooled_levels) == ((16,), 2048, 1)


def test_c4_s_head_is_the_network_s_last_stage(small_resnet: str) -> None:
    """The same weights give what a whole ResNet makes of the map before it, with its classifier's average."""
    torch.manual_seed(0)
    network = BACKBONES[small_resnet].build(FrozenBatchNorm).eval()
    model = FasterRCNN(settings_of(backbone=small_resnet, box_head="res5", roi_size=14), 3).eval()
    model.roi_heads.box_head.layer4.load_state_dict(network.layer4.state_dict())
    pooled = torch.randn(2, 64, 14, 14)
    with torch.no_grad():
        features = network.layer4(pooled)
        found = model.roi_heads.box_head(pooled)
    assert features.shape == (2, 128, 7, 7)
    average = nn.AdaptiveAvgPool2d(1)(features).flatten(1)
    torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-5)


def test_the_names_and_widths_of_c4() -> None:
    with torch.device("meta"):
        model = FasterRCNN(settings_of(backbone="resnet50", box_head="res5", roi_size=14), 3)
        theirs = torchvision.models.resnet50(norm_layer=FrozenBatchNorm).layer4.state_dict()
        assert build_last_stage(model.settings)[1] == 2048
    state = model.state_dict()
    head = {name for name in state if name.startswith("roi_heads.box_head.")}
    assert head == {f"roi_heads.box_head.layer4.{name}" for name in theirs}
    assert state["roi_heads.box_predictor.bbox_pred.weight"].shape == (16, 2048)
    assert state["rpn.head.conv.0.0.weight"].shape == (1024, 1024, 3, 3)
    body = {name.split(".")[2] for name in state if name.startswith("backbone.body.")}
    assert body == {"conv1", "bn1", "layer1", "layer2", "layer3"}


def test_imagenet_s_last_stage_fills_the_head(small_resnet: str, tmp_path: Path) -> None:
    network = BACKBONES[small_resnet].build(nn.BatchNorm2d)
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    model = FasterRCNN(settings_of(backbone=small_resnet, box_head="res5"), 3)
    load_pretrained(model, path)
    for name, value in model.roi_heads.box_head.layer4.state_dict().items():
        assert torch.equal(value, network.state_dict()[f"layer4.{name}"]), name
    lacking = {name: value for name, value in network.state_dict().items() if "layer4.0.conv2" not in name}
    torch.save(lacking, path)
    with pytest.raises(ArtefactError, match=r"1 of \d+ backbone tensors are missing.*layer4.0.conv2"):
        load_pretrained(model, path)


def test_the_resnext_of_x101_fpn_has_the_published_widths() -> None:
    """Detectron2's NUM_GROUPS 32 and WIDTH_PER_GROUP 8: 3x3 convolutions of 256, 512, ... channels."""
    with torch.device("meta"):
        settings = settings_of(neck="fpn", anchor_sizes=((32.0,),) * 5, backbone="resnext101_32x8d")
        body = build_backbone(settings).body
    for number, blocks in zip(range(1, 5), (3, 4, 23, 3), strict=True):
        stage = getattr(body, f"layer{number}")
        convolution = stage[0].conv2
        assert len(stage) == blocks
        assert (convolution.groups, convolution.out_channels) == (32, 256 * 2 ** (number - 1))
        assert convolution.stride == ((1, 1) if number == 1 else (2, 2))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"backbone": "resnet18", "bottleneck_stride": "1x1"},
            "bottleneck_stride '1x1' does not fit backbone",
        ),
        (
            {"backbone": "vgg16", "bottleneck_stride": "1x1"},
            "'vgg16', which has no bottlenecks; expected '3x3'",
        ),
        ({"backbone": "resnet18", "neck": "dc5"}, "neck 'dc5' does not fit backbone 'resnet18'"),
        (
            {"backbone": "vgg16", "neck": "dc5"},
            "backbone 'vgg16' has no stage res5 (layer4); expected a ResNet",
        ),
        ({"backbone": "mobilenet_v2", "box_head": "res5"}, "backbone 'mobilenet_v2' has no stage res5"),
    ],
)
def test_networks_without_the_part_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ArtefactError) as caught:
        FasterRCNN(settings_of(**changes), 2)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_resnet_without_bottlenecks_may_have_the_head(small_settings: Callable[..., ModelSettings]) -> None:
    settings = small_settings("single", backbone="resnet10", box_head="res5", roi_size=4)
    model = FasterRCNN(settings, 3).eval()
    with torch.no_grad():
        found = model(torch.rand(1, 128, 160, 3) * 255, torch.tensor([[128.0, 160.0]]))
    assert found.boxes.shape == (1, 100, 4)
