"""Weights trained on one input convention, made to take another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anchorline.train.model_settings import IMAGENET_MEAN, IMAGENET_STD, ModelSettings


@torch.no_grad()
def adapt_first_convolution(body: nn.Module, settings: ModelSettings) -> None:
    """Change the first convolution of ``body`` from RGB with ImageNet's statistics to ``settings``' input.

    A convolution is linear: its input channels change places and scale, and what the mean changes goes
    into its bias. Without a bias (a norm follows) the mean stays the network's own. At the very edge of
    the canvas the zero padding stands for the new mean instead of the old one, which is less than one
    grey level away for caffe's. Nothing is touched where the conventions are the same.
    """
    order, mean, std = settings.channel_order, settings.mean, settings.std
    if (order, mean, std) == ("rgb", IMAGENET_MEAN, IMAGENET_STD):
        return
    conv = next(layer for layer in body.modules() if isinstance(layer, nn.Conv2d))
    weight = conv.weight.double() / _channels(IMAGENET_STD)
    old_mean = _channels(IMAGENET_MEAN)
    if order == "bgr":
        weight, old_mean = weight.flip(1), old_mean.flip(1)
    if conv.bias is not None:
        # A pixel of the new mean is above 0 by this much in the old convention.
        conv.bias += (weight * (_channels(mean) - old_mean)).sum(dim=(1, 2, 3)).to(conv.bias.dtype)
    conv.weight.copy_(weight * _channels(std))


def _channels(values: tuple[float, float, float]) -> Tensor:
    """[1, 3, 1, 1] in float64."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 3, 1, 1)
