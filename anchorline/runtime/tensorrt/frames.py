"""Frames on a GPU: read where they lie, staged when they are large, laid onto the canvas by a kernel each.

A device frame is anything with ``__dlpack__`` or ``__cuda_array_interface__``: tensors and arrays of
PyTorch, CuPy, Numba, pycuda, cuda.core, on the GPU or in pinned memory. It must not be changed until its
detections have come. The counterpart of ``canvas.Preprocessor``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anchorline.runtime.canvas import Placement
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import FrameError, SettingsError, one_line
from anchorline.runtime.nv12 import NV12_EXPECTATION, Nv12, frame_size, nv12_size
from anchorline.runtime.tensorrt.cuda import LEGACY_STREAM, PER_THREAD_STREAM, Cuda, PinnedBuffer
from anchorline.runtime.tensorrt.kernels import Launch

_BGR = "Expected a device frame as uint8 BGR of shape [H, W, 3]"

# kDLCPU, kDLCUDA, kDLCUDAHost (pinned) and kDLCUDAManaged of dlpack.h
_CPU, _CUDA, _CUDA_HOST, _CUDA_MANAGED = 1, 2, 3, 13
_READABLE = (_CUDA, _CUDA_HOST, _CUDA_MANAGED)  # by a kernel
_MAJOR = 1  # of dlpack.h, which we ask for: earlier ones know no tensors that are read only
_VERSIONED_BYTES = 32  # of DLManagedTensorVersioned before its DLTensor: version, context, deleter, flags
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}

_THREADS = 256

_REMEMBERED = 1024  # addresses of device frames whose device is known; decoders use a few over and over
_STAGING_REMEDY = "give smaller frames, smaller batches, or run less at once (workers, in_flight)"


@dataclass(frozen=True)
class DeviceFrame:
    """A frame in device memory. ``pitch`` is the bytes from row to row; ``chroma`` is 0 for BGR.

    ``stream`` is the stream it becomes ready on, where it says so; ``owner`` keeps its memory alive;
    ``colours`` are those of ``Nv12``.
    """

    address: int
    chroma: int
    pitch: int
    size: tuple[int, int]
    device: int | None
    stream: int | None
    owner: Any
    colours: str = ""


# What a library tells of an array: its address, shape, strides in bytes of uint8, and type, and the frame's
# device (pinned memory is of none), stream and owner.
_Array = tuple[int, tuple[int, ...], tuple[int, ...], str, int | None, int | None, Any]


def is_device_frame(frame: object) -> bool:
    """Whether ``frame``, or the array in an ``Nv12``, lies on a GPU by its own account."""
    pixels = frame.pixels if isinstance(frame, Nv12) else frame
    if isinstance(pixels, np.ndarray):
        return False
    return _speaks_dlpack(pixels) or getattr(pixels, "__cuda_array_interface__", None) is not None


def read_device_frame(frame: Any, stream: int) -> DeviceFrame:
    """Where ``frame`` lies, for work to be queued on ``stream``; ``FrameError`` for what is no frame."""
    pixels = frame.pixels if isinstance(frame, Nv12) else frame
    read = _read_dlpack(pixels, stream) if _speaks_dlpack(pixels) else _read_interface(pixels)
    address, shape, steps, dtype, device, ready_on, owner = read
    # A side of 1 has no next one, so libraries write any step there; rows and pixels are never nearer.
    tight_steps = _dense(shape)
    strides = [d if n == 1 else step for n, step, d in zip(shape, steps, tight_steps, strict=True)]
    if isinstance(frame, Nv12):
        height, width = nv12_size(shape, dtype)
        tight = strides[1] == 1 and strides[0] >= width
        expectation, chroma = NV12_EXPECTATION, address + height * strides[0]
    else:
        if dtype != "uint8" or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise FrameError(f"{_BGR}, got {dtype} {list(shape)}; convert it on the GPU first")
        height, width = shape[:2]
        tight = strides[1:] == [3, 1] and strides[0] >= 3 * width
        expectation, chroma = _BGR, 0
    if not tight:
        raise FrameError(
            f"{expectation} with pixels side by side and rows in order, got strides {strides} bytes; "
            "make it contiguous first"
        )
    colours = frame.colours if isinstance(frame, Nv12) else ""
    return DeviceFrame(address, chroma, strides[0], (height, width), device, ready_on, owner, colours)


def _read_interface(pixels: Any) -> _Array:
    """CUDA array interface, versions 2 and 3: ``stream`` None means ready; version 2 does not say."""
    told = pixels.__cuda_array_interface__
    try:
        shape = tuple(int(side) for side in told["shape"])
        dtype = np.dtype(told["typestr"])
        strides = told.get("strides")
        steps = _dense(shape, dtype.itemsize) if strides is None else tuple(int(step) for step in strides)
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


def _dense(shape: tuple[int, ...], step: int = 1) -> tuple[int, ...]:
    return tuple(step * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


# DLPack in plain Python (dlpack.h, versions 0 and 1).


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


def _speaks_dlpack(tensor: Any) -> bool:
    """Whether a tensor says through DLPack that it lies where an NVIDIA GPU reads it."""
    try:
        return tensor.__dlpack_device__()[0] in _READABLE
    except Exception:  # not there, or a library's own way to say no
        return False


def _read_dlpack(tensor: Any, stream: int) -> _Array:
    """The tensor's memory, ready to be read by work queued on ``stream`` from now on.

    Its own library sees to that, so there is no stream left to wait for. The capsule stays unconsumed and is
    the owner: its destructor gives the memory back.
    """
    try:
        announced = tensor.__dlpack_device__()[0]
        # Memory of the host is on no stream: PyTorch refuses one there.
        asked = None if announced == _CUDA_HOST else stream
        try:
            capsule = tensor.__dlpack__(stream=asked, max_version=(_MAJOR, 0))
        except TypeError:  # from before there were versions
            capsule = tensor.__dlpack__(stream=asked)
        if _is_named(capsule, b"dltensor_versioned"):
            address = _pointer_of(capsule, b"dltensor_versioned")
            major = ctypes.c_uint32.from_address(address).value
            if major != _MAJOR:
                raise ValueError(f"version {major} of DLPack; versions 0 and {_MAJOR} are known")
            address += _VERSIONED_BYTES
        else:
            address = _pointer_of(capsule, b"dltensor")
        found = _Tensor.from_address(address)
        # What PyTorch announces as pinned memory is the CPU's in its capsule; the driver is asked about it.
        pinned = announced == _CUDA_HOST and found.device_type in (_CPU, _CUDA_HOST)
        if not pinned and found.device_type not in _READABLE:
            raise ValueError(f"it lies on a device of type {found.device_type}")
    except Exception as error:
        raise FrameError(
            f"a {type(tensor).__name__} cannot be read through DLPack ({one_line(error)}); hand over a plain "
            "tensor"
        ) from None
    shape = tuple(found.shape[: found.ndim])
    strides = tuple(found.strides[: found.ndim]) if found.strides else _dense(shape)
    dtype = f"{_CODES.get(found.code, 'type ' + str(found.code))}{found.bits}"
    if found.lanes != 1:
        dtype += f"x{found.lanes}"
    start = int(found.data or 0) + int(found.byte_offset)
    device = None if pinned or found.device_type == _CUDA_HOST else int(found.device_id)
    return start, shape, strides, dtype, device, None, capsule


# Onto the canvas.


def resizes_as(contract: Contract) -> bool:
    """Whether the kernels do the contract's resize: not the antialiased one (``canvas.to_canvas``)."""
    return contract.resize.interpolation == "bilinear"


