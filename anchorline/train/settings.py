"""A training and its model as documented settings: the defaults, the presets, the overrides.

A preset is a TOML file in ``presets/`` with the tables ``[model]`` (``train/model/settings.py``) and
``[training]``; fields it does not name keep the defaults written there and here, and the command line may
override each one.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from msgspec import Meta

from anchorline.runtime.io.errors import SettingsError, reason_of
from anchorline.runtime.io.files import expect_regular
from anchorline.runtime.io.schema import AtLeastOne, Share, check_fields
from anchorline.runtime.video.options import LEAST_SLICE, SliceOptions
from anchorline.train.model.settings import (
    BelowOne,
    ModelSettings,
    NotNegative,
    Positive,
    Whole,
    expect,
    settings_from,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"

Seed = Annotated[int, Meta(ge=0, lt=2**32, description="a whole number from 0 to below 2**32")]

# Fields by the names they had before, in settings files and in the states of runs.
RENAMED = {"schedule": "lr_schedule"}


@dataclass(frozen=True)
class TrainingSettings:
    """How the model is trained: by default approximate joint training (section 3.2), SGD with momentum."""

    regime: Literal["joint", "alternating", "rpn-only", "fast-rcnn"] = "joint"
    """What is trained when (``--schedule``): ``joint``, ``alternating``, ``rpn-only`` or ``fast-rcnn``."""
    epochs: AtLeastOne = 12
    """Passes over the data, of all steps together."""
    step_shares: tuple[Positive, Positive, Positive, Positive] = (1.0, 1.0, 1.0, 1.0)
    """For ``alternating``: how the epochs are shared among the four steps; at least one for each."""
    batch: AtLeastOne = 4
    """Images per batch."""
    accumulate: AtLeastOne = 1
    """Batches per step: 4 batches of 2 make the step of one batch of 8 in a quarter of the memory."""
    learning_rate: Positive = 0.01
    optimiser: Literal["sgd", "adamw"] = "sgd"
    """``sgd`` with momentum as in the paper, or ``adamw``, which learns faster from random weights."""
    momentum: BelowOne = 0.9
    weight_decay: NotNegative = 1e-4
    warmup_steps: Whole = 100
    """Steps over which the learning rate rises linearly to its value."""
    warmup_factor: Share = 0.01
    lr_schedule: Literal["cosine", "step", "one-cycle"] = "cosine"
    """``cosine`` to zero, ``step`` (divided by 10 at the milestones), or ``one-cycle`` (up for 30 %, then
    down to zero; without the warm-up)."""
    milestones: tuple[Share, ...] = (0.67, 0.9)
    """For ``step``: shares of the whole training."""
    clip_norm: NotNegative = 10.0
    """Largest norm of the gradient; 0 sets no limit."""
    backbone_rate: NotNegative = 1.0
    """The backbone's share of the learning rate."""
    frozen_stages: Whole = 0
    """Stages of the backbone that are not trained: 1 is the stem (stride 2), 2 reaches stride 4, ..."""
    bias_rate: NotNegative = 1.0
    """The biases' rate as a multiple of the weights'; caffe's models have 2."""
    pretrained_input: Literal["torchvision", "model"] = "torchvision"
    """What the network behind a file of ``--backbone-weights`` was trained on: RGB with ImageNet's mean and
    std (``torchvision``; the first convolution is adapted), or the ``model``'s own input."""
    ema: BelowOne = 0.0
    """Decay of the exponential moving average of the weights; 0 switches it off."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """``fp32``, ``bf16``, ``fp16`` (CUDA only), or ``auto``: bf16 on processors that compute it natively."""
    compile: bool = False
    """Compile backbone and RPN head with torch.compile; pays in a long training on a GPU."""
    seed: Seed = 0
    workers: Whole = 1
    """Processes that load images; 0 loads in the training process."""
    validate_every: Whole = 0
    """Epochs between validations when validation data is given; 0 validates at the end only."""
    patience: Whole = 0
    """Stop after this many validations without a better one; 0 never does."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into ``RUN/tensorboard``."""

    slice: tuple[Whole, Whole] = (0, 0)
    """Height and width of slices of the images, which are the samples then (docs/slicing.md); 0 for whole
    images. Validation looks at whole images in such slices."""
    slice_overlap: Share = 0.2
    """Share of a slice that the next one shows again, at most 0.9."""
    min_visible: Share = 0.3
    """Objects of which less shows in a slice are not learnt there, nor are they background."""
    empty_slices: NotNegative = 0.25
    """Slices without an object to train on, at most, as a share of those with one."""

    flip: Share = 0.5
    """Probability of a horizontal mirror image."""
    vertical_flip: Share = 0.0
    """Probability of an upside-down image; for views without an up, such as microscopy and satellites."""
    zoom: tuple[Positive, Positive] = (1.0, 1.0)
    """Range of random magnification: above 1 crops a part, below 1 sets the image in a larger frame."""
    iou_crop: Share = 0.0
    """Probability of a crop that keeps at least one object to a random degree."""
    mosaic: Share = 0.0
    """Probability of four images in the quarters of one canvas; for many small objects."""
    photometric: Share = 0.0
    """Strength of random brightness, contrast, saturation and hue, 0 to 1."""

    rpn_positive_iou: Share = 0.7
    rpn_negative_iou: Share = 0.3
    rpn_samples: AtLeastOne = 256
    """Anchors per image in the RPN loss."""
    rpn_positive_fraction: Share = 0.5
    rpn_ignore_outside: bool = False
    """Leave out anchors that cross the edge of the image (section 3.1.3)."""
    rpn_normalisation: Literal["drawn", "paper"] = "drawn"
    """``drawn``: both losses by the anchors drawn in the batch. ``paper`` (equation 1), for each image: the
    objectness loss by N_cls = ``rpn_samples``, the box loss by N_reg = the places of the feature map."""
    rpn_pre_nms: AtLeastOne = 2000
    """Candidates kept per level before NMS while training."""
    rpn_post_nms: AtLeastOne = 2000
    """Proposals per image while training."""
    roi_positive_iou: Share = 0.5
    roi_background_iou: Share = 0.0
    """Proposals that overlap every object less than this are no background either (Fast R-CNN: 0.1)."""
    roi_samples: AtLeastOne = 512
    """Proposals per image in the detection loss."""
    roi_positive_fraction: Share = 0.25
    rpn_box_beta: NotNegative = 1.0 / 9
    """Where the RPN's smooth L1 turns from quadratic to linear."""
    roi_box_beta: NotNegative = 1.0 / 9
    """The same in the detection head."""
    rpn_loss_weight: NotNegative = 1.0
    """Of both RPN losses."""
    rpn_box_loss_weight: NotNegative = 1.0
    """Of the box loss besides: lambda of equation (1)."""
    roi_box_loss_weight: NotNegative = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "training.", SettingsError)
        enough = self.regime != "alternating" or self.epochs >= len(self.step_shares)
        expect(enough, "training.epochs", self.epochs, "at least 4, one for each step")
        ordered = self.rpn_negative_iou <= self.rpn_positive_iou
        expect(ordered, "training.rpn_negative_iou", self.rpn_negative_iou, "at most rpn_positive_iou")
        ordered = self.roi_background_iou <= self.roi_positive_iou
        expect(ordered, "training.roi_background_iou", self.roi_background_iou, "at most roi_positive_iou")
        ordered = self.zoom[0] <= self.zoom[1]
        expect(ordered, "training.zoom", self.zoom, "a lowest and a highest magnification")
        sides = set(self.slice) == {0} or min(self.slice) >= LEAST_SLICE
        expect(
            sides, "training.slice", self.slice, f"a height and a width of at least {LEAST_SLICE}, or 0, 0"
        )
        expect(self.slice_overlap <= 0.9, "training.slice_overlap", self.slice_overlap, "at most 0.9")

    @property
    def slices(self) -> SliceOptions | None:
        """Those that the model is to be run with, where it is trained on slices."""
        return SliceOptions(*self.slice, overlap=self.slice_overlap) if any(self.slice) else None


