"""``RoIPool``: the paper's max pooling of RoIs; the kernels are in ``kernels/roi_pool.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from anchorline.runtime.errors import ArtefactError
from anchorline.runtime.plugins.op import Call, Launch, Shape

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
