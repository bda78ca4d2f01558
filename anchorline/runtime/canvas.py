"""Laying a frame onto the canvas, the padded input of the network, and the way back.

Training and inference both use these functions, so the network sees the same pixels in both. Box
edges are continuous (the first pixel spans 0 to 1), as are OpenCV's pixel centres in a linear
resize, so boxes move with one factor per axis and no offset.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import ArtefactError, DataError, FrameError, SettingsError, shown
from anchorline.runtime.io.images import MAX_PIXELS_VARIABLE, max_pixels
from anchorline.runtime.nv12 import Nv12, bgr_of, frame_size
from anchorline.runtime.resize import resize_antialiased, resize_float

PROPOSAL_NAMES = ("object",)
USUAL_FRAME = (600, 800)  # height and width of a frame in the most common shape, 4:3
_LARGE_CANVAS = 500_000  # pixels

_BGR = "Expected a frame as uint8 BGR array of shape [H, W, 3]"


@dataclass(frozen=True)
class Placement:
    """Where a frame lies on its canvas: ``source`` and ``valid`` are its (height, width) in pixels
    before and after the resize; it occupies the top left ``valid`` corner of the canvas.
    ``interpolation`` is the contract's: how the pixels between are found."""

    source: tuple[int, int]
    valid: tuple[int, int]
    interpolation: str = "bilinear"

    @property
    def scales(self) -> NDArray[np.float64]:
        """Canvas pixels for one source pixel, along x, y, x and y."""
        scale_y, scale_x = self.valid[0] / self.source[0], self.valid[1] / self.source[1]
        return np.array([scale_x, scale_y, scale_x, scale_y])


def place(source_size: tuple[int, int], canvas: tuple[int, int] | None, resize: ResizeRule) -> Placement:
    """Scale a frame of ``source_size`` as ``resize`` says or, where that does not fit, to fit ``canvas``.

    Without a canvas that is the rule's ``within``, if it has one. All sizes are (height, width) in pixels.
    Scaled sides are rounded as ``resize`` says, and no side falls below one pixel. To fit the canvas they are
    rounded down after exact arithmetic, so that such a frame fills the canvas to the last pixel.
    """
    room = canvas or resize.within
    height, width = source_size
    sides = ((resize.shorter_side, min(source_size)), (resize.longer_side, max(source_size)))
    scales = [wanted / side for wanted, side in sides if wanted is not None]
    # In double precision, as in torchvision's GeneralizedRCNNTransform and torch.nn.functional.interpolate:
    # 97 x 97 at a shorter side of 800 becomes 799 x 799 there.
    extra = 0.5 if resize.rounding == "nearest" else 0.0
    valid = tuple(int(side * min(scales) + extra) for side in source_size) if scales else None
    if room is not None and (valid is None or valid[0] > room[0] or valid[1] > room[1]):
        scale = min(Fraction(room[0], height), Fraction(room[1], width))
        valid = (int(height * scale), int(width * scale))
    valid = valid or source_size
    fitted = (max(1, valid[0]), max(1, valid[1]))
    return Placement(source=(height, width), valid=fitted, interpolation=resize.interpolation)


def canvas_of(contract: Contract, placements: Sequence[Placement]) -> tuple[int, int]:
    """The canvas (height, width) of a batch of at least one: the contract's, or the largest of each side.

    Raises ``FrameError`` where it has more pixels than ``max_pixels`` allows.
    """
    if contract.canvas is not None:
        return contract.canvas
    height, width = _padded(placements, contract.resize)
    if height * width > max_pixels():
        found = " and ".join("{}x{}".format(*placement.source) for placement in placements[:3])
        remedy = (
            "give frames of like shapes" if len(placements) > 1 else "bound the resize rule's longer side"
        )
        raise FrameError(
            f"Frames of {found} would need a canvas of {height}x{width}; expected at most {max_pixels()} "
            f"pixels; {remedy}, or set {MAX_PIXELS_VARIABLE}={height * width}"
        )
    return height, width


