"""Execution providers that are packages of their own, and the libraries that onnxruntime-gpu looks for.

NVIDIA's and Intel's packages are played by a module that names onnxruntime's own CPU provider, which lists a
device like theirs: registering is recorded, all the rest is onnxruntime's.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from anchorline.runtime.backends import execution_providers
from anchorline.runtime.backends.cpu_options import CpuOptions
from anchorline.runtime.backends.execution_providers import (
    PROVIDER_PACKAGES,
    linked_tensorrt,
    preload_libraries,
    provider_devices,
)
from anchorline.runtime.backends.onnxruntime import PROVIDERS, OnnxRuntimeBackend, available_providers
from anchorline.runtime.backends.selection import open_backend
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import GpuError, SettingsError
from anchorline.runtime.tensorrt.cuda import GpuOptions

FRAME = np.full((48, 64, 3), 102, np.uint8)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(execution_providers, "_registered", set())
    preload_libraries.cache_clear()
    yield
    preload_libraries.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``install(provider, plays, error)``: the package of a provider whose library brings the provider
    ``plays``; what was registered."""
    if available_providers() != ["cpu"]:
        pytest.skip("this onnxruntime has more providers")
    registered: list[tuple[str, str]] = []

    def install(provider: str, plays: str = "", error: str = "") -> list[tuple[str, str]]:
        def register(named: str, path: str) -> None:
            registered.append((named, path))
            if error:
                raise RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {error}")

        package = PROVIDER_PACKAGES[provider]
        if plays:
            package = dataclasses.replace(package, provider=plays, kind="CPU")
            monkeypatch.setitem(PROVIDER_PACKAGES, provider, package)
            monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [])
            if provider in PROVIDERS:
                monkeypatch.setitem(PROVIDERS, provider, plays)
        made = ModuleType(package.module)
        made.get_library_path = lambda: f"/somewhere/{provider}.so"  # type: ignore[attr-defined]
        made.__spec__ = ModuleSpec(package.module, None)
        monkeypatch.setitem(sys.modules, package.module, made)
        monkeypatch.setattr(onnxruntime, "register_execution_provider_library", register)
        return registered

    return install


CPU = "CPUExecutionProvider"


