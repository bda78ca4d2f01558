"""Every choice in a model and its training, as documented dataclasses.

A preset is a TOML file in ``presets/`` with the tables ``[model]`` and ``[training]``; fields it does
not name keep the defaults written here, and the command line may override each one.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from anchorline.runtime.errors import SettingsError
from anchorline.train.setting_checks import Choices, Ranges, check_choices, check_ranges, coerce, expect

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"

# ImageNet's statistics in grey levels, RGB: what the pretrained backbones expect.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

_MODEL_CHOICES: Choices = {
    "neck": ("fpn", "fpn32", "single"),
    "finest_stride": (4, 8),
    "backbone_norm": ("frozen", "live"),
}
_MODEL_RANGES: Ranges = {
    "at least 1": "fpn_channels rpn_pre_nms rpn_post_nms roi_size roi_sampling representation max_detections",
    "above 0": "anchor_sizes aspect_ratios canonical_size box_weights std",
    "0 or more": "rpn_convs rpn_min_side box_min_side box_convs backbone_norm_eps",
    "from 0 to 1": "rpn_nms_iou nms_iou score_threshold rpn_score_threshold",
}
_TRAINING_CHOICES: Choices = {
    "optimiser": ("sgd", "adamw"),
    "schedule": ("cosine", "step", "one-cycle"),
    "precision": ("fp32", "bf16", "fp16", "auto"),
}
_TRAINING_RANGES: Ranges = {
    "at least 1": "epochs batch accumulate rpn_samples roi_samples rpn_pre_nms rpn_post_nms",
    "above 0": "learning_rate zoom",
    "0 or more": "weight_decay warmup_steps clip_norm backbone_rate frozen_stages seed workers "
    "validate_every patience rpn_box_beta roi_box_beta rpn_loss_weight roi_box_loss_weight",
    "from 0 to 1": "momentum warmup_factor milestones ema flip vertical_flip iou_crop mosaic photometric "
    "rpn_positive_iou rpn_negative_iou rpn_positive_fraction roi_positive_iou roi_positive_fraction",
}


@dataclass(frozen=True)
class ModelSettings:
    """The architecture; with the class names and the weights it is the whole model."""

    backbone: str = "mobilenet_v2"
    """Name in ``backbones.BACKBONES``."""
    neck: str = "fpn"
    """``fpn`` (strides up to 64), ``single`` (16), or ``fpn32``: 32, 32, 64 as torchvision's MobileNets."""
    finest_stride: int = 4
    """Stride of the pyramid's finest level: 4, or 8 for a quarter of the work where no object is tiny."""
    backbone_norm: str = "frozen"
    """Batch norm of the body: ``frozen`` (fixed statistics) or ``live`` (trained; the pyramid has it too)."""
    backbone_norm_eps: float = 1e-5
    """Added to the body's variances; 0 with torchvision's official weights of ResNet-50-FPN."""
    canvas: tuple[int, int] = (480, 640)
    """Height and width of the network input in pixels, multiples of 32."""
    fpn_channels: int = 256
    anchor_sizes: tuple[tuple[float, ...], ...] = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    """Square roots of the anchor areas in canvas pixels, one group per level."""
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height / width of the anchors."""
    rpn_convs: int = 1
    """3x3 convolutions of the RPN head before its two siblings."""
    rpn_pre_nms: int = 1000
    """Candidates kept per level before NMS at test time."""
    rpn_post_nms: int = 300
    """Proposals per image at test time."""
    rpn_nms_iou: float = 0.7
    rpn_score_threshold: float = 0.0
    rpn_min_side: float = 1e-3
    """Proposals with a lower objectness, or a side below this many canvas pixels, are dropped before NMS."""
    roi_size: int = 7
    """Cells per side of a pooled region."""
    roi_sampling: int = 2
    """Sampling points per cell and axis."""
    roi_aligned: bool = False
    """Shift RoIs by half a feature pixel, as Detectron2 does and torchvision does not."""
    canonical_size: float = 224.0
    """Side in pixels of a RoI that is pooled from the level of stride 16 (FPN paper, equation 1)."""
    box_convs: int = 0
    """3x3 convolutions with batch norm in the box head: then it has one fully connected layer, else two."""
    representation: int = 1024
    """Width of the box head's fully connected layers."""
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Scale of the detection head's regression targets."""
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    box_min_side: float = 1e-2
    max_detections: int = 100
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        check_choices(self, "model", _MODEL_CHOICES)
        check_ranges(self, "model", _MODEL_RANGES)
        canvas_fits = len(self.canvas) == 2 and all(s >= 32 and s % 32 == 0 for s in self.canvas)
        expect(canvas_fits, "model.canvas", self.canvas, "a height and a width that are multiples of 32")
        levels = {"single": 1, "fpn32": 3}.get(self.neck, 5 if self.finest_stride == 4 else 4)
        groups = {len(group) for group in self.anchor_sizes}
        expect(
            len(self.anchor_sizes) == levels and len(groups) == 1 and 0 not in groups,
            "model.anchor_sizes",
            self.anchor_sizes,
            f"{levels} group{'s' if levels > 1 else ''} of as many sizes each for the neck {self.neck!r}",
        )
        expect(bool(self.aspect_ratios), "model.aspect_ratios", self.aspect_ratios, "at least one ratio")

    @property
    def anchors_per_place(self) -> int:
        """k of the paper: anchors at one place of one level."""
        return len(self.anchor_sizes[0]) * len(self.aspect_ratios)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSettings:
        return settings_from(cls, json.loads(text), "model")


