"""Frames that lie on the GPU already, and NV12 frames as video decoders deliver them.

A device frame is anything with ``__dlpack__`` or ``__cuda_array_interface__``: tensors and arrays of
PyTorch, CuPy, Numba, pycuda, cuda.core, on the GPU or in pinned memory. It is read where it lies and must not
be changed until its detections have come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.errors import FrameError
from anchorline.runtime.tensorrt.cuda.interface import LEGACY_STREAM
from anchorline.runtime.tensorrt.dlpack import on_cuda, read_dlpack

_BGR = "Expected a device frame as uint8 BGR of shape [H, W, 3]"
_NV12 = "Expected an NV12 frame as uint8 of shape [H * 3 / 2, W] with even H and W"


@dataclass(frozen=True)
class Nv12:
    """A frame in NV12: uint8 [H * 3 / 2, W], luma over interleaved chroma, on the host or on the GPU.

    The colours are ITU-R BT.601 in its limited range, as in OpenCV's ``COLOR_YUV2BGR_NV12``.
    """

    pixels: Any


@dataclass(frozen=True)
class DeviceFrame:
    """A frame in device memory. ``pitch`` is the bytes from row to row; ``chroma`` is 0 for BGR.

    ``stream`` is the stream it becomes ready on, where it says so; ``owner`` keeps its memory alive.
    """

    address: int
    chroma: int
    pitch: int
    size: tuple[int, int]
    device: int | None
    stream: int | None
    owner: Any


def is_device_frame(frame: object) -> bool:
    """Whether ``frame``, or the array in an ``Nv12``, lies on a GPU by its own account."""
    pixels = frame.pixels if isinstance(frame, Nv12) else frame
    if isinstance(pixels, np.ndarray):
        return False
    return on_cuda(pixels) or getattr(pixels, "__cuda_array_interface__", None) is not None


def host_bgr(frame: Nv12) -> NDArray[np.uint8]:
    """An NV12 frame of the host as BGR [H, W, 3]."""
    check_host_nv12(frame)
    pixels = frame.pixels
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_YUV2BGR_NV12), np.uint8)


def check_host_nv12(frame: Nv12) -> tuple[int, int]:
    """Height and width of an NV12 frame of the host; ``FrameError`` for what is none."""
    if not isinstance(frame.pixels, np.ndarray):
        raise FrameError(f"{_NV12}, got a {type(frame.pixels).__name__}")
    _check_nv12(frame.pixels.shape, str(frame.pixels.dtype))
    return frame.pixels.shape[0] * 2 // 3, frame.pixels.shape[1]


def read_device_frame(frame: Any, stream: int) -> DeviceFrame:
    """Where ``frame`` lies, for work to be queued on ``stream``; ``FrameError`` for what is no frame."""
    pixels = frame.pixels if isinstance(frame, Nv12) else frame
    address, shape, strides, dtype, device, ready_on, owner = (
        _from_dlpack(pixels, stream) if on_cuda(pixels) else _from_interface(pixels)
    )
    # A side of 1 has no next one, so libraries write any step there; rows and pixels are never nearer.
    strides = tuple(
        dense if side == 1 else step
        for side, step, dense in zip(shape, strides, _dense(shape, np.dtype(np.uint8)), strict=True)
    )
    if isinstance(frame, Nv12):
        _check_nv12(shape, dtype)
        height, width = shape[0] * 2 // 3, shape[1]
        tight, expectation = strides[1] == 1 and strides[0] >= width, _NV12
        chroma = address + height * strides[0]
    else:
        _check_bgr(shape, dtype)
        height, width = shape[:2]
        tight, expectation = strides[1:] == (3, 1) and strides[0] >= 3 * width, _BGR
        chroma = 0
    if not tight:
        raise FrameError(
            f"{expectation} with pixels side by side and rows in order, got strides {list(strides)} bytes; "
            "make it contiguous first"
        )
    return DeviceFrame(address, chroma, strides[0], (height, width), device, ready_on, owner)


Read = tuple[int, tuple[int, ...], tuple[int, ...], str, "int | None", "int | None", Any]


def _from_dlpack(pixels: Any, stream: int) -> Read:
    """The library makes ``stream`` wait for the tensor, so there is no stream left to wait for."""
    tensor = read_dlpack(pixels, stream)
    return tensor.address, tensor.shape, tensor.strides, tensor.dtype, tensor.device, None, tensor.capsule


def _from_interface(pixels: Any) -> Read:
    """CUDA array interface, versions 2 and 3: ``stream`` None means ready; version 2 does not say."""
    told = pixels.__cuda_array_interface__
    try:
        shape = tuple(int(side) for side in told["shape"])
        dtype = np.dtype(told["typestr"])
        strides = told.get("strides")
        steps = tuple(int(step) for step in (strides if strides is not None else _dense(shape, dtype)))
        address = int(told["data"][0])
        stream = told["stream"] if int(told.get("version", 2)) >= 3 and "stream" in told else LEGACY_STREAM
        ready_on = None if stream is None else int(stream)
        if len(steps) != len(shape):
            raise ValueError(f"{len(steps)} strides for {len(shape)} sides")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FrameError(
            f"the frame's __cuda_array_interface__ cannot be read ({error!r}); hand over DLPack, or mend it"
        ) from None
    if ready_on is not None and ready_on < 1:
        raise FrameError(
            f"the frame's __cuda_array_interface__ says stream {ready_on}, which is ambiguous; expected None "
            "(ready), 1 (legacy default), 2 (the thread's default) or a stream's handle"
        )
    return address, shape, steps, str(dtype), None, ready_on, pixels


def _dense(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...]:
    steps = [dtype.itemsize]
    for side in shape[:0:-1]:
        steps.append(steps[-1] * side)
    return tuple(reversed(steps))


def _check_bgr(shape: tuple[int, ...], dtype: str) -> None:
    if dtype != "uint8" or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise FrameError(f"{_BGR}, got {dtype} {list(shape)}; convert it on the GPU first")


def _check_nv12(shape: tuple[int, ...], dtype: str) -> None:
    fits = len(shape) == 2 and 0 not in shape and shape[0] % 3 == 0 and shape[1] % 2 == 0
    if dtype != "uint8" or not fits:
        raise FrameError(f"{_NV12}, got {dtype} {list(shape)}")
