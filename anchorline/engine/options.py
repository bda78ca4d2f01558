"""What a build is asked for: each option written once, for the command and Python, and checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.io.schema import check_fields
from anchorline.runtime.video.options import Option

if TYPE_CHECKING:
    from anchorline.runtime.canvas import CanvasRange
    from anchorline.runtime.contract import Contract

Target = Literal["tensorrt", "tensorrt-rtx"]
Precision = Literal["fp16", "fp32"]
NmsForm = Literal["plugin", "fixed-point"]
RoIAlignForm = Literal["grid-sample", "gather"]
Batch = tuple[int, int, int]
FrameSide = Annotated[int, Meta(ge=1, le=1 << 20, description="pixels, from 1 on")]
FrameSize = Annotated[tuple[FrameSide, FrameSide], Meta(description="a height and a width in pixels")]
Mebibytes = Annotated[int, Meta(ge=1, description="a whole number of MiB above 0")]
Level = Annotated[int, Meta(ge=0, le=5, description="a whole number from 0 to 5")]


def parse_batch(texts: Iterable[str]) -> Batch | None:
    """``["1:4:8"]`` as (1, 4, 8), the last of several; else ``SettingsError``."""
    batch = None
    for text in texts:
        parts = text.split(":")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise SettingsError(f"--batch is {text!r}; expected MIN:OPT:MAX, such as 1:4:8")
        batch = int(parts[0]), int(parts[1]), int(parts[2])
    return batch


def parse_capabilities(texts: Iterable[str]) -> tuple[int, ...]:
    """``["86,89"]`` as (86, 89); else ``SettingsError``."""
    for text in texts:
        if not all(part.strip().isdecimal() for part in text.split(",")):
            raise SettingsError(f"--compute-capability is {text!r}; expected numbers such as 86,89,120")
    return tuple(int(part) for text in texts for part in text.split(","))


def parse_frames(texts: Iterable[str]) -> tuple[FrameSize, ...]:
    """``["1920x1080"]`` as ((1080, 1920),), height first; else ``SettingsError``."""
    return tuple(_frame_size(text, "--frame") for text in texts)


def parse_max_frame(texts: Iterable[str]) -> FrameSize | None:
    """The last of several; see ``parse_frames``."""
    sizes = [_frame_size(text, "--max-frame") for text in texts]
    return sizes[-1] if sizes else None


def _frame_size(text: str, option: str) -> FrameSize:
    width, _, height = text.lower().partition("x")
    if not width.isdecimal() or not height.isdecimal():
        raise SettingsError(f"{option} is {text!r}; expected WIDTHxHEIGHT in pixels, such as 1920x1080")
    return int(height), int(width)


# No canvas of a range is smaller: what is computed of one row of pixels no layer was made for.
_LEAST_SIDE = 32


@dataclass(frozen=True)
class BuildOptions:
    """Options of ``build_engine``; raises ``SettingsError`` for values that cannot be used.

    ``compute_capabilities`` are as 86 for 8.6; all from 80 on when empty. ``batch`` is (smallest, best,
    largest) within the exported batch. ``frames`` and ``max_frame`` are sizes (height, width) for a file that
    takes any: an optimisation profile for each, or one for all up to the largest, in either orientation.
    ``nms`` "plugin" needs our plugins wherever the engine runs.
    ``roi_align`` is TensorRT for RTX's, the two compatibilities are full TensorRT's.
    """

    target: Annotated[
        Target,
        Option(
            "tensorrt builds for the GPU at hand, tensorrt-rtx for any GeForce, without one.", flag="--for"
        ),
    ] = "tensorrt"
    precision: Annotated[Precision, Option("Of convolutions and fully connected layers.")] = "fp16"
    batch: Annotated[
        Batch | None,
        Option(
            "Batch sizes (default: 1:1:MAX of the exported batch).", metavar="MIN:OPT:MAX", parse=parse_batch
        ),
    ] = None
    frames: Annotated[
        tuple[FrameSize, ...],
        Option(
            "Frames it is for, where the file takes any; may be repeated (default: those in 4:3).",
            flag="--frame",
            metavar="WxH",
            parse=parse_frames,
        ),
    ] = ()
    max_frame: Annotated[
        FrameSize | None,
        Option(
            "One engine for all frames up to this size, upright too.", metavar="WxH", parse=parse_max_frame
        ),
    ] = None
    compute_capabilities: Annotated[
        tuple[int, ...],
        Option(
            "GPUs to build for (tensorrt-rtx; default: all).",
            flag="--compute-capability",
            metavar="86,89,120",
            parse=parse_capabilities,
        ),
    ] = ()
    nms: Annotated[NmsForm, Option("Our plugin, or standard operators that any loader runs.")] = "plugin"
    roi_align: Annotated[
        RoIAlignForm, Option("What RoIAlign is made of (tensorrt-rtx; TensorRT has one itself).")
    ] = "grid-sample"
    workspace: Annotated[Mebibytes | None, Option("Scratch memory of the builder, MiB from 1 on.")] = None
    optimization_level: Annotated[
        Level | None, Option("How hard TensorRT searches, 0 to 5 (its default: 3).")
    ] = None
    version_compatible: Annotated[
        bool, Option("Let later versions of TensorRT load it (with --nms fixed-point).")
    ] = False
    hardware_compatible: Annotated[bool, Option("Let other GPUs, from Ampere on, load it.")] = False

    def __post_init__(self) -> None:
        check_fields(self, "", SettingsError)
        if self.frames and self.max_frame:
            raise SettingsError(
                f"frames are {self.frames} and the largest one is {self.max_frame}; expected one or the other"
            )
        if self.target == "tensorrt" and self.compute_capabilities:
            named = ", ".join(map(str, self.compute_capabilities))
            raise SettingsError(
                f"compute capability is {named}; TensorRT builds for the GPU at hand, so leave it out or "
                "build with --for tensorrt-rtx"
            )
        if self.target == "tensorrt" and self.roi_align != "grid-sample":
            raise SettingsError(
                f"roi align is {self.roi_align}; TensorRT has RoIAlign itself, so leave it out or build with "
                "--for tensorrt-rtx"
            )
        if self.target == "tensorrt-rtx":
            for name in ("version_compatible", "hardware_compatible"):
                if getattr(self, name):
                    raise SettingsError(
                        f"{name.replace('_', ' ')} is set; TensorRT for RTX has no such engines, "
                        "name the compute capabilities instead"
                    )

    def resolve_canvases(self, contract: Contract) -> tuple[CanvasRange, ...]:
        """Those of each optimisation profile; (height, width) of the smallest, the best and the largest."""
        from anchorline.runtime.canvas import frame_canvas, usual_canvas
        from anchorline.runtime.io.images import max_pixels

        fixed, largest = contract.canvas, self.max_frame
        if fixed is not None and (self.frames or largest):
            raise SettingsError(
                f"frames (height, width) are {self.frames or largest}, but the model was exported for a "
                f"canvas of {fixed}: leave them out, or export it for any frame size"
            )
        if largest is not None:
            best, upright = frame_canvas(largest, contract), frame_canvas(largest[::-1], contract)
            side = max(contract.resize.padding, _LEAST_SIDE)
            least = min(side, best[0]), min(side, best[1])
            height, width = max(best[0], upright[0]), max(best[1], upright[1])
            if height * width > max_pixels():
                raise SettingsError(
                    f"largest frame is {largest[0]}x{largest[1]}, and for it upright as well the canvas is "
                    f"{height}x{width}; expected at most {max_pixels()} pixels: give a smaller frame"
                )
            return ((least, best, (height, width)),)
        canvases = [frame_canvas(size, contract) for size in self.frames] or [usual_canvas(contract)]
        return tuple((canvas, canvas, canvas) for canvas in dict.fromkeys(canvases))

    def resolve_batch(self, contract: Contract) -> Batch:
        """The batch profile, within what was exported; (1, 1, largest) when none was asked for."""
        largest = contract.max_batch
        low, best, high = self.batch or (1, 1, largest or 1)
        if not 1 <= low <= best <= high:
            raise SettingsError(
                f"batch is {low}:{best}:{high}; expected MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX"
            )
        if largest is not None and high > largest:
            raise SettingsError(
                f"batch is {low}:{best}:{high}; the model was exported for at most {largest}: stay within it "
                "or export with a larger --max-batch"
            )
        return low, best, high
