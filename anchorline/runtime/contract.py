"""The contract: what a model promises, carried as JSON inside every artefact.

It travels in the header of ``model.safetensors``, in ``metadata_props`` of ``model.onnx`` and in
the manifest beside an engine, always under the key ``CONTRACT_KEY``. The runtime reads everything
from it and guesses nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from anchorline.runtime.io.errors import UNPRINTABLE, AnchorlineError, ArtefactError, shown

CONTRACT_KEY = "anchorline.contract"
CONTRACT_VERSION = 1

# The custom ops' domain in an ONNX file, which is also the namespace of their TensorRT plugins.
DOMAIN = "anchorline"
OP_VERSION = 1

# The output that an engine with the fixed-point NMS has besides the contract's: bool [1], false when
# suppression needed more rounds than the engine has, so that duplicates may be left.
NMS_CONVERGED = "nms_converged"

# In ``Contract.source``: the canvas that an export was told to use instead of the checkpoint's.
CANVAS_KEY = "canvas"

MOST_NAMES = 50_000
LONGEST_NAME = 200  # characters

TASKS = ("detections", "proposals")
INPUT_DTYPES = ("uint8", "float32")
CHANNEL_ORDERS = ("rgb", "bgr")
INTERPOLATIONS = ("bilinear", "antialiased")
ROUNDINGS = ("down", "nearest")


def check_names(
    names: Iterable[object], where: str, error: type[AnchorlineError] = ArtefactError
) -> tuple[str, ...]:
    """The class names as a tuple, or an ``error`` that begins with ``where``.

    Each can be shown anywhere, has at most ``LONGEST_NAME`` characters and stands once; there are at most
    ``MOST_NAMES``. Data, imports and options are held to this as well: a model can be saved when it is made.
    """
    seen: dict[str, None] = {}
    for number, name in enumerate(names):
        text = name if isinstance(name, str) else ""
        if not text.strip() or len(text) > LONGEST_NAME or UNPRINTABLE.search(text):
            raise error(
                f"{where}: class name {number} is {shown(name)}; expected 1 to {LONGEST_NAME} characters "
                "that can be printed; rename the class"
            )
        if text in seen:
            raise error(f"{where}: class name {shown(text)} stands twice; expected each once")
        seen[text] = None
        if len(seen) > MOST_NAMES:
            raise error(f"{where}: there are over {MOST_NAMES} class names; expected at most that many")
    return tuple(seen)


@dataclass(frozen=True)
class ResizeRule:
    """How a frame is scaled before it is laid into the top left corner of the canvas.

    The scale is the largest one for which the frame fits the canvas, its shorter side is at most
    ``shorter_side`` and its longer side at most ``longer_side`` (both in pixels; ``None`` sets no
    bound). The aspect ratio is kept. Sizes are rounded ``down`` as torchvision does, or to the ``nearest``
    pixel as Detectron2, MMDetection and py-faster-rcnn do (see ``canvas.place``). ``interpolation`` is
    ``bilinear`` between the nearest four pixels, or ``antialiased``: Pillow's filter, in whole grey
    levels, as Detectron2 resizes (see ``canvas.resize_antialiased``).
    """

    shorter_side: int | None = None
    longer_side: int | None = None
    interpolation: str = "bilinear"
    rounding: str = "down"

    def __post_init__(self) -> None:
        _expect_choice("resize.interpolation", self.interpolation, INTERPOLATIONS)
        _expect_choice("resize.rounding", self.rounding, ROUNDINGS)
        for name in ("shorter_side", "longer_side"):
            side = getattr(self, name)
            fits = side is None or (isinstance(side, int) and side >= 1)
            _expect(fits, f"resize.{name}", side, "null or a positive number of pixels")

    @property
    def is_bounded(self) -> bool:
        """Whether the rule asks for a size of its own; otherwise frames fill the canvas."""
        return self.shorter_side is not None or self.longer_side is not None


@dataclass(frozen=True)
class Thresholds:
    """Where scores and overlaps are cut. ``score`` and the IoUs lie in [0, 1]."""

    score: float = 0.05
    nms_iou: float = 0.5
    max_detections: int = 100
    rpn_nms_iou: float = 0.7
    max_proposals: int = 300

    def __post_init__(self) -> None:
        for name in ("score", "nms_iou", "rpn_nms_iou"):
            value = getattr(self, name)
            fits = _is_number(value) and 0.0 <= value <= 1.0
            _expect(fits, f"thresholds.{name}", value, "a number from 0 to 1")
        for name in ("max_detections", "max_proposals"):
            value = getattr(self, name)
            fits = isinstance(value, int) and value >= 1
            _expect(fits, f"thresholds.{name}", value, "a whole number of at least 1")


@dataclass(frozen=True)
class Contract:
    """What a model expects and delivers. Immutable; ``dataclasses.replace`` makes a changed copy.

    ``names`` holds the class names; background never appears, and ``labels`` index ``names``.
    ``canvas`` is (height, width) in pixels of the fixed-size network input. ``mean`` and ``std``
    are in grey levels (0 to 255), in the order of ``channel_order``; they are applied inside the
    graph, whose ``images`` input is always BGR. ``profile`` names the numeric preset (docs/architecture.md).
    ``source`` says where the model came from: command, data, commit.
    """

    task: str
    names: tuple[str, ...]
    canvas: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channel_order: str = "rgb"
    input_dtype: str = "uint8"
    resize: ResizeRule = field(default_factory=ResizeRule)
    profile: str = "torchvision"
    thresholds: Thresholds = field(default_factory=Thresholds)
    category_ids: tuple[int, ...] | None = None
    inputs: tuple[str, ...] = ("images", "image_sizes")
    outputs: tuple[str, ...] = ("boxes", "scores", "labels", "num_detections")
    precision: str = "fp32"
    max_batch: int | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    version: int = CONTRACT_VERSION

    @property
    def needs_vnni(self) -> bool:
        """Whether it is quantised for processors with weights of 8 bits, as before they had 7.

        Their products fit the sums of processors with VNNI only; where those have 16 bits they saturate.
        """
        made = self.source.get("quantised")
        if self.precision != "int8" or not isinstance(made, Mapping):
            return False
        return made.get("for") == "cpu" and made.get("weight_bits") != 7

    def __post_init__(self) -> None:
        _expect_choice("task", self.task, TASKS)
        _expect_choice("input_dtype", self.input_dtype, INPUT_DTYPES)
        _expect_choice("channel_order", self.channel_order, CHANNEL_ORDERS)
        names, canvas, std = self.names, self.canvas, self.std
        _expect(isinstance(names, tuple) and len(names) > 0, "contract names", names, "a class name", "are")
        check_names(names, "contract names")
        fits = len(canvas) == 2 and all(isinstance(side, int) and side > 0 for side in canvas)
        _expect(fits, "contract canvas", canvas, "(height, width) in pixels")
        for name in ("mean", "std"):
            values = getattr(self, name)
            fits = len(values) == 3 and all(_is_number(value) for value in values)
            _expect(fits, f"contract {name}", values, "three numbers in grey levels")
        _expect(min(std) > 0, "contract std", std, "three numbers above 0")
        count = len(names if self.category_ids is None else self.category_ids)
        if count != len(names):
            raise ArtefactError(
                f"contract has {count} category ids for {len(names)} names; expected one each"
            )

    def to_json(self) -> str:
        """The contract as one JSON object with sorted keys; ``from_json`` reads it back."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str = "contract") -> Contract:
        """Read a contract; ``where`` names the file in the message of the ``ArtefactError``."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise ArtefactError(
                f"{where}: the contract is not JSON ({error}); export the model again"
            ) from None
        if not isinstance(raw, dict):
            raise ArtefactError(f"{where}: the contract is a {type(raw).__name__}, expected a JSON object")
        version = raw.get("version")
        if not isinstance(version, int) or version < 1:
            raise ArtefactError(
                f"{where}: contract version is {version!r}, expected a whole number; export again"
            )
        if version > CONTRACT_VERSION:
            raise ArtefactError(
                f"{where}: contract version {version} is newer than {CONTRACT_VERSION}, the newest this "
                "anchorline reads; upgrade anchorline"
            )
        values = dict(raw)
        try:
            values["resize"] = ResizeRule(**values.get("resize", {}))
            values["thresholds"] = Thresholds(**values.get("thresholds", {}))
            for name in ("names", "canvas", "mean", "std", "category_ids", "inputs", "outputs"):
                if isinstance(values.get(name), list):
                    values[name] = tuple(values[name])
            return cls(**values)
        except (TypeError, KeyError, ArtefactError) as error:
            raise ArtefactError(f"{where}: damaged contract: {error}; export the model again") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _expect(fits: bool, what: str, value: object, expected: str, verb: str = "is") -> None:
    if not fits:
        raise ArtefactError(f"{what} {verb} {value!r}; expected {expected}")


def _expect_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    _expect(value in choices, f"contract {name}", value, f"one of {', '.join(choices)}")
