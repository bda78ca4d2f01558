"""Backbones: torchvision's classification networks, and the paper's two, as sources of feature maps.

With a feature pyramid (Lin et al., 2017; its last map takes every second place of the one before, as
torchvision's, Detectron2's and MMDetection's do), or as a map of stride 16 alone. Parameter names follow
torchvision's detection models (``body``, ``fpn``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import SqueezeExcitation

from anchorline.runtime.io.errors import ArtefactError
from anchorline.train.model.ops import mark
from anchorline.train.model.settings import ModelSettings

# Makes a randomly initialised network with a norm such as ``nn.BatchNorm2d``.
Build = Callable[[Callable[..., nn.Module]], nn.Module]


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics and affine parameters never change, under BatchNorm2d's keys.

    Computes as ``torchvision.ops.FrozenBatchNorm2d`` (eps 1e-5) in one fused pass instead of two. In training
    the convolution ``before`` it, where there is one, has done its work already (``fold_frozen_norms``).
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps=eps)
        self.requires_grad_(False)
        self.before: tuple[FoldingConv, ...] = ()  # in a tuple, where it is no child

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] as ``x``."""
        if any(conv.training for conv in self.before):
            return x
        return super().forward(x)

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stay in evaluation mode whatever ``mode`` says."""
        return super().train(False)


class FoldingConv(nn.Conv2d):
    """A convolution that in training does the work of the frozen batch norm behind it with its own weights.

    A scale and a shift of each channel are a convolution's: the pass over the map is saved, there and back,
    and the map between the two that a gradient would need.
    """

    behind: tuple[FrozenBatchNorm]

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Conv2d``; in training as that and the norm."""
        if not self.training:
            return super().forward(x)
        (norm,) = self.behind
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        scale = norm.weight * torch.rsqrt(variance + norm.eps)
        return self._conv_forward(x, self.weight * scale[:, None, None, None], norm.bias - mean * scale)


def fold_frozen_norms(network: nn.Module) -> None:
    """Have each convolution of ``network`` without a bias fold a frozen norm behind it in training."""
    for parent in network.modules():
        for conv, norm in pairwise(parent.children()):
            if type(conv) is nn.Conv2d and conv.bias is None and isinstance(norm, FrozenBatchNorm):
                conv.__class__ = FoldingConv
                folding = cast(FoldingConv, conv)
                folding.behind, norm.before = (norm,), (folding,)


class MeanOfRows(nn.Module):
    """The mean of each map, of its rows' means: torchvision's ``AdaptiveAvgPool2d(1)`` but for rounding.

    onnxruntime adds the values of an average one after the other in float32. Over a whole map that loses up
    to 2e-4 of the mean where many are equal, as on the empty part of a canvas; over rows nearly nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 1, 1] of ``x`` [B, C, H, W]."""
        return x.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)