@dataclass(frozen=True)
class DeviceCanvas:
    """The canvas of one image in device memory: the address of its pixels [height, width, 3], that of the two
    float32 that say which part of it is valid, and its ``size`` (height, width)."""

    pixels: int
    valid_size: int
    size: tuple[int, int]


def canvas_launch(
    frame: DeviceFrame, placement: Placement, contract: Contract, canvas: DeviceCanvas
) -> Launch:
    """The kernel that lays ``frame`` on the ``canvas`` and notes its valid size.

    uint8 canvases are within one grey level of OpenCV's
    resize, float32 ones equal ``resize.resize_float``. Raises ``SettingsError`` where ``resizes_as`` says no.
    """
    if not resizes_as(contract):
        raise SettingsError(
            f"resize.interpolation is {contract.resize.interpolation!r}, which the GPU's kernels do not do; "
            "lay the frames onto the canvas with canvas.to_canvas"
        )
    height, width = canvas.size
    # Source pixels for one canvas pixel: in single precision for float32, as in PyTorch.
    number = np.float32 if contract.input_dtype == "float32" else np.float64
    steps = (np.array(placement.source, number) / np.array(placement.valid, number)).tolist()
    arguments = (
        ctypes.c_void_p(frame.address),
        ctypes.c_void_p(frame.chroma),
        ctypes.c_longlong(frame.pitch),
        *map(ctypes.c_int, frame.size),
        ctypes.c_void_p(canvas.pixels),
        ctypes.c_int(width),
        ctypes.c_void_p(canvas.valid_size),
        *map(ctypes.c_int, placement.valid),
        *map(ctypes.c_double, steps),
    )
    kernel = f"{f'nv12_{frame.colours}' if frame.chroma else 'bgr'}_to_{contract.input_dtype}"
    return Launch("preprocess", kernel, (-(-width // _THREADS), height, 1), _THREADS, arguments)


class FrameIntake:
    """Frames on their way to a lane: what they wait for, staging of large host frames, the kernels.

    The staging memory, pinned and on the device, grows to the largest frame of each place in a batch.
    """

    def __init__(self, cuda: Cuda, contract: Contract) -> None:
        self._cuda, self._contract = cuda, contract
        self._staging: dict[int, tuple[PinnedBuffer, int]] = {}
        self._device_of = functools.lru_cache(_REMEMBERED)(cuda.device_of)
        self._event: int | None = None
        self._load_kernel = functools.cache(cuda.load_kernel)

    def read(
        self, frames: Sequence[Any], own: int, named: int | None, follow: bool
    ) -> tuple[list[DeviceFrame | None], int]:
        """The device frames among ``frames`` (``None`` for others), and the stream to work on.

        With ``follow`` that is the stream ``named`` by the caller, or else the one that all device frames
        come from, so that nobody has to wait. Otherwise it is ``own``, made to wait for those streams. Never
        a thread's own default stream, which no other thread could wait for. Raises ``FrameError``.
        """
        stream = named if follow and named is not None and named != PER_THREAD_STREAM else own
        found = [read_device_frame(frame, stream) if is_device_frame(frame) else None for frame in frames]
        there = [frame for frame in found if frame is not None]
        for frame in there:
            device = self._device_of(frame.address) if frame.device is None else frame.device
            if device is None:
                raise FrameError("Expected a device frame, got one whose address CUDA does not know")
            if device != self._cuda.device:
                raise FrameError(
                    f"Expected a device frame on GPU {self._cuda.device}, got one on GPU {device}; copy it "
                    f"there, or open the detector with device={device}"
                )
        origins = {frame.stream for frame in there}
        if follow and named is None and len(origins) == 1:
            (only,) = origins
            if only is not None and only != PER_THREAD_STREAM:
                return found, only
        for origin in origins | {named}:
            if origin is not None and origin != stream:
                if self._event is None:
                    self._event = self._cuda.create_event()
                self._cuda.record(self._event, origin)
                self._cuda.wait(stream, self._event)
        return found, stream

    def resized_by_cpu(self, frame: Any, canvas: tuple[int, int]) -> bool:
        """Whether a frame of the host is resized before the copy: where the GPU cannot, and up to the size
        of the canvas, but for NV12 (half the bytes)."""
        small = not isinstance(frame, Nv12) and frame.shape[0] * frame.shape[1] <= math.prod(canvas)
        return small or not resizes_as(self._contract)

    def stage(self, index: int, frame: Any, stream: int) -> DeviceFrame:
        """Copy a host frame as it is into pinned memory, and queue the copy to the device."""
        pixels = frame.pixels if isinstance(frame, Nv12) else frame
        pinned, address = self._room(index, pixels.nbytes)
        np.copyto(pinned.array[: pixels.nbytes].reshape(pixels.shape), pixels)
        self._cuda.copy_in(address, pinned, pixels.nbytes, stream)
        height, width = frame_size(frame)
        pitch = width if isinstance(frame, Nv12) else 3 * width
        chroma = address + height * pitch if isinstance(frame, Nv12) else 0
        colours = frame.colours if isinstance(frame, Nv12) else ""
        return DeviceFrame(address, chroma, pitch, (height, width), self._cuda.device, None, frame, colours)

    def to_canvas(self, frame: DeviceFrame, placement: Placement, canvas: DeviceCanvas, stream: int) -> None:
        """Queue the kernel for one frame; see ``canvas_launch``. It is loaded when it is first wanted."""
        item = canvas_launch(frame, placement, self._contract, canvas)
        self._cuda.launch(self._load_kernel(item.source, item.kernel), item, stream)

    def close(self) -> None:
        """Free the staging memory."""
        with contextlib.ExitStack() as stack:
            if self._event is not None:
                stack.callback(self._cuda.destroy_event, self._event)
            for index in list(self._staging):
                stack.callback(self._release, index)

    def _room(self, index: int, size: int) -> tuple[PinnedBuffer, int]:
        """Pinned and device memory for a frame of ``size`` bytes."""
        staging = self._staging.get(index)
        if staging is not None and len(staging[0].array) >= size:
            return staging
        self._release(index)
        address = self._cuda.allocate(size, f"a frame of {size} bytes", _STAGING_REMEDY)
        try:
            pinned = self._cuda.allocate_pinned(size)
        except BaseException:
            self._cuda.free(address)
            raise
        self._staging[index] = pinned, address
        return pinned, address

    def _release(self, index: int) -> None:
        if index in self._staging:
            pinned, address = self._staging.pop(index)
            self._cuda.free(address)
            self._cuda.free_pinned(pinned)
