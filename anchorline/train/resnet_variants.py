"""ResNets as Detectron2 and MMDetection have them: which convolution strides, and a dilated last stage.

The networks are torchvision's and are changed in place; no parameter is, so torchvision's names remain.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from anchorline.runtime.errors import ArtefactError

_DILATION = 2


def stride_in_1x1(network: nn.Module, name: str) -> None:
    """Let each bottleneck stride in its first 1x1 convolution instead of the 3x3 one.

    So do MSRA's networks: Detectron2's ``STRIDE_IN_1X1`` (``modeling/backbone/resnet.py``), MMDetection's
    ``style="caffe"`` (``models/backbones/resnet.py``). ``name`` is the backbone's in the message of the
    ``ArtefactError`` for a network without bottlenecks.
    """
    for block in _bottlenecks(network, name, "bottleneck_stride '1x1'", "'3x3'"):
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def dilate_last_stage(network: nn.Module, name: str) -> None:
    """Take the stride out of the last stage, which then has 16, and dilate its 3x3 convolutions by 2.

    All of them, as Detectron2's ``RES5_DILATION`` 2; torchvision's ``replace_stride_with_dilation`` leaves
    the first block's as it was. Raises as ``stride_in_1x1`` and ``last_stage``.
    """
    for block in _bottlenecks(last_stage(network, name), name, "neck 'dc5'", "'fpn' or 'single'"):
        block.conv1.stride = block.conv2.stride = (1, 1)
        block.conv2.dilation = block.conv2.padding = (_DILATION, _DILATION)
        if block.downsample is not None:
            block.downsample[0].stride = (1, 1)


def last_stage(network: nn.Module, name: str) -> nn.Module:
    """torchvision's ``layer4`` of a ResNet; an ``ArtefactError`` that says ``name`` for another network."""
    if not isinstance(network, ResNet):
        raise ArtefactError(f"backbone {name!r} has no stage res5 (layer4); expected a ResNet")
    return network.layer4


def _bottlenecks(part: nn.Module, name: str, setting: str, instead: str) -> Iterator[Bottleneck]:
    """Every bottleneck of ``part``; where there is none, ``setting`` does not fit the backbone ``name``."""
    blocks = [module for module in part.modules() if isinstance(module, Bottleneck)]
    if not blocks:
        raise ArtefactError(
            f"{setting} does not fit backbone {name!r}, which has no bottlenecks; expected {instead}, "
            "or a ResNet from resnet50 on"
        )
    return iter(blocks)
