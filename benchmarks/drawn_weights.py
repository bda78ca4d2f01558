"""Random weights with which a torchvision detector detects: for comparing two implementations of it.

A freshly built detector finds nothing or noise. Here its batch norms take the statistics of real
images, and its heads are centred and scaled until scores spread, boxes move and each image has tens of
detections.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

OBJECTNESS_SPREAD = 1.0  # in logits; much more and scores of 1.0 tie
DELTA_SPREAD = 0.2
LOGIT_SPREAD = 0.266  # by the logarithm of the number of outputs: fewer need less to stand out

# Batch norms put out values around 1, so most units are active, as in a trained network. Around 0 a random
# network is chaotic: it enlarges a rounding error of the input a thousandfold.
SHIFT = 2.0


@torch.no_grad()
def draw_weights(
    model: FasterRCNN, frames: Sequence[NDArray[np.uint8]], seed: int, wanted: float = 40.0
) -> FasterRCNN:
    """Give ``model`` weights with which each of ``frames`` (BGR) has about ``wanted`` detections."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
    for norm in norms(model):
        norm.bias.fill_(SHIFT)
    model.eval()
    images, _ = model.transform([as_tensor(frame) for frame in frames])
    with statistics_of_inputs(model):
        features = model.backbone(images.tensors)
    maps = list(features.values())
    head = model.rpn.head
    hidden = [head.conv(each) for each in maps]
    spread(head.cls_logits, hidden, OBJECTNESS_SPREAD)
    spread(head.bbox_pred, hidden, DELTA_SPREAD)
    proposals, _ = model.rpn(images, features)
    heads = model.roi_heads
    pooled = heads.box_roi_pool(features, proposals, images.image_sizes)
    with statistics_of_inputs(heads):
        hidden_rois = heads.box_head(pooled)
    predictor = heads.box_predictor
    outputs = predictor.cls_score.out_features
    spread(predictor.cls_score, [hidden_rois], LOGIT_SPREAD * math.log(outputs))
    spread(predictor.bbox_pred, [hidden_rois], 3 * DELTA_SPREAD)
    logits, deltas = predictor(hidden_rois)
    _choose_background(model, logits, deltas, proposals, images.image_sizes, wanted)
    return model


def as_tensor(frame: NDArray[np.uint8]) -> Tensor:
    """A BGR frame as torchvision wants it: RGB [3, H, W] from 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(frame[:, :, ::-1])).permute(2, 0, 1).float() / 255


@contextmanager
def statistics_of_inputs(module: nn.Module) -> Iterator[None]:
    """Every batch norm that runs takes mean and variance of its input as its own."""

    def take(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        norm.running_var.copy_(inputs[0].var(dim=(0, 2, 3)))

    hooks = [norm.register_forward_pre_hook(take) for norm in norms(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def norms(module: nn.Module) -> list[nn.Module]:
    """The batch norms, frozen ones of any library as well."""
    return [m for m in module.modules() if hasattr(m, "running_mean")]


def spread(layer: nn.Conv2d | nn.Linear, inputs: Sequence[Tensor], spread: float) -> None:
    """Scale and shift ``layer`` so that each of its outputs has mean 0 and this standard deviation."""
    layer.bias.zero_()
    outputs = torch.cat([layer(each).movedim(1, -1).flatten(0, -2) for each in inputs])
    factor = spread / outputs.std(dim=0).clamp(min=1e-6)
    layer.weight.mul_(factor.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias.copy_(-outputs.mean(dim=0) * factor)


def _choose_background(
    model: FasterRCNN,
    logits: Tensor,
    deltas: Tensor,
    proposals: list[Tensor],
    sizes: list[tuple[int, int]],
    wanted: float,
) -> None:
    """Bisect the background's bias for the wanted number of detections per image."""
    low, high = -10.0, 20.0
    shift = torch.zeros_like(logits[0])
    for _ in range(12):
        shift[0] = (low + high) / 2
        boxes, _, _ = model.roi_heads.postprocess_detections(logits + shift, deltas, proposals, sizes)
        count = sum(map(len, boxes)) / len(boxes)
        low, high = (shift[0].item(), high) if count > wanted else (low, shift[0].item())
    model.roi_heads.box_predictor.cls_score.bias.add_(shift)
