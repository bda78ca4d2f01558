"""Frames that lie on the GPU: what is taken, what they wait for, and what is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import FrameError, SettingsError
from anchorline.runtime.nv12 import Nv12
from anchorline.runtime.tensorrt.frames import _Tensor, is_device_frame
from anchorline.runtime.video.options import SliceOptions

PIXELS = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class DlpackArray:
    """A tensor of another library, with DLPack alone, as version 0.8 of it lays it out."""

    def __init__(self, driver: Any, pixels: np.ndarray, device: tuple[int, int] = (2, 0)) -> None:
        self.address, self.device, self.streams = driver.put(pixels), device, []
        self.shape = (ctypes.c_int64 * pixels.ndim)(*pixels.shape)
        code, bits = {"u": 1, "f": 2}[pixels.dtype.kind], 8 * pixels.dtype.itemsize
        self.tensor = _Tensor(self.address, *device, pixels.ndim, code, bits, 1, self.shape, None, 0)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, stream: int) -> Any:
        self.streams.append(stream)
        return _new_capsule(ctypes.addressof(self.tensor), b"dltensor", None)


@pytest.fixture
def detector(gpu: Any, make_engine: Callable[..., Path]) -> Iterator[Detector]:
    with Detector(make_engine()) as opened:
        yield opened


@pytest.fixture
def refuse(gpu: Any, detector: Detector) -> Callable[..., None]:
    """``refuse(frame, message)``; the detector goes on to work afterwards."""

    def check(frame: Any, message: str) -> None:
        with pytest.raises(FrameError, match=message) as caught:
            detector(frame)
        assert "\n" not in str(caught.value)
        assert len(detector(PIXELS)) == 2

    return check


def test_what_is_a_device_frame(gpu: Any) -> None:
    frame = gpu.frame(PIXELS)
    assert is_device_frame(frame)
    assert is_device_frame(Nv12(frame))
    assert not is_device_frame(PIXELS)
    assert not is_device_frame(None)
    assert not is_device_frame([1])
    frame.free()


def test_dlpack_waits_on_the_lane_s_stream(gpu: Any, detector: Detector) -> None:
    frame = DlpackArray(gpu.driver, PIXELS)
    expected = detector(PIXELS)
    np.testing.assert_allclose(detector(frame).scores, expected.scores, atol=1e-5)
    (stream,) = frame.streams
    assert stream in gpu.driver.streams
    assert stream > 1
    gpu.driver.remove(frame.address)


def test_a_frame_of_a_stream_is_worked_on_there(gpu: Any, detector: Detector) -> None:
    """No event, no wait: the graph goes where the frame comes from."""
    with detector._backend._cuda.current():
        (_, theirs) = gpu.driver.cuStreamCreate(0)
    frame = gpu.frame(np.zeros_like(PIXELS), stream=theirs)
    detector(frame)
    gpu.driver.enqueue(theirs, lambda: gpu.driver.at(frame.address, PIXELS.nbytes).fill(255))
    gpu.driver.calls.clear()
    assert detector(frame).scores[0] == 1
    assert len(gpu.driver.calls) == 4
    assert [a[-1] for n, a in gpu.driver.calls if n == "cuGraphLaunch"] == [theirs]
    gpu.driver.cuStreamDestroy(theirs)
    frame.free()


def test_version_2_waits_for_the_default_stream(gpu: Any, detector: Detector) -> None:
    """It does not say where the frame comes from; most libraries work on the default stream."""
    frame = gpu.frame(np.zeros_like(PIXELS), version=2)
    detector(frame)
    gpu.driver.enqueue(1, lambda: gpu.driver.at(frame.address, PIXELS.nbytes).fill(255))
    assert detector(frame).scores[0] == 1
    frame.free()


def test_frames_of_several_streams_are_waited_for(gpu: Any, detector: Detector) -> None:
    with detector._backend._cuda.current():
        streams = [gpu.driver.cuStreamCreate(0)[1] for _ in range(2)]
    frames = [gpu.frame(np.zeros_like(PIXELS), stream=stream) for stream in streams]
    for frame, stream in zip(frames, streams, strict=True):
        gpu.driver.enqueue(stream, lambda frame=frame: gpu.driver.at(frame.address, PIXELS.nbytes).fill(255))
    assert [found.scores[0] for found in detector.batch([*frames, PIXELS // 255])][:2] == [1, 1]
    for frame, stream in zip(frames, streams, strict=True):
        gpu.driver.cuStreamDestroy(stream)
        frame.free()


@pytest.mark.parametrize("kind", ["handle", "torch", "pycuda", "cuda.core"])
def test_the_caller_s_stream(kind: str, gpu: Any, detector: Detector) -> None:
    with detector._backend._cuda.current():
        (_, handle) = gpu.driver.cuStreamCreate(0)
    given: Any = {
        "handle": handle,
        "torch": type("Stream", (), {"cuda_stream": handle})(),
        "pycuda": type("Stream", (), {"handle": handle})(),
        "cuda.core": type("Stream", (), {"__cuda_stream__": lambda self: (0, handle)})(),
    }[kind]
    frame = gpu.frame(np.zeros_like(PIXELS))
    gpu.driver.enqueue(handle, lambda: gpu.driver.at(frame.address, PIXELS.nbytes).fill(255))
    assert detector(frame, stream=given).scores[0] == 1
    gpu.driver.cuStreamDestroy(handle)
    frame.free()


@pytest.mark.parametrize("stream", ["fast", -1, 1.5, True, object()])
def test_what_is_no_stream(stream: Any, detector: Detector) -> None:
    with pytest.raises(SettingsError, match="expected a stream of PyTorch"):
        detector(PIXELS, stream=stream)
    assert len(detector(PIXELS)) == 2


def test_a_view_with_rows_apart(gpu: Any, detector: Detector) -> None:
    wide = gpu.frame(PIXELS)
    part = gpu.frame(PIXELS[:1, :1])
    part.__cuda_array_interface__ |= {
        "shape": (60, 50, 3),
        "strides": (240, 3, 1),
        "data": (wide.address, False),
    }
    np.testing.assert_allclose(detector(part).scores, detector(PIXELS[:, :50]).scores, atol=1e-5)
    wide.free()
    part.free()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"typestr": "<f4"}, r"uint8 BGR of shape \[H, W, 3\], got float32 \[60, 80, 3\]"),
        ({"typestr": "|i1"}, "got int8"),
        ({"shape": (60, 80)}, r"got uint8 \[60, 80\]"),
        ({"shape": (1, 60, 80, 3)}, "got uint8"),
        ({"shape": (0, 80, 3)}, "got uint8"),
        ({"shape": (60, 60, 4)}, r"\[60, 60, 4\]"),
        ({"strides": (240, 3, -1)}, "make it contiguous"),
        ({"strides": (-240, 3, 1)}, "make it contiguous"),
        ({"strides": (3, 240, 1)}, "make it contiguous"),
        ({"strides": (100, 3, 1)}, "make it contiguous"),
        ({"data": (12345, False)}, "whose address CUDA does not know"),
        ({"data": None}, "__cuda_array_interface__ cannot be read"),
        ({"shape": "wide"}, "cannot be read"),
        ({"typestr": "nonsense"}, "cannot be read"),
    ],
)
def test_a_frame_that_is_none(told: dict, message: str, gpu: Any, refuse: Callable) -> None:
    frame = gpu.frame(PIXELS, **told)
    refuse(frame, message)
    frame.free()


def test_a_frame_on_another_gpu(gpu: Any, refuse: Callable) -> None:
    gpu.driver.foreign_device_memory[0xABC0000] = 3
    frame = gpu.frame(PIXELS, data=(0xABC0000, False))
    refuse(frame, "got one on GPU 3; copy it there, or open the detector with device=3")
    tensor = DlpackArray(gpu.driver, PIXELS, device=(2, 1))
    refuse(tensor, "on GPU 0, got one on GPU 1")
    frame.free()
    gpu.driver.remove(tensor.address)


def test_dlpack_tensors_that_are_no_frames(gpu: Any, refuse: Callable) -> None:
    floats = DlpackArray(gpu.driver, PIXELS.astype(np.float32))
    refuse(floats, r"got float32 \[60, 80, 3\]")
    on_host = DlpackArray(gpu.driver, PIXELS, device=(1, 0))
    refuse(on_host, "got a DlpackArray; convert it with numpy")
    broken = DlpackArray(gpu.driver, PIXELS)
    broken.__dlpack__ = None
    refuse(type("Broken", (), {"__dlpack_device__": lambda self: (2, 0)})(), "cannot be read through DLPack")
    for tensor in (floats, on_host, broken):
        gpu.driver.remove(tensor.address)


@pytest.mark.parametrize("shape", [(90,), (91, 80), (90, 81), (90, 80, 3), (0, 80)])
def test_nv12_that_is_none(shape: tuple, gpu: Any, refuse: Callable) -> None:
    pixels = np.zeros(shape, np.uint8)
    refuse(Nv12(pixels), "Expected an NV12 frame")
    if pixels.size:
        on_gpu = gpu.frame(pixels)
        refuse(Nv12(on_gpu), "Expected an NV12 frame")
        on_gpu.free()
    refuse(Nv12(pixels.astype(np.float32)), "Expected an NV12 frame")
    refuse(Nv12([1]), "Expected an NV12 frame")


def test_a_detector_on_the_cpu_takes_none(gpu: Any, model_path: Path) -> None:
    frame = gpu.frame(PIXELS)
    with Detector(model_path) as detector:
        with pytest.raises(FrameError, match="lies on a GPU, but this model runs on cpu"):
            detector(frame)
        with pytest.raises(SettingsError, match="runs on cpu, which takes none"):
            detector(PIXELS, stream=5)
    frame.free()


def test_slices_are_of_frames_on_the_host(gpu: Any, make_engine: Callable[..., Path]) -> None:
    """Rows of a slice lie apart, and an engine answers as onnxruntime does. GPU frames are refused."""
    pixels = np.random.default_rng(2).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    engine, slices = make_engine(), SliceOptions(64, overlap=0.25)
    with Detector(engine.with_suffix(".onnx"), "cpu", slices=slices) as on_cpu:
        expected = on_cpu(pixels)
    with Detector(engine, slices=slices) as detector:
        assert detector.provider == "tensorrt"
        found = detector(pixels)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        frame, tensor = gpu.frame(pixels), DlpackArray(gpu.driver, pixels)
        planes = gpu.frame(np.zeros((150, 100), np.uint8))
        for given in (frame, tensor, Nv12(planes)):
            with pytest.raises(FrameError, match="slices are cut on the host; copy the frame to the host"):
                detector(given)
        with pytest.raises(FrameError, match="frame 1 of the batch: the frame lies on a GPU, and slices"):
            detector.batch([pixels, frame])
        with pytest.raises(FrameError, match="slices are cut on the host"):
            list(detector.stream([frame]))
        assert len(detector(pixels)) == len(expected)
    frame.free()
    planes.free()
    gpu.driver.remove(tensor.address)
