"""py-faster-rcnn's VGG-16 and ZF: their settings and the names of their layers.

The files that each rule comes from stand in ``docs/import.md``. The order of classes, anchors, scores and
of the inputs of fc6 is ours already (docs/paper.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from anchorline.export.importers.checkpoint_files import CheckpointFile
from anchorline.export.importers.library import (
    Architecture,
    ClassNames,
    Description,
    coco_80,
    side_of,
    with_widths,
)
from anchorline.runtime.contract import ResizeRule
from anchorline.train.model.backbones import BACKBONES
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import load_preset

NAME = "py-faster-rcnn"
INPUT_DTYPE = "float32"
IGNORED = ()

# Without the background, in the order of lib/datasets/pascal_voc.py.
VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

# models/coco has a fourth scale, and with it 24 scores at each place.
_COCO_SIZES, _COCO_SCORES = ((64.0, 128.0, 256.0, 512.0),), 24

_CLASSIFIER, _SCORES = "cls_score.weight", "rpn_cls_score.weight"
_RPN_CONV = "rpn_conv/3x3"
_OLD_RPN_CONV = "rpn_conv1"  # in the ZF that was trained in alternation
_HEAD = {
    "rpn.head.conv.0.0": _RPN_CONV,
    "rpn.head.cls_logits": "rpn_cls_score",
    "rpn.head.bbox_pred": "rpn_bbox_pred",
    "roi_heads.box_head.fc6": "fc6",
    "roi_heads.box_head.fc7": "fc7",
    "roi_heads.box_predictor.cls_score": "cls_score",
    "roi_heads.box_predictor.bbox_pred": "bbox_pred",
}
_FULLY_CONNECTED = ("fc6", "fc7", "cls_score", "bbox_pred")
# conv1_1 to conv5_3 and their places among the layers of the body, poolings and ReLUs included.
_VGG16_CONVS = {
    0: "conv1_1",
    2: "conv1_2",
    5: "conv2_1",
    7: "conv2_2",
    10: "conv3_1",
    12: "conv3_2",
    14: "conv3_3",
    17: "conv4_1",
    19: "conv4_2",
    21: "conv4_3",
    24: "conv5_1",
    26: "conv5_2",
    28: "conv5_3",
}
_ZF_CONVS = ("conv1", "conv2", "conv3", "conv4", "conv5")
_LAYERS = {
    "vgg16": {f"backbone.body.{place}": name for place, name in _VGG16_CONVS.items()} | _HEAD,
    "zf": {f"backbone.body.{name}": name for name in _ZF_CONVS} | _HEAD,
}
_FIRST = {"vgg16": "conv1_1.weight", "zf": "conv1.weight"}


def _architecture(backbone: str) -> Architecture:
    """The preset of the paper, whose test-time numbers are py-faster-rcnn's.

    Its snapshots undo the scaling of the regression targets (lib/fast_rcnn/train.py, ``snapshot``).
    """
    settings = load_preset(f"{backbone}-paper").model
    settings = dataclasses.replace(settings, box_weights=(1.0, 1.0, 1.0, 1.0))
    return Architecture(settings, ResizeRule(600, 1000, rounding="nearest"))


ARCHITECTURES = {f"py_faster_rcnn_{backbone}": _architecture(backbone) for backbone in _LAYERS}
"""The networks of ``models/pascal_voc`` and ``models/coco``."""

KNOWN_NAMES = ", ".join(ARCHITECTURES)


def coco_classes() -> ClassNames:
    """COCO's 80 classes in the order of their ids."""
    return coco_80()


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with one name for the RPN's window, and without the leading sides of 1 of old files."""
    renamed = {}
    for name, tensor in state.items():
        layer, _, part = name.rpartition(".")
        if layer == _OLD_RPN_CONV and f"{_RPN_CONV}.{part}" not in state:
            layer = _RPN_CONV
        sides = 1 if part == "bias" else 2 if layer in _FULLY_CONNECTED else 4
        while tensor.dim() > sides and tensor.shape[0] == 1:
            tensor = tensor[0]
        renamed[f"{layer}.{part}"] = tensor
    return renamed


def recognise(source: CheckpointFile, state: Mapping[str, Tensor]) -> str | None:
    """The architecture by its layers."""
    return _by_layers(state)


def _by_layers(state: Mapping[str, Tensor]) -> str | None:
    """The architecture by its first convolution; ``None`` without an RPN."""
    if _SCORES not in state:
        return None
    return next((f"py_faster_rcnn_{name}" for name, first in _FIRST.items() if first in state), None)


def describe(source: CheckpointFile, state: Mapping[str, Tensor], arch: str) -> Description:
    """The preset's settings with the widths of ``state``, and VOC's names where there are 21 outputs."""
    architecture = ARCHITECTURES[arch]
    settings = with_widths(
        architecture.settings,
        channels=BACKBONES[architecture.settings.backbone].maps[16][1],
        pooled=side_of(state, "fc6.weight", 1),
        representation=side_of(state, _CLASSIFIER, 1),
    )
    settings = dataclasses.replace(
        settings,
        rpn_channels=side_of(state, f"{_RPN_CONV}.weight", 0) or settings.rpn_channels,
        anchor_sizes=_COCO_SIZES if side_of(state, _SCORES, 0) == _COCO_SCORES else settings.anchor_sizes,
    )
    names = VOC_CLASSES if side_of(state, _CLASSIFIER, 0) == len(VOC_CLASSES) + 1 else None
    return Description(settings, architecture.resize, names)


def their_name(ours: str, settings: ModelSettings) -> str:
    """caffe's name of our parameter ``ours``; the settings tell the backbone."""
    layer, _, part = ours.rpartition(".")
    return f"{_LAYERS[settings.backbone].get(layer, layer)}.{part}"


def our_layout(state: Mapping[str, Tensor], settings: ModelSettings) -> dict[str, Tensor]:
    """``state`` as it is: background first, score pairs as all of background and then all of objects,
    anchors ratio by ratio, fc6's inputs channel by channel."""
    return dict(state)


def likely_cause(state: Mapping[str, Tensor], settings: ModelSettings) -> str:
    """What the layers say the file is, as the end of a message."""
    if "fc6_L.weight" in state or "fc7_L.weight" in state:
        return "; its fully connected layers are compressed (SVD), which this command does not read"
    if "fc8.weight" in state:
        return "; it looks like the weights of a classifier"
    has_rpn, has_head = _SCORES in state, _CLASSIFIER in state
    if has_rpn != has_head:
        return f"; it looks like {'an RPN alone' if has_rpn else 'a Fast R-CNN, which has no RPN'}"
    best = _by_layers(state)
    if best is not None and ARCHITECTURES[best].settings.backbone != settings.backbone:
        return f"; it looks like {best}: give --arch {best}"
    scores = side_of(state, _SCORES, 0)
    if scores is not None and scores != 2 * settings.anchors_per_place:
        return (
            f"; its RPN predicts {scores // 2} anchors at each place: give the ones it was trained with, as "
            'in --set "anchor_sizes=[[128, 256, 512]]" --set "aspect_ratios=[0.5, 1, 2]"'
        )
    return ""
