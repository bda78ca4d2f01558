"""Engines built and run on a real GPU, through the same Detector as their ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``BuildOptions`` has to say of the flavour, for this GPU."""
    capability = find_gpus().gpus[0].compute_capability
    try:
        trt = load_tensorrt(request.param)
    except SettingsError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if request.param == "tensorrt":
        return {"target": request.param}
    if f"SM{capability}" not in trt.ComputeCapability.__members__:
        pytest.skip(f"TensorRT for RTX does not build for sm_{capability}")
    return {"target": request.param, "compute_capabilities": (capability,)}


@pytest.mark.parametrize("task", ["detections", "proposals"])
@pytest.mark.parametrize("options", [GpuOptions(), GpuOptions(graph=False), GpuOptions(timings=True)])
def test_an_engine_finds_what_its_onnx_file_finds(
    target: dict[str, Any],
    task: str,
    options: GpuOptions,
    model_file: Callable[[str], Path],
    tmp_path: Path,
    frames: list[NDArray[np.uint8]],
    check_same_rows: Callable[..., None],
) -> None:
    """One by one, in batches, streamed; with graphs, without, and measured by events."""
    engine, onnx = tmp_path / "model.engine", model_file(task)
    build_engine(onnx, engine, BuildOptions(**target, precision="fp32", batch=(1, 1, 4)))
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


@pytest.mark.parametrize("sizes", [{"frames": ((480, 640), (1080, 1920))}, {"max_frame": (480, 640)}])
def test_an_engine_for_several_frame_sizes_finds_what_its_onnx_file_finds(
    sizes: dict[str, Any],
    target: dict[str, Any],
    free_file: Path,
    tmp_path: Path,
    frames: list[NDArray[np.uint8]],
    check_same_rows: Callable[..., None],
) -> None:
    """Compared by the build on each of its canvases, and here on frames that have their own."""
    options = BuildOptions(**target, **sizes, precision="fp32", batch=(1, 1, 4))
    result = build_engine(free_file, tmp_path / "model.engine", options)
    assert "not verified" not in result.verification
    own = [frames[0], frames[1], frames[2]]  # on 128 x 160, and the last on 64 x 160
    with (
        Detector(free_file, provider="cpu") as reference,
        Detector(result.path, provider="tensorrt") as detector,
    ):
        for frame in own[:2] if "frames" in sizes else own:
            check_same_rows(rows_of(detector(frame)), rows_of(reference(frame)), box=0.5, score=2e-3)