def test_a_session_runs_on_the_devices_of_a_package(
    install: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("tensorrt-rtx", CPU)
    given: list[Any] = []
    add = onnxruntime.SessionOptions.add_provider_for_devices

    def add_provider(self: Any, devices: Any, settings: Any) -> None:
        given.append(([device.ep_name for device in devices], settings))
        add(self, devices, {})  # the CPU's takes no settings

    monkeypatch.setattr(onnxruntime.SessionOptions, "add_provider_for_devices", add_provider)
    with Detector(model_path, provider="tensorrt-rtx", gpu=GpuOptions(graph=True)) as detector:
        assert detector.provider == "tensorrt-rtx"
        assert len(detector(FRAME)) == 2
    assert given == [([CPU], {"enable_cuda_graph": "1"})]
    with pytest.raises(GpuError, match="device is 1; onnxruntime-ep-nv-tensorrt-rtx lists 1 here, from 0 on"):
        OnnxRuntimeBackend(model_path, "tensorrt-rtx", options=GpuOptions(device=1))


@pytest.mark.parametrize(("provider", "kinds"), [("openvino", ["CPU"]), ("tensorrt-rtx", ["GPU", "GPU"])])
def test_of_the_devices_of_a_package_those_of_its_kind_are_used(
    provider: str, kinds: list[str], install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO lists GPUs and NPUs beside processors, in any order. What the program itself has told
    onnxruntime of is not registered again, which onnxruntime refuses."""
    registered = install(provider, error="library is already registered")
    types = onnxruntime.OrtHardwareDeviceType
    listed = [
        SimpleNamespace(ep_name=PROVIDER_PACKAGES[provider].provider, device=SimpleNamespace(type=kind))
        for kind in (types.NPU, types.GPU, types.CPU, types.GPU)
    ]
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: listed)
    assert [one.device.type.name for one in provider_devices(provider)] == kinds
    assert registered == []


def test_a_library_that_cannot_be_loaded_is_the_reason(install: Any, model_path: Path) -> None:
    registered = install("tensorrt-rtx", error="Failed to load library: libcuda.so.1: cannot open")
    assert available_providers() == ["cpu", "tensorrt-rtx"]
    with pytest.raises(GpuError, match=r"onnxruntime-ep-nv-tensorrt-rtx cannot be loaded .*libcuda\.so\.1"):
        OnnxRuntimeBackend(model_path, "tensorrt-rtx")
    assert registered == [("NvTensorRTRTXExecutionProvider", "/somewhere/tensorrt-rtx.so")]
    registered = install("tensorrt-rtx")
    registered.clear()
    for _ in range(2):  # onnxruntime refuses a second time
        with pytest.raises(GpuError, match="offers no device here"):
            OnnxRuntimeBackend(model_path, "tensorrt-rtx")
    assert len(registered) == 1


def test_an_onnxruntime_that_knows_no_packages_says_from_when(
    install: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("tensorrt-rtx")
    monkeypatch.delattr(onnxruntime, "register_execution_provider_library")
    with pytest.raises(GpuError, match=r"needs 1\.24 or later: pip install 'onnxruntime>=1\.24'"):
        OnnxRuntimeBackend(model_path, "tensorrt-rtx")


def test_openvino_s_package_is_there_where_it_offers_a_device(
    install: Any, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anchorline.runtime.backends.selection.has_openvino", lambda: False)
    install("openvino")  # and its library lists nothing, as on other makers' processors
    assert available_providers() == ["cpu"]
    install("openvino", CPU)
    with Detector(model_path, provider="openvino") as detector:
        assert detector.provider == "openvino"
        assert len(detector(FRAME)) == 2
    fp32 = CpuOptions(precision="fp32")
    with pytest.raises(SettingsError, match="cpu_precision is 'fp32', and OpenVINO as onnx"):
        open_backend(model_path, "openvino", fp32, GpuOptions())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    assert open_backend(model_path, "auto", fp32, GpuOptions()).provider == "cpu"


def test_cuda_and_cudnn_are_loaded_before_their_providers_start(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, caplog: Any
) -> None:
    """onnxruntime tells of what it misses on stdout, where detections go."""
    order: list[str] = []

    def preload() -> None:
        order.append("preload")
        print("Failed to load libcublas.so.13")

    def start(*arguments: Any, **more: Any) -> None:
        order.append("session")
        raise RuntimeError("no CUDA-capable device is detected")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload, raising=False)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    with caplog.at_level("INFO", "anchorline.runtime"):
        for _ in range(2):
            with pytest.raises(GpuError, match="no CUDA-capable device"):
                OnnxRuntimeBackend(model_path, "cuda")
    assert order == ["preload", "session", "session"]
    assert capsys.readouterr().out == ""
    assert "onnxruntime: Failed to load libcublas.so.13" in caplog.text


def test_the_tensorrt_that_the_provider_is_linked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_path: Path
) -> None:
    """From the library's own list of what it needs, as a loader reads it."""
    monkeypatch.syspath_prepend(tmp_path)
    capi = tmp_path / "onnxruntime" / "capi"
    capi.mkdir(parents=True)
    spec = type("Spec", (), {"origin": str(capi.parent / "__init__.py")})
    monkeypatch.setattr(execution_providers.importlib.util, "find_spec", lambda name: spec)
    assert linked_tensorrt() is None
    (capi / "libonnxruntime_providers_tensorrt.so").write_bytes(
        b"\x7fELF\0libcudart.so.13\0libnvinfer.so.10\0libnvonnxparser.so.10\0"
    )
    assert linked_tensorrt() == 10