@dataclass(frozen=True)
class TrainingSettings:
    """How the model is trained: approximate joint training (section 3.2), SGD with momentum."""

    epochs: int = 12
    batch: int = 4
    """Images per batch."""
    accumulate: int = 1
    """Batches per step: 4 batches of 2 make the step of one batch of 8 in a quarter of the memory."""
    learning_rate: float = 0.01
    optimiser: str = "sgd"
    """``sgd`` with momentum as in the paper, or ``adamw``, which learns faster from random weights."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to its value."""
    warmup_factor: float = 0.01
    schedule: str = "cosine"
    """``cosine`` to zero, ``step`` (divided by 10 at the milestones), or ``one-cycle`` (up for 30 %, then
    down to zero; without the warm-up)."""
    milestones: tuple[float, ...] = (0.67, 0.9)
    """For ``step``: shares of the whole training."""
    clip_norm: float = 10.0
    """Largest norm of the gradient; 0 sets no limit."""
    backbone_rate: float = 1.0
    """The backbone's share of the learning rate."""
    frozen_stages: int = 0
    """Stages of the backbone that are not trained: 1 is the stem (stride 2), 2 reaches stride 4, ..."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights; 0 switches it off."""
    precision: str = "fp32"
    """``fp32``, ``bf16``, ``fp16`` (CUDA only), or ``auto``: bf16 on processors that compute it natively."""
    compile: bool = False
    """Compile backbone and RPN head with torch.compile; pays in a long training on a GPU."""
    seed: int = 0
    workers: int = 1
    """Processes that load images; 0 loads in the training process."""
    validate_every: int = 0
    """Epochs between validations when validation data is given; 0 validates at the end only."""
    patience: int = 0
    """Stop after this many validations without a better one; 0 never does."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into ``RUN/tensorboard``."""

    flip: float = 0.5
    """Probability of a horizontal mirror image."""
    vertical_flip: float = 0.0
    """Probability of an upside-down image; for views without an up, such as microscopy and satellites."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of random magnification: above 1 crops a part, below 1 sets the image in a larger frame."""
    iou_crop: float = 0.0
    """Probability of a crop that keeps at least one object to a random degree."""
    mosaic: float = 0.0
    """Probability of four images in the quarters of one canvas; for many small objects."""
    photometric: float = 0.0
    """Strength of random brightness, contrast, saturation and hue, 0 to 1."""

    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    rpn_samples: int = 256
    """Anchors per image in the RPN loss."""
    rpn_positive_fraction: float = 0.5
    rpn_pre_nms: int = 2000
    """Candidates kept per level before NMS while training."""
    rpn_post_nms: int = 2000
    """Proposals per image while training."""
    roi_positive_iou: float = 0.5
    roi_samples: int = 512
    """Proposals per image in the detection loss."""
    roi_positive_fraction: float = 0.25
    rpn_box_beta: float = 1.0 / 9
    """Where the RPN's smooth L1 turns from quadratic to linear."""
    roi_box_beta: float = 1.0 / 9
    """The same in the detection head."""
    rpn_loss_weight: float = 1.0
    roi_box_loss_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, "training", _TRAINING_CHOICES)
        check_ranges(self, "training", _TRAINING_RANGES)
        ordered = self.rpn_negative_iou <= self.rpn_positive_iou
        expect(ordered, "training.rpn_negative_iou", self.rpn_negative_iou, "at most rpn_positive_iou")
        expect(self.ema < 1, "training.ema", self.ema, "a decay from 0 to below 1")
        expect(self.momentum < 1, "training.momentum", self.momentum, "a number from 0 to below 1")
        expect(self.seed < 2**32, "training.seed", self.seed, "a whole number below 2**32")
        zoom_fits = len(self.zoom) == 2 and self.zoom[0] <= self.zoom[1]
        expect(zoom_fits, "training.zoom", self.zoom, "a lowest and a highest magnification")


