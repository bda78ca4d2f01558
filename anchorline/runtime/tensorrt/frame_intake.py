"""Frames on their way to a GPU lane: where they lie, what they wait for, staging for large host frames."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from anchorline.runtime.io.errors import FrameError
from anchorline.runtime.tensorrt.cuda.interface import PER_THREAD_STREAM, Cuda, PinnedBuffer
from anchorline.runtime.tensorrt.frames import (
    DeviceFrame,
    Nv12,
    check_host_nv12,
    is_device_frame,
    read_device_frame,
)

_REMEMBERED = 1024  # addresses of device frames whose device is known; decoders use a few over and over
_STAGING_REMEDY = "give smaller frames, smaller batches, or run less at once (workers, in_flight)"


@dataclass
class _Staging:
    """Room for one frame as it is, in pinned and in device memory."""

    pinned: PinnedBuffer
    address: int


class FrameIntake:
    """A context manager that owns the staging memory, which grows to the largest frame of each place."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._staging: dict[int, _Staging] = {}
        self._devices: dict[int, int | None] = {}
        self._event: int | None = None

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
            self._check_device(frame)
        origins = {frame.stream for frame in there}
        if follow and named is None and len(origins) == 1:
            (only,) = origins
            if only is not None and only != PER_THREAD_STREAM:
                return found, only
        for origin in origins | {named}:
            if origin is not None and origin != stream:
                self._wait(stream, origin)
        return found, stream

    def stage(self, index: int, frame: Any, stream: int) -> DeviceFrame:
        """Copy a host frame as it is into pinned memory, and queue the copy to the device."""
        pixels = frame.pixels if isinstance(frame, Nv12) else frame
        staging = self._room(index, pixels.nbytes)
        np.copyto(staging.pinned.array[: pixels.nbytes].reshape(pixels.shape), pixels)
        self._cuda.copy_in(staging.address, staging.pinned, pixels.nbytes, stream)
        height, width = self.host_size(frame)
        pitch = width if isinstance(frame, Nv12) else 3 * width
        chroma = staging.address + height * pitch if isinstance(frame, Nv12) else 0
        return DeviceFrame(staging.address, chroma, pitch, (height, width), self._cuda.device, None, frame)

    @staticmethod
    def host_size(frame: Any) -> tuple[int, int]:
        """Height and width of a host frame; ``FrameError`` for an ``Nv12`` that is none."""
        if isinstance(frame, Nv12):
            return check_host_nv12(frame)
        return frame.shape[0], frame.shape[1]

    @staticmethod
    def is_large(frame: Any, canvas: tuple[int, int]) -> bool:
        """Whether the GPU should resize it: where it is larger than the canvas, or NV12 (half the bytes)."""
        return isinstance(frame, Nv12) or frame.shape[0] * frame.shape[1] > canvas[0] * canvas[1]

    def _room(self, index: int, size: int) -> _Staging:
        staging = self._staging.get(index)
        if staging is not None and len(staging.pinned.array) >= size:
            return staging
        self._release(index)
        address = self._cuda.allocate(size, f"a frame of {size} bytes", _STAGING_REMEDY)
        try:
            pinned = self._cuda.allocate_pinned(size)
        except BaseException:
            self._cuda.free(address)
            raise
        self._staging[index] = _Staging(pinned, address)
        return self._staging[index]

    def _release(self, index: int) -> None:
        staging = self._staging.pop(index, None)
        if staging is not None:
            self._cuda.free(staging.address)
            self._cuda.free_pinned(staging.pinned)

    def _wait(self, stream: int, origin: int) -> None:
        if self._event is None:
            self._event = self._cuda.create_event()
        self._cuda.record(self._event, origin)
        self._cuda.wait(stream, self._event)

    def _check_device(self, frame: DeviceFrame) -> None:
        device = frame.device if frame.device is not None else self._device_of(frame.address)
        if device is None:
            raise FrameError("Expected a device frame, got one whose address CUDA does not know")
        if device != self._cuda.device:
            raise FrameError(
                f"Expected a device frame on GPU {self._cuda.device}, got one on GPU {device}; copy it "
                f"there, or open the detector with device={device}"
            )

    def _device_of(self, address: int) -> int | None:
        if address not in self._devices:
            if len(self._devices) >= _REMEMBERED:
                self._devices.clear()
            self._devices[address] = self._cuda.device_of(address)
        return self._devices[address]

    def __enter__(self) -> FrameIntake:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            if self._event is not None:
                stack.callback(self._cuda.destroy_event, self._event)
            for index in list(self._staging):
                stack.callback(self._release, index)
