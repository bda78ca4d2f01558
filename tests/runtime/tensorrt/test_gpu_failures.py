"""What goes wrong on a GPU, and what is left then: errors in the middle, fallback, refusal."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as names

from anchorline.doctor.machine import find_gpus
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, GpuError, SettingsError
from anchorline.runtime.tensorrt import cuda as cuda_layer
from anchorline.runtime.tensorrt import lane as tensorrt_lane
from anchorline.runtime.tensorrt.cuda import (
    CudaError,
    GpuOptions,
    NoGpuError,
    OutOfDeviceMemoryError,
    open_cuda,
)
from anchorline.runtime.tensorrt.manifest import manifest_path

RESULT = names.CUresult
FRAME = np.full((48, 64, 3), 102, np.uint8)
LARGE = np.full((480, 640, 3), 102, np.uint8)


def change_manifest(of: Path, /, **changes: Any) -> None:
    path = manifest_path(of)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def check_works(detector: Detector) -> None:
    np.testing.assert_allclose(detector(FRAME).scores, [0.4, 0.2], rtol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        "cuMemcpyHtoDAsync",
        "cuGraphLaunch",
        "cuStreamSynchronize",
        "cuLaunchKernel",
        "cuCtxGetCurrent",
    ],
)
def test_a_failure_in_the_middle_is_an_error_and_no_more(call: str, gpu: Any, make_engine: Callable) -> None:
    """The lane is dropped, with all that it holds, and the next frame gets a new one."""
    with Detector(make_engine()) as detector:
        detector(LARGE)
        gpu.driver.fail[call] = RESULT.CUDA_ERROR_INVALID_VALUE
        with pytest.raises(CudaError, match=r"CUDA_ERROR_INVALID_VALUE: text of CUDA_ERROR_INVALID_VALUE"):
            detector(LARGE)
        check_works(detector)
        assert len(gpu.driver.device) <= 5


@pytest.mark.parametrize(
    "call", ["cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuLibraryLoadData", "cuGraphInstantiate"]
)
def test_a_failure_while_a_lane_is_made_leaves_nothing(call: str, gpu: Any, make_engine: Callable) -> None:
    with Detector(make_engine()) as detector:
        gpu.driver.fail[call] = RESULT.CUDA_ERROR_UNKNOWN
        with pytest.raises(CudaError, match="CUDA_ERROR_UNKNOWN"):
            detector(LARGE)
        assert {name: count for name, count in gpu.driver.leaks().items() if name != "libraries"} == {
            "contexts": 1
        }
        check_works(detector)


@pytest.mark.parametrize("after", ["cuStreamBeginCapture", "cuStreamEndCapture"])
def test_a_capture_that_fails(after: str, gpu: Any, make_engine: Callable) -> None:
    with Detector(make_engine()) as detector:
        gpu.driver.fail[after] = RESULT.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        with pytest.raises(CudaError, match="STREAM_CAPTURE_INVALIDATED"):
            detector(FRAME)
        check_works(detector)


def test_tensorrt_refuses_while_capturing(
    gpu: Any, make_engine: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The capture is ended, and the reason is TensorRT's."""
    trt = gpu.trt["tensorrt"]
    with Detector(make_engine()) as detector:
        begin = type(gpu.driver).do_cuStreamBeginCapture

        def begin_and_break(self: Any, *arguments: Any) -> None:
            begin(self, *arguments)
            trt.refuse["execute"] = "no kernel for this capture"

        monkeypatch.setattr(type(gpu.driver), "do_cuStreamBeginCapture", begin_and_break)
        with pytest.raises(GpuError):
            detector(FRAME)
        monkeypatch.undo()


@pytest.mark.parametrize("what", ["execute", "context"])
def test_tensorrt_s_own_reason_is_told(what: str, gpu: Any, make_engine: Callable) -> None:
    trt = gpu.trt["tensorrt"]
    with Detector(make_engine(), gpu=GpuOptions(graph=False)) as detector:
        trt.refuse[what] = "Cask convolution execution"
        with pytest.raises(GpuError, match=r"model\.engine: TensorRT 11.*Cask convolution execution"):
            detector(FRAME)
        trt.refuse.clear()
        check_works(detector)


