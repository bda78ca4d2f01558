"""Frames and streams of other libraries, by the letter of DLPack and of the CUDA array interface."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import FrameError
from anchorline.runtime.tensorrt.cuda import GpuOptions
from anchorline.runtime.tensorrt.frames import _Tensor

PIXELS = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
LEGACY, PER_THREAD = 1, 2
CPU, CUDA, PINNED, MANAGED, ROCM = 1, 2, 3, 13, 10
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_set_name = ctypes.pythonapi.PyCapsule_SetName
_set_name.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Versioned(ctypes.Structure):
    """``DLManagedTensorVersioned`` of dlpack.h 1.0."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


class NewArray:
    """A tensor as libraries export it since DLPack 1.0."""

    def __init__(self, address: int, pixels: np.ndarray, device: int = CUDA, **told: Any) -> None:
        self.device, self.asked, self.major = device, [], told.get("major", 1)
        self.shape = (ctypes.c_int64 * pixels.ndim)(*pixels.shape)
        steps = told.get("strides", [side // pixels.itemsize for side in pixels.strides])
        self.strides = (ctypes.c_int64 * pixels.ndim)(*steps)
        offset = told.get("offset", 0)
        tensor = _Tensor(
            address - offset,
            told.get("inside", device),
            0,
            pixels.ndim,
            1,
            8,
            1,
            self.shape,
            self.strides,
            offset,
        )
        read_only = 1
        self.managed = Versioned(self.major, 0, None, None, read_only, tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, *, stream: int | None = None, max_version: tuple[int, int] | None = None) -> Any:
        if max_version is None:
            raise BufferError("a read-only tensor needs version 1.0")
        assert self.device != PINNED or stream is None  # as in PyTorch: the host has no streams
        self.asked.append((stream, max_version))
        return _new_capsule(ctypes.addressof(self.managed), b"dltensor_versioned", None)


@pytest.fixture
def detector(gpu: Any, make_engine: Callable[..., Path]) -> Iterator[Detector]:
    with Detector(make_engine()) as opened:
        yield opened


def check_same(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-5)


# DLPack


@pytest.mark.parametrize("device", [CUDA, MANAGED])
def test_a_versioned_read_only_tensor(device: int, gpu: Any, detector: Detector) -> None:
    address = gpu.driver.put(PIXELS)
    tensor = NewArray(address, PIXELS, device, offset=64)
    check_same(detector(tensor), detector(PIXELS))
    ((stream, version),) = tensor.asked
    assert stream > PER_THREAD
    assert version == (1, 0)
    gpu.driver.remove(address)


def test_a_tensor_in_pinned_memory_is_read_where_it_lies(gpu: Any, detector: Detector) -> None:
    with detector._backend._cuda.current():
        (_, address) = gpu.driver.cuMemHostAlloc(PIXELS.nbytes, 0)
        gpu.driver.pinned[address][:] = PIXELS.reshape(-1)
        expected = detector(PIXELS)
        for frame in (NewArray(address, PIXELS, PINNED), gpu.frame(PIXELS, data=(address, True))):
            gpu.driver.calls.clear()
            check_same(detector(frame), expected)
            assert "cuMemcpyHtoDAsync" not in gpu.driver.names()
        frame.free()
        gpu.driver.cuMemFreeHost(address)


def test_a_pinned_tensor_of_pytorch_is_read_where_it_lies(
    gpu: Any, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It announces pinned memory and its capsule says the CPU, by PyTorch's own code but for the pinning."""
    torch = pytest.importorskip("torch")
    expected = detector(PIXELS)
    with detector._backend._cuda.current():
        (_, address) = gpu.driver.cuMemHostAlloc(PIXELS.nbytes, 0)
        tensor = torch.from_numpy(gpu.driver.pinned[address].reshape(PIXELS.shape))
        tensor[:] = torch.from_numpy(PIXELS)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
        assert tensor.__dlpack_device__()[0] == PINNED
        gpu.driver.calls.clear()
        check_same(detector(tensor), expected)
        assert "cuMemcpyHtoDAsync" not in gpu.driver.names()
        elsewhere = torch.from_numpy(PIXELS)
        with pytest.raises(FrameError, match="whose address CUDA does not know"):
            detector(elsewhere)
        gpu.driver.cuMemFreeHost(address)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"major": 2}, "version 2 of DLPack; versions 0 and 1 are known"),
        ({"inside": ROCM}, "it lies on a device of type 10"),
        ({"inside": CPU}, "it lies on a device of type 1"),
        ({"strides": (240, 3, 2)}, "make it contiguous first"),
        ({"strides": (0, 3, 1)}, "make it contiguous first"),
    ],
)
def test_tensors_that_are_refused(told: dict, message: str, gpu: Any, detector: Detector) -> None:
    address = gpu.driver.put(PIXELS)
    with pytest.raises(FrameError, match=message) as caught:
        detector(NewArray(address, PIXELS, **told))
    assert "\n" not in str(caught.value)
    gpu.driver.remove(address)


