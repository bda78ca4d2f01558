"""Backbones: torchvision's classification networks as sources of feature maps.

A backbone maps images [B, 3, H, W] to a list of feature maps, finest first. ``FPNBackbone`` puts a
feature pyramid on it (Lin et al., 2017), ``SingleBackbone`` hands on the map of stride 16 alone.
Parameter names follow torchvision's detection models (``body``, ``fpn``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
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

    ``build(norm_layer)`` gives the network as an ``nn.Sequential`` of stages; ``taps`` are the
    stages whose outputs have strides 4, 8, 16 and 32, and ``channels`` their widths.
    """

    build: Callable[[Callable[..., nn.Module]], nn.Sequential]
    taps: tuple[int, int, int, int]
    channels: tuple[int, int, int, int]


def _mobilenet_v2(norm_layer: Callable[..., nn.Module]) -> nn.Sequential:
    # The last stage widens to 1280 channels for classification; the pyramid takes the 320 before it.
    return torchvision.models.mobilenet_v2(norm_layer=norm_layer).features[:18]


BACKBONES: dict[str, BackboneSpec] = {
    "mobilenet_v2": BackboneSpec(_mobilenet_v2, taps=(3, 6, 13, 17), channels=(24, 32, 96, 320)),
}


class Body(nn.Module):
    """The stages of a backbone up to the last tap; returns the tapped maps, finest first."""

    def __init__(self, stages: nn.Sequential, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.taps = taps
        for index, stage in enumerate(stages[: taps[-1] + 1]):
            self.add_module(str(index), stage)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps [B, C_i, H / stride_i, W / stride_i] of ``x`` [B, 3, H, W]."""
        maps = []
        for index, stage in enumerate(self.children()):
            x = stage(x)
            if index in self.taps:
                maps.append(x)
        return maps

    def freeze(self, stages: int) -> None:
        """Stop training the first ``stages`` stages."""
        for stage in list(self.children())[:stages]:
            stage.requires_grad_(False)


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
    stages = spec.build(nn.BatchNorm2d if live else FrozenBatchNorm)
    if settings.neck == "single":
        return SingleBackbone(Body(stages, spec.taps[2:3]), spec.channels[2])
    first = (4, 8).index(settings.finest_stride)
    taps, channels = spec.taps[first:], spec.channels[first:]
    return FPNBackbone(Body(stages, taps), channels, settings.fpn_channels, settings.finest_stride, live)


def load_backbone_weights(body: Body, path: Path) -> None:
    """Fill ``body`` from a classification checkpoint of the same network (torchvision's keys).

    The file is a state dict (``.pth`` loaded as weights only, or ``.safetensors``) whose keys are
    ``features.N...`` or ``N...``; layers behind the last tap, and the classifier, are left out.
    Raises ``ArtefactError`` for a file that is missing, damaged or of another network.
    """
    state = _read_state(path)
    state = {key.removeprefix("features."): value for key, value in state.items()}
    wanted = body.state_dict()
    # Old checkpoints have no step counter, and no result depends on it.
    needed = {key for key in wanted if not key.endswith("num_batches_tracked")}
    missing = sorted(needed - set(state))
    if missing:
        raise ArtefactError(
            f"{path}: {len(missing)} of {len(needed)} backbone tensors are missing, first {missing[0]!r}; "
            "expected ImageNet weights of the same network with torchvision's keys"
        )
    wrong = [key for key in sorted(needed) if state[key].shape != wanted[key].shape]
    if wrong:
        raise ArtefactError(
            f"{path}: {wrong[0]!r} has shape {list(state[wrong[0]].shape)}, expected "
            f"{list(wanted[wrong[0]].shape)}; the weights belong to another network"
        )
    body.load_state_dict({key: state.get(key, wanted[key]) for key in wanted})


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ArtefactError(
            f"{path}: no such file; give the ImageNet weights of the backbone, or leave the option out"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtefactError(
            f"{path}: cannot be read as weights ({reason[:120]}); expected a state dict"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ArtefactError(f"{path}: holds no state dict; expected a dictionary of tensors")
    return state
