"""Detectron2's Faster R-CNN models of its model zoo: their settings, their names and the order of their rows.

The files that each rule comes from stand in ``docs/import.md``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from anchorline.export.importers.checkpoint_files import CheckpointFile
from anchorline.export.importers.library import (
    MSRA,
    RESNET_FPN,
    Architecture,
    Library,
    State,
    side_of,
)
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import ArtefactError
from anchorline.train.model.anchors import unrounded_base_anchors
from anchorline.train.model.settings import ModelSettings

_RPN_HEAD = "proposal_generator.rpn_head."
_FPN, _C4 = "backbone.fpn_lateral2.weight", "roi_heads.res5.0.conv1.weight"
_ALL_SIZES = ((32.0, 64.0, 128.0, 256.0, 512.0),)
_ANCHORS = "proposal_generator.anchor_generator.cell_anchors."


def _architectures() -> dict[str, Architecture]:
    fpn = dataclasses.replace(RESNET_FPN, roi_level_rule="detectron2", **MSRA)
    one_map = dataclasses.replace(fpn, neck="dc5", anchor_sizes=_ALL_SIZES, rpn_pre_nms=6000)
    c4 = dataclasses.replace(one_map, neck="single", box_head="res5", roi_size=14)
    x101 = dataclasses.replace(
        fpn, backbone="resnext101_32x8d", bottleneck_stride="3x3", std=(57.375, 57.12, 58.395)
    )
    found = {"x101_fpn": x101}
    for depth in ("50", "101"):
        for kind, settings in (("fpn", fpn), ("c4", c4), ("dc5", one_map)):
            found[f"r{depth}_{kind}"] = dataclasses.replace(settings, backbone=f"resnet{depth}")
    resize = ResizeRule(800, 1333, interpolation="antialiased", rounding="nearest")
    return {f"detectron2_{name}": Architecture(settings, resize) for name, settings in sorted(found.items())}


ARCHITECTURES = _architectures()
"""The architectures of ``configs/COCO-Detection/faster_rcnn_*.yaml``."""


def recognise(source: CheckpointFile, state: State) -> str | None:
    """The architecture by the parts that are there, the blocks of ``res4`` and the groups."""
    if f"{_RPN_HEAD}objectness_logits.weight" not in state:
        return None
    kind = "fpn" if _FPN in state else "c4" if _C4 in state else "dc5"
    blocks = {name.partition("res4.")[2].partition(".")[0] for name in state if "res4." in name}
    depth = {6: "r50", 23: "r101"}.get(len(blocks))
    if depth == "r101" and side_of(state, "backbone.bottom_up.res2.0.conv2.weight", 1) == 8:
        depth = "x101"
    arch = f"detectron2_{depth}_{kind}"
    return arch if arch in ARCHITECTURES else None


def describe(source: CheckpointFile, state: State, arch: str) -> Architecture:
    """The zoo's settings with what ``state`` holds of pixel statistics and anchors."""
    usual = ARCHITECTURES[arch].settings
    held = {**_pixel_statistics(state, source.name), **_anchors(state, usual, source.name)}
    found = dataclasses.replace(usual, **held)
    warnings = []  # what the tensors leave open where their statistics are not the zoo's
    if found.mean[0] > found.mean[2]:
        warnings.append(
            f"pixel_mean is {list(found.mean)}, the order of RGB; if the model was trained with INPUT.FORMAT "
            '"RGB", import again with --set channel_order=rgb'
        )
    if max(found.std) > 1 and usual.bottleneck_stride == "1x1":
        warnings.append(
            f"pixel_std is {list(found.std)}, so the backbone is not MSRA's; if it was trained with "
            "STRIDE_IN_1X1: False, import again with --set bottleneck_stride=3x3"
        )
    return Architecture(found, ARCHITECTURES[arch].resize, warnings=tuple(warnings))


def _pixel_statistics(state: State, where: str) -> dict[str, Any]:
    """Mean and standard deviation where the checkpoint has them, as those of before version 0.5."""
    found = {}
    for field in ("mean", "std"):
        tensor = state.get(f"pixel_{field}")
        if tensor is None:
            continue
        if tensor.numel() != 3 or not torch.isfinite(tensor.float()).all():
            raise ArtefactError(
                f"{where}: pixel_{field} is {list(tensor.shape)}, expected 3 finite numbers, one a channel"
            )
        # Written as float32 and shown so: 103.53, not 103.52999877929688.
        found[field] = tuple(round(float(value), 4) for value in tensor.flatten())
    return found


