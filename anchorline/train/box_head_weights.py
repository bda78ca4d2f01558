"""fc6 and fc7 of the box head from the classification network the body comes from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from anchorline.train.roi_heads import BoxHead


@torch.no_grad()
def fill_box_head(head: nn.Module, state: Mapping[str, Tensor], classifier: tuple[str, str] | None) -> bool:
    """Copy the layers named ``classifier`` in ``state`` into fc6 and fc7; whether that was possible.

    It is for a ``BoxHead`` whose fc6 and fc7 have those shapes: 512 x 7 x 7 -> 4096 -> 4096 for VGG-16,
    256 x 6 x 6 for ZF; a pooled region and the network's last map are both flattened as channels, rows,
    columns. Otherwise, and where values are not finite (torchvision's ``IMAGENET1K_FEATURES``), both
    layers stay new.
    """
    if classifier is None or not isinstance(head, BoxHead):
        return False
    pairs = []
    for layer, name in zip((head.fc6, head.fc7), classifier, strict=True):
        for own, key in ((layer.weight, f"{name}.weight"), (layer.bias, f"{name}.bias")):
            given = state.get(key)
            if given is None or given.shape != own.shape or not torch.isfinite(given.float()).all():
                return False
            pairs.append((own, given))
    for own, given in pairs:
        own.copy_(given)
    return True