def _padded(placements: Sequence[Placement], resize: ResizeRule) -> tuple[int, int]:
    """The smallest canvas that holds all of them and whose sides are multiples of the rule's padding."""
    sides = (max(placement.valid[axis] for placement in placements) for axis in (0, 1))
    height, width = (-(-side // resize.padding) * resize.padding for side in sides)
    return height, width


CanvasRange = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # (height, width): least, best, most


def fit(
    sizes: Sequence[tuple[int, int]], ranges: Sequence[CanvasRange], contract: Contract
) -> tuple[int, tuple[int, int], list[Placement]]:
    """For a network that takes canvases of some ``ranges`` only, as an engine: which range a batch of frames
    of ``sizes`` goes to, its canvas there, and where each frame lies on it.

    Where the contract has a canvas, that is it. Otherwise the frames are scaled as the contract says and,
    where that is too large for a range, further down to fit it. The range is taken in which the frame that
    loses most keeps most of its size, of equal ones the one with the smallest canvas. Sizes are
    (height, width).
    """
    fixed, resize = contract.canvas, contract.resize
    if fixed is not None:
        fitting = (number for number, each in enumerate(ranges) if lies_within(fixed, each))
        return next(fitting), fixed, [place(size, fixed, resize) for size in sizes]
    wanted = [math.prod(place(size, None, resize).valid) for size in sizes]
    found = []
    for number, (least, _, most) in enumerate(ranges):
        room = (
            most
            if resize.within is None
            else (min(most[0], resize.within[0]), min(most[1], resize.within[1]))
        )
        placements = [place(size, room, resize) for size in sizes]
        height, width = _padded(placements, resize)
        canvas = min(max(height, least[0]), most[0]), min(max(width, least[1]), most[1])
        lost = max(1 - math.prod(p.valid) / area for p, area in zip(placements, wanted, strict=True))
        found.append((lost, math.prod(canvas), number, canvas, placements))
    _, _, number, canvas, placements = min(found)
    return number, canvas, placements


def lies_within(canvas: tuple[int, int], canvases: CanvasRange) -> bool:
    """Whether a range holds ``canvas``."""
    least, _, most = canvases
    return all(low <= side <= high for low, side, high in zip(least, canvas, most, strict=True))


def frame_canvas(frame_size: tuple[int, int], contract: Contract) -> tuple[int, int]:
    """The smallest canvas that holds frames of ``frame_size`` at the scale they have on the model's own.

    Both are (height, width). On it a model with a free canvas gives what it gives by itself for such frames.
    """
    if min(frame_size) < 1:
        raise SettingsError(f"frame size is {frame_size}; expected a height and a width of at least 1 pixel")
    free = dataclasses.replace(contract, canvas=None)
    return canvas_of(free, [place(frame_size, contract.canvas, contract.resize)])


def by_canvas(contract: Contract, frames: Sequence[Any]) -> list[list[int]]:
    """The places in ``frames`` (of the host) of those that have the same canvas alone, in their order.

    Together these have the results that they have alone; others are padded to each other's size, and differ.
    """
    runs: dict[tuple[int, int], list[int]] = {}
    for number, frame in enumerate(frames):
        runs.setdefault(canvas_alone(contract, frame_size(frame)), []).append(number)
    return list(runs.values())


def canvas_alone(contract: Contract, size: tuple[int, int]) -> tuple[int, int]:
    """The canvas (height, width) of a frame of ``size`` in no batch. Raises as ``canvas_of``."""
    return contract.canvas or canvas_of(contract, [place(size, None, contract.resize)])


class _BatchDetector(Protocol):
    @property
    def contract(self) -> Contract: ...
    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]: ...


def unmixed(detector: _BatchDetector) -> Callable[[Sequence[NDArray[np.uint8]]], list[Detections]]:
    """``detector.batch`` in a run for each canvas: no frame's result depends on what else is in its batch."""

    def detect(frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        found: dict[int, Detections] = {}
        for run in by_canvas(detector.contract, frames):
            found.update(zip(run, detector.batch([frames[number] for number in run]), strict=True))
        return [found[number] for number in range(len(frames))]

    return detect


def held_to(contract: Contract, canvas: tuple[int, int] | None, resize: ResizeRule | None) -> Contract:
    """``contract`` with the free canvas fixed, or frames resized by another rule (its padding stays).

    Raises ``SettingsError`` where its canvas is fixed, or ``canvas`` none that it takes.
    """
    if canvas is None and resize is None:
        return contract
    if resize is not None and not isinstance(resize, ResizeRule):
        raise SettingsError(f"resize is {shown(resize)}; expected ResizeRule(...), or None")
    if contract.canvas is not None:
        raise SettingsError(
            f"canvas and resize are {shown(canvas)} and {resize}, but the model was made for one canvas, "
            f"{contract.canvas}; leave them out, or export it for any frame size"
        )
    rule = dataclasses.replace(resize or contract.resize, padding=contract.resize.padding)
    return dataclasses.replace(contract, canvas=_checked_canvas(canvas, rule.padding), resize=rule)


def _checked_canvas(canvas: object, unit: int) -> tuple[int, int] | None:
    """``canvas`` if it is None, or a height and a width that a network takes; else ``SettingsError``."""
    if canvas is None:
        return None
    if not isinstance(canvas, tuple | list) or len(canvas) != 2:
        raise SettingsError(f"canvas is {shown(canvas)}; expected (height, width)")
    height, width = canvas
    if not all(type(side) is int and side > 0 and side % unit == 0 for side in (height, width)):
        raise SettingsError(
            f"canvas is {shown(canvas)}; expected a height and a width that are multiples of {unit}"
        )
    if height * width > max_pixels():
        raise SettingsError(
            f"canvas is {height}x{width}; expected at most {max_pixels()} pixels, or "
            f"{MAX_PIXELS_VARIABLE}={height * width}"
        )
    return height, width


def usual_canvas(contract: Contract) -> tuple[int, int]:
    """The contract's canvas or, where that is free, that of a ``USUAL_FRAME``."""
    return contract.canvas or frame_canvas(USUAL_FRAME, contract)


def is_large(contract: Contract) -> bool:
    """Whether an image takes a processor so long that whoever tries a new file does it with few."""
    return math.prod(usual_canvas(contract)) > _LARGE_CANVAS


def to_canvas(
    frame: NDArray[np.uint8], placement: Placement, out: NDArray[np.uint8] | NDArray[np.float32]
) -> None:
    """Resize ``frame`` (uint8 [H, W, 3]) into the top left of ``out`` and zero the rest.

    ``out`` is the canvas [CH, CW, 3], uint8 or float32, and may hold anything before. Bilinearly, a float32
    canvas is filled as PyTorch resizes (``resize_float``), without rounding to whole grey levels.
    """
    height, width = placement.valid
    if frame.strides[1:] != (3, 1) or frame.strides[0] < 0:
        frame = np.ascontiguousarray(frame)  # OpenCV cannot read mirrored or channel-reversed views
    inner = out[:height, :width]
    if placement.valid == placement.source:
        inner[...] = frame
    elif placement.interpolation == "antialiased":
        resize_antialiased(frame, inner)
    elif out.dtype == np.float32:
        resize_float(frame, cast("NDArray[np.float32]", inner))
    else:
        cv2.resize(frame, (width, height), dst=inner, interpolation=cv2.INTER_LINEAR)
    out[height:] = 0
    out[:height, width:] = 0


def boxes_to_canvas(boxes: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """Boxes [N, 4] xyxy in source pixels, as float32 [N, 4] in canvas pixels."""
    return (boxes * placement.scales).astype(np.float32)


def boxes_to_source(boxes: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """Boxes [N, 4] xyxy in canvas pixels, as float32 [N, 4] in source pixels, clipped to the frame."""
    height, width = placement.source
    limits = np.array([width, height, width, height], np.float64)
    return np.clip(boxes / placement.scales, 0.0, limits).astype(np.float32)


def check_frame(frame: object) -> NDArray[np.uint8]:
    """Return ``frame`` if it is uint8 [H, W, 3] with at least one pixel; else raise ``FrameError``."""
    if frame is None:
        raise FrameError(f"{_BGR}, got None; an image or video that could not be read gives None")
    if isinstance(frame, str | bytes | os.PathLike):
        raise FrameError(f"{_BGR}, got a {type(frame).__name__}; read it first, with read_image(path)")
    if not isinstance(frame, np.ndarray):
        # Pillow's pictures are RGB.
        convert = "(image.convert('RGB'))[:, :, ::-1]" if hasattr(frame, "convert") else ""
        raise FrameError(f"{_BGR}, got a {type(frame).__name__}; convert it with numpy.asarray{convert}")
    got = f"got {frame.dtype} {list(frame.shape)}"
    if frame.ndim == 2 or (frame.ndim == 3 and frame.shape[2] == 1):
        raise FrameError(f"{_BGR}, {got}; convert grey with cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR)")
    if frame.ndim == 3 and frame.shape[2] == 4:
        raise FrameError(f"{_BGR}, {got}; drop the alpha channel with frame[:, :, :3]")
    if frame.ndim != 3 or frame.shape[2] != 3:
        raise FrameError(f"{_BGR}, {got}; give one frame, channels last (several go to batch)")
    if frame.size == 0:
        raise FrameError(f"{_BGR}, {got}; the frame has no pixels, check the crop or the reader")
    if frame.dtype != np.uint8:
        raise FrameError(f"{_BGR}, {got}; scale it to 0..255 and convert with astype(numpy.uint8)")
    return frame


class Preprocessor:
    """Lays frames onto canvases, into memory that grows to the largest batch and is used again."""

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._pixels = np.empty(0, np.dtype(contract.input_dtype))

    def __call__(
        self, frames: Sequence[NDArray[np.uint8] | Nv12]
    ) -> tuple[dict[str, NDArray[np.generic]], list[Placement]]:
        """The network's inputs for checked frames of any sizes, by the contract's names, and the placements.

        They are ``images`` [B, H, W, 3] in the contract's input dtype (overwritten by the next call), and
        ``image_sizes`` float32 [B, 2], the valid (height, width) of each.
        """
        contract = self._contract
        placements = [place(frame_size(frame), contract.canvas, contract.resize) for frame in frames]
        shape = (len(frames), *canvas_of(contract, placements), 3)
        if len(self._pixels) < math.prod(shape):
            self._pixels = np.empty(math.prod(shape), self._pixels.dtype)
        images = self._pixels[: math.prod(shape)].reshape(shape)
        for frame, placement, canvas in zip(frames, placements, images, strict=True):
            to_canvas(bgr_of(frame), placement, canvas)
        sizes = np.array([placement.valid for placement in placements], np.float32)
        return dict(zip(contract.inputs, (images, sizes), strict=True)), placements


def to_detections(
    outputs: Mapping[str, NDArray[np.generic]],
    placements: Sequence[Placement],
    contract: Contract,
    score_threshold: float = 0.0,
) -> list[Detections]:
    """Unpack a batch of the network's output slots into detections in source pixels.

    ``outputs`` holds, by the contract's names, boxes [B, D, 4] on the canvas, scores [B, D], for the
    task ``detections`` labels [B, D], and the number of filled slots [B]. Detections with a score
    of at least ``score_threshold`` are kept, in the order of the slots. Raises ``ArtefactError``
    where the values do not fit the contract, such as a label without a name or a box that is NaN.
    """
    arrays = [outputs[name] for name in contract.outputs]
    boxes, scores, counts = arrays[0], arrays[1], arrays[-1]
    if contract.task == "detections":
        labels, names, ids = arrays[2], contract.names, contract.category_ids
    else:
        labels, names, ids = np.zeros(scores.shape, np.int64), PROPOSAL_NAMES, None
    found = []
    for index, placement in enumerate(placements):
        kept = np.flatnonzero(scores[index, : int(counts[index])] >= np.float32(score_threshold))
        try:
            found.append(
                Detections(
                    boxes=boxes_to_source(boxes[index, kept], placement),
                    scores=scores[index, kept],
                    labels=labels[index, kept],
                    class_names=names,
                    category_ids=ids,
                    size=placement.source,
                )
            )
        except DataError as error:
            raise ArtefactError(
                f"the model's output does not fit its contract: {error}; export again"
            ) from error
    return found
