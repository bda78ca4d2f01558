"""The paper's two networks up to their last shareable convolution: VGG-16 and ZF, both of stride 16.

Layers carry the names of the published weights: VGG-16 torchvision's numbers, ZF those of
py-faster-rcnn's prototxt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

# py-faster-rcnn, models/pascal_voc/ZF: local_size, alpha and beta of norm1 and norm2.
_LRN_SIZE, _LRN_ALPHA, _LRN_BETA = 3, 5e-5, 0.75


class SpatialResponseNorm(nn.Module):
    """Local response normalisation within each channel: x / (1 + alpha * mean of x^2 around)^beta.

    caffe's ``norm_region: WITHIN_CHANNEL``; the mean over size x size counts zeros beyond the edge.
    """

    def __init__(self, size: int = _LRN_SIZE, alpha: float = _LRN_ALPHA, beta: float = _LRN_BETA) -> None:
        super().__init__()
        self.size, self.alpha, self.beta = size, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] as ``x``."""
        mean = F.avg_pool2d(x * x, self.size, stride=1, padding=self.size // 2)
        return x * (1.0 + self.alpha * mean) ** -self.beta


def vgg16(norm_layer: Callable[..., nn.Module]) -> nn.Sequential:
    """The 13 convolutions of VGG-16 (configuration D), random weights; it has no norms to choose."""
    layers = nn.Sequential(*list(make_layers(cfgs["D"]))[:-1])  # without the pooling after conv5_3
    return _initialised(layers)


def zf(norm_layer: Callable[..., nn.Module]) -> nn.Sequential:
    """The 5 convolutions of Zeiler and Fergus as py-faster-rcnn has them; no batch norms to choose.

    caffe rounds the size of a pooled map up, so on sides that are multiples of 32 the last map is one
    place larger than side / 16.
    """
    return _initialised(
        nn.Sequential(
            OrderedDict(
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
        )
    )


def _initialised(layers: nn.Sequential) -> nn.Sequential:
    """Weights as torchvision starts a VGG: the variance of the features stays, layer by layer."""
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, layer.bias))
    return layers
