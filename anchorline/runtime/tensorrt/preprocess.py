"""Frames onto the canvas by one kernel each, on the GPU; the same result as ``canvas.to_canvas``."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from anchorline.runtime.canvas import Placement
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.tensorrt.cuda.interface import Cuda
from anchorline.runtime.tensorrt.frames import DeviceFrame
from anchorline.runtime.tensorrt.plugins.ops import Launch

SOURCE = "preprocess"
KERNELS = tuple(f"{pixels}_to_{dtype}" for pixels in ("bgr", "nv12") for dtype in ("uint8", "float32"))
_THREADS = 256


def resizes_as(contract: Contract) -> bool:
    """Whether the kernels do the contract's resize: not the antialiased one (``canvas.to_canvas``)."""
    return contract.resize.interpolation == "bilinear"


def canvas_launch(
    frame: DeviceFrame, placement: Placement, contract: Contract, canvas: int, image_size: int
) -> Launch:
    """The kernel that lays ``frame`` on the canvas at address ``canvas`` and notes its valid size.

    ``image_size`` is the address of two float32. uint8 canvases are within one grey level of OpenCV's
    resize, float32 ones equal ``float_resize``. Raises ``SettingsError`` where ``resizes_as`` says no.
    """
    if not resizes_as(contract):
        raise SettingsError(
            f"resize.interpolation is {contract.resize.interpolation!r}, which the GPU's kernels do not do; "
            "lay the frames onto the canvas with canvas.to_canvas"
        )
    height, width = contract.canvas
    pixels = "nv12" if frame.chroma else "bgr"
    arguments = (
        ctypes.c_void_p(frame.address),
        ctypes.c_void_p(frame.chroma),
        ctypes.c_longlong(frame.pitch),
        ctypes.c_int(frame.size[0]),
        ctypes.c_int(frame.size[1]),
        ctypes.c_void_p(canvas),
        ctypes.c_int(width),
        ctypes.c_void_p(image_size),
        ctypes.c_int(placement.valid[0]),
        ctypes.c_int(placement.valid[1]),
        ctypes.c_double(_step(placement, contract, 0)),
        ctypes.c_double(_step(placement, contract, 1)),
    )
    grid = (-(-width // _THREADS), height, 1)
    return Launch(SOURCE, f"{pixels}_to_{contract.input_dtype}", grid, _THREADS, arguments)


class GpuPreprocessor:
    """The kernels of one GPU, loaded when they are first wanted."""

    def __init__(self, cuda: Cuda, contract: Contract) -> None:
        self._cuda, self._contract = cuda, contract
        self._kernels: dict[str, Any] = {}

    def __call__(
        self, frame: DeviceFrame, placement: Placement, canvas: int, image_size: int, stream: int
    ) -> None:
        """Queue the kernel for one frame."""
        item = canvas_launch(frame, placement, self._contract, canvas, image_size)
        if item.kernel not in self._kernels:
            self._kernels[item.kernel] = self._cuda.load_kernel(item.source, item.kernel)
        self._cuda.launch(self._kernels[item.kernel], item.grid, item.threads, item.arguments, stream)


def _step(placement: Placement, contract: Contract, axis: int) -> float:
    """Source pixels for one canvas pixel: in single precision for float32, as in PyTorch."""
    source, valid = placement.source[axis], placement.valid[axis]
    if contract.input_dtype == "float32":
        return float(np.float32(source) / np.float32(valid))
    return source / valid
