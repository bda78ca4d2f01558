"""Backbones: torchvision's classification networks as sources of feature maps.

A backbone maps images [B, 3, H, W] to a list of feature maps, finest first. ``FPNBackbone`` puts a
feature pyramid on it (Lin et al., 2017; its last map takes every second place of the one before, as
torchvision's, Detectron2's and MMDetection's do), ``SingleBackbone`` hands on a map of stride 16 alone.
Parameter names follow torchvision's detection models (``body``, ``fpn``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from anchorline.runtime.errors import ArtefactError
from anchorline.train.model_settings import ModelSettings
from anchorline.train.resnet_variants import dilate_last_stage, last_stage, stride_in_1x1
from anchorline.train.stages import mark
from anchorline.train.vgg_and_zf import vgg16, zf


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics and affine parameters never change, under BatchNorm2d's keys.

    Computes as ``torchvision.ops.FrozenBatchNorm2d`` (eps 1e-5) in one fused pass instead of two.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps=eps)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stay in evaluation mode whatever ``mode`` says."""
        return super().train(False)


@dataclass(frozen=True)
class BackboneSpec:
    """Where a network's feature maps come from.

    ``build(norm_layer)`` gives the network, ``layers`` its layers in order under the names their
    parameters have in torchvision's detection models. ``stage_ends`` name the last layers of the stages
    that can be frozen, ``maps`` the last layer and the width at each stride that a neck may take.
    ``coarse`` names the first and the last layer of stride 32, with their widths: what torchvision's
    MobileNet detectors tap (neck ``fpn32``); ``None`` where torchvision has no such detector.
    ``classifier`` names the two fully connected layers of the classification network that the box head
    takes over as fc6 and fc7 (``box_head_weights.py``).
    """

    build: Callable[[Callable[..., nn.Module]], nn.Module]
    layers: Callable[[nn.Module], dict[str, nn.Module]]
    stage_ends: tuple[str, ...]
    maps: dict[int, tuple[str, int]]
    coarse: dict[str, int] | None = None
    classifier: tuple[str, str] | None = None


def _five_stages(
    build: Callable[[Callable[..., nn.Module]], nn.Module],
    layers: Callable[[nn.Module], dict[str, nn.Module]],
    ends: tuple[str, str, str, str, str],
    widths: tuple[int, int, int, int],
    coarse: dict[str, int] | None = None,
) -> BackboneSpec:
    """A network whose stages end at strides 2, 4, 8, 16 and 32; ``widths`` are those from stride 4 on."""
    maps = dict(zip((4, 8, 16, 32), zip(ends[1:], widths, strict=True), strict=True))
    return BackboneSpec(build, layers, ends, maps, coarse)


def _feature_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of a MobileNet, numbered as in its ``features``."""
    return dict(cast(nn.Module, network.features).named_children())


def _children(network: nn.Module) -> dict[str, nn.Module]:
    return dict(network.named_children())


def _resnet_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of a ResNet without its classifier."""
    return {name: child for name, child in network.named_children() if name not in ("avgpool", "fc")}


def _mobilenet_v2(norm_layer: Callable[..., nn.Module], width: float = 1.0) -> nn.Module:
    return torchvision.models.mobilenet_v2(norm_layer=norm_layer, width_mult=width)


def _resnet10(norm_layer: Callable[..., nn.Module]) -> nn.Module:
    """One basic block a stage: small enough to train from nothing on a CPU."""
    return ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm_layer)


def _network(name: str) -> Callable[[Callable[..., nn.Module]], nn.Module]:
    """A builder of torchvision's network ``name``, randomly initialised."""
    return lambda norm_layer: torchvision.models.get_model(name, weights=None, norm_layer=norm_layer)


# MobileNets end in a layer that widens for classification; the pyramid takes the map before it.
_V2_ENDS = ("1", "3", "6", "13", "17")
_RESNET_ENDS = ("relu", "layer1", "layer2", "layer3", "layer4")
_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)  # widths by kind of block

BACKBONES: dict[str, BackboneSpec] = {
    "mobilenet_v2": _five_stages(
        _mobilenet_v2, _feature_layers, _V2_ENDS, (24, 32, 96, 320), {"14": 160, "18": 1280}
    ),
    "mobilenet_v2_050": _five_stages(
        partial(_mobilenet_v2, width=0.5),
        _feature_layers,
        _V2_ENDS,
        (16, 16, 48, 160),
        {"14": 80, "18": 1280},
    ),
    "mobilenet_v3_large": _five_stages(
        _network("mobilenet_v3_large"),
        _feature_layers,
        ("1", "3", "6", "12", "15"),
        (24, 40, 112, 160),
        {"13": 160, "16": 960},
    ),
    "resnet10": _five_stages(_resnet10, _resnet_layers, _RESNET_ENDS, _BASIC),
    "resnet18": _five_stages(_network("resnet18"), _resnet_layers, _RESNET_ENDS, _BASIC),
    "resnet34": _five_stages(_network("resnet34"), _resnet_layers, _RESNET_ENDS, _BASIC),
    **{
        name: _five_stages(_network(name), _resnet_layers, _RESNET_ENDS, _BOTTLENECK)
        for name in (
            "resnet50",
            "resnet101",
            "resnet152",
            "resnext50_32x4d",
            "resnext101_32x8d",
            "wide_resnet50_2",
            "wide_resnet101_2",
        )
    },
    # The paper's two networks end at stride 16 (``vgg_and_zf.py``).
    "vgg16": BackboneSpec(
        vgg16,
        _children,
        ("4", "9", "16", "23", "29"),  # conv1_x to conv4_x with their pooling, conv5_x
        {16: ("29", 512)},
        classifier=("classifier.0", "classifier.3"),
    ),
    "zf": BackboneSpec(
        zf,
        _children,
        ("pool1", "pool2", "relu3", "relu4", "relu5"),
        {16: ("relu5", 256)},
        classifier=("fc6", "fc7"),
    ),
}


