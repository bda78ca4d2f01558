"""torchvision's Faster R-CNN detectors: their settings, and the names of their parameters.

Our parameters carry torchvision's names, so a state dict fits once old names are brought up to date.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from torch import Tensor

from anchorline.export.importers.checkpoint_files import CheckpointFile
from anchorline.export.importers.library import (
    CLASSIFIER,
    Architecture,
    ClassNames,
    Description,
    expected_shapes,
    find_faults,
    output_count,
    side_of,
    with_widths,
    without_prefix,
)
from anchorline.runtime.contract import ResizeRule
from anchorline.train.model.backbones import BACKBONES
from anchorline.train.model.settings import ModelSettings

NAME = "torchvision"
INPUT_DTYPE = "float32"
IGNORED = ()

# The start of the SHA-256 of fasterrcnn_resnet50_fpn_coco-258fb6c6.pth. It was trained with eps 0, and
# torchvision sets that back (``overwrite_eps``) for this file alone.
_EPS_0_SHA256 = "258fb6c6"
_EPS_0_WEIGHTS = "FasterRCNN_ResNet50_FPN_Weights."

_NOT_TORCHVISIONS = ("resnet10",)
_RESNETS = tuple(name for name in BACKBONES if "resne" in name and name not in _NOT_TORCHVISIONS)


def _architectures() -> dict[str, Architecture]:
    large, small = ResizeRule(800, 1333), ResizeRule(320, 640)
    resnet = ModelSettings(neck="fpn", rpn_pre_nms=1000, rpn_post_nms=1000)
    v2 = dataclasses.replace(resnet, backbone_norm="live", rpn_convs=2, box_convs=4)
    mobilenet = dataclasses.replace(
        resnet,
        backbone="mobilenet_v3_large",
        neck="fpn32",
        anchor_sizes=((32.0, 64.0, 128.0, 256.0, 512.0),) * 3,
        rpn_score_threshold=0.05,
    )
    mobilenet_320 = dataclasses.replace(mobilenet, rpn_pre_nms=150, rpn_post_nms=150)
    found = {
        "fasterrcnn_mobilenet_v3_large_fpn": Architecture(mobilenet, large),
        "fasterrcnn_mobilenet_v3_large_320_fpn": Architecture(mobilenet_320, small),
    }
    for name in _RESNETS:
        found[f"fasterrcnn_{name}_fpn"] = Architecture(dataclasses.replace(resnet, backbone=name), large)
        found[f"fasterrcnn_{name}_fpn_v2"] = Architecture(dataclasses.replace(v2, backbone=name), large)
    return found


ARCHITECTURES = _architectures()
"""By torchvision's name. ``fasterrcnn_resnet101_fpn`` and the like are torchvision's builders with another
of its ResNets in place of ``resnet50``."""

KNOWN_NAMES = (
    "fasterrcnn_mobilenet_v3_large_fpn, fasterrcnn_mobilenet_v3_large_320_fpn, or fasterrcnn_X_fpn or "
    f"fasterrcnn_X_fpn_v2 with one of {', '.join(_RESNETS)} for X"
)


def coco_classes() -> ClassNames:
    """COCO's 90 classes in the order of torchvision's labels, whose numbers are COCO's category ids.

    Ten of the numbers were never used. Their outputs stay, since they take part in the softmax, under
    names such as ``N/A 12``; a trained model does not detect them.
    """
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
    shown = tuple(f"N/A {number}" if name == "N/A" else name for number, name in enumerate(names, start=1))
    return ClassNames(shown, tuple(range(1, len(shown) + 1)))


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under torchvision's names of today.

    Drops what stands before them (``module.`` of DistributedDataParallel, ``model.`` of wrappers), and
    renames the pyramid's and the RPN head's convolutions of before torchvision 0.13.
    """
    renamed = {}
    for name, tensor in without_prefix(state, CLASSIFIER).items():
        name = re.sub(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name)
        name = re.sub(r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1", name)
        renamed[name] = tensor
    return renamed


def recognise(source: CheckpointFile, state: Mapping[str, Tensor]) -> str | None:
    """Nothing: ResNets of one depth, and models of one shape with other settings, have the same names."""
    return None


def describe(source: CheckpointFile, state: Mapping[str, Tensor], arch: str) -> Description:
    """Settings with the widths that the tensors of ``state`` have, and the eps of the batch norms."""
    architecture = ARCHITECTURES[arch]
    settings = adapted(architecture.settings, state)
    warnings: tuple[str, ...] = ()
    if _was_trained_with_eps_0(source):
        settings = dataclasses.replace(settings, backbone_norm_eps=0.0)
    elif arch == "fasterrcnn_resnet50_fpn" and not any(n.endswith("num_batches_tracked") for n in state):
        warnings = (
            f"batch-norm eps taken as {settings.backbone_norm_eps:g}; if the model was built with "
            "weights=...COCO_V1 and trained on, torchvision has set it to 0: import again with "
            "--batch-norm-eps 0",
        )
    return Description(settings, architecture.resize, eps_warnings=warnings)


def _was_trained_with_eps_0(source: CheckpointFile) -> bool:
    official = source.sha256.startswith(_EPS_0_SHA256) or _EPS_0_SHA256 in source.name
    return official or source.name.startswith(_EPS_0_WEIGHTS)


def adapted(settings: ModelSettings, state: Mapping[str, Tensor]) -> ModelSettings:
    """``settings`` with the widths that the tensors of ``state`` have."""
    return with_widths(
        settings,
        channels=side_of(state, "backbone.fpn.inner_blocks.0.0.weight", 0),
        pooled=side_of(state, "roi_heads.box_head.fc6.weight", 1),
        representation=side_of(state, CLASSIFIER, 1),
    )


def their_name(ours: str, settings: ModelSettings) -> str:
    """torchvision's name of our parameter: the same."""
    return ours


def our_layout(state: Mapping[str, Tensor], settings: ModelSettings) -> dict[str, Tensor]:
    """``state`` as it is: background first and ratio by ratio, as ours."""
    return dict(state)


def likely_cause(state: Mapping[str, Tensor], settings: ModelSettings) -> str:
    """What the names say the checkpoint is, as the end of a message."""
    for mark, kind in (
        ("roi_heads.mask_", "a Mask R-CNN"),
        ("roi_heads.keypoint_", "a Keypoint R-CNN"),
        ("head.classification_head.", "a RetinaNet, FCOS or SSD"),
    ):
        if any(name.startswith(mark) for name in state):
            return f"; it looks like {kind}, which this command does not read"
    if CLASSIFIER not in state:
        classifier = any(name.startswith(("fc.", "classifier.")) for name in state)
        kind = "the weights of a classifier" if classifier else "no Faster R-CNN of torchvision"
        return f"; it looks like {kind}"
    best = _best_architecture(state)
    return f"; it looks like {best}: give --arch {best}" if best is not None else ""


def _best_architecture(state: Mapping[str, Tensor]) -> str | None:
    """The architecture whose parameters have exactly the names and shapes of ``state``."""
    mobile = any(name.startswith("backbone.body.0.") for name in state)
    convs = "roi_heads.box_head.0.0.weight" in state
    for name, architecture in ARCHITECTURES.items():
        settings = architecture.settings
        if (settings.neck == "fpn32", settings.box_convs > 0) != (mobile, convs):
            continue  # building the model to see its names takes a second
        settings = adapted(settings, state)
        if not find_faults(state, expected_shapes(settings, output_count(state, CLASSIFIER) - 1)):
            return name
    return None
