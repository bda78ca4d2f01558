"""The contract: what a model promises, carried as JSON inside every artefact.

It travels in the header of ``model.safetensors``, in ``metadata_props`` of ``model.onnx`` and in
the manifest beside an engine, always under the key ``CONTRACT_KEY``. The runtime reads everything
from it and guesses nothing.

The annotations of the three classes are the schema: whatever makes an object (``from_json``, the constructor,
``dataclasses.replace``) checks it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from msgspec import Meta

from anchorline.runtime.io.errors import UNPRINTABLE, AnchorlineError, ArtefactError, shown
from anchorline.runtime.io.images import MAX_PIXELS_VARIABLE, max_pixels
from anchorline.runtime.io.schema import NAME, Count, Name, Share, build, check_fields, choice, read_object

CONTRACT_KEY = "anchorline.contract"
CONTRACT_VERSION = 2

# The custom ops' domain in an ONNX file, which is also the namespace of their TensorRT plugins.
DOMAIN = "anchorline"
OP_VERSION = 1
WINOGRAD_OP = "WinogradConv"  # 3x3 convolutions in a file for processors
BANDS_OP = "RoIBands"  # RoIAlign by matrix products, for onnxruntime's CPU provider

# The output that an engine with the fixed-point NMS has besides the contract's: bool [1], false when
# suppression needed more rounds than the engine has, so that duplicates may be left.
NMS_CONVERGED = "nms_converged"

# As many classes as are named: a head of them takes memory. Who has more says so.
MOST_NAMES = 50_000
NAMES_VARIABLE = "ANCHORLINE_MOST_CLASSES"
LONGEST_NAME = 200  # characters
_DEEPEST_SOURCE = 32  # objects and lists inside each other

_OUTPUT_COUNTS = {"detections": 4, "proposals": 3}
TASKS = tuple(_OUTPUT_COUNTS)

Pixels = Annotated[int, Meta(ge=1, le=1 << 24)]
Side = Annotated[Pixels | None, Meta(description="null or a positive number of pixels")]
Level = Annotated[float, Meta(ge=-1e6, le=1e6)]
Spread = Annotated[float, Meta(ge=1e-6, le=1e6)]
CategoryId = Annotated[int, Meta(ge=-(2**53) + 1, le=2**53 - 1)]


def check_names(
    names: Iterable[object], where: str, error: type[AnchorlineError] = ArtefactError
) -> tuple[str, ...]:
    """The class names as a tuple, or an ``error`` that begins with ``where``.

    Each can be shown anywhere, has at most ``LONGEST_NAME`` characters and stands once; there are at most
    ``MOST_NAMES``. Data, imports and options are held to this as well: a model can be saved when it is made.
    """
    seen: dict[str, None] = {}
    most = most_names()
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
        if len(seen) > most:
            raise error(
                f"{where}: there are over {most} class names; expected at most that many (the environment "
                f"variable {NAMES_VARIABLE} sets another bound)"
            )
    return tuple(seen)


def most_names() -> int:
    """How many classes a model may have; ``ArtefactError`` is for who sets it wrongly."""
    stated = os.environ.get(NAMES_VARIABLE, "")
    if stated and not (stated.isascii() and stated.isdecimal() and len(stated) < 16):
        raise ArtefactError(f"{NAMES_VARIABLE} is {shown(stated)}; expected a number of classes")
    return int(stated or MOST_NAMES)


@dataclass(frozen=True)
class ResizeRule:
    """How a frame is scaled before it is laid into the top left corner of the canvas, and how that is sized.

    The scale is the largest one for which the frame's shorter side is at most ``shorter_side``, its longer
    side at most ``longer_side``, and it fits ``within`` (height, width), all in pixels; ``None`` sets no
    bound, and without any a frame keeps its size. Where the contract has a canvas, that stands for
    ``within``; where it has none the canvas is the frame's scaled size, in a batch the largest of each side,
    with sides rounded up to multiples of ``padding``. The aspect ratio is kept. Sizes are rounded ``down`` as
    torchvision does, or to the ``nearest`` pixel as Detectron2, MMDetection and py-faster-rcnn do (see
    ``canvas.place``). ``interpolation`` is ``bilinear`` between the nearest four pixels, or ``antialiased``:
    Pillow's filter, in whole grey levels, as Detectron2 resizes (see ``resize.resize_antialiased``).
    """

    shorter_side: Side = None
    longer_side: Side = None
    interpolation: Annotated[str, choice("bilinear", "antialiased")] = "bilinear"
    rounding: Annotated[str, choice("down", "nearest")] = "down"
    within: Annotated[tuple[Pixels, Pixels] | None, Meta(description="null or (height, width)")] = None
    padding: Annotated[int, Meta(ge=1, le=1024, description="a whole number from 1 to 1024")] = 32

    def __post_init__(self) -> None:
        check_fields(self, "resize.")


@dataclass(frozen=True)
class Thresholds:
    """Where scores and overlaps are cut. ``score`` and the IoUs lie in [0, 1]."""

    score: Share = 0.05
    nms_iou: Share = 0.5
    max_detections: Count = 100
    rpn_nms_iou: Share = 0.7
    max_proposals: Count = 300

    def __post_init__(self) -> None:
        check_fields(self, "thresholds.")


@dataclass(frozen=True)
class Contract:
    """What a model expects and delivers. Immutable; ``dataclasses.replace`` makes a changed copy.

    ``names`` holds the class names; background never appears, and ``labels`` index ``names``.
    ``canvas`` is (height, width) in pixels of the network input, None where that is free: then ``resize``
    gives each frame its own. ``mean`` and ``std``
    are in grey levels (0 to 255), in the order of ``channel_order``; they are applied inside the
    graph, whose ``images`` input is always BGR. ``profile`` names the numeric preset (docs/architecture.md).
    ``source`` says where the model came from: command, data, commit; anything that is JSON. Raises
    ``ArtefactError`` that names the field, its value and what was expected.
    """

    task: Annotated[str, choice(*TASKS)]
    names: Annotated[tuple[str, ...], Meta(min_length=1, description="at least one class name")]
    canvas: Annotated[tuple[Pixels, Pixels] | None, Meta(description="null or (height, width) in pixels")]
    mean: Annotated[tuple[Level, Level, Level], Meta(description="three numbers in grey levels")]
    std: Annotated[tuple[Spread, Spread, Spread], Meta(description="three numbers above 0, in grey levels")]
    channel_order: Annotated[str, choice("rgb", "bgr")] = "rgb"
    input_dtype: Annotated[str, choice("uint8", "float32")] = "uint8"
    resize: ResizeRule = field(default_factory=ResizeRule)
    profile: Name = "torchvision"
    thresholds: Thresholds = field(default_factory=Thresholds)
    category_ids: Annotated[
        tuple[CategoryId, ...] | None, Meta(description="null or whole numbers under 2^53")
    ] = None
    inputs: Annotated[tuple[Name, Name], Meta(description=f"two tensor names, each {NAME}")] = (
        "images",
        "image_sizes",
    )
    outputs: Annotated[tuple[Name, ...], Meta(description=f"tensor names, each {NAME}")] = (
        "boxes",
        "scores",
        "labels",
        "num_detections",
    )
    precision: Name = "fp32"
    max_batch: Annotated[Count | None, Meta(description="null or a whole number from 1 to 1000000")] = None
    source: Annotated[Mapping[str, Any], Meta(description="a JSON object")] = field(default_factory=dict)
    version: Annotated[int, Meta(ge=1, description="a whole number")] = CONTRACT_VERSION

    @property
    def frame_sizes(self) -> str:
        """In words: which canvas, or that it is each frame's own."""
        return "any frame size" if self.canvas is None else "canvas {}x{}".format(*self.canvas)

    @property
    def needs_vnni(self) -> bool:
        """Whether it is quantised for processors with weights of 8 bits, as before they had 7.

        Their products fit the sums of processors with VNNI only; where those have 16 bits they saturate.
        """
        made = self.source.get("quantised")
        if self.precision != "int8" or not isinstance(made, Mapping):
            return False
        return made.get("for") == "cpu" and made.get("weight_bits") != 7

    @property
    def winograd(self) -> bool:
        """Whether it has convolutions in Winograd's form, whose sums bf16 rounds too much."""
        return bool(self.source.get("winograd"))

    def __post_init__(self) -> None:
        check_fields(self, "contract ")
        check_names(self.names, "contract names")
        height, width = self.canvas or (1, 1)
        if height * width > max_pixels():
            raise ArtefactError(
                f"contract canvas is {shown(self.canvas)}; expected at most {max_pixels()} pixels, or "
                f"{MAX_PIXELS_VARIABLE}={height * width} if you trust it"
            )
        ids = self.category_ids
        if ids is not None and len(ids) != len(self.names):
            raise ArtefactError(
                f"contract has {len(ids)} category ids for {len(self.names)} names; expected one each"
            )
        if ids is not None and len(set(ids)) != len(ids):
            raise ArtefactError(f"contract category_ids are {shown(ids)}; expected each once")
        tensors = (*self.inputs, *self.outputs)
        if len(set(tensors)) != len(tensors):
            raise ArtefactError(f"contract inputs and outputs are {shown(tensors)}; expected each name once")
        if not _fits_json(self.source, _DEEPEST_SOURCE):
            raise ArtefactError(
                f"contract source is {shown(self.source)}; expected what JSON knows, at most "
                f"{_DEEPEST_SOURCE} objects and lists deep"
            )

    def to_json(self) -> str:
        """The contract as one JSON object with sorted keys; ``from_json`` reads it back."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "contract") -> Contract:
        """Read a contract; ``where`` names the file in the message of the ``ArtefactError``.

        A field that this version does not know is an error, as one that is missing: a newer anchorline that
        adds any raises the version.
        """
        return cls.from_values(read_object(text, f"{where}: the contract", "export the model again"), where)

    @classmethod
    def from_values(cls, stated: object, where: str = "contract") -> Contract:
        """As ``from_json``, from JSON that was read already."""
        values = dict(stated) if isinstance(stated, dict) else {}
        version = values.get("version")
        if type(version) is int and version > CONTRACT_VERSION:
            raise ArtefactError(
                f"{where}: contract version {shown(version)} is newer than {CONTRACT_VERSION}, the newest "
                "this anchorline reads; upgrade anchorline"
            )
        try:
            if not isinstance(stated, dict):
                raise ArtefactError(f"contract is {shown(stated)}; expected a JSON object")
            if "version" not in values:  # which has a default for who makes one
                raise ArtefactError("contract version is missing")
            if type(version) is int and version == 1:  # whose canvas was always fixed
                if values.get("canvas", ...) is None:
                    raise ArtefactError("contract canvas is null; expected (height, width) in version 1")
                if isinstance(values.get("resize"), dict):
                    values["resize"] = {"within": None, "padding": 32, **values["resize"]}
                values["version"] = CONTRACT_VERSION
            for name, kind in (("resize", ResizeRule), ("thresholds", Thresholds)):
                if isinstance(inner := values.get(name), dict):
                    values[name] = build(kind, inner, f"{name}.")
            made = build(cls, values, "contract ")
            # Here and not above: who changes the task of a contract need not name the tensors at once.
            if len(made.outputs) != _OUTPUT_COUNTS[made.task]:
                raise ArtefactError(
                    f"contract outputs are {shown(made.outputs)}; expected {_OUTPUT_COUNTS[made.task]} for "
                    f"the task {made.task}"
                )
            return made
        except ArtefactError as error:
            raise ArtefactError(f"{where}: damaged contract: {error}; export the model again") from None


def _fits_json(value: object, room: int) -> bool:
    if isinstance(value, Mapping):
        return room > 0 and all(
            isinstance(key, str) and _fits_json(each, room - 1) for key, each in value.items()
        )
    if isinstance(value, list | tuple):
        return room > 0 and all(_fits_json(each, room - 1) for each in value)
    return value is None or isinstance(value, str | int | float)
