"""Reading a tensor of another library through DLPack, in plain Python (dlpack.h, versions 0 and 1)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from anchorline.runtime.io.errors import FrameError

CUDA, CUDA_HOST, CUDA_MANAGED = 2, 3, 13  # kDLCUDA, kDLCUDAHost (pinned) and kDLCUDAManaged
READABLE = (CUDA, CUDA_HOST, CUDA_MANAGED)  # by a kernel
_MAJOR = 1  # of dlpack.h, which we ask for: earlier ones know no tensors that are read only
_VERSIONED_BYTES = 32  # of DLManagedTensorVersioned before its DLTensor: version, context, deleter, flags
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
_is_named = ctypes.pythonapi.PyCapsule_IsValid
_is_named.restype = ctypes.c_int
_is_named.argtypes = [ctypes.py_object, ctypes.c_char_p]


@dataclass(frozen=True)
class DlpackTensor:
    """``strides`` count elements; ``capsule`` keeps the memory alive; pinned memory is of no ``device``."""

    address: int
    device: int | None
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    capsule: Any


def on_cuda(tensor: Any) -> bool:
    """Whether a tensor says through DLPack that it lies where an NVIDIA GPU reads it."""
    try:
        return tensor.__dlpack_device__()[0] in READABLE
    except Exception:  # not there, or a library's own way to say no
        return False


def read_dlpack(tensor: Any, stream: int) -> DlpackTensor:
    """The tensor's memory, ready to be read by work queued on ``stream`` from now on.

    Its own library sees to that. The capsule stays unconsumed: its destructor gives the memory back.
    """
    try:
        # Memory of the host is on no stream: PyTorch refuses one there.
        capsule = _exported(tensor, None if tensor.__dlpack_device__()[0] == CUDA_HOST else stream)
        found = _tensor_in(capsule)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise FrameError(
            f"a {type(tensor).__name__} cannot be read through DLPack ({reason}); hand over a plain tensor"
        ) from None
    shape = tuple(found.shape[: found.ndim])
    strides = tuple(found.strides[: found.ndim]) if found.strides else _dense(shape)
    dtype = f"{_CODES.get(found.code, 'type ' + str(found.code))}{found.bits}"
    if found.lanes != 1:
        dtype += f"x{found.lanes}"
    start = int(found.data or 0) + int(found.byte_offset)
    device = None if found.device_type == CUDA_HOST else int(found.device_id)
    return DlpackTensor(start, device, dtype, shape, strides, capsule)


def _exported(tensor: Any, stream: int | None) -> Any:
    try:
        return tensor.__dlpack__(stream=stream, max_version=(_MAJOR, 0))
    except TypeError:  # from before there were versions
        return tensor.__dlpack__(stream=stream)


def _tensor_in(capsule: Any) -> _Tensor:
    """The ``DLTensor`` of a capsule of either version; ``ValueError`` for others."""
    if _is_named(capsule, b"dltensor_versioned"):
        address = _pointer_of(capsule, b"dltensor_versioned")
        major = ctypes.c_uint32.from_address(address).value
        if major != _MAJOR:
            raise ValueError(f"version {major} of DLPack; versions 0 and {_MAJOR} are known")
        address += _VERSIONED_BYTES
    else:
        address = _pointer_of(capsule, b"dltensor")
    found = _Tensor.from_address(address)
    if found.device_type not in READABLE:
        raise ValueError(f"it lies on a device of type {found.device_type}")
    return found


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= side
    return tuple(reversed(strides))
