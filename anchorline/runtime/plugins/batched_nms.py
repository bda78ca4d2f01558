"""``BatchedNMS``: greedy NMS of G groups of N boxes; the kernels are in ``kernels/nms.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from anchorline.runtime.errors import ArtefactError
from anchorline.runtime.plugins.op import Call, Launch, Shape

MAX_BOXES = 8192  # of a group: the words of bits that nms_select keeps in shared memory
MAX_GROUPS = 65535  # a grid's third side
TILE = 64  # NMS_TILE, the bits of a word
SMALL = 256  # NMS_SMALL: up to here one kernel without scratch memory
_WORD_BYTES = 8
_MOST_THREADS = 1024


class BatchedNMS:
    """boxes [G, N, 4] xyxy and scores [G, N] in falling order, float32 -> scores [G, N], suppressed ones -1.

    What counts and what is suppressed is defined in ``anchorline/train/ops.py`` and exact to the bit.
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
