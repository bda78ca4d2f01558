"""torchvision's Faster R-CNN detectors: their settings, and the names of their parameters.

Our parameters carry torchvision's names, so a state dict fits once old names are brought up to date.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.errors import ArtefactError
from anchorline.train.backbones import BACKBONES
from anchorline.train.faster_rcnn import FasterRCNN
from anchorline.train.model_settings import ModelSettings

CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"
_STEP_COUNTER = "num_batches_tracked"  # no result depends on it, and frozen batch norms have none
_SHOWN = 3

_NOT_TORCHVISIONS = ("resnet10",)
_RESNETS = tuple(name for name in BACKBONES if "resne" in name and name not in _NOT_TORCHVISIONS)


@dataclass(frozen=True)
class Architecture:
    """A detector as torchvision builds it: our settings for it, and how it resizes images."""

    settings: ModelSettings
    resize: ResizeRule


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


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under torchvision's names of today.

    Drops what stands before them (``module.`` of DistributedDataParallel, ``model.`` of wrappers), and
    renames the pyramid's and the RPN head's convolutions of before torchvision 0.13.
    """
    prefix = next((name.removesuffix(CLASSIFIER) for name in state if name.endswith(CLASSIFIER)), "")
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix(prefix)
        name = re.sub(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name)
        name = re.sub(r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1", name)
        renamed[name] = tensor
    return renamed


def output_count(state: Mapping[str, Tensor]) -> int:
    """Outputs of the classifier, background included; 2 where there is none, which ``fit_state`` refuses."""
    classifier = state.get(CLASSIFIER)
    return max(2, classifier.shape[0]) if classifier is not None and classifier.dim() == 2 else 2


def adapted(settings: ModelSettings, state: Mapping[str, Tensor]) -> ModelSettings:
    """``settings`` with the widths that the tensors of ``state`` have."""

    def side(name: str, axis: int) -> int | None:
        tensor = state.get(name)
        return tensor.shape[axis] if tensor is not None and tensor.dim() > axis else None

    channels = side("backbone.fpn.inner_blocks.0.0.weight", 0) or settings.fpn_channels
    pooled = side("roi_heads.box_head.fc6.weight", 1)
    return dataclasses.replace(
        settings,
        fpn_channels=channels,
        representation=side(CLASSIFIER, 1) or settings.representation,
        roi_size=settings.roi_size if pooled is None else max(1, math.isqrt(pooled // channels)),
    )


def fit_state(
    state: Mapping[str, Tensor], settings: ModelSettings, classes: int, where: str, arch: str
) -> dict[str, Tensor]:
    """``state`` as ``FasterRCNN(settings, classes)`` loads it: float32, with step counters added.

    Raises ``ArtefactError`` that lists tensors which are missing, unknown, of another shape or not
    finite, and says what the checkpoint looks like.
    """
    expected = expected_shapes(settings, classes)
    faults = find_faults(state, expected)
    if faults:
        raise ArtefactError(f"{where}: does not fit {arch}: {'; '.join(faults)}{_likely_cause(state, arch)}")
    fitted = {}
    for name, shape in expected.items():
        if name.endswith(_STEP_COUNTER):
            fitted[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        fitted[name] = state[name].float()
        # Not isfinite(...).all(), which allocates as much again; a NaN comes through as both extremes.
        if not torch.isfinite(torch.stack(fitted[name].aminmax())).all():
            raise ArtefactError(f"{where}: tensor {name!r} holds values that are not finite; refused")
    return fitted


@functools.cache
def expected_shapes(settings: ModelSettings, classes: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the model has, by name; nothing is allocated."""
    with torch.device("meta"):
        model = FasterRCNN(settings, classes)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def find_faults(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps ``state`` from fitting, as phrases with the first names and the counts; empty if it fits."""
    needed = {name for name in expected if not name.endswith(_STEP_COUNTER)}
    given = {name for name in state if not name.endswith(_STEP_COUNTER)}
    wrong = [
        f"{name} is {list(state[name].shape)}, expected {list(expected[name])}"
        for name in sorted(needed & given)
        if tuple(state[name].shape) != expected[name]
    ]
    kinds = (
        ("missing", sorted(needed - given)),
        ("unknown", sorted(given - needed)),
        ("of another shape", wrong),
    )
    return [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds if names]


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _likely_cause(state: Mapping[str, Tensor], arch: str) -> str:
    """What the names say the checkpoint is, as the end of a message."""
    for mark, kind in (
        ("roi_heads.mask_", "a Mask R-CNN"),
        ("roi_heads.keypoint_", "a Keypoint R-CNN"),
        ("head.classification_head.", "a RetinaNet, FCOS or SSD"),
        ("proposal_generator.", "a Detectron2 model"),
        ("rpn_head.", "an MMDetection model"),
    ):
        if any(name.startswith(mark) for name in state):
            return f"; it looks like {kind}, which this command does not read"
    if CLASSIFIER not in state:
        classifier = any(name.startswith(("fc.", "classifier.")) for name in state)
        kind = "the weights of a classifier" if classifier else "no Faster R-CNN of torchvision"
        return f"; it looks like {kind}"
    best = _best_architecture(state)
    if best is not None:
        return f"; it looks like {best}: give --arch {best}"
    anchors = state.get("rpn.head.cls_logits.bias")
    if anchors is not None and len(anchors) != ARCHITECTURES[arch].settings.anchors_per_place:
        return (
            f"; its RPN predicts {len(anchors)} anchors at each place: give the ones it was trained with, as "
            'in --set "anchor_sizes=[[32], [64], [128], [256], [512]]" --set "aspect_ratios=[0.5, 1, 2]"'
        )
    return ""


def _best_architecture(state: Mapping[str, Tensor]) -> str | None:
    """The architecture whose parameters have exactly the names and shapes of ``state``."""
    mobile = any(name.startswith("backbone.body.0.") for name in state)
    convs = "roi_heads.box_head.0.0.weight" in state
    for name, architecture in ARCHITECTURES.items():
        settings = architecture.settings
        if (settings.neck == "fpn32", settings.box_convs > 0) != (mobile, convs):
            continue  # building the model to see its names takes a second
        settings = adapted(architecture.settings, state)
        if not find_faults(state, expected_shapes(settings, output_count(state) - 1)):
            return name
    return None