@dataclass(frozen=True)
class Settings:
    """A model and its training."""

    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name: str, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a preset (a name, or the path of a TOML file), changed by ``overrides``.

    An override is ``table.field=value`` with a TOML value, such as ``training.epochs=20``; the
    table may be left out where only one has the field. Raises ``SettingsError``.
    """
    path = PRESETS / f"{name}.toml" if not name.endswith(".toml") else Path(name)
    if not path.is_file():
        raise SettingsError(
            f"preset {name!r} is not known; expected one of {', '.join(preset_names())} or a .toml file"
        )
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not a TOML file ({error}); mend it or use a preset") from None
    for table, content in tables.items():
        expect(isinstance(content, dict), f"{path}: {table}", content, "a table [model] or [training]")
    for text in overrides:
        table, field_name, value = parse_override(text)
        tables.setdefault(table, {})[field_name] = value
    unknown = set(tables) - {"model", "training"}
    if unknown:
        raise SettingsError(f"{path}: unknown table {sorted(unknown)[0]!r}; expected [model] and [training]")
    return Settings(
        settings_from(ModelSettings, tables.get("model", {}), "model"),
        settings_from(TrainingSettings, tables.get("training", {}), "training"),
    )


_Dataclass = TypeVar("_Dataclass", ModelSettings, TrainingSettings)


def settings_from(cls: type[_Dataclass], values: Mapping[str, Any], table: str) -> _Dataclass:
    """Build ``cls`` from plain values, checking names and types; raises ``SettingsError``."""
    expect(isinstance(values, Mapping), table, values, "fields and their values")
    hints = get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise SettingsError(
            f"{table}.{sorted(unknown)[0]} is not a setting; expected one of {', '.join(sorted(hints))}"
        )
    return cls(**{name: coerce(value, hints[name], f"{table}.{name}") for name, value in values.items()})


def parse_override(text: str) -> tuple[str, str, Any]:
    """Table, field and value of ``table.field=value``; the value is TOML, or text where it is none."""
    key, equals, literal = text.partition("=")
    table, dot, name = key.strip().rpartition(".")
    if not dot:
        tables = [
            t
            for t, c in (("model", ModelSettings), ("training", TrainingSettings))
            if name in get_type_hints(c)
        ]
        expect(len(tables) == 1, "override", text, "table.field=value with the table model or training")
        table = tables[0]
    expect(bool(equals) and table in ("model", "training"), "override", text, "table.field=value")
    try:
        return table, name, tomllib.loads(f"value = {literal}")["value"]
    except tomllib.TOMLDecodeError:
        return table, name, literal.strip()