class SpatialResponseNorm(nn.Module):
    """Local response normalisation within each channel: x / (1 + alpha * mean of x^2 around)^beta.

    caffe's ``norm_region: WITHIN_CHANNEL``; the mean over size x size counts zeros beyond the edge. The
    defaults are those of norm1 and norm2 in py-faster-rcnn's ``models/pascal_voc/ZF``.
    """

    def __init__(self, size: int = 3, alpha: float = 5e-5, beta: float = 0.75) -> None:
        super().__init__()
        self.size, self.alpha, self.beta = size, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] as ``x``."""
        mean = F.avg_pool2d(x * x, self.size, stride=1, padding=self.size // 2)
        return x * (1.0 + self.alpha * mean) ** -self.beta


# The paper's two networks up to their last shareable convolution, both of stride 16 and without batch norms.
# Layers carry the names of the published weights.


def vgg16(_: Callable[..., nn.Module]) -> nn.Module:
    """The 13 convolutions of VGG-16 (configuration D)."""
    layers = nn.Sequential(*list(make_layers(cfgs["D"]))[:-1])  # without the pooling after conv5_3
    return _initialised(layers)


def zf(_: Callable[..., nn.Module]) -> nn.Module:
    """The 5 convolutions of Zeiler and Fergus as py-faster-rcnn has them.

    caffe rounds the size of a pooled map up, so on sides that are multiples of 32 the last map is one
    place larger than side / 16.
    """
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(3, 96, 7, stride=2, padding=3),
        relu1=nn.ReLU(),
        norm1=SpatialResponseNorm(),
        pool1=nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        conv2=nn.Conv2d(96, 256, 5, stride=2, padding=2),
        relu2=nn.ReLU(),
        norm2=SpatialResponseNorm(),
        pool2=nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        conv3=nn.Conv2d(256, 384, 3, padding=1),
        relu3=nn.ReLU(),
        conv4=nn.Conv2d(384, 384, 3, padding=1),
        relu4=nn.ReLU(),
        conv5=nn.Conv2d(384, 256, 3, padding=1),
        relu5=nn.ReLU(),
    )
    return _initialised(nn.Sequential(layers))


def _initialised(layers: nn.Sequential) -> nn.Sequential:
    """Weights as torchvision starts a VGG: the variance of the features stays, layer by layer."""
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, layer.bias))
    return layers


@dataclass(frozen=True)
class BackboneSpec:
    """Where a network's feature maps come from.

    ``stage_ends`` name the last layers of the stages that can be frozen, ``maps`` the last layer and the
    width at each stride that a neck may take. ``coarse`` holds the first and the last layer of stride 32 with
    their widths, which torchvision's MobileNet detectors tap (neck ``fpn32``). ``classifier`` names the fully
    connected layers that the box head takes over as fc6 and fc7 (``pretrained.py``).
    """

    build: Build
    stage_ends: tuple[str, ...]
    maps: dict[int, tuple[str, int]]
    coarse: dict[str, int] | None = None
    classifier: tuple[str, str] | None = None


def _torchvision(name: str, **options: Any) -> Build:
    return lambda norm: torchvision.models.get_model(name, weights=None, norm_layer=norm, **options)


def _five_stages(
    build: Build, ends: Sequence[str], widths: Sequence[int], coarse: dict[str, int] | None = None
) -> BackboneSpec:
    """A network whose stages end at strides 2, 4, 8, 16 and 32; ``widths`` are those from stride 4 on."""
    maps = dict(zip((4, 8, 16, 32), zip(ends[1:], widths, strict=True), strict=True))
    return BackboneSpec(build, tuple(ends), maps, coarse)


# MobileNets end in a layer that widens for classification; the pyramid takes the map before it.
_V2_ENDS, _V3_ENDS = ("1", "3", "6", "13", "17"), ("1", "3", "6", "12", "15")
_RESNET_ENDS = ("relu", "layer1", "layer2", "layer3", "layer4")
_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)  # widths by kind of block
_DEEP = "resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d wide_resnet50_2 wide_resnet101_2"

BACKBONES: dict[str, BackboneSpec] = {
    "mobilenet_v2": _five_stages(
        _torchvision("mobilenet_v2"), _V2_ENDS, (24, 32, 96, 320), {"14": 160, "18": 1280}
    ),
    "mobilenet_v2_050": _five_stages(
        _torchvision("mobilenet_v2", width_mult=0.5), _V2_ENDS, (16, 16, 48, 160), {"14": 80, "18": 1280}
    ),
    "mobilenet_v3_large": _five_stages(
        _torchvision("mobilenet_v3_large"), _V3_ENDS, (24, 40, 112, 160), {"13": 160, "16": 960}
    ),
    # One basic block a stage: small enough to train from nothing on a CPU.
    "resnet10": _five_stages(
        lambda norm: ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm), _RESNET_ENDS, _BASIC
    ),
    "resnet18": _five_stages(_torchvision("resnet18"), _RESNET_ENDS, _BASIC),
    "resnet34": _five_stages(_torchvision("resnet34"), _RESNET_ENDS, _BASIC),
    **{name: _five_stages(_torchvision(name), _RESNET_ENDS, _BOTTLENECK) for name in _DEEP.split()},
    "vgg16": BackboneSpec(
        vgg16,
        ("4", "9", "16", "23", "29"),  # conv1_x to conv4_x with their pooling, conv5_x
        {16: ("29", 512)},
        classifier=("classifier.0", "classifier.3"),
    ),
    "zf": BackboneSpec(
        zf,
        ("pool1", "pool2", "relu3", "relu4", "relu5"),
        {16: ("relu5", 256)},
        classifier=("fc6", "fc7"),
    ),
}


# ResNets as Detectron2 and MMDetection have them. torchvision's networks are changed in place; no parameter
# is, so torchvision's names remain.


def stride_in_1x1(network: nn.Module, name: str) -> None:
    """Let each bottleneck stride in its first 1x1 convolution instead of the 3x3 one, as MSRA's networks.

    Detectron2's ``STRIDE_IN_1X1`` (``modeling/backbone/resnet.py``), MMDetection's ``style="caffe"``. Raises
    ``ArtefactError`` that says ``name`` for a network without bottlenecks.
    """
    for block in _bottlenecks(network, name, "bottleneck_stride '1x1'", "'3x3'"):
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def dilate_last_stage(network: nn.Module, name: str) -> None:
    """Take the stride out of the last stage, which then has 16, and dilate its 3x3 convolutions by 2.

    All of them, as Detectron2's ``RES5_DILATION`` 2, where torchvision's ``replace_stride_with_dilation``
    leaves the first block's alone. Raises as ``stride_in_1x1`` and ``last_stage``.
    """
    for block in _bottlenecks(last_stage(network, name), name, "neck 'dc5'", "'fpn' or 'single'"):
        block.conv1.stride = block.conv2.stride = (1, 1)
        block.conv2.dilation = block.conv2.padding = (2, 2)
        if block.downsample is not None:
            block.downsample[0].stride = (1, 1)


def last_stage(network: nn.Module, name: str) -> nn.Module:
    """torchvision's ``layer4`` of a ResNet; an ``ArtefactError`` that says ``name`` for another network."""
    if not isinstance(network, ResNet):
        raise ArtefactError(f"backbone {name!r} has no stage res5 (layer4); expected a ResNet")
    return network.layer4