def _anchors(state: State, usual: ModelSettings, where: str) -> dict[str, Any]:
    """Anchor sizes and ratios where the checkpoint holds the anchors, as those of before version 0.5."""
    held = [state.get(f"{_ANCHORS}{level}") for level in range(len(usual.anchor_sizes))]
    found = [_sizes_and_ratios(each) for each in held if each is not None]
    if not found:
        return {}
    ratios = {each[1] for each in found if each is not None}
    if None in found or len(found) != len(held) or len(ratios) != 1:
        raise ArtefactError(
            f"{where}: its {_ANCHORS}* are no anchors for {len(held)} map{'s' * (len(held) > 1)}; expected "
            "every size with every ratio, centred at 0, which are the anchors that can be imported"
        )
    return {"anchor_sizes": tuple(each[0] for each in found if each), "aspect_ratios": ratios.pop()}


def _sizes_and_ratios(anchors: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Sizes and ratios that give ``anchors`` [A, 4], size by size; ``None`` where none do."""
    if anchors.dim() != 2 or anchors.shape[1] != 4 or not len(anchors):
        return None
    width, height = (anchors[:, 2:] - anchors[:, :2]).double().unbind(1)
    # Rounded, since the buffers are float32: 22.627416 x 45.254833 is 32 at a ratio of 2.
    sizes, ratios = (
        tuple(dict.fromkeys(round(value, decimals) for value in values.tolist()))
        for values, decimals in (((width * height).sqrt(), 3), (height / width, 5))
    )
    if not all(value > 0 for value in (*sizes, *ratios)):  # NaN as well
        return None
    rebuilt = unrounded_base_anchors(sizes, ratios).unflatten(0, (len(ratios), len(sizes))).transpose(0, 1)
    same = rebuilt.numel() == anchors.numel() and torch.allclose(
        rebuilt.reshape(-1, 4), anchors.float(), rtol=1e-4, atol=1e-2
    )
    return (sizes, ratios) if same else None


LIBRARY = Library(
    name="Detectron2",
    architectures=ARCHITECTURES,
    known_names=", ".join(ARCHITECTURES),
    recognise=recognise,
    describe=describe,
    names=(
        (r"^backbone\.body\.(conv1|bn1)\.", r"backbone.body.stem.\1."),
        (r"^roi_heads\.box_head\.layer4\.", "roi_heads.res5."),
        *((rf"\.layer{number}\.", f".res{number + 1}.") for number in range(1, 5)),
        (r"\.bn(\d)\.", r".conv\1.norm."),
        (r"\.downsample\.0\.", ".shortcut."),
        (r"\.downsample\.1\.", ".shortcut.norm."),
        *(
            (rf"^backbone\.fpn\.{ours}_blocks\.{level}\.0\.", f"backbone.fpn_{theirs}{level + 2}.")
            for ours, theirs in (("inner", "lateral"), ("layer", "output"))
            for level in range(4)
        ),
        (r"^rpn\.head\.conv\.0\.0\.", f"{_RPN_HEAD}conv."),
        (r"^rpn\.head\.cls_logits\.", f"{_RPN_HEAD}objectness_logits."),
        (r"^rpn\.head\.bbox_pred\.", f"{_RPN_HEAD}anchor_deltas."),
        (r"^roi_heads\.box_head\.fc6\.", "roi_heads.box_head.fc1."),
        (r"^roi_heads\.box_head\.fc7\.", "roi_heads.box_head.fc2."),
    ),
    body={"fpn": "backbone.bottom_up.", "single": "backbone.", "dc5": "backbone."},
    ignored=("pixel_mean", "pixel_std", "proposal_generator.anchor_generator."),
    background_last=True,
    size_by_size=True,
    marks=(
        (r"^roi_heads\.mask_head\.", "a Mask R-CNN"),
        (r"^roi_heads\.keypoint_head\.", "a Keypoint R-CNN"),
        (r"^roi_heads\.box_(head|predictor)\.0\.", "a Cascade R-CNN"),
        (r"^head\.cls_subnet\.", "a RetinaNet"),
        (r"^roi_heads\.box_head\.conv1\.", "a model with convolutions in its box head"),
    ),
)
