"""onnxruntime's providers: which is chosen, and the session with its memory bound."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from anchorline.runtime.backends import onnxruntime as onnxruntime_backend
from anchorline.runtime.backends import selection as opening
from anchorline.runtime.backends.onnxruntime import (
    PROVIDERS,
    BoundNetwork,
    OnnxRuntimeBackend,
    available_providers,
)
from anchorline.runtime.contract import Contract
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, GpuError, SettingsError
from anchorline.runtime.tensorrt.cuda import GpuOptions

FRAME = np.full((48, 64, 3), 102, np.uint8)


@pytest.fixture
def session(model_path: Path) -> Any:
    return onnxruntime.InferenceSession(str(model_path), providers=["CPUExecutionProvider"])


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An onnxruntime that says it has the CUDA provider; what each session was asked for."""
    asked: list[Any] = []
    build = onnxruntime.InferenceSession

    def make(path: str, options: Any, providers: list[Any], **more: Any) -> Any:
        asked.append(providers)
        assert more == {"enable_fallback": 0, "disabled_optimizers": ["WeightBiasQuantization"]}
        return build(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    monkeypatch.setattr(opening, "_said", set())
    return asked


def bound_inputs(levels: list[int], size: tuple[int, int] = (48, 64)) -> dict[str, np.ndarray]:
    images = np.stack([np.full((*size, 3), level, np.uint8) for level in levels])
    return {"images": images, "image_sizes": np.full((len(levels), 2), size, np.float32)}


def test_bound_memory_gives_the_session_s_numbers(session: Any, contract: Contract) -> None:
    """On the CPU's memory, by the calls that bind a GPU's."""
    network = BoundNetwork(session, contract, "cpu", 0)
    kept = []
    for levels in ([10], [20, 30, 40], [50], [60, 70, 80]):
        inputs = bound_inputs(levels)
        outputs, seconds = network.infer(inputs)
        expected = session.run(list(contract.outputs), inputs)
        for name, value in zip(contract.outputs, expected, strict=True):
            np.testing.assert_array_equal(outputs[name], value)
        assert list(seconds) == ["upload", "network", "download"]
        kept.append((outputs, expected))
    assert len(network._kept) == 2  # buffers are made once for a batch size
    for outputs, expected in kept:
        np.testing.assert_array_equal(outputs["scores"], expected[1])  # and results are nobody's buffer


def test_threads_share_the_bound_memory_in_turn(
    session: Any, contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session.run_with_iobinding

    def run_late(*arguments: Any) -> None:
        time.sleep(0.002)  # long enough for another thread to fill the inputs again
        run(*arguments)

    monkeypatch.setattr(session, "run_with_iobinding", run_late)
    network = BoundNetwork(session, contract, "cpu", 0)

    def infer(level: int) -> bool:
        outputs, _ = network.infer(bound_inputs([level]))
        return round(float(outputs["scores"][0, 0]) * 255) == level

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(infer, range(0, 240, 10)))


def test_each_batch_size_has_its_graph(
    session: Any, contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []

    class Options(onnxruntime.RunOptions):
        def add_run_config_entry(self, key: str, value: str) -> None:
            told.append((key, value))

    monkeypatch.setattr(onnxruntime, "RunOptions", Options)
    network = BoundNetwork(session, contract, "cpu", 0, graph=True)
    for levels in ([1], [1, 2], [3]):
        network.infer(bound_inputs(levels))
    assert told == [("gpu_graph_id", "1"), ("gpu_graph_id", "2")]


@pytest.fixture
def free(tmp_path: Path, write_model: Callable[..., Path], contract: Contract) -> tuple[Any, Contract]:
    """A session of a model for frames of any size, and its contract."""
    contract = dataclasses.replace(contract, canvas=None)
    path = write_model(tmp_path / "free.onnx", contract)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]), contract


@pytest.mark.parametrize("graph", [False, True])
def test_the_buffers_of_a_few_shapes_are_kept(
    free: tuple[Any, Contract], monkeypatch: pytest.MonkeyPatch, graph: bool
) -> None:
    """And all that a graph was captured with, whose addresses it replays; beyond those nothing is."""
    session, contract = free
    made: list[tuple[int, ...]] = []
    told: list[str] = []
    bind = BoundNetwork._bind

    def noted(self: BoundNetwork, inputs: dict[str, np.ndarray], number: str) -> Any:
        made.append(inputs["images"].shape[:3])
        told.append(number)
        return bind(self, inputs, number)

    monkeypatch.setattr(BoundNetwork, "_bind", noted)
    monkeypatch.setattr(BoundNetwork, "MOST_GRAPHS", 2)
    network = BoundNetwork(session, contract, "cpu", 0, graph)
    sides = [32 * (1 + number) for number in range(7)]
    for side in [*sides, 192, 224, 128]:
        inputs = bound_inputs([side], (side, 64))
        outputs, _ = network.infer(inputs)
        for name, value in zip(contract.outputs, session.run(list(contract.outputs), inputs), strict=True):
            np.testing.assert_array_equal(outputs[name], value)
    assert made == [(1, side, 64) for side in sides]  # the last four stay
    network.infer(bound_inputs([1], (32, 64)))  # the first two only where graphs hold them
    assert len(made) == (7 if graph else 8)
    assert told == (["1", "2", *["-1"] * 5] if graph else ["-1"] * 8)
    network.infer(bound_inputs([1], (160, 64)))  # used longest ago of four, when another came
    assert len(made) == (7 if graph else 9)
    network.infer(bound_inputs([1, 2], (128, 64)))
    assert made[-1] == (2, 128, 64)


