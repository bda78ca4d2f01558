"""Small exported models on disk, for the builder, and an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from anchorline.engine.build import BuildResult, build_engine
from anchorline.engine.graph import check_exported
from anchorline.engine.options import BuildOptions
from anchorline.runtime.contract import CONTRACT_KEY

CAPABILITIES = (86, 89, 120)


@pytest.fixture(scope="session")
def model_file(
    exported: Callable[..., onnx.ModelProto], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """``model_file(task)``: a narrow MobileNetV2, exported for batches of 1 to 8; the detector has an FPN."""
    folder = tmp_path_factory.mktemp("exported")

    def write(task: str = "detections") -> Path:
        path = folder / f"{task}.onnx"
        if not path.exists():
            model = exported("fpn" if task == "detections" else "single", task)
            contract = dataclasses.replace(check_exported(model), max_batch=8)
            del model.metadata_props[:]
            onnx.helper.set_model_props(model, {CONTRACT_KEY: contract.to_json()})
            onnx.save(model, path)
        return path

    return write


@pytest.fixture(scope="session")
def free_file(exported: Callable[..., onnx.ModelProto], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector with an FPN, exported for any frame size and batches of 1 to 4."""
    path = tmp_path_factory.mktemp("free") / "m.onnx"
    model = exported(free=True)
    contract = dataclasses.replace(check_exported(model), max_batch=4)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {CONTRACT_KEY: contract.to_json()})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def built(
    rtx: Any, model_file: Callable[[str], Path], once: Callable[[str, Callable[[Path], None]], Path]
) -> BuildResult:
    """The engine that most tests look at: fp16, batches of 1 to 8, three GPUs, our plugin.

    Whichever worker comes first builds it; for the others it is a build that need not be done again.
    """

    def build(out: Path) -> BuildResult:
        return build_engine(
            model_file("detections"),
            out,
            BuildOptions(target="tensorrt-rtx", batch=(1, 1, 8), compute_capabilities=CAPABILITIES),
        )

    def make(folder: Path) -> None:
        assert build(folder / "model.engine").built

    return build(once("engine", make) / "model.engine")
