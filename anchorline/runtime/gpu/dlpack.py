"""Reading a tensor of another library through DLPack, in plain Python (dlpack.h before version 1)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from anchorline.runtime.errors import FrameError

CUDA, CUDA_MANAGED = 2, 13  # kDLCUDA and kDLCUDAManaged: memory that a kernel can read
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}


class _Tensor(ctypes.Structure):
    """``DLTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


@dataclass(frozen=True)
class DlpackTensor:
    """``strides`` count elements; ``capsule`` keeps the memory alive."""

    address: int
    device: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    capsule: Any


def on_cuda(tensor: Any) -> bool:
    """Whether a tensor says through DLPack that it lies on an NVIDIA GPU."""
    try:
        return tensor.__dlpack_device__()[0] in (CUDA, CUDA_MANAGED)
    except Exception:  # not there, or a library's own way to say no
        return False


def read_dlpack(tensor: Any, stream: int) -> DlpackTensor:
    """The tensor's memory, ready to be read by work queued on ``stream`` from now on.

    Its own library sees to that. The capsule stays unconsumed: its destructor gives the memory back.
    """
    try:
        capsule = tensor.__dlpack__(stream=stream)
        address = _pointer_of(capsule, b"dltensor")
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FrameError(f"a {type(tensor).__name__} cannot be read through DLPack ({reason})") from None
    found = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
    shape = tuple(found.shape[: found.ndim])
    strides = tuple(found.strides[: found.ndim]) if found.strides else _dense(shape)
    dtype = f"{_CODES.get(found.code, 'type ' + str(found.code))}{found.bits}"
    if found.lanes != 1:
        dtype += f"x{found.lanes}"
    start = int(found.data or 0) + int(found.byte_offset)
    return DlpackTensor(start, int(found.device_id), dtype, shape, strides, capsule)


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= side
    return tuple(reversed(strides))
