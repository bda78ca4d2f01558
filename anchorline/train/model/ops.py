"""The custom ops and the stages: all that the model knows of the export.

In eager PyTorch the ops run torchvision's kernels; in an ONNX export each becomes one node of the domain
``anchorline``, whose meaning for other runtimes is in ``anchorline/export/functions.py``. Stages are the
points of the network, each with a ``mark``, where another runtime can be compared with PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor

from anchorline.runtime.contract import DOMAIN, OP_VERSION

SUPPRESSED = -1.0

# TensorRT hands a node to a plugin only when the node itself names the plugin's namespace and version.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(OP_VERSION)}

MARKER = "Stage"
Visitor = Callable[[str, Tensor], Tensor]
_visitor: Visitor | None = None

_traced_slots: int | torch.SymInt | None = None


def batched_nms(boxes: Tensor, scores: Tensor, *, iou_threshold: float, score_threshold: float) -> Tensor:
    """Greedy non-maximum suppression of G independent groups of N boxes.

    ``boxes`` float32 [G, N, 4] xyxy and ``scores`` float32 [G, N] in falling order within a group
    (entries that do not count may stand anywhere). Returns ``scores`` in which entries at or below
    ``score_threshold`` or NaN, boxes without a finite positive area, and those whose IoU with a kept one
    exceeds ``iou_threshold`` are ``SUPPRESSED``.
    """
    if torch.onnx.is_in_onnx_export():
        thresholds = {"iou_threshold": float(iou_threshold), "score_threshold": float(score_threshold)}
        return _op("BatchedNMS", (boxes, scores), thresholds, scores.dtype, scores.shape)
    # The op's threshold is a float32; torchvision's CPU kernel compares in double, where an IoU of
    # exactly 0.6 lies above 0.6.
    iou_threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    area = width * height
    counts = (scores > score_threshold) & (width > 0) & (area > 0) & torch.isfinite(area)
    kept = torch.full_like(scores, SUPPRESSED)
    for group in torch.nonzero(counts.any(dim=1)).flatten().tolist():
        candidates = torch.nonzero(counts[group]).flatten()
        # Ranks instead of scores, so that equal scores keep the order in which they stand.
        ranks = -torch.arange(len(candidates), dtype=torch.float32, device=boxes.device)
        survivors = candidates[torchvision.ops.nms(boxes[group, candidates], ranks, iou_threshold)]
        kept[group, survivors] = scores[group, survivors]
    return kept


def roi_align(features: Tensor, rois: Tensor, *, output_size: int, sampling_ratio: int) -> Tensor:
    """RoIAlign (He et al., "Mask R-CNN", section 3) on one feature map: [B * R, C, S, S].

    ``features`` [B, C, H, W]; ``rois`` float32 [B, R, 4] xyxy in feature pixels where a pixel's
    value stands at its centre, (0.5, 0.5) for the first (torchvision's ``aligned=True``, ONNX's
    ``half_pixel``). ``sampling_ratio`` points per cell and axis are averaged; 0 is adaptive, as many as
    ceil(side of the RoI / ``output_size``), and none, with the value 0, in a RoI without extent.
    """
    size = int(output_size)
    if torch.onnx.is_in_onnx_export():
        attributes = {"output_size": size, "sampling_ratio": int(sampling_ratio)}
        return _op("RoIAlign", (features, rois), attributes, features.dtype, _pooled(features, rois, size))
    # In float32, as the ONNX body: bfloat16 has steps of a whole feature pixel from 128 on.
    images = list(rois.float())
    pooled = torchvision.ops.roi_align(features.float(), images, size, 1.0, sampling_ratio, aligned=True)
    return pooled.to(features.dtype)


def roi_pool(features: Tensor, rois: Tensor, *, output_size: int, spatial_scale: float) -> Tensor:
    """RoI max pooling (Girshick, "Fast R-CNN", section 2.1) on one feature map: [B * R, C, S, S].

    ``features`` [B, C, H, W]; ``rois`` float32 [B, R, 4] xyxy in image pixels, of which x2 and y2 belong to
    the RoI; ``spatial_scale`` takes them to feature pixels, which are rounded (halves away from zero). A
    RoI covers at least one feature pixel; a cell without any is 0.
    """
    size, scale = int(output_size), float(spatial_scale)
    if torch.onnx.is_in_onnx_export():
        attributes = {"output_size": size, "spatial_scale": scale}
        return _op("RoIPool", (features, rois), attributes, features.dtype, _pooled(features, rois, size))
    # In float32, as the ONNX body.
    pooled = torchvision.ops.roi_pool(features.float(), list(rois.float()), size, scale)
    return pooled.to(features.dtype)


def ordered(scores: Tensor) -> tuple[Tensor, Tensor]:
    """``scores`` [..., N] in falling order and their places; of equal ones the first comes first.

    That is onnxruntime's order for TopK, where PyTorch's is open. RoIs that cover the same cells after the
    rounding of ``roi_pool`` have exactly equal scores and yet different boxes.
    """
    if torch.onnx.is_in_onnx_export():
        return torch.topk(scores, scores.shape[-1], dim=-1)
    return torch.sort(scores, dim=-1, descending=True, stable=True)


def occupied(boxes: Tensor, scores: Tensor) -> Tensor:
    """The first slots [B, S, 4] of ``boxes`` [B, P, 4], as many as hold a proposal in any image by ``scores``
    [B, P], those with one first; at least one.

    In an ONNX export S is a size of its own (``slots_of_trace``); with a fixed shape, as in an engine, P.
    """
    if torch.onnx.is_in_onnx_export():
        assert _traced_slots is not None
        shape = (boxes.shape[0], _traced_slots, 4)
        return _op("Occupied", (boxes, scores), {}, boxes.dtype, shape, plugin=False)
    return boxes[:, : max(1, int((scores > SUPPRESSED).sum(dim=1).max()))]


@contextlib.contextmanager
def slots_of_trace(slots: int | torch.SymInt) -> Iterator[None]:
    """While it is traced for an export: the size that ``occupied`` gives, which only the data will tell."""
    global _traced_slots
    before, _traced_slots = _traced_slots, slots
    try:
        yield
    finally:
        _traced_slots = before


def mark(name: str, tensor: Tensor) -> Tensor:
    """``tensor``, known from here on as ``name`` to verification and to the exported graph.

    In an ONNX export a node, which ``export/onnx_export.py`` turns into the name of the value.
    """
    if torch.onnx.is_in_onnx_export():
        return _op(MARKER, (tensor,), {"name": name}, tensor.dtype, tensor.shape, plugin=False)
    return tensor if _visitor is None else _visitor(name, tensor)


@contextlib.contextmanager
def tapped(visitor: Visitor) -> Iterator[None]:
    """Call ``visitor(name, tensor)`` at each mark; what it returns goes on through the network."""
    global _visitor
    before, _visitor = _visitor, visitor
    try:
        yield
    finally:
        _visitor = before


def _pooled(features: Tensor, rois: Tensor, size: int) -> tuple[int, ...]:
    return (rois.shape[0] * rois.shape[1], features.shape[1], size, size)


def _op(
    name: str,
    inputs: tuple[Tensor, ...],
    attributes: Mapping[str, float | int | str],
    dtype: torch.dtype,
    shape: Sequence[int | torch.SymInt],
    plugin: bool = True,
) -> Tensor:
    """A node of the exported graph."""
    node = f"{DOMAIN}::{name}"
    named: dict[str, Any] = {**attributes, **PLUGIN_ATTRIBUTES} if plugin else {**attributes}
    return torch.onnx.ops.symbolic(node, inputs, named, dtype=dtype, shape=shape, version=OP_VERSION)