@pytest.mark.parametrize("code", ["CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED"])
def test_after_a_sticky_error_nothing_more_is_tried(code: str, gpu: Any, make_engine: Callable) -> None:
    detector = Detector(make_engine())
    detector(FRAME)
    gpu.driver.sticky = getattr(RESULT, code)
    with pytest.raises(CudaError, match=f"{code}.*the GPU's context is lost.*start the process again"):
        detector(FRAME)
    gpu.driver.calls.clear()
    with pytest.raises(GpuError, match=rf"model\.engine: refused after an earlier failure: .*{code}"):
        detector(FRAME)
    with pytest.raises(GpuError, match="refused"):
        list(detector.stream([FRAME]))
    assert gpu.driver.calls == []
    detector.close()
    gpu.driver.sticky = None
    forget_everything(gpu.driver)


def forget_everything(driver: Any) -> None:
    """As the end of the process would: a lost context gives nothing back."""
    for table in (driver.device, driver.pinned, driver.events, driver.graphs, driver.executables):
        table.clear()
    for stream in [handle for handle in driver.streams if handle > 1]:
        del driver.streams[stream]
    driver.libraries.clear()
    driver.retained = 0


# Memory


def test_out_of_memory_says_what_is_needed_and_free(gpu: Any, make_engine: Callable) -> None:
    engine = make_engine(plan={"activation_bytes": 1 << 23})
    gpu.driver.memory = 1 << 22
    with Detector(engine) as detector:
        for _ in range(2):
            with pytest.raises(
                OutOfDeviceMemoryError, match=r"needs 8\.0 MiB, 4\.0 MiB are free\); .*smaller --batch"
            ):
                detector(FRAME)
        gpu.driver.memory = 1 << 26
        check_works(detector)


def test_a_frame_too_large_for_the_memory(gpu: Any, make_engine: Callable) -> None:
    with Detector(make_engine()) as detector:
        detector(FRAME)
        gpu.driver.memory = sum(map(len, gpu.driver.device.values())) + 1000
        with pytest.raises(OutOfDeviceMemoryError, match=r"a frame of 921600 bytes needs 0\.9 MiB"):
            detector(LARGE)
        gpu.driver.memory = 1 << 30
        check_works(detector)


def test_weights_that_do_not_fit(gpu: Any, make_engine: Callable) -> None:
    gpu.trt["tensorrt"].refuse["deserialize"] = "[defaultAllocator.cpp] Requested size exceeds: out of memory"
    with pytest.raises(OutOfDeviceMemoryError, match=r"loading model\.engine needs .* are free"):
        Detector(make_engine())


# Fallback


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "anchorline.runtime")
    return caplog


def without_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> str:
    def missing(*arguments: Any) -> None:
        raise RuntimeError('"cuda" is an NVIDIA driver library and can only be found via system search.')

    monkeypatch.setattr(type(gpu.driver), "do_cuInit", missing)
    return "there is no NVIDIA driver here"