def test_the_options_of_the_gpu_providers(with_cuda: list[Any], model_path: Path) -> None:
    cuda, cpu = PROVIDERS["cuda"], PROVIDERS["cpu"]
    for provider, options in (
        ("cuda", GpuOptions(device=1, graph=True)),
        ("cuda", GpuOptions()),
        ("tensorrt", GpuOptions(graph=True)),
    ):
        with pytest.raises(GpuError, match=f"cannot start {PROVIDERS[provider]} here"):
            OnnxRuntimeBackend(model_path, provider, options=options)
    assert with_cuda == [
        [(cuda, {"device_id": "1", "enable_cuda_graph": "1"}), cpu],
        [(cuda, {"device_id": "0"}), cpu],
        [(PROVIDERS["tensorrt"], {"device_id": "0", "trt_cuda_graph_enable": "1"}), cuda, cpu],
    ]


def test_auto_goes_on_to_the_cpu_and_says_so_once(
    with_cuda: list[Any], model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with Detector(model_path) as detector:
            assert detector.provider == "cpu"
            assert len(detector(FRAME)) == 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cuda cannot run it here" in record.getMessage()


def test_a_damaged_file_is_no_fault_of_the_gpu_s(
    with_cuda: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no ONNX at all")
    for provider in ("auto", "cuda"):
        with pytest.raises(ArtefactError, match="not an ONNX file"):
            Detector(path, provider=provider)
    assert caplog.records == []


def test_a_file_that_no_provider_runs_is_not_said_to_run(
    with_cuda: list[Any], model_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("This is an invalid model")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(ArtefactError, match=r"cannot load it \(This is an invalid model\)"):
        Detector(model_path)
    assert caplog.records == []


def test_onnxruntime_s_own_fallback_is_off(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It prints on stdout and starts again without options, on another GPU than was asked for."""
    create = onnxruntime.InferenceSession._create_inference_session
    tries = []

    def fail(self: Any, providers: Any, *rest: Any) -> None:
        tries.append(providers)
        if providers and providers[0] != "CPUExecutionProvider":
            raise RuntimeError("CUDA failure 101: invalid device ordinal ; GPU=7")
        create(self, providers, *rest)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fail)
    monkeypatch.setattr(opening, "_said", set())
    with pytest.raises(
        GpuError, match=r"cannot start CUDAExecutionProvider here \(CUDA failure 101.*provider cpu"
    ):
        Detector(model_path, provider="cuda", gpu=GpuOptions(device=7))
    assert len(tries) == 1
    with Detector(model_path, gpu=GpuOptions(device=7)) as detector:
        assert detector.provider == "cpu"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("code", "sticky"), [(2, False), (700, True), (719, True)])
def test_a_run_that_fails_on_the_gpu(
    code: int, sticky: bool, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the GPU's fault and not the file's; after a lost context nothing more is tried."""
    monkeypatch.setattr(onnxruntime_backend, "available_providers", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(opening, "available_providers", lambda: ["cpu", "cuda"])
    monkeypatch.setitem(PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setattr(
        onnxruntime_backend, "_provider_list", lambda provider, options: ["CPUExecutionProvider"]
    )
    tries = []

    def infer(self: Any, inputs: Any) -> Any:
        tries.append(inputs)
        raise RuntimeError(f"CUDA failure {code}: some text ; GPU=0")

    monkeypatch.setattr(BoundNetwork, "infer", infer)
    detector = Detector(model_path, provider="cuda")
    with pytest.raises(GpuError, match=f"CUDA failure {code}.*; .*"):
        detector(FRAME)
    with pytest.raises(
        GpuError, match="refused after an earlier failure" if sticky else "cannot run it on cuda"
    ):
        detector(FRAME)
    assert len(tries) == (1 if sticky else 2)


def test_by_name_a_provider_that_does_not_start_is_an_error(with_cuda: list[Any], model_path: Path) -> None:
    with pytest.raises(GpuError, match="cannot start CUDAExecutionProvider here"):
        Detector(model_path, provider="cuda")


def test_a_provider_that_is_not_there(model_path: Path) -> None:
    if available_providers() != ["cpu"]:
        pytest.skip("this onnxruntime has a GPU's providers")
    gpu = "onnxruntime-gpu; pip install 'anchorline\\[gpu\\]'"
    packages = {"cuda": gpu, "tensorrt": gpu, "tensorrt-rtx": "onnxruntime-ep-nv-tensorrt-rtx"}
    for provider, package in packages.items():
        with pytest.raises(SettingsError, match=rf"comes with {package}\); available here: auto, cpu"):
            Detector(model_path, provider=provider)


def test_the_cuda_provider_takes_what_it_is_given(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, make_engine: Callable, gpu: Any
) -> None:
    """The way through the backend, with the CPU's memory in the place of the GPU's."""
    monkeypatch.setattr(onnxruntime_backend, "available_providers", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(opening, "available_providers", lambda: ["cpu", "cuda"])
    monkeypatch.setitem(PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setattr(
        onnxruntime_backend, "_provider_list", lambda provider, options: ["CPUExecutionProvider"]
    )
    build = BoundNetwork
    monkeypatch.setattr(
        onnxruntime_backend,
        "BoundNetwork",
        lambda session, contract, *rest: build(session, contract, "cpu", 0),
    )
    for model in (model_path, make_engine()):
        with Detector(model, provider="cuda") as detector:
            assert detector.provider == "cuda"
            np.testing.assert_allclose(detector(FRAME).scores, [0.4, 0.2], rtol=1e-6)
            assert detector.timings["network"] > 0
    with Detector(model_path) as detector:
        assert detector.provider == "cuda"