def _bottlenecks(part: nn.Module, name: str, setting: str, instead: str) -> list[Bottleneck]:
    """Every bottleneck of ``part``; where there is none, ``setting`` does not fit the backbone ``name``."""
    blocks = [module for module in part.modules() if isinstance(module, Bottleneck)]
    if not blocks:
        raise ArtefactError(
            f"{setting} does not fit backbone {name!r}, which has no bottlenecks; expected {instead}, "
            "or a ResNet from resnet50 on"
        )
    return blocks


class Body(nn.Module):
    """The layers of ``network`` up to the last of ``taps``; returns the maps behind them, finest first."""

    def __init__(self, spec: BackboneSpec, network: nn.Module, taps: Sequence[str]) -> None:
        super().__init__()
        self.stage_ends = spec.stage_ends
        self.taps = tuple(taps)
        # A MobileNet numbers its layers in ``features``.
        for name, layer in cast(nn.Module, getattr(network, "features", network)).named_children():
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


class Backbone(nn.Module):
    """Body and neck: maps of ``out_channels`` channels at ``strides``.

    A pyramid ``fpn``, or the body's only map. RoIs are pooled from the first ``pooled_levels``: a pyramid's
    coarsest map serves the RPN only.
    """

    def __init__(
        self,
        body: Body,
        out_channels: int,
        strides: Sequence[int] = (16,),
        pooled_levels: int = 1,
        fpn: FeaturePyramidNetwork | None = None,
    ) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, out_channels
        self.strides, self.pooled_levels = tuple(strides), pooled_levels

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps [B, out_channels, H / stride, W / stride] of ``x`` [B, 3, H, W], finest first."""
        maps: list[Tensor] = self.body(x)
        if self.fpn is None:
            return maps
        pyramid = self.fpn({str(level): each for level, each in enumerate(maps)})
        return [mark(f"fpn.{level}", each) for level, each in enumerate(pyramid.values())]


def build_backbone(settings: ModelSettings) -> Backbone:
    """The backbone and neck that ``settings`` ask for, randomly initialised; raises ``ArtefactError``."""
    spec, network = _network_of(settings)
    if settings.neck in ("single", "dc5"):
        last, width = spec.maps[16 if settings.neck == "single" else 32]
        return Backbone(Body(spec, network, (last,)), width)
    strides: tuple[int, ...]
    if settings.neck == "fpn32":
        if spec.coarse is None:
            known = ", ".join(name for name, each in BACKBONES.items() if each.coarse)
            raise ArtefactError(f"neck 'fpn32' does not fit backbone {settings.backbone!r}; expected {known}")
        # torchvision finds the same scale for both maps of stride 32 and pools every RoI from the first.
        taps, strides, pooled_levels = spec.coarse, (32, 32, 64), 1
    else:
        strides = (4, 8, 16, 32, 64)[0 if settings.finest_stride == 4 else 1 :]
        if not set(strides[:-1]) <= set(spec.maps):
            raise ArtefactError(
                f"neck 'fpn' does not fit backbone {settings.backbone!r}, which ends at stride "
                f"{max(spec.maps)}; expected 'single'"
            )
        taps, pooled_levels = dict(spec.maps[stride] for stride in strides[:-1]), len(strides) - 1
    channels, norm = settings.fpn_channels, nn.BatchNorm2d if settings.backbone_norm == "live" else None
    body = Body(spec, network, tuple(taps))
    fpn = FeaturePyramidNetwork(list(taps.values()), channels, LastLevelMaxPool(), norm)
    return Backbone(body, channels, strides, pooled_levels, fpn)


def build_last_stage(settings: ModelSettings) -> tuple[nn.Module, int]:
    """A ResNet's last stage, randomly initialised, and its width: the box head ``res5``."""
    spec, network = _network_of(settings)
    return last_stage(network, settings.backbone), spec.maps[32][1]


def _network_of(settings: ModelSettings) -> tuple[BackboneSpec, nn.Module]:
    """The whole network with the norms, strides and dilation of ``settings``, randomly initialised."""
    spec = BACKBONES.get(settings.backbone)
    if spec is None:
        raise ArtefactError(
            f"backbone {settings.backbone!r} is not known; expected one of {', '.join(BACKBONES)}"
        )
    live = settings.backbone_norm == "live"
    network = spec.build(partial(nn.BatchNorm2d if live else FrozenBatchNorm, eps=settings.backbone_norm_eps))
    for block in network.modules():
        if isinstance(block, SqueezeExcitation):
            block.avgpool = MeanOfRows()
    if settings.bottleneck_stride == "1x1":
        stride_in_1x1(network, settings.backbone)
    if settings.neck == "dc5":
        dilate_last_stage(network, settings.backbone)
    fold_frozen_norms(network)
    return spec, network
