"""A GPU made of NumPy: the doubles of CUDA and TensorRT, and engines for them."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from anchorline.runtime.backends import selection as opening
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.tensorrt import cuda as cuda_layer
from anchorline.runtime.tensorrt import engine as tensorrt_engine
from anchorline.runtime.tensorrt import lane as tensorrt_lane
from anchorline.runtime.tensorrt import plugins
from anchorline.runtime.tensorrt.library import load_tensorrt
from anchorline.runtime.tensorrt.manifest import manifest_path

HERE = Path(__file__).parent
ACTIVATIONS = 4096
BATCH = (1, 1, 4)


def _load(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"gpu_tests_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass
class Gpu:
    """The doubles in use: ``driver`` for CUDA, ``trt`` by flavour."""

    driver: Any
    trt: dict[str, Any]
    misuse: type[Exception]

    def frame(self, pixels: NDArray[np.uint8], **told: Any) -> DeviceArray:
        """A copy of a host frame on the GPU."""
        return DeviceArray(self.driver, pixels, told)


class DeviceArray:
    """An array of another library, with ``__cuda_array_interface__``; to be freed."""

    def __init__(self, driver: Any, pixels: NDArray[Any], told: dict[str, Any]) -> None:
        self._driver, self.address = driver, driver.put(pixels)
        self.__cuda_array_interface__ = {
            "shape": pixels.shape,
            "typestr": pixels.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
            "stream": None,
            **told,
        }

    def free(self) -> None:
        self._driver.remove(self.address)


@pytest.fixture(scope="session")
def doubles(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, ModuleType, Any]:
    """The modules of the doubles, and TensorRT for RTX's own for its names."""
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings for its names")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        try:
            real = load_tensorrt("tensorrt-rtx")
        except SettingsError as error:
            pytest.skip(str(error))
    return _load("driver_double"), _load("tensorrt_double"), real


@pytest.fixture(scope="session")
def pycuda_module() -> ModuleType:
    return _load("pycuda_double")


@pytest.fixture
def gpu(
    doubles: tuple[ModuleType, ModuleType, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Gpu]:
    """A GPU for the test. When it ends, everything must have been given back, and nothing misused."""
    driver_module, trt_module, real = doubles
    # What is there by now is no garbage of this test, and looking through it takes up to a second each time.
    gc.freeze()
    driver = driver_module.DriverDouble()
    modules = {name: trt_module.TensorRTDouble(real, driver, name) for name in ("tensorrt", "tensorrt-rtx")}
    monkeypatch.setattr(cuda_layer, "load_driver", lambda: driver)
    monkeypatch.setattr(tensorrt_lane, "load_tensorrt", modules.__getitem__)
    for module in (tensorrt_engine, plugins):
        monkeypatch.setattr(module, "tensorrt_logger", lambda name: None)
    monkeypatch.setattr(plugins, "_registered", set())
    monkeypatch.setattr(opening, "_said", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield Gpu(driver, modules, driver_module.Misuse)
    gc.collect()
    gc.unfreeze()
    assert driver.misuse == []
    assert driver.leaks() == {}


@pytest.fixture
def make_engine(tmp_path: Path, write_model: Callable[..., Path], contract: Contract) -> Callable[..., Path]:
    """``make_engine(flavour, batch, promised, plan, manifest, write)``: an engine of the tiny model, its
    manifest and its ONNX file, with changes to plan and manifest, or of what ``write`` writes."""

    def make(
        flavour: str = "tensorrt",
        batch: tuple[int, int, int] = BATCH,
        promised: Contract = contract,
        plan: dict[str, Any] | None = None,
        manifest: dict[str, Any] | None = None,
        write: Callable[..., Path] = write_model,
    ) -> Path:
        onnx = write(tmp_path / "model.onnx", promised)
        content = json.dumps(
            {
                "onnx": str(onnx),
                "batch": batch,
                "activation_bytes": ACTIVATIONS,
                "plugins": ["BatchedNMS"],
                **(plan or {}),
            }
        ).encode()
        engine = tmp_path / "model.engine"
        engine.write_bytes(content)
        promised = dataclasses.replace(promised, max_batch=batch[2], precision="fp16")
        told = {
            "contract": json.loads(promised.to_json()),
            "onnx": {"name": onnx.name, "sha256": hashlib.sha256(onnx.read_bytes()).hexdigest()},
            "engine": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)},
            "flavour": flavour,
            "flavour_version": "11.4.0.26",
            "compute_capabilities": [86, 89],
            "precision": "fp16",
            "profiles": [{"batch": list(batch)}],
            "options_hash": "0",
            "options": {},
            **(manifest or {}),
        }
        manifest_path(engine).write_text(json.dumps(told), encoding="utf-8")
        return engine

    return make


@pytest.fixture
def frames() -> list[NDArray[np.uint8]]:
    """Frames of many sizes, smaller and larger than the canvas of 48x64."""
    generator = np.random.default_rng(0)
    sizes = [(48, 64), (10, 20), (100, 200), (30, 90), (64, 48), (7, 9), (300, 40), (48, 64)]
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.fixture
def check_same() -> Callable[[list[Any], list[Any]], None]:
    """Detections of both lists agree, up to a grey level of the resize in the scores."""

    def check(found: list[Any], expected: list[Any]) -> None:
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.boxes, other.boxes, rtol=1e-5)
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
            assert (one.names, one.size) == (other.names, other.size)

    return check
