"""Errors that lose the GPU, wherever they come to light, and reasons that must not be hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as names

from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import GpuError
from anchorline.runtime.tensorrt.cuda import CudaError, GpuOptions

RESULT = names.CUresult
FRAME = np.full((48, 64, 3), 102, np.uint8)


def test_a_sticky_error_in_a_stream_is_remembered(gpu: Any, make_engine: Callable) -> None:
    for call in ("cuGraphLaunch", "cuStreamSynchronize"):
        with Detector(make_engine()) as detector:
            detector(FRAME)
            gpu.driver.fail[call] = RESULT.CUDA_ERROR_LAUNCH_FAILED
            with pytest.raises(CudaError, match="the GPU's context is lost"):
                list(detector.stream([FRAME] * 5))
            gpu.driver.calls.clear()
            with pytest.raises(GpuError, match=r"refused after an earlier failure: .*LAUNCH_FAILED"):
                detector(FRAME)
            assert gpu.driver.calls == []


def test_every_error_that_loses_the_context_is_known() -> None:
    """By what cuda-bindings say of each: the process must be terminated, or the context cannot be used."""
    words = ("must be terminated", "context cannot be used", "process in an inconsistent state")
    lost = [
        code.name for code in RESULT if any(word in " ".join((code.__doc__ or "").split()) for word in words)
    ]
    if not lost:
        pytest.skip("these cuda-bindings say nothing of their errors")
    harmless = {"CUDA_ERROR_GRAPH_RECAPTURE_FAILURE"}
    assert [name for name in lost if name not in harmless and not CudaError("x", name).sticky] == []
    assert not CudaError("x", "CUDA_ERROR_INVALID_VALUE").sticky


def test_tensorrt_s_reason_survives_a_capture(gpu: Any, make_engine: Callable, monkeypatch: Any) -> None:
    """Waiting on a stream that captures fails by itself; that is not why."""
    begin = type(gpu.driver).do_cuStreamBeginCapture

    def begin_and_break(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        gpu.trt["tensorrt"].refuse["execute"] = "no kernel for this capture"

    monkeypatch.setattr(type(gpu.driver), "do_cuStreamBeginCapture", begin_and_break)
    with Detector(make_engine()) as detector:
        with pytest.raises(GpuError, match=r"did not run it .no kernel for this capture.; .*graph=False"):
            detector(FRAME)
        monkeypatch.undo()
        assert not any(stream.capture for stream in gpu.driver.streams.values())


def test_a_sticky_error_behind_tensorrt_s_refusal(gpu: Any, make_engine: Callable) -> None:
    with Detector(make_engine(), gpu=GpuOptions(graph=False)) as detector:
        detector(FRAME)
        gpu.trt["tensorrt"].refuse["execute"] = "Cuda failure 700"
        gpu.driver.fail["cuStreamSynchronize"] = RESULT.CUDA_ERROR_ILLEGAL_ADDRESS
        with pytest.raises(CudaError, match="context is lost"):
            detector(FRAME)
        with pytest.raises(GpuError, match="refused after"):
            detector(FRAME)
