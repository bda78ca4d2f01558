"""Every choice in a model, as one documented dataclass, and how settings are made of plain values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from anchorline.runtime.io.errors import SettingsError, printable, shown
from anchorline.runtime.io.schema import read_object

_Settings = TypeVar("_Settings")

_INSIDE: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda v: v >= 1,
    "above 0": lambda v: v > 0,
    "0 or more": lambda v: v >= 0,
    "at most 100": lambda v: v <= 100,
    "at most 1000000": lambda v: v <= 1_000_000,
    "from 0 to 1": lambda v: 0 <= v <= 1,
}


def settings_from(cls: type[_Settings], values: Mapping[str, Any], table: str) -> _Settings:
    """Build ``cls`` from plain values, checking names and types; raises ``SettingsError``."""
    expect(isinstance(values, Mapping), table, values, "fields and their values")
    hints = get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        first = printable(sorted(unknown)[0][:80])
        raise SettingsError(f"{table}.{first} is not a setting; expected one of {', '.join(sorted(hints))}")
    return cls(**{name: coerce(value, hints[name], f"{table}.{name}") for name, value in values.items()})


def coerce(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the type of its field: lists become tuples, whole numbers become floats where asked."""
    if get_origin(hint) is Literal:
        hint = type(get_args(hint)[0])  # ``check_fields`` knows the choices
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        expect(abs(value) < 1e30, name, value, "a finite number")  # false for NaN as well
        return float(value)
    if isinstance(hint, type):
        matches = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
        expect(matches, name, value, f"a value of type {hint.__name__}")
        return value
    expect(isinstance(value, list | tuple), name, value, "a list")
    inner = [each for each in get_args(hint) if each is not Ellipsis]
    if len(inner) > 1:
        expect(len(value) == len(inner), name, value, f"a list of {len(inner)}")
    return tuple(coerce(item, inner[min(i, len(inner) - 1)], name) for i, item in enumerate(value))


def check_fields(settings: object, table: str, ranges: Mapping[str, str]) -> None:
    """Raise ``SettingsError`` for the first field that has none of its choices or is out of its range.

    The choices are those of a ``Literal``; ``ranges`` name, with a space between, the fields whose numbers,
    on any level of their tuples, lie in each range.
    """
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal:
            value, choices = getattr(settings, name), get_args(hint)
            expect(value in choices, f"{table}.{name}", value, f"one of {', '.join(map(repr, choices))}")
    for range_, names in ranges.items():
        for name in names.split():
            value = getattr(settings, name)
            kind = "numbers" if isinstance(value, tuple) else "a number"
            expect(all(map(_INSIDE[range_], _numbers(value))), f"{table}.{name}", value, f"{kind} {range_}")


def _numbers(value: Any) -> list[float]:
    """A number, or all numbers of nested tuples."""
    return [n for item in value for n in _numbers(item)] if isinstance(value, tuple) else [value]


def expect(condition: bool, name: str, value: object, expectation: str) -> None:
    """Raise ``SettingsError`` that ``name`` is ``value`` unless ``condition`` holds."""
    if not condition:
        raise SettingsError(f"{name} is {shown(value)}; expected {expectation}")


# ImageNet's statistics in grey levels, RGB: what the pretrained backbones expect.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

