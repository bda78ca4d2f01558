"""Rows of the last layers in our order: the background first, and anchors ratio by ratio."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anchorline.train.model_settings import ModelSettings

_PREDICTOR = "roi_heads.box_predictor"
_RPN = "rpn.head"


def background_first(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` (our names) of a library whose classes stand first and whose background is last.

    Logits [K + 1, ...]: the last row goes to the front. Deltas [4K, ...], which the background has none
    of: four rows of zeros for it, never read, before them. Deltas [4, ...] for all classes at once
    (class-agnostic regression): the same four rows for each class.
    """
    changed = dict(state)
    for kind in ("weight", "bias"):
        logits, deltas = (
            state.get(f"{_PREDICTOR}.cls_score.{kind}"),
            state.get(f"{_PREDICTOR}.bbox_pred.{kind}"),
        )
        if logits is None or deltas is None or min(logits.dim(), deltas.dim()) < 1:
            continue
        classes = len(logits) - 1
        if len(deltas) not in (4, 4 * classes):
            continue
        changed[f"{_PREDICTOR}.cls_score.{kind}"] = torch.cat((logits[-1:], logits[:-1]))
        repeats = classes if len(deltas) == 4 else 1
        rows = [torch.zeros_like(deltas[:4]), *[deltas] * repeats]
        changed[f"{_PREDICTOR}.bbox_pred.{kind}"] = torch.cat(rows)
    return changed


def ratio_by_ratio(state: Mapping[str, Tensor], settings: ModelSettings) -> dict[str, Tensor]:
    """``state`` (our names) of a library whose anchors run size by size, the ratios within each.

    Row ``size * ratios + ratio`` of the objectness becomes row ``ratio * sizes + size``; the four rows of an
    anchor's deltas move together.
    """
    changed, ratios = dict(state), len(settings.aspect_ratios)
    sizes = settings.anchors_per_place // ratios
    for name, rows in ((f"{_RPN}.cls_logits", 1), (f"{_RPN}.bbox_pred", 4)):
        for kind in ("weight", "bias"):
            tensor = state.get(f"{name}.{kind}")
            if tensor is not None and tensor.dim() and len(tensor) == sizes * ratios * rows:
                by_anchor = tensor.reshape(sizes, ratios, rows, *tensor.shape[1:])
                changed[f"{name}.{kind}"] = by_anchor.transpose(0, 1).reshape(tensor.shape)
    return changed