def test_a_capsule_that_was_used_up(gpu: Any, detector: Detector) -> None:
    class Used(NewArray):
        def __dlpack__(self, **asked: Any) -> Any:
            capsule = super().__dlpack__(**asked)
            _set_name(capsule, b"used_dltensor_versioned")
            return capsule

    with pytest.raises(FrameError, match=r"cannot be read through DLPack .*; hand over a plain tensor"):
        detector(Used(4096, PIXELS))


_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def test_a_capsule_is_held_until_the_detections_have_come(gpu: Any, detector: Detector) -> None:
    """Its memory may be a copy that was made for it, and goes with it."""
    addresses = []

    class Copying(NewArray):
        def __dlpack__(self, **asked: Any) -> Any:
            addresses.append(gpu.driver.put(PIXELS))
            self.managed.tensor.data = addresses[-1]
            self.destroy = _Destructor(lambda _: gpu.driver.remove(addresses[-1]))
            address = ctypes.addressof(self.managed)
            return _new_capsule(address, b"dltensor_versioned", ctypes.cast(self.destroy, ctypes.c_void_p))

    expected = detector(PIXELS)
    check_same(detector(Copying(0, PIXELS)), expected)
    assert len(addresses) == 1
    assert gpu.driver.foreign_blocks() == set()


@pytest.mark.parametrize("shape", [(1, 80, 3), (60, 1, 3), (1, 1, 3)])
def test_steps_of_sides_of_one_mean_nothing(shape: tuple, gpu: Any, detector: Detector) -> None:
    """PyTorch writes 1 for them, NumPy anything."""
    pixels = np.ascontiguousarray(PIXELS[: shape[0], : shape[1]])
    address = gpu.driver.put(pixels)
    steps = [1 if side == 1 else step for side, step in zip(shape, pixels.strides, strict=True)]
    check_same(detector(NewArray(address, pixels, strides=steps)), detector(pixels))
    gpu.driver.remove(address)


# The CUDA array interface


@pytest.mark.parametrize("stream", [0, -1])
def test_streams_that_the_interface_forbids(stream: int, gpu: Any, detector: Detector) -> None:
    frame = gpu.frame(PIXELS, stream=stream)
    with pytest.raises(FrameError, match=f"says stream {stream}, which is ambiguous; expected None"):
        detector(frame)
    frame.free()


def test_strides_that_do_not_fit_the_shape(gpu: Any, detector: Detector) -> None:
    frame = gpu.frame(PIXELS, strides=(240, 3))
    with pytest.raises(FrameError, match="2 strides for 3 sides"):
        detector(frame)
    frame.free()


def test_a_read_only_array_is_read(gpu: Any, detector: Detector) -> None:
    frame = gpu.frame(PIXELS)
    frame.__cuda_array_interface__["data"] = (frame.address, True)
    check_same(detector(frame), detector(PIXELS))
    frame.free()


# Streams


def write_later(gpu: Any, stream: int, frame: Any) -> None:
    """Fill the frame with 255 by work on ``stream``."""
    gpu.driver.enqueue(stream, lambda: gpu.driver.at(frame.address, PIXELS.nbytes).fill(255))


def test_a_frame_of_the_legacy_stream(gpu: Any, detector: Detector) -> None:
    """0 and 1 are the same stream, and graphs are launched there."""
    for told, named in (({"stream": LEGACY}, None), ({}, LEGACY), ({}, 0)):
        frame = gpu.frame(np.zeros_like(PIXELS), **told)
        detector(PIXELS)
        write_later(gpu, 0, frame)
        gpu.driver.calls.clear()
        assert detector(frame, stream=named).scores[0] == 1
        assert [a[-1] for n, a in gpu.driver.calls if n == "cuGraphLaunch"] == [LEGACY]
        frame.free()


@pytest.mark.parametrize("how", ["interface", "named"])
def test_a_thread_s_own_default_stream(how: str, gpu: Any, detector: Detector) -> None:
    """Another thread may collect the results, and cannot wait for this one's stream."""
    told = {"stream": PER_THREAD} if how == "interface" else {}
    frames = [gpu.frame(np.zeros_like(PIXELS), **told) for _ in range(2)]
    for frame in frames:
        write_later(gpu, PER_THREAD, frame)
    if how == "named":
        assert detector(frames[0], stream=PER_THREAD).scores[0] == 1
    else:
        stream = detector.stream(frames, in_flight=2)
        found = [next(stream)]
        other = threading.Thread(target=lambda: found.append(next(stream)))
        other.start()
        other.join(60)
        assert [one.scores[0] for one in found] == [1, 1]
    for frame in frames:
        frame.free()


@pytest.mark.parametrize("graph", [None, False])
@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_what_is_captured_elsewhere_runs_on_our_stream(
    flavour: str, graph: bool | None, gpu: Any, make_engine: Callable
) -> None:
    """TensorRT on the legacy stream waits for everything, and for RTX cannot capture there."""
    frame = gpu.frame(np.zeros_like(PIXELS))
    with Detector(make_engine(flavour), gpu=GpuOptions(graph=graph)) as detector:
        write_later(gpu, LEGACY, frame)
        assert detector(frame, stream=LEGACY).scores[0] == 1
        executed = {int(a[0]) for n, a in gpu.driver.calls if n == "execute_async_v3"}
        assert LEGACY not in executed
    frame.free()
