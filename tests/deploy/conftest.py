"""A small exported detector on disk, and pictures as the content of files."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import onnx
import pytest

from anchorline.runtime.contract import Contract

if TYPE_CHECKING:
    from anchorline.train.model.faster_rcnn import FasterRCNN

NAMES = ("cat", "dög", 'a "bird"\\')


@pytest.fixture(scope="session")
def exported(
    small_model: Callable[..., FasterRCNN],
    onnx_of: Callable[[FasterRCNN, Contract], onnx.ModelProto],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """``exported(free)``: a detector for a canvas of 128x160 or for any frame size, as a file."""
    from anchorline.train.checkpoint import contract_of

    folder = tmp_path_factory.mktemp("exported")

    def write(free: bool = False, task: str = "detections") -> Path:
        path = folder / f"{'free' if free else 'fixed'} {task}.onnx"
        if not path.exists():
            # Those of the engine's tests, so that they are exported once.
            model = small_model("fpn" if task == "detections" else "single", len(NAMES))
            contract = contract_of(model.settings, NAMES, source={})
            canvas = None if free else model.settings.canvas
            onnx.save(onnx_of(model, dataclasses.replace(contract, task=task, canvas=canvas)), path)
        return path

    return write


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """The content of six image files of four shapes, with detail for an untrained model to find."""
    random, found = np.random.default_rng(3), []
    for number, (height, width) in enumerate(
        ((90, 120), (200, 150), (90, 120), (60, 300), (128, 160), (90, 120))
    ):
        coarse = random.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        done, content = cv2.imencode((".jpg", ".png")[number % 2], image)
        assert done
        found.append(content.tobytes())
    return found


@pytest.fixture(scope="session")
def triton() -> Any:
    """The player of Triton beside this file; test folders are no packages."""
    spec = importlib.util.spec_from_file_location(
        "triton_double", Path(__file__).with_name("triton_double.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
