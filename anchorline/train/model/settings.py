"""Every choice in a model, as one documented dataclass, and how settings are made of plain values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta

from anchorline.runtime.io.errors import SettingsError, printable, shown
from anchorline.runtime.io.schema import Count, Share, check_fields, read_object

_Settings = TypeVar("_Settings")

# Numbers of 1e30 or more are mistakes wherever there is no other bound.
Finite = Annotated[float, Meta(gt=-1e30, lt=1e30, description="a number between -1e30 and 1e30")]
Positive = Annotated[float, Meta(gt=0, lt=1e30, description="a number above 0 and below 1e30")]
NotNegative = Annotated[float, Meta(ge=0, lt=1e30, description="a number from 0 to below 1e30")]
BelowOne = Annotated[float, Meta(ge=0, lt=1, description="a number from 0 to below 1")]
Whole = Annotated[int, Meta(ge=0, description="a whole number of at least 0")]
# With bounds, since a damaged number would take all memory before it is found to fit no tensor.
Width = Annotated[int, Meta(ge=0, le=1_000_000, description="a whole number from 0 to 1000000")]
Few = Annotated[int, Meta(ge=0, le=100, description="a whole number from 0 to 100")]
Cells = Annotated[int, Meta(ge=1, le=100, description="a whole number from 1 to 100")]
Side = Annotated[int, Meta(ge=32, multiple_of=32)]


def settings_from(cls: type[_Settings], values: Mapping[str, Any], table: str) -> _Settings:
    """Build ``cls`` from plain values, checking names and types; raises ``SettingsError``."""
    expect(isinstance(values, Mapping), table, values, "fields and their values")
    known = {each.name for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = set(values) - known
    if unknown:
        first = printable(sorted(unknown)[0][:80])
        raise SettingsError(f"{table}.{first} is not a setting; expected one of {', '.join(sorted(known))}")
    return cls(**values)


def expect(condition: bool, name: str, value: object, expectation: str) -> None:
    """Raise ``SettingsError`` that ``name`` is ``value`` unless ``condition`` holds."""
    if not condition:
        raise SettingsError(f"{name} is {shown(value)}; expected {expectation}")


# ImageNet's statistics in grey levels, RGB: what the pretrained backbones expect.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class ModelSettings:
    """The architecture; with the class names and the weights it is the whole model."""

    backbone: str = "mobilenet_v2"
    """Name in ``backbones.BACKBONES``."""
    neck: Literal["fpn", "fpn32", "single", "dc5"] = "fpn"
    """``fpn`` (strides up to 64), ``fpn32``: 32, 32, 64 as torchvision's MobileNets, or one map of stride 16:
    ``single``, the stage that ends there (C4), or ``dc5``, a ResNet's last stage, dilated (Detectron2)."""
    finest_stride: Literal[4, 8] = 4
    """Stride of the pyramid's finest level: 4, or 8 for a quarter of the work where no object is tiny."""
    backbone_norm: Literal["frozen", "live"] = "frozen"
    """Batch norm of the body: ``frozen`` (fixed statistics) or ``live`` (trained; the pyramid has it too)."""
    backbone_norm_eps: NotNegative = 1e-5
    """Added to the body's variances; 0 with torchvision's official weights of ResNet-50-FPN."""
    bottleneck_stride: Literal["3x3", "1x1"] = "3x3"
    """Convolution of a ResNet's bottleneck that strides: ``3x3`` (torchvision, ResNeXt, MMDetection's
    ``pytorch``) or the first ``1x1`` (MSRA's weights: Detectron2's R50 and R101, MMDetection's ``caffe``)."""
    canvas: Annotated[
        tuple[Side, Side], Meta(description="a height and a width that are multiples of 32")
    ] = (480, 640)
    """Height and width in pixels, multiples of 32, of the network input in training, and the size that
    frames are scaled to fit at test time."""
    shorter_side: Whole = 0
    longer_side: Whole = 0
    """Images are scaled to these sides in pixels at most, then laid on the canvas; 0 sets no bound."""
    fpn_channels: Count = 256
    anchor_sizes: tuple[tuple[Positive, ...], ...] = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    """Square roots of the anchor areas in canvas pixels, one group per level."""
    aspect_ratios: Annotated[
        tuple[Positive, ...], Meta(min_length=1, description="at least one ratio above 0 and below 1e30")
    ] = (0.5, 1.0, 2.0)
    """Height / width of the anchors."""
    anchor_style: Literal["torchvision", "caffe", "unrounded"] = "torchvision"
    """``torchvision``: rounded, centred at 0. ``caffe``: multiples of a rounded window (``anchors.py``).
    ``unrounded``: centred at 0, at the levels' true strides (Detectron2, MMDetection)."""
    box_edges: Literal["continuous", "inclusive"] = "continuous"
    """``inclusive``: what is left of boxes that include x2 and y2 (py-faster-rcnn): the decoded x2 and y2
    one pixel further, clipping to the first and last pixel, and RoI pooling from pixel x2 - 1."""
    frame_scale: Positive = 1.0
    """Canvas pixels for one pixel of the frames, for ``inclusive`` edges alone: py-faster-rcnn decodes and
    clips detections, and measures the smallest proposals, on the unscaled image. 1: on the canvas."""
    clamp_deltas: bool = True
    """Limit dw and dh to log(1000 / 16) in decoding; py-faster-rcnn does not."""
    clamp_deltas_below: bool = False
    """Limit them to -log(1000 / 16) too, as MMDetection does."""
    rpn_convs: Few = 1
    """3x3 convolutions of the RPN head before its two siblings."""
    rpn_channels: Width = 0
    """Their width; 0 is that of the feature map."""
    rpn_score: Literal["sigmoid", "softmax"] = "sigmoid"
    """One objectness for each anchor, or the paper's two scores, background first, under a ``softmax``."""
    rpn_pre_nms: Count = 1000
    """Candidates kept per level before NMS at test time."""
    rpn_post_nms: Count = 300
    """Proposals per image at test time."""
    rpn_nms_iou: Share = 0.7
    rpn_score_threshold: Share = 0.0
    rpn_min_side: NotNegative = 1e-3
    """Proposals with a lower objectness, or a side below this many canvas pixels, are dropped before NMS;
    a side of 0 always is (Detectron2's and MMDetection's rule is a ``rpn_min_side`` of 0)."""
    roi_size: Cells = 7
    """Cells per side of a pooled region."""
    roi_pooling: Literal["align", "max"] = "align"
    """``align`` (RoIAlign), or the paper's ``max`` pooling (RoIPool) for the neck ``single``."""
    roi_sampling: Few = 2
    """Sampling points per cell and axis; 0: as many as a cell has feature pixels, rounded up for each RoI
    (Detectron2, MMDetection). TensorRT for RTX then takes a fixed number (``engine/bodies.py``)."""
    roi_aligned: bool = False
    """Shift RoIs by half a feature pixel, as Detectron2 does and torchvision does not."""
    canonical_size: Positive = 224.0
    """Side in pixels of a RoI that is pooled from the level of stride 16 (FPN paper, equation 1)."""
    roi_level_rule: Literal["torchvision", "detectron2", "mmdetection"] = "torchvision"
    """How a rounding error just below a step between levels is caught (``roi_pooling.assign_levels``)."""
    box_head: Literal["fc", "res5"] = "fc"
    """``fc``, or ``res5``: a ResNet's last stage over each RoI and the mean of its cells, for the neck
    ``single`` (C4: RoIs of 14x14 cells from the stage before)."""
    box_convs: Few = 0
    """3x3 convolutions with batch norm in the box head: then it has one fully connected layer, else two."""
    representation: Count = 1024
    """Width of the box head's fully connected layers; ``res5`` has none."""
    box_dropout: BelowOne = 0.0
    """Share of fc6's and fc7's outputs dropped while training."""
    box_init_std: NotNegative = 0.0
    """Box head and predictor start from N(0, this), as the paper's new layers; 0 is PyTorch's own start."""
    box_weights: tuple[Positive, Positive, Positive, Positive] = (10.0, 10.0, 5.0, 5.0)
    """Scale of the detection head's regression targets."""
    score_threshold: Share = 0.05
    nms_iou: Share = 0.5
    box_min_side: NotNegative = 1e-2
    max_detections: Count = 100
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """In which the body takes its input; ``mean`` and ``std`` have the same order."""
    mean: tuple[Finite, Finite, Finite] = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD

    def __post_init__(self) -> None:
        check_fields(self, "model.", SettingsError)
        levels = {"single": 1, "dc5": 1, "fpn32": 3}.get(self.neck, 5 if self.finest_stride == 4 else 4)
        groups = {len(group) for group in self.anchor_sizes}
        expect(
            len(self.anchor_sizes) == levels and len(groups) == 1 and 0 not in groups,
            "model.anchor_sizes",
            self.anchor_sizes,
            f"{levels} group{'s' if levels > 1 else ''} of as many sizes each for the neck {self.neck!r}",
        )
        for name, value in (("anchor_style", "caffe"), ("roi_pooling", "max"), ("box_head", "res5")):
            fits = self.neck == "single" or getattr(self, name) != value
            expect(fits, f"model.{name}", value, f"another for the neck {self.neck!r}; it wants 'single'")
        scaled = self.box_edges == "inclusive" or self.frame_scale == 1.0
        expect(scaled, "model.frame_scale", self.frame_scale, "1 where box_edges are not 'inclusive'")
        both = self.clamp_deltas or not self.clamp_deltas_below
        expect(both, "model.clamp_deltas_below", True, "false where clamp_deltas is false")
        two_layers = not (self.box_dropout and self.box_convs)
        expect(two_layers, "model.box_dropout", self.box_dropout, "0 where box_convs is not 0")
        for name in ("box_convs", "box_dropout") if self.box_head == "res5" else ():
            value = getattr(self, name)
            expect(not value, f"model.{name}", value, "0 for the box head 'res5'")

    @property
    def profile(self) -> str:
        """The numeric profile by what decides the boxes, or ``mixed`` where that is of no one library."""
        choices = (self.anchor_style, self.box_edges, self.clamp_deltas, self.clamp_deltas_below)
        return {
            ("torchvision", "continuous", True, False): "torchvision",
            ("caffe", "inclusive", False, False): "caffe2015",
            ("unrounded", "continuous", True, False): "detectron2",
            ("unrounded", "continuous", True, True): "mmdetection",
        }.get(choices, "mixed")

    @property
    def padding(self) -> int:
        """What both sides of a canvas are multiples of: a pyramid's maps must halve exactly."""
        return 1 if self.neck in ("single", "dc5") else 32

    @property
    def anchors_per_place(self) -> int:
        """k of the paper: anchors at one place of one level."""
        return len(self.anchor_sizes[0]) * len(self.aspect_ratios)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSettings:
        """Read what ``to_json`` gives; raises ``ArtefactError`` and ``SettingsError``."""
        return settings_from(cls, read_object(text, "the architecture", "train or import again"), "model")
