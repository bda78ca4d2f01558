"""Engines built and run on a real GPU, through the same Detector as their ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from anchorline.doctor.machine import find_gpus
from anchorline.engine.build import build_engine
from anchorline.engine.options import BuildOptions
from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.tensorrt.cuda import GpuOptions
from anchorline.runtime.tensorrt.library import load_tensorrt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not find_gpus().gpus, reason="needs an NVIDIA GPU"),
]


@pytest.fixture
def frames() -> list[NDArray[np.uint8]]:
    """Smaller and larger than the canvas of 128x160, and of other shapes."""
    patches = np.random.default_rng(5).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    large = patches.repeat(24, axis=0).repeat(24, axis=1)
    return [large, large[:128, :160], large[50:90, 20:200], large[:, :100]]


def rows_of(found: Detections) -> NDArray[np.float64]:
    return np.column_stack([found.boxes, found.scores, found.labels]).astype(np.float64)


@pytest.mark.parametrize("task", ["detections", "proposals"])
@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("options", [GpuOptions(), GpuOptions(graph=False), GpuOptions(timings=True)])
def test_an_engine_finds_what_its_onnx_file_finds(
    flavour: str,
    task: str,
    options: GpuOptions,
    model_file: Callable[[str], Path],
    tmp_path: Path,
    frames: list[NDArray[np.uint8]],
    check_same_rows: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One by one, in batches, streamed; with graphs, without, and measured by events."""
    capability = find_gpus().gpus[0].compute_capability
    asked = (capability,) if flavour == "tensorrt-rtx" else ()
    try:
        trt = load_tensorrt(flavour)
    except SettingsError as error:
        pytest.skip(str(error))
    if flavour == "tensorrt-rtx" and f"SM{capability}" not in trt.ComputeCapability.__members__:
        pytest.skip(f"TensorRT for RTX does not build for sm_{capability}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine, onnx = tmp_path / "model.engine", model_file(task)
    build_engine(
        onnx,
        engine,
        BuildOptions(target=flavour, precision="fp32", batch=(1, 1, 4), compute_capabilities=asked),
    )
    with Detector(onnx, provider="cpu") as detector:
        expected = [rows_of(found) for found in detector.batch(frames)]
    with Detector(engine, provider="tensorrt", gpu=options) as detector:
        for results in (
            [detector(frame) for frame in frames],
            detector.batch(frames),
            list(detector.stream(frames * 5, batch=2)),
        ):
            for index, found in enumerate(results):
                check_same_rows(rows_of(found), expected[index % len(frames)], box=0.5, score=2e-3)
        assert detector.timings["network"] > 0
