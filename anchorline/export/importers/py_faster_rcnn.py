"""py-faster-rcnn's VGG-16 and ZF: their settings and the names of their layers.

The files that each rule comes from stand in ``docs/import.md``. The order of classes, anchors, scores and
of the inputs of fc6 is ours already: score pairs as all of background and then all of objects,
anchors ratio by ratio, fc6's inputs channel by channel (docs/paper.md).
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from anchorline.export.importers.checkpoint_files import CheckpointFile
from anchorline.export.importers.library import Architecture, Library, State, side_of
from anchorline.runtime.contract import ResizeRule
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import load_preset

# Without the background, in the order of lib/datasets/pascal_voc.py.
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# models/coco has a fourth scale, and with it 24 scores at each place.
_COCO_SIZES, _COCO_SCORES = ((64.0, 128.0, 256.0, 512.0),), 24

_CLASSIFIER, _SCORES, _RPN_CONV = "cls_score.weight", "rpn_cls_score.weight", "rpn_conv/3x3"
_FULLY_CONNECTED = ("fc6", "fc7", "cls_score", "bbox_pred")
_FIRST = {"vgg16": "conv1_1.weight", "zf": "conv1.weight"}
# VGG-16's convolutions and their places among the layers of the body, poolings and ReLUs included.
_VGG16_CONVS = {
    0: "conv1_1", 2: "conv1_2", 5: "conv2_1", 7: "conv2_2", 10: "conv3_1", 12: "conv3_2", 14: "conv3_3",
    17: "conv4_1", 19: "conv4_2", 21: "conv4_3", 24: "conv5_1", 26: "conv5_2", 28: "conv5_3",
}  # fmt: skip


# The presets of the paper have py-faster-rcnn's test-time numbers. Its snapshots undo the scaling of the
# regression targets (lib/fast_rcnn/train.py, ``snapshot``).
ARCHITECTURES = {
    f"py_faster_rcnn_{backbone}": Architecture(
        dataclasses.replace(load_preset(f"{backbone}-paper").model, box_weights=(1.0, 1.0, 1.0, 1.0)),
        ResizeRule(600, 1000, rounding="nearest"),
    )
    for backbone in _FIRST
}
"""The networks of ``models/pascal_voc`` and ``models/coco``."""


def recognise(source: CheckpointFile, state: State) -> str | None:
    """The architecture by its first convolution; ``None`` without an RPN."""
    if _SCORES not in state:
        return None
    return next((f"py_faster_rcnn_{name}" for name, first in _FIRST.items() if first in state), None)


def describe(source: CheckpointFile, state: State, arch: str) -> Architecture:
    """The preset's settings with the anchors of ``state``, and VOC's names where there are 21 outputs."""
    usual = ARCHITECTURES[arch].settings
    settings = dataclasses.replace(
        usual,
        rpn_channels=side_of(state, f"{_RPN_CONV}.weight", 0) or usual.rpn_channels,
        anchor_sizes=_COCO_SIZES if side_of(state, _SCORES, 0) == _COCO_SCORES else usual.anchor_sizes,
    )
    names = VOC_CLASSES if side_of(state, _CLASSIFIER, 0) == len(VOC_CLASSES) + 1 else None
    return Architecture(settings, ARCHITECTURES[arch].resize, names)


def _without_leading_sides(name: str, tensor: Tensor) -> Tensor:
    """``tensor`` without the leading sides of 1 that old files have."""
    layer, _, part = name.rpartition(".")
    sides = 1 if part == "bias" else 2 if layer in _FULLY_CONNECTED else 4
    while tensor.dim() > sides and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


def _likely_cause(state: State, settings: ModelSettings) -> str:
    if "fc6_L.weight" in state or "fc7_L.weight" in state:
        return "; its fully connected layers are compressed (SVD), which this command does not read"
    if "fc8.weight" in state:
        return "; it looks like the weights of a classifier"
    has_rpn, has_head = _SCORES in state, _CLASSIFIER in state
    if has_rpn != has_head:
        return f"; it looks like {'an RPN alone' if has_rpn else 'a Fast R-CNN, which has no RPN'}"
    return ""


LIBRARY = Library(
    name="py-faster-rcnn",
    architectures=ARCHITECTURES,
    known_names=", ".join(ARCHITECTURES),
    recognise=recognise,
    describe=describe,
    takes_configuration=False,
    input_dtype="float32",
    names=(
        *((rf"^backbone\.body\.{place}\.", f"{name}.") for place, name in _VGG16_CONVS.items()),
        (r"^backbone\.body\.conv", "conv"),
        (r"^rpn\.head\.conv\.0\.0\.", f"{_RPN_CONV}."),
        (r"^rpn\.head\.", "rpn_"),
        (r"^rpn_cls_logits\.", "rpn_cls_score."),
        (r"^roi_heads\.box_(head|predictor)\.", ""),
    ),
    old_names=((r"^rpn_conv1\.", f"{_RPN_CONV}."),),  # in the ZF that was trained in alternation
    tidy=_without_leading_sides,
    likely_cause=_likely_cause,
)
