"""The custom ops as plugins see them: ``BatchedNMS`` and ``RoIPool``, their shapes and kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from anchorline.runtime.io.errors import ArtefactError

Shape = Sequence[int]


@dataclass(frozen=True)
class Launch:
    """One kernel of ``source``: its grid, threads a block (in one dimension), arguments as ctypes values."""

    source: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """The tensors of one execution: shapes of the inputs, their types, and device addresses."""

    shapes: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]
    inputs: tuple[int, ...]
    output: int
    workspace: int = 0


class Op(Protocol):
    """A custom op of the domain ``anchorline`` with one output."""

    name: ClassVar[str]
    attributes: ClassVar[dict[str, type]]  # name -> float or int
    input_count: ClassVar[int]
    output_like: ClassVar[int]  # the input whose type the output has
    source: ClassVar[str]  # of its kernels
    kernels: ClassVar[tuple[str, ...]]

    def __init__(self, **attributes: Any) -> None: ...

    def accepts(self, position: int, types: Sequence[str]) -> bool:
        """Whether the tensor at ``position`` of inputs and output may have the last of ``types``."""
        ...

    def output_shape(self, shapes: Sequence[Sequence[Any]], product: Callable[[Any, Any], Any]) -> list[Any]:
        """The output's shape from the inputs', which may be symbolic; ``product`` multiplies two sides."""
        ...

    def workspace_bytes(self, shapes: Sequence[Shape]) -> int:
        """Scratch memory, in bytes, for inputs of at most ``shapes``."""
        ...

    def launches(self, call: Call) -> list[Launch]:
        """The kernels to run, in order."""
        ...


# ``BatchedNMS``: greedy NMS of G groups of N boxes; the kernels are in ``kernels/nms.cu``.


MAX_BOXES = 8192  # of a group: the words of bits that nms_select keeps in shared memory
MAX_GROUPS = 65535  # a grid's third side
TILE = 64  # NMS_TILE, the bits of a word
SMALL = 256  # NMS_SMALL: up to here one kernel without scratch memory
_WORD_BYTES = 8
_MOST_THREADS = 1024


class BatchedNMS:
    """boxes [G, N, 4] xyxy and scores [G, N] in falling order, float32 -> scores [G, N], suppressed ones -1.

    What counts and what is suppressed is defined in ``anchorline/train/model/ops.py`` and exact to the bit.
    ``iou_threshold`` lies in [0, 1]; N is at most 8192.
    """

    name: ClassVar[str] = "BatchedNMS"
    attributes: ClassVar[dict[str, type]] = {"iou_threshold": float, "score_threshold": float}
    input_count: ClassVar[int] = 2
    output_like: ClassVar[int] = 1
    source: ClassVar[str] = "nms"
    kernels: ClassVar[tuple[str, ...]] = ("nms_overlaps", "nms_select", "nms_small")

    def __init__(self, *, iou_threshold: float, score_threshold: float) -> None:
        if not 0.0 <= iou_threshold <= 1.0:
            raise ArtefactError(f"BatchedNMS: iou_threshold is {iou_threshold}; expected 0 to 1")
        self.iou_threshold, self.score_threshold = iou_threshold, score_threshold

    def accepts(self, position: int, types: Sequence[str]) -> bool:
        return types[position] == "float32"

    def output_shape(self, shapes: Sequence[Sequence[Any]], product: Callable[[Any, Any], Any]) -> list[Any]:
        return list(shapes[1])

    def workspace_bytes(self, shapes: Sequence[Shape]) -> int:
        """The overlap matrix on and above its diagonal, in tiles of 64x64 bits: below N * N / 8 a group."""
        groups, boxes = shapes[1]
        words = -(-boxes // TILE)
        return 0 if boxes <= SMALL else groups * words * (words + 1) // 2 * TILE * _WORD_BYTES

    def launches(self, call: Call) -> list[Launch]:
        groups, boxes = call.shapes[1]
        if boxes > MAX_BOXES or groups > MAX_GROUPS:
            raise ArtefactError(
                f"BatchedNMS: {groups} groups of {boxes} boxes; the plugin takes at most {MAX_GROUPS} of "
                f"{MAX_BOXES}: export with fewer proposals"
            )
        if groups == 0 or boxes == 0:
            return []
        inputs = tuple(ctypes.c_void_p(address) for address in call.inputs)
        kept, tiles = ctypes.c_void_p(call.output), ctypes.c_void_p(call.workspace)
        count, iou = ctypes.c_int(boxes), ctypes.c_float(self.iou_threshold)
        score = ctypes.c_float(self.score_threshold)
        words = -(-boxes // TILE)
        if boxes <= SMALL:
            small = (*inputs, kept, count, iou, score)
            return [Launch(self.source, "nms_small", (groups, 1, 1), words * TILE, small)]
        grid = (words + 1, (words + 1) // 2, groups)
        threads = min(_MOST_THREADS, 32 * max(2, words))
        return [
            Launch(self.source, "nms_overlaps", grid, TILE, (*inputs, tiles, count, iou, score)),
            Launch(self.source, "nms_select", (groups, 1, 1), threads, (*inputs, tiles, kept, count, score)),
        ]


# ``RoIPool``: the paper's max pooling of RoIs; the kernels are in ``kernels/roi_pool.cu``.


THREADS = 256
_KERNELS = {"float32": "roi_pool_f32", "float16": "roi_pool_f16"}


class RoIPool:
    """features [B, C, H, W] and rois [B, R, 4] xyxy in image pixels -> [B * R, C, S, S].

    The same numbers as ONNX's MaxRoiPool and torchvision's roi_pool. Features are float32 or float16,
    RoIs float32. ``output_size`` is S; ``spatial_scale`` takes image pixels to feature pixels.
    """

    name: ClassVar[str] = "RoIPool"
    attributes: ClassVar[dict[str, type]] = {"output_size": int, "spatial_scale": float}
    input_count: ClassVar[int] = 2
    output_like: ClassVar[int] = 0
    source: ClassVar[str] = "roi_pool"
    kernels: ClassVar[tuple[str, ...]] = ("roi_pool_f32", "roi_pool_f16")

    def __init__(self, *, output_size: int, spatial_scale: float) -> None:
        if output_size < 1 or not spatial_scale > 0.0:
            raise ArtefactError(
                f"RoIPool: output_size is {output_size} and spatial_scale {spatial_scale}; "
                "expected at least 1 and above 0"
            )
        self.output_size, self.spatial_scale = output_size, spatial_scale

    def accepts(self, position: int, types: Sequence[str]) -> bool:
        if position == 0:
            return types[0] in _KERNELS
        return types[position] == ("float32" if position == 1 else types[0])

    def output_shape(self, shapes: Sequence[Sequence[Any]], product: Callable[[Any, Any], Any]) -> list[Any]:
        (_, channels, _, _), (images, rois, _) = shapes
        return [product(images, rois), channels, self.output_size, self.output_size]

    def workspace_bytes(self, shapes: Sequence[Shape]) -> int:
        return 0

    def launches(self, call: Call) -> list[Launch]:
        (_, channels, height, width), (images, rois, _) = call.shapes
        total = images * rois * channels * self.output_size**2
        if total == 0:
            return []
        arguments = (
            *(ctypes.c_void_p(address) for address in (*call.inputs, call.output)),
            *(ctypes.c_int(value) for value in (rois, channels, height, width, self.output_size)),
            ctypes.c_float(self.spatial_scale),
            ctypes.c_longlong(total),
        )
        return [
            Launch(self.source, _KERNELS[call.types[0]], (-(-total // THREADS), 1, 1), THREADS, arguments)
        ]
