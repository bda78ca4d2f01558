"""Backbones: torchvision's classification networks as sources of feature maps.

A backbone maps images [B, 3, H, W] to a list of feature maps, finest first. ``FPNBackbone`` puts a
feature pyramid on it (Lin et al., 2017), ``SingleBackbone`` hands on the map of stride 16 alone.
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
from anchorline.train.settings import ModelSettings


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

    ``build(norm_layer)`` gives the whole classification network, ``layers`` its layers in order under
    the names their parameters have in torchvision's detection models. The five ``stage_ends`` name
    the last layers of strides 2, 4, 8, 16 and 32; ``channels`` are the widths at strides 4 to 32.
    """

    build: Callable[[Callable[..., nn.Module]], nn.Module]
    layers: Callable[[nn.Module], dict[str, nn.Module]]
    stage_ends: tuple[str, str, str, str, str]
    channels: tuple[int, int, int, int]


def _feature_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers of a MobileNet, numbered as in its ``features``."""
    return dict(cast(nn.Module, network.features).named_children())


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

BACKBONES: dict[str, BackboneSpec] = {
    "mobilenet_v2": BackboneSpec(_mobilenet_v2, _feature_layers, _V2_ENDS, (24, 32, 96, 320)),
    "mobilenet_v2_050": BackboneSpec(
        partial(_mobilenet_v2, width=0.5), _feature_layers, _V2_ENDS, (16, 16, 48, 160)
    ),
    "mobilenet_v3_large": BackboneSpec(
        _network("mobilenet_v3_large"), _feature_layers, ("1", "3", "6", "12", "15"), (24, 40, 112, 160)
    ),
    "resnet10": BackboneSpec(_resnet10, _resnet_layers, _RESNET_ENDS, (64, 128, 256, 512)),
    "resnet18": BackboneSpec(_network("resnet18"), _resnet_layers, _RESNET_ENDS, (64, 128, 256, 512)),
    "resnet34": BackboneSpec(_network("resnet34"), _resnet_layers, _RESNET_ENDS, (64, 128, 256, 512)),
    "resnet50": BackboneSpec(_network("resnet50"), _resnet_layers, _RESNET_ENDS, (256, 512, 1024, 2048)),
    "resnet101": BackboneSpec(_network("resnet101"), _resnet_layers, _RESNET_ENDS, (256, 512, 1024, 2048)),
}


class Body(nn.Module):
    """The layers of a backbone up to the last tap; returns the tapped maps, finest first.

    ``strides`` (of 4, 8, 16, 32) says which maps to tap.
    """

    def __init__(
        self, spec: BackboneSpec, strides: Sequence[int], norm_layer: Callable[..., nn.Module]
    ) -> None:
        super().__init__()
        self.stage_ends = spec.stage_ends
        self.taps = tuple(spec.stage_ends[(2, 4, 8, 16, 32).index(stride)] for stride in strides)
        for name, layer in spec.layers(spec.build(norm_layer)).items():
            self.add_module(name, layer)
            if name == self.taps[-1]:
                break

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps [B, C_i, H / stride_i, W / stride_i] of ``x`` [B, 3, H, W]."""
        maps = []
        for name, layer in self.named_children():
            x = layer(x)
            if name in self.taps:
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
    """Body and feature pyramid: maps of ``channels`` channels, strides ``finest`` (4 or 8) to 64."""

    def __init__(
        self, body: Body, body_channels: tuple[int, ...], channels: int, finest: int, live_norm: bool
    ) -> None:
        super().__init__()
        self.body = body
        self.strides = tuple(stride for stride in (4, 8, 16, 32, 64) if stride >= finest)
        self.pooled_levels = len(self.strides) - 1  # the coarsest map serves the RPN only
        norm = nn.BatchNorm2d if live_norm else None
        self.fpn = FeaturePyramidNetwork(list(body_channels), channels, LastLevelMaxPool(), norm)
        self.out_channels = channels

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = OrderedDict((str(i), m) for i, m in enumerate(self.body(x)))
        return list(self.fpn(maps).values())


class SingleBackbone(nn.Module):
    """The stride-16 map alone, as in the paper."""

    strides = (16,)
    pooled_levels = 1

    def __init__(self, body: Body, channels: int) -> None:
        super().__init__()
        self.body = body
        self.out_channels = channels

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.body(x)[0]]


def build_backbone(settings: ModelSettings) -> FPNBackbone | SingleBackbone:
    """The backbone and neck that ``settings`` ask for, randomly initialised."""
    spec = BACKBONES.get(settings.backbone)
    if spec is None:
        raise ArtefactError(
            f"backbone {settings.backbone!r} is not known; expected one of {', '.join(BACKBONES)}"
        )
    live = settings.backbone_norm == "live"
    norm = nn.BatchNorm2d if live else FrozenBatchNorm
    if settings.neck == "single":
        return SingleBackbone(Body(spec, (16,), norm), spec.channels[2])
    strides = [stride for stride in (4, 8, 16, 32) if stride >= settings.finest_stride]
    channels = spec.channels[-len(strides) :]
    return FPNBackbone(
        Body(spec, strides, norm), channels, settings.fpn_channels, settings.finest_stride, live
    )