_RANGES = {
    "at least 1": "fpn_channels rpn_pre_nms rpn_post_nms roi_size representation max_detections",
    "above 0": "anchor_sizes aspect_ratios canonical_size box_weights frame_scale std",
    "0 or more": "rpn_convs rpn_channels rpn_min_side box_min_side box_convs backbone_norm_eps box_init_std "
    "roi_sampling shorter_side longer_side",
    "from 0 to 1": "box_dropout rpn_nms_iou nms_iou score_threshold rpn_score_threshold",
    # A damaged number would take all memory before it is found to fit no tensor.
    "at most 100": "rpn_convs box_convs roi_size roi_sampling",
    "at most 1000000": "fpn_channels rpn_channels representation rpn_pre_nms rpn_post_nms max_detections",
}


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
    backbone_norm_eps: float = 1e-5
    """Added to the body's variances; 0 with torchvision's official weights of ResNet-50-FPN."""
    bottleneck_stride: Literal["3x3", "1x1"] = "3x3"
    """Convolution of a ResNet's bottleneck that strides: ``3x3`` (torchvision, ResNeXt, MMDetection's
    ``pytorch``) or the first ``1x1`` (MSRA's weights: Detectron2's R50 and R101, MMDetection's ``caffe``)."""
    canvas: tuple[int, int] = (480, 640)
    """Height and width of the network input in pixels, multiples of 32."""
    shorter_side: int = 0
    longer_side: int = 0
    """Images are scaled to these sides in pixels at most, then laid on the canvas; 0 sets no bound."""
    fpn_channels: int = 256
    anchor_sizes: tuple[tuple[float, ...], ...] = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    """Square roots of the anchor areas in canvas pixels, one group per level."""
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height / width of the anchors."""
    anchor_style: Literal["torchvision", "caffe", "unrounded"] = "torchvision"
    """``torchvision``: rounded, centred at 0. ``caffe``: multiples of a rounded window (``anchors.py``).
    ``unrounded``: centred at 0, at the levels' true strides (Detectron2, MMDetection)."""
    box_edges: Literal["continuous", "inclusive"] = "continuous"
    """``inclusive``: what is left of boxes that include x2 and y2 (py-faster-rcnn): the decoded x2 and y2
    one pixel further, clipping to the first and last pixel, and RoI pooling from pixel x2 - 1."""
    frame_scale: float = 1.0
    """Canvas pixels for one pixel of the frames, for ``inclusive`` edges alone: py-faster-rcnn decodes and
    clips detections, and measures the smallest proposals, on the unscaled image. 1: on the canvas."""
    clamp_deltas: bool = True
    """Limit dw and dh to log(1000 / 16) in decoding; py-faster-rcnn does not."""
    clamp_deltas_below: bool = False
    """Limit them to -log(1000 / 16) too, as MMDetection does."""
    rpn_convs: int = 1
    """3x3 convolutions of the RPN head before its two siblings."""
    rpn_channels: int = 0
    """Their width; 0 is that of the feature map."""
    rpn_score: Literal["sigmoid", "softmax"] = "sigmoid"
    """One objectness for each anchor, or the paper's two scores, background first, under a ``softmax``."""
    rpn_pre_nms: int = 1000
    """Candidates kept per level before NMS at test time."""
    rpn_post_nms: int = 300
    """Proposals per image at test time."""
    rpn_nms_iou: float = 0.7
    rpn_score_threshold: float = 0.0
    rpn_min_side: float = 1e-3
    """Proposals with a lower objectness, or a side below this many canvas pixels, are dropped before NMS;
    a side of 0 always is (Detectron2's and MMDetection's rule is a ``rpn_min_side`` of 0)."""
    roi_size: int = 7
    """Cells per side of a pooled region."""
    roi_pooling: Literal["align", "max"] = "align"
    """``align`` (RoIAlign), or the paper's ``max`` pooling (RoIPool) for the neck ``single``."""
    roi_sampling: int = 2
    """Sampling points per cell and axis; 0: as many as a cell has feature pixels, rounded up for each RoI
    (Detectron2, MMDetection). TensorRT for RTX then takes a fixed number (``engine/bodies.py``)."""
    roi_aligned: bool = False
    """Shift RoIs by half a feature pixel, as Detectron2 does and torchvision does not."""
    canonical_size: float = 224.0
    """Side in pixels of a RoI that is pooled from the level of stride 16 (FPN paper, equation 1)."""
    roi_level_rule: Literal["torchvision", "detectron2", "mmdetection"] = "torchvision"
    """How a rounding error just below a step between levels is caught (``roi_pooling.assign_levels``)."""
    box_head: Literal["fc", "res5"] = "fc"
    """``fc``, or ``res5``: a ResNet's last stage over each RoI and the mean of its cells, for the neck
    ``single`` (C4: RoIs of 14x14 cells from the stage before)."""
    box_convs: int = 0
    """3x3 convolutions with batch norm in the box head: then it has one fully connected layer, else two."""
    representation: int = 1024
    """Width of the box head's fully connected layers; ``res5`` has none."""
    box_dropout: float = 0.0
    """Share of fc6's and fc7's outputs dropped while training."""
    box_init_std: float = 0.0
    """Box head and predictor start from N(0, this), as the paper's new layers; 0 is PyTorch's own start."""
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Scale of the detection head's regression targets."""
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    box_min_side: float = 1e-2
    max_detections: int = 100
    channel_order: Literal["rgb", "bgr"] = "rgb"
    """In which the body takes its input; ``mean`` and ``std`` have the same order."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        check_fields(self, "model", _RANGES)
        canvas_fits = len(self.canvas) == 2 and all(s >= 32 and s % 32 == 0 for s in self.canvas)
        expect(canvas_fits, "model.canvas", self.canvas, "a height and a width that are multiples of 32")
        levels = {"single": 1, "dc5": 1, "fpn32": 3}.get(self.neck, 5 if self.finest_stride == 4 else 4)
        groups = {len(group) for group in self.anchor_sizes}
        expect(
            len(self.anchor_sizes) == levels and len(groups) == 1 and 0 not in groups,
            "model.anchor_sizes",
            self.anchor_sizes,
            f"{levels} group{'s' if levels > 1 else ''} of as many sizes each for the neck {self.neck!r}",
        )
        expect(bool(self.aspect_ratios), "model.aspect_ratios", self.aspect_ratios, "at least one ratio")
        for name, value in (("anchor_style", "caffe"), ("roi_pooling", "max"), ("box_head", "res5")):
            fits = self.neck == "single" or getattr(self, name) != value
            expect(fits, f"model.{name}", value, f"another for the neck {self.neck!r}; it wants 'single'")
        scaled = self.box_edges == "inclusive" or self.frame_scale == 1.0
        expect(scaled, "model.frame_scale", self.frame_scale, "1 where box_edges are not 'inclusive'")
        both = self.clamp_deltas or not self.clamp_deltas_below
        expect(both, "model.clamp_deltas_below", True, "false where clamp_deltas is false")
        expect(self.box_dropout < 1, "model.box_dropout", self.box_dropout, "a share from 0 to below 1")
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
    def anchors_per_place(self) -> int:
        """k of the paper: anchors at one place of one level."""
        return len(self.anchor_sizes[0]) * len(self.aspect_ratios)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSettings:
        """Read what ``to_json`` gives; raises ``ArtefactError`` and ``SettingsError``."""
        return settings_from(cls, read_object(text, "the architecture", "train or import again"), "model")
