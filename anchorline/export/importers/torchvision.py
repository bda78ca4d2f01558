"""torchvision's Faster R-CNN detectors: their settings, and the names of their parameters.

Our parameters carry torchvision's names, so a state dict fits once old names are brought up to date.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from anchorline.export.importers.checkpoint_files import CheckpointFile
from anchorline.export.importers.library import (
    CLASSIFIER,
    OPEN_SETTINGS,
    Architecture,
    Library,
    State,
    coco_90,
    has_shapes,
    output_count,
    with_widths,
)
from anchorline.runtime.canvas import check_frame, place
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import SettingsError
from anchorline.train.model.backbones import BACKBONES
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.settings import ModelSettings

# The start of the SHA-256 of fasterrcnn_resnet50_fpn_coco-258fb6c6.pth. It was trained with eps 0, and
# torchvision sets that back (``overwrite_eps``) for this file alone.
_EPS_0_SHA256 = "258fb6c6"
_EPS_0_WEIGHTS = "FasterRCNN_ResNet50_FPN_Weights."

_RESNETS = tuple(name for name in BACKBONES if "resne" in name and name != "resnet10")


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


def describe(source: CheckpointFile, state: State, arch: str) -> Architecture:
    """The architecture's settings, with the eps that the batch norms were trained with."""
    usual = ARCHITECTURES[arch]
    official = source.sha256.startswith(_EPS_0_SHA256) or _EPS_0_SHA256 in source.name
    if official or source.name.startswith(_EPS_0_WEIGHTS):
        settings = dataclasses.replace(usual.settings, backbone_norm_eps=0.0)
        return dataclasses.replace(usual, settings=settings, known=frozenset(LIBRARY.open_settings))
    if "_Weights." in source.name:
        return dataclasses.replace(usual, known=frozenset(LIBRARY.open_settings))
    if arch != "fasterrcnn_resnet50_fpn" or any(name.endswith("num_batches_tracked") for name in state):
        return usual
    warning = (
        f"batch-norm eps taken as {usual.settings.backbone_norm_eps:g}; if the model was built with "
        "weights=...COCO_V1 and trained on, torchvision has set it to 0: import again with "
        "--batch-norm-eps 0"
    )
    return dataclasses.replace(usual, eps_warnings=(warning,))


def _likely_cause(state: State, settings: ModelSettings) -> str:
    if CLASSIFIER not in state:
        classifier = any(name.startswith(("fc.", "classifier.")) for name in state)
        kind = "the weights of a classifier" if classifier else "no Faster R-CNN of torchvision"
        return f"; it looks like {kind}"
    if has_shapes(state, settings, output_count(LIBRARY, state, settings) - 1):
        return ""  # it is its values that do not fit
    mobile = any(name.startswith("backbone.body.0.") for name in state)
    convs = "roi_heads.box_head.0.0.weight" in state
    for name, architecture in ARCHITECTURES.items():
        usual = architecture.settings
        if (usual.neck == "fpn32", usual.box_convs > 0) != (mobile, convs):
            continue  # building the model to see its names takes a second
        found = with_widths(LIBRARY, usual, state)
        if has_shapes(state, found, output_count(LIBRARY, state, found) - 1):
            return f"; it looks like {name}: give --arch {name}"
    return ""


