"""The second implementation of the CUDA layer, over pycuda."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as names

from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import GpuError, SettingsError
from anchorline.runtime.tensorrt import cuda as cuda_layer
from anchorline.runtime.tensorrt.cuda import (
    CudaError,
    GpuOptions,
    NoGpuError,
    OutOfDeviceMemoryError,
    open_cuda,
)

PYCUDA = GpuOptions(cuda="pycuda")
SHORT = np.full((48, 64, 3), 102, np.uint8)


@pytest.fixture
def pycuda(gpu: Any, pycuda_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module ``pycuda.driver``, on the same double of a GPU."""
    module = pycuda_module.make_pycuda(gpu.driver)
    monkeypatch.setattr(cuda_layer, "load_pycuda", lambda: module)
    yield module
    gc.collect()


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_through_pycuda(
    flavour: str, gpu: Any, pycuda: Any, make_engine: Callable, frames: list, check_same: Callable
) -> None:
    engine = make_engine(flavour)
    with Detector(engine) as detector:
        expected = detector.batch(frames)
    on_gpu = [gpu.frame(frame) for frame in frames]
    gpu.driver.calls.clear()
    with Detector(engine, gpu=PYCUDA) as detector:
        check_same(detector.batch(frames), expected)
        check_same(detector.batch(on_gpu), expected)
        check_same(list(detector.stream(frames, batch=2)), expected)
    assert "cuGraphLaunch" not in gpu.driver.names()
    for frame in on_gpu:
        frame.free()


def test_a_thousand_frames_leave_nothing(gpu: Any, pycuda: Any, make_engine: Callable) -> None:
    frame = gpu.frame(SHORT)
    with Detector(make_engine(plan={"stub": True}), gpu=PYCUDA) as detector:
        detector(frame)
        gpu.driver.calls.clear()
        for _ in range(1000):
            detector(frame)
        assert not {"cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate"} & set(gpu.driver.names())
    frame.free()


def test_a_stream_of_pycuda(gpu: Any, pycuda: Any, make_engine: Callable) -> None:
    theirs = pycuda.Device(0).retain_primary_context()  # as pycuda.autoprimaryctx does
    with Detector(make_engine(), gpu=PYCUDA) as detector:
        with detector._backend._cuda.current():
            stream = pycuda.Stream()
        frame = gpu.frame(np.zeros_like(SHORT))
        gpu.driver.enqueue(stream.handle, lambda: gpu.driver.at(frame.address, SHORT.nbytes).fill(255))
        assert detector(frame, stream=stream).scores[0] == 1
        with pytest.raises(SettingsError, match=r"expected a pycuda\.driver\.Stream"):
            detector(frame, stream=123456)
        foreign = gpu.frame(SHORT, stream=99)
        with pytest.raises(SettingsError, match="stream 0x63, which pycuda cannot work with"):
            detector(foreign)
        second = gpu.frame(SHORT, version=2)
        assert len(detector.batch([second, frame])) == 2  # one waits for the default stream
        for _ in range(200):  # a program with a stream for each frame
            with detector._backend._cuda.current():
                detector(frame, stream=pycuda.Stream())
        gc.collect()
        assert len(gpu.driver.streams) < 120
    for each in (frame, foreign, second):
        each.free()
    del stream
    gc.collect()
    theirs.detach()


def test_timings_by_events(gpu: Any, pycuda: Any, make_engine: Callable) -> None:
    with Detector(make_engine(), gpu=GpuOptions(cuda="pycuda", timings=True)) as detector:
        detector(SHORT)
        assert all(seconds > 0 for seconds in detector.timings.values())


def test_a_failure_in_the_middle(gpu: Any, pycuda: Any, make_engine: Callable) -> None:
    with Detector(make_engine(), gpu=PYCUDA) as detector:
        gpu.driver.fail["cuMemcpyHtoDAsync"] = names.CUresult.CUDA_ERROR_INVALID_VALUE
        with pytest.raises(CudaError, match=r"copying to the GPU failed \(LogicError: .*invalid value"):
            detector(SHORT)
        assert len(detector(SHORT)) == 2


@pytest.mark.parametrize("code", ["CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED"])
def test_a_sticky_failure(code: str, gpu: Any, pycuda: Any, make_engine: Callable) -> None:
    with Detector(make_engine(), gpu=PYCUDA) as detector:
        gpu.driver.fail["cuStreamSynchronize"] = getattr(names.CUresult, code)
        with pytest.raises(CudaError, match="the GPU's context is lost"):
            detector(SHORT)
        with pytest.raises(GpuError, match="refused after an earlier failure"):
            detector(SHORT)


def test_out_of_memory(gpu: Any, pycuda: Any, make_engine: Callable) -> None:
    gpu.driver.memory = 1 << 20
    engine = make_engine(plan={"activation_bytes": 1 << 21})
    message = r"one batch in work needs 2\.0 MiB, 1\.0 MiB are free"
    with Detector(engine, gpu=PYCUDA) as detector, pytest.raises(OutOfDeviceMemoryError, match=message):
        detector(SHORT)


def test_frames_that_pycuda_does_not_know(gpu: Any, pycuda: Any, make_engine: Callable) -> None:
    frame = gpu.frame(SHORT, data=(99, False))
    with Detector(make_engine(), gpu=PYCUDA) as detector, pytest.raises(ValueError, match="does not know"):
        detector(frame)
    frame.free()


def test_no_gpu_and_no_pycuda(gpu: Any, pycuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoGpuError, match="there is no GPU 4 here"):
        open_cuda("pycuda", 4)
    gpu.driver.fail["cuInit"] = names.CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(NoGpuError, match=r"does not start \(cuInit failed: no device\)"):
        open_cuda("pycuda")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(NoGpuError, match="pycuda cannot be imported"):
        open_cuda("pycuda")