@dataclass(frozen=True)
class Settings:
    """A model and its training."""

    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_TABLES = {"model": ModelSettings, "training": TrainingSettings}


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name: str, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a preset (a name, or the path of a TOML file), changed by ``overrides``.

    An override is ``table.field=value`` with a TOML value, such as ``training.epochs=20``; the
    table may be left out where only one has the field. Raises ``SettingsError``.
    """
    path = PRESETS / f"{name}.toml" if not name.endswith(".toml") else Path(name)
    expect_regular(path, SettingsError)
    if not path.is_file():
        raise SettingsError(
            f"preset {name!r} is not known; expected one of {', '.join(preset_names())} or a .toml file"
        )
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # numbers of thousands of digits among them
        raise SettingsError(
            f"{path}: not a TOML file ({reason_of(error)}); mend it or use a preset"
        ) from None
    for table, content in tables.items():
        expect(isinstance(content, dict), f"{path}: {table}", content, "a table [model] or [training]")
    training = tables.get("training", {})
    for before in RENAMED.keys() & training.keys():
        now = _name_now(before, str(path))
        expect(now not in training, f"{path}: training.{before}", training[before], f"{now} alone")
        training[now] = training.pop(before)
    for text in overrides:
        table, field_name, value = parse_override(text)
        tables.setdefault(table, {})[field_name] = value
    unknown = tables.keys() - _TABLES.keys()
    if unknown:
        raise SettingsError(f"{path}: unknown table {sorted(unknown)[0]!r}; expected [model] and [training]")
    return Settings(**{name: settings_from(cls, tables.get(name, {}), name) for name, cls in _TABLES.items()})


def parse_override(text: str) -> tuple[str, str, Any]:
    """Table, field and value of ``table.field=value``; the value is TOML, or text where it is none."""
    key, equals, literal = text.partition("=")
    table, dot, name = key.strip().rpartition(".")
    if table in ("", "training"):
        name = _name_now(name, text)
    if not dot:
        tables = [each for each, kind in _TABLES.items() if name in get_type_hints(kind)]
        expect(len(tables) == 1, "override", text, "table.field=value with the table model or training")
        table = tables[0]
    expect(bool(equals) and table in _TABLES, "override", text, "table.field=value")
    try:
        return table, name, tomllib.loads(f"value = {literal}")["value"]
    except (ValueError, RecursionError):
        return table, name, literal.strip()


def _name_now(name: str, where: str) -> str:
    """The name of a field of ``[training]``, which may be given by an earlier one; that is said on stderr."""
    now = RENAMED.get(name, name)
    if now != name and os.environ.get("RANK", "0") == "0":  # of several processes one says it
        print(f"{where}: training.{name} is called training.{now} now; expected that name", file=sys.stderr)
    return now