class Body(nn.Module):
    """The layers of ``network`` up to the last of ``taps``; returns the maps behind them, finest first."""

    def __init__(self, spec: BackboneSpec, network: nn.Module, taps: Sequence[str]) -> None:
        super().__init__()
        self.stage_ends = spec.stage_ends
        self.taps = tuple(taps)
        for name, layer in spec.layers(network).items():
            self.add_module(name, layer)
            if name == self.taps[-1]:
                break

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps [B, C_i, H / stride_i, W / stride_i] of ``x`` [B, 3, H, W]."""
        maps: list[Tensor] = []
        for name, layer in self.named_children():
            x = layer(x)
            if name in self.taps:
                x = mark(f"backbone.{len(maps)}", x)
                maps.append(x)
        return maps

    def freeze(self, stages: int) -> None:
        """Stop training the first ``stages`` stages: 1 is the stem up to stride 2, 2 reaches stride 4."""
        if not stages:
            return
        for name, layer in self.named_children():
            layer.requires_grad_(False)
            if name == self.stage_ends[min(stages, len(self.stage_ends)) - 1]:
                return


class FPNBackbone(nn.Module):
    """Body and feature pyramid: maps of ``channels`` channels at ``strides``, the last one pooled.

    ``body_channels`` are the widths of the body's maps; RoIs are pooled from the first ``pooled_levels``.
    """

    def __init__(
        self,
        body: Body,
        body_channels: Sequence[int],
        channels: int,
        strides: Sequence[int],
        pooled_levels: int,
        live_norm: bool,
    ) -> None:
        super().__init__()
        self.body = body
        self.strides = tuple(strides)
        self.pooled_levels = pooled_levels
        norm = nn.BatchNorm2d if live_norm else None
        self.fpn = FeaturePyramidNetwork(list(body_channels), channels, LastLevelMaxPool(), norm)
        self.out_channels = channels

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = OrderedDict((str(i), m) for i, m in enumerate(self.body(x)))
        return [mark(f"fpn.{level}", each) for level, each in enumerate(self.fpn(maps).values())]


class SingleBackbone(nn.Module):
    """A map of stride 16 alone: as in the paper, of a ResNet's stage before the last, or its dilated last."""

    strides = (16,)
    pooled_levels = 1

    def __init__(self, body: Body, channels: int) -> None:
        super().__init__()
        self.body = body
        self.out_channels = channels

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.body(x)[0]]


def _spec_of(settings: ModelSettings) -> BackboneSpec:
    spec = BACKBONES.get(settings.backbone)
    if spec is None:
        raise ArtefactError(
            f"backbone {settings.backbone!r} is not known; expected one of {', '.join(BACKBONES)}"
        )
    return spec


def _network_of(settings: ModelSettings) -> nn.Module:
    """The whole network with the norms, strides and dilation of ``settings``, randomly initialised."""
    live = settings.backbone_norm == "live"
    norm = partial(nn.BatchNorm2d if live else FrozenBatchNorm, eps=settings.backbone_norm_eps)
    network = _spec_of(settings).build(norm)
    if settings.bottleneck_stride == "1x1":
        stride_in_1x1(network, settings.backbone)
    if settings.neck == "dc5":
        dilate_last_stage(network, settings.backbone)
    return network


def build_last_stage(settings: ModelSettings) -> tuple[nn.Module, int]:
    """A ResNet's last stage, randomly initialised, and its width: the box head ``res5``."""
    return last_stage(_network_of(settings), settings.backbone), _spec_of(settings).maps[32][1]


def build_backbone(settings: ModelSettings) -> FPNBackbone | SingleBackbone:
    """The backbone and neck that ``settings`` ask for, randomly initialised."""
    spec, network = _spec_of(settings), _network_of(settings)
    if settings.neck in ("single", "dc5"):
        last, width = spec.maps[16 if settings.neck == "single" else 32]
        return SingleBackbone(Body(spec, network, (last,)), width)
    live = settings.backbone_norm == "live"
    if settings.neck == "fpn32":
        if spec.coarse is None:
            known = ", ".join(name for name, each in BACKBONES.items() if each.coarse)
            raise ArtefactError(f"neck 'fpn32' does not fit backbone {settings.backbone!r}; expected {known}")
        body, widths = Body(spec, network, tuple(spec.coarse)), tuple(spec.coarse.values())
        # torchvision finds the same scale for both maps of stride 32 and pools every RoI from the first.
        return FPNBackbone(body, widths, settings.fpn_channels, (32, 32, 64), 1, live)
    levels = 4 if settings.finest_stride == 4 else 3
    strides = (4, 8, 16, 32, 64)[-levels - 1 :]
    if not set(strides[:-1]) <= set(spec.maps):
        raise ArtefactError(
            f"neck 'fpn' does not fit backbone {settings.backbone!r}, which ends at stride {max(spec.maps)}; "
            "expected 'single'"
        )
    taps = [spec.maps[stride] for stride in strides[:-1]]
    body = Body(spec, network, [layer for layer, _ in taps])
    # The coarsest map serves the RPN only.
    return FPNBackbone(body, [width for _, width in taps], settings.fpn_channels, strides, levels, live)