# ResNets of one depth, and models of one shape with other settings, have the same names, so no architecture
# is recognised. Background first and anchors ratio by ratio, as ours.
LIBRARY = Library(
    name="torchvision",
    architectures=ARCHITECTURES,
    known_names=(
        "fasterrcnn_mobilenet_v3_large_fpn, fasterrcnn_mobilenet_v3_large_320_fpn, or fasterrcnn_X_fpn or "
        f"fasterrcnn_X_fpn_v2 with one of {', '.join(_RESNETS)} for X"
    ),
    describe=describe,
    open_settings=(*OPEN_SETTINGS, "roi_sampling", "rpn_score_threshold"),
    takes_configuration=False,
    input_dtype="float32",
    coco_classes=coco_90,
    old_names=(  # of before torchvision 0.13
        (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
        (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    ),
    marks=(
        (r"^roi_heads\.mask_", "a Mask R-CNN"),
        (r"^roi_heads\.keypoint_", "a Keypoint R-CNN"),
        (r"^head\.classification_head\.", "a RetinaNet, FCOS or SSD"),
    ),
    likely_cause=_likely_cause,
)


# torchvision's own detector with a checkpoint's weights: the reference that ours must agree with.

# What a model must have for torchvision to have one like it.
_USUAL = {
    "profile": "torchvision", "channel_order": "rgb", "rpn_channels": 0, "rpn_score": "sigmoid",
    "roi_pooling": "align", "roi_aligned": False, "roi_level_rule": "torchvision", "box_head": "fc",
    "bottleneck_stride": "3x3", "box_min_side": 1e-2,
}  # fmt: skip


class TorchvisionDetector:
    """A detector of torchvision with its own resizing, as a ``BatchDetector``.

    ``model`` is the network in evaluation mode; label n + 1 of it is ``contract.names[n]``. A batch is padded
    as torchvision pads it, to the largest sides. Where ``contract.resize`` is not a shorter and a longer
    side, frames are resized as it says.
    """

    provider = "torchvision"
    precision = "fp32"

    def __init__(self, model: TorchvisionFasterRCNN, contract: Contract) -> None:
        self.model, self.contract = model.eval(), contract
        rule = contract.resize
        if None in (rule.shorter_side, rule.longer_side) or rule.within is not None:
            self._resize_by_the_rule()
        # torchvision derives the scales of RoI pooling from the first image it sees and keeps them; a
        # narrow one would mislead it (48 rows padded to 64 look like stride 16 instead of 32).
        self(np.zeros((256, 256, 3), np.uint8))

    @classmethod
    def of(cls, model: FasterRCNN, contract: Contract) -> TorchvisionDetector:
        """torchvision's form of our ``model``, with the same weights and settings."""
        return cls(torchvision_model(model, contract), contract)

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of several BGR frames of any sizes, in one run."""
        pixels = [torch.from_numpy(check_frame(frame)[:, :, ::-1].copy()) for frame in frames]
        with torch.inference_mode():
            results: list[dict[str, Tensor]] = self.model(
                [rgb.permute(2, 0, 1).float() / 255 for rgb in pixels]
            )
        return [
            Detections(
                boxes=found["boxes"].numpy(),
                scores=found["scores"].numpy(),
                labels=found["labels"].numpy() - 1,
                class_names=self.contract.names,
                category_ids=self.contract.category_ids,
                size=(frame.shape[0], frame.shape[1]),
            )
            for frame, found in zip(frames, results, strict=True)
        ]

    def __call__(self, frame: NDArray[np.uint8]) -> Detections:
        """Detections of one BGR frame [H, W, 3], boxes in its own pixels."""
        return self.batch([frame])[0]

    def _resize_by_the_rule(self) -> None:
        """torchvision knows two sides, or one size for all images of a batch."""
        transform, resize = self.model.transform, self.model.transform.resize

        def resize_one(image: Tensor, target: Any = None) -> Any:
            size = (image.shape[-2], image.shape[-1])
            transform.fixed_size = place(size, self.contract.canvas, self.contract.resize).valid[::-1]
            return resize(image, target)

        transform.resize = resize_one


def torchvision_model(model: FasterRCNN, contract: Contract) -> TorchvisionFasterRCNN:
    """torchvision's ``FasterRCNN`` with the settings and the weights of ``model``, in evaluation mode.

    Raises ``SettingsError`` for a model that torchvision has no parts for.
    """
    s, classes = model.settings, len(contract.names) + 1
    usual = all(getattr(s, name) == value for name, value in _USUAL.items())
    if not usual or s.neck == "dc5" or int(s.canonical_size) != s.canonical_size:
        raise SettingsError(
            "torchvision has no model with these settings; expected the torchvision profile, RGB, RoIAlign "
            "and a sigmoid, roi_aligned false, box_min_side 0.01 and a canonical_size without fraction, its "
            "level rule, the box head 'fc', bottleneck_stride '3x3' and another neck than 'dc5'"
        )
    backbone, levels = _backbone(model), len(s.anchor_sizes)
    names = [str(level) for level in range(max(1, levels - 1))]  # of a pyramid all but the pooled map
    channels, size = backbone.out_channels, s.roi_size
    built = TorchvisionFasterRCNN(
        backbone,
        min_size=contract.resize.shorter_side or min(s.canvas),
        max_size=contract.resize.longer_side or max(s.canvas),
        image_mean=[value / 255 for value in s.mean],
        image_std=[value / 255 for value in s.std],
        rpn_anchor_generator=AnchorGenerator(s.anchor_sizes, (s.aspect_ratios,) * levels),
        rpn_head=RPNHead(channels, s.anchors_per_place, conv_depth=s.rpn_convs),
        rpn_pre_nms_top_n_test=s.rpn_pre_nms,
        rpn_post_nms_top_n_test=s.rpn_post_nms,
        rpn_nms_thresh=s.rpn_nms_iou,
        rpn_score_thresh=s.rpn_score_threshold,
        box_roi_pool=MultiScaleRoIAlign(names, size, s.roi_sampling, canonical_scale=int(s.canonical_size)),
        box_head=FastRCNNConvFCHead(
            (channels, size, size), [channels] * s.box_convs, [s.representation], nn.BatchNorm2d
        )
        if s.box_convs
        else TwoMLPHead(channels * size**2, s.representation),
        box_predictor=FastRCNNPredictor(s.representation, classes),
        box_score_thresh=s.score_threshold,
        box_nms_thresh=s.nms_iou,
        box_detections_per_img=s.max_detections,
        size_divisible=contract.resize.padding,
        bbox_reg_weights=s.box_weights,
    )
    built.rpn.min_size = s.rpn_min_side
    own = built.state_dict()  # torchvision's frozen batch norms have no step counters
    built.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})
    return built.eval()


def _backbone(model: FasterRCNN) -> Any:
    """torchvision's backbone and pyramid with its own batch norms, randomly initialised."""
    settings, ours = model.settings, model.backbone
    norm = nn.BatchNorm2d if settings.backbone_norm == "live" else FrozenBatchNorm2d
    network = BACKBONES[settings.backbone].build(partial(norm, eps=settings.backbone_norm_eps))
    body = cast(nn.Module, getattr(network, "features", network))
    taps = {tap: str(level) for level, tap in enumerate(ours.body.taps)}
    if ours.fpn is None:
        single = nn.Sequential()
        single.body, single.out_channels = IntermediateLayerGetter(body, taps), ours.out_channels  # type: ignore[assignment]
        return single
    widths = [block[0].in_channels for block in ours.fpn.inner_blocks]
    norm_layer = nn.BatchNorm2d if norm is nn.BatchNorm2d else None
    return BackboneWithFPN(body, taps, widths, ours.out_channels, norm_layer=norm_layer)