def without_tensorrt(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> str:
    def missing(name: str) -> None:
        raise SettingsError("TensorRT is not installed, and this needs it: pip install 'anchorline[gpu]'")

    monkeypatch.setattr(tensorrt_lane, "load_tensorrt", missing)
    return "TensorRT is not installed"


def without_bindings(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> str:
    def missing() -> None:
        raise NoGpuError("cuda-bindings cannot be imported")

    monkeypatch.setattr(cuda_layer, "load_driver", missing)
    return "cuda-bindings cannot be imported"


def another_release(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> str:
    gpu.trt["tensorrt"].__version__ = "11.5.0.1"
    return "built with TensorRT 11.4.0.26, and 11.5.0.1 is installed; build it again here"


def another_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> str:
    gpu.driver.capability = 90
    return "built for sm_86, sm_89, and Double is sm_90; build it again for this GPU"


def no_device(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> str:
    gpu.driver.fail["cuInit"] = RESULT.CUDA_ERROR_NO_DEVICE
    return r"there is no GPU 0 here \(CUDA_ERROR_NO_DEVICE\)"


def broken_driver(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> str:
    gpu.driver.fail["cuInit"] = RESULT.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
    return r"the GPU's driver does not start \(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH\)"


OBSTACLES = [
    without_gpu,
    without_tensorrt,
    without_bindings,
    another_release,
    another_gpu,
    no_device,
    broken_driver,
]


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_where_it_cannot_run_its_onnx_file_does(
    obstacle: Callable, gpu: Any, make_engine: Callable, monkeypatch: pytest.MonkeyPatch, log: Any
) -> None:
    engine = make_engine()
    reason = obstacle(monkeypatch, gpu)
    with Detector(engine, threads=1) as detector:
        assert (detector.provider, detector.precision) == ("cpu", "fp32")
        check_works(detector)
    (record,) = log.records
    assert "model.onnx runs on the CPU instead" in record.getMessage()
    assert re.search(reason, record.getMessage())
    if obstacle not in (no_device, broken_driver):
        Detector(engine, threads=1).close()
        assert len(log.records) == 1


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_asked_for_by_name_it_is_an_error(
    obstacle: Callable, gpu: Any, make_engine: Callable, monkeypatch: pytest.MonkeyPatch, log: Any
) -> None:
    engine = make_engine()
    reason = obstacle(monkeypatch, gpu)
    with pytest.raises(GpuError, match=rf"model\.engine: cannot run here: .*{reason}"):
        Detector(engine, provider="tensorrt")
    assert log.records == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda onnx: onnx.unlink(), "model.onnx: no such file"),
        (lambda onnx: onnx.write_bytes(b"other"), "is not the ONNX file that the engine was built from"),
    ],
)
def test_without_its_onnx_file_both_reasons_are_told(
    spoil: Callable, message: str, gpu: Any, make_engine: Callable, log: Any
) -> None:
    engine = make_engine()
    gpu.driver.capability = 90
    spoil(engine.with_suffix(".onnx"))
    with pytest.raises(GpuError, match=f"is sm_90.*Nor can its ONNX file instead: .*{message}"):
        Detector(engine)


def test_an_engine_on_the_cpu_by_name_is_its_onnx_file(gpu: Any, make_engine: Callable, log: Any) -> None:
    engine = make_engine()
    with Detector(engine, provider="cpu", threads=1) as detector:
        assert detector.provider == "cpu"
        check_works(detector)
    assert log.records == []
    assert gpu.driver.calls == []
    change_manifest(engine, onnx=None)
    with pytest.raises(ArtefactError, match="does not say which ONNX file"):
        Detector(engine, provider="cpu")


def test_compatible_engines_run_elsewhere(gpu: Any, make_engine: Callable) -> None:
    gpu.driver.capability = 120
    options = {"hardware_compatible": True, "version_compatible": True}
    engine = make_engine(plan={"version_compatible": True}, manifest={"options": options})
    gpu.trt["tensorrt"].__version__ = "11.9.1"
    with Detector(engine, provider="tensorrt") as detector:
        check_works(detector)
    for version in ("12.0.0", "11.3.9.5"):
        gpu.trt["tensorrt"].__version__ = version
        with pytest.raises(GpuError, match=rf"{version} is installed.* or a later one of its major version"):
            Detector(engine, provider="tensorrt")


# Files and settings


def test_a_damaged_plan(gpu: Any, make_engine: Callable, log: Any) -> None:
    engine = make_engine()
    content = engine.read_bytes()
    engine.write_bytes(content[:-9])
    with pytest.raises(ArtefactError, match=r"is not the engine that model\.engine\.json describes"):
        Detector(engine)
    change_manifest(engine, engine={"sha256": hashlib.sha256(content[:-9]).hexdigest()})
    with pytest.raises(ArtefactError, match=r"cannot load it \(Serialization assertion magicTag failed\)"):
        Detector(engine)
    assert not any("CPU" in record.getMessage() for record in log.records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flavour": "tensorrt-lite"}, "flavour is 'tensorrt-lite'; expected one of tensorrt, tensorrt-rtx"),
        ({"contract": {}}, "contract version is missing"),
        ({"profiles": []}, "damaged manifest"),
        ({"profiles": [{"batch": [1, 2]}]}, "damaged manifest"),
        ({"profiles": [{"batch": [0, 1, 4]}]}, r"damaged manifest: batch is \[0, 1, 4\]"),
        ({"profiles": [{"batch": [2, 1, 4]}]}, "expected sizes that do not fall"),
        ({"profiles": [{"batch": [1, 1, 8]}]}, r"its batches are \[1, 1, 4\].*manifest says \[1, 1, 8\]"),
        ({"compute_capabilities": "x"}, "damaged manifest"),
    ],
)
def test_a_manifest_that_is_none(changes: dict, message: str, gpu: Any, make_engine: Callable) -> None:
    engine = make_engine()
    change_manifest(engine, **changes)
    with pytest.raises(ArtefactError, match=message):
        Detector(engine)


def test_a_missing_manifest(gpu: Any, make_engine: Callable) -> None:
    engine = make_engine()
    manifest_path(engine).unlink()
    with pytest.raises(ArtefactError, match=r"model\.engine\.json: no such file; an engine needs"):
        Detector(engine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"canvas": [48, 65]}, r"input images is uint8 \[48, 64, 3\].*expects uint8 \[48, 65, 3\]"),
        ({"input_dtype": "float32"}, "expects float32"),
        ({"inputs": ["pictures", "image_sizes"]}, "its manifest expects pictures, image_sizes"),
        (
            {"outputs": ["boxes", "scores", "labels", "count"]},
            "manifest expects boxes, scores, labels, count",
        ),
    ],
)
def test_a_manifest_at_odds_with_its_engine(
    changes: dict, message: str, gpu: Any, make_engine: Callable
) -> None:
    engine = make_engine()
    contract = json.loads(manifest_path(engine).read_text())["contract"]
    change_manifest(engine, contract={**contract, **changes})
    with pytest.raises(ArtefactError, match=message):
        Detector(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda": "cupy"}, "cuda is 'cupy'; expected one of cuda-bindings, pycuda"),
        ({"device": -1}, "device is -1; expected the number of a GPU"),
        ({"device": "0"}, "device is '0'"),
        ({"device": True}, "device is True"),
        ({"graph": "no"}, "graph is 'no'; expected True, False or None"),
        ({"graph": 1}, "graph is 1; expected True, False or None"),
        ({"timings": 2}, "timings is 2; expected True or False"),
    ],
)
def test_options_that_make_no_sense(
    options: dict[str, Any], message: str, gpu: Any, make_engine: Callable
) -> None:
    with pytest.raises(SettingsError, match=message):
        Detector(make_engine(), gpu=GpuOptions(**options))


def test_a_gpu_that_is_not_there(gpu: Any, make_engine: Callable) -> None:
    with pytest.raises(GpuError, match=r"there is no GPU 7 here \(CUDA_ERROR_INVALID_DEVICE\)"):
        Detector(make_engine(), provider="tensorrt", gpu=GpuOptions(device=7))


def test_an_rtx_engine_is_no_tensorrt_engine(gpu: Any, make_engine: Callable) -> None:
    with pytest.raises(SettingsError, match=r"provider is 'tensorrt-rtx', but .* is an engine of tensorrt"):
        Detector(make_engine(), provider="tensorrt-rtx")


@pytest.mark.parametrize("workers", [0, -1, 1.5, "two", True])
def test_absurd_workers(workers: Any, gpu: Any, make_engine: Callable) -> None:
    with pytest.raises(SettingsError, match=r"workers is .* at least 1"):
        Detector(make_engine(), workers=workers)


def test_no_driver_in_this_process() -> None:
    """The real cuda-bindings, where there is no driver."""
    if find_gpus().gpus:
        pytest.skip("this machine has a GPU")
    with pytest.raises(NoGpuError) as caught:
        open_cuda()
    assert "\n" not in str(caught.value)
