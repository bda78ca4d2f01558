"""MMDetection 2.x and 3.x: Faster R-CNN on ResNets with a pyramid; settings, names and order of the rows.

The files that each rule comes from stand in ``docs/import.md``; ``mmdetection_config.py`` reads the
configuration that the checkpoints carry.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from torch import Tensor

from anchorline.export.checkpoint_files import CheckpointFile
from anchorline.export.importers.class_names import ClassNames, are_class_names, coco_80
from anchorline.export.importers.library import (
    Architecture,
    Description,
    side_of,
    with_widths,
    without_prefix,
)
from anchorline.export.importers.mmdetection_config import Configuration, read_configuration
from anchorline.export.importers.rows import background_first
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.errors import SettingsError
from anchorline.train.model_settings import ModelSettings

NAME = "MMDetection"
INPUT_DTYPE = "uint8"
IGNORED = ("data_preprocessor.",)

_CLASSIFIER = "roi_head.bbox_head.fc_cls.weight"
_RESIZE = ResizeRule(800, 1333, rounding="nearest")


def _architectures() -> dict[str, Architecture]:
    pytorch = ModelSettings(
        backbone="resnet50",
        neck="fpn",
        anchor_style="unrounded",
        clamp_deltas_below=True,
        rpn_pre_nms=1000,
        rpn_post_nms=1000,
        rpn_min_side=0.0,
        roi_sampling=0,
        roi_aligned=True,
        roi_level_rule="mmdetection",
        box_min_side=0.0,
    )
    caffe = dataclasses.replace(
        pytorch,
        bottleneck_stride="1x1",
        channel_order="bgr",
        mean=(103.53, 116.28, 123.675),
        std=(1.0, 1.0, 1.0),
    )
    found = {}
    for depth in ("50", "101"):
        for style, settings in (("", pytorch), ("_caffe", caffe)):
            of_depth = dataclasses.replace(settings, backbone=f"resnet{depth}")
            found[f"mmdet_r{depth}{style}_fpn"] = Architecture(of_depth, _RESIZE)
    return found


ARCHITECTURES = _architectures()
"""The architectures of ``configs/faster_rcnn/faster-rcnn_r{50,101}{,-caffe}_fpn_*_coco.py``."""

KNOWN_NAMES = ", ".join(ARCHITECTURES)


def coco_classes() -> ClassNames:
    """COCO's 80 classes in the order of their ids."""
    return coco_80()


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without what stands before MMDetection's names."""
    return without_prefix(state, _CLASSIFIER)


def recognise(source: CheckpointFile, state: Mapping[str, Tensor]) -> str | None:
    """The architecture that the tensors show, in the style of the configuration or ``pytorch``."""
    arch = _by_tensors(state)
    configuration = read_configuration(source.meta, source.name) if arch else None
    caffe = configuration is not None and configuration.style == "caffe"
    return arch.replace("_fpn", "_caffe_fpn") if arch and caffe else arch


def _by_tensors(state: Mapping[str, Tensor]) -> str | None:
    """The architecture in the style ``pytorch``, which no tensor shows, by the blocks of the third stage."""
    if "rpn_head.rpn_cls.weight" not in state:
        return None
    blocks = {name.split(".")[2] for name in state if name.startswith("backbone.layer3.")}
    depth = {6: "50", 23: "101"}.get(len(blocks))
    return f"mmdet_r{depth}_fpn" if depth else None


def describe(source: CheckpointFile, state: Mapping[str, Tensor], arch: str) -> Description:
    """The zoo's settings, changed as the checkpoint's configuration says, with the widths of ``state``."""
    configuration = read_configuration(source.meta, source.name)
    architecture, warnings = _in_style(arch, configuration, source.name)
    changed = dataclasses.replace(architecture.settings, **(configuration.settings if configuration else {}))
    found = with_widths(
        changed,
        channels=side_of(state, "neck.lateral_convs.0.conv.weight", 0),
        pooled=side_of(state, "roi_head.bbox_head.shared_fcs.0.weight", 1),
        representation=side_of(state, _CLASSIFIER, 1),
    )
    resize = architecture.resize
    if configuration is not None and configuration.sides is not None:
        shorter, longer = configuration.sides
        resize = dataclasses.replace(resize, shorter_side=shorter, longer_side=longer)
    return Description(found, resize, _class_names(source.meta), warnings)


def _in_style(
    arch: str, configuration: Configuration | None, where: str
) -> tuple[Architecture, tuple[str, ...]]:
    """The architecture in the style that the configuration names, and a warning where there is none."""
    if configuration is None:
        return ARCHITECTURES[arch], (
            f"no configuration in the checkpoint that can be read: taken as {arch} with MMDetection's usual "
            "settings; change what was not so with --arch, --resize and --set",
        )
    caffe = "_caffe_" in arch
    if configuration.style is not None and (configuration.style == "caffe") != caffe:
        right = arch.replace("_caffe_fpn", "_fpn") if caffe else arch.replace("_fpn", "_caffe_fpn")
        raise SettingsError(
            f"{where}: its configuration says style={configuration.style!r}, and arch is {arch!r}; give "
            f"--arch {right}"
        )
    return ARCHITECTURES[arch], ()


def _class_names(meta: Mapping[str, object]) -> tuple[str, ...] | None:
    """``CLASSES`` of version 2, or ``dataset_meta``'s of version 3."""
    dataset = meta.get("dataset_meta")
    places = (meta, dataset if isinstance(dataset, Mapping) else {})
    for names in (place.get(key) for place in places for key in ("CLASSES", "classes")):
        if isinstance(names, str) and names:
            return (names,)  # version 2 keeps the name of a single class so, where the tuple lost its comma
        if isinstance(names, list | tuple) and are_class_names(names):
            return tuple(names)
    return None


_RENAMED: tuple[tuple[str, str], ...] = (
    (r"^backbone\.body\.", "backbone."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"^roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"^roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
)


def their_name(ours: str, settings: ModelSettings) -> str:
    """MMDetection's name of our parameter ``ours``."""
    for pattern, replacement in _RENAMED:
        ours = re.sub(pattern, replacement, ours)
    return ours


def our_layout(state: Mapping[str, Tensor], settings: ModelSettings) -> dict[str, Tensor]:
    """``state`` with the background first; its anchors run ratio by ratio, as ours."""
    return background_first(state)


def likely_cause(state: Mapping[str, Tensor], settings: ModelSettings) -> str:
    """What the names say the checkpoint is, as the end of a message."""
    for mark, kind in (
        ("roi_head.mask_head.", "a Mask R-CNN"),
        ("roi_head.bbox_head.0.", "a Cascade R-CNN"),
        ("roi_head.shared_head.", "a C4 model of MMDetection"),
        ("bbox_head.", "a one-stage detector, or a model of MMDetection 1.x"),
        ("rpn_head.rpn_conv.0.", "a model with several convolutions in its RPN"),
    ):
        if any(name.startswith(mark) for name in state):
            return f"; it looks like {kind}, which this command does not read"
    if any(".conv2_offset." in name or ".conv2.conv_offset." in name for name in state):
        return "; it looks like a model with deformable convolutions, which this command does not read"
    best = _by_tensors(state)
    if best is not None and ARCHITECTURES[best].settings.backbone != settings.backbone:
        return f"; it looks like {best}: give --arch {best}"
    return ""
