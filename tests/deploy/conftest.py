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

from anchorline.engine.graph import forget
from anchorline.runtime.contract import CONTRACT_KEY, Contract

if TYPE_CHECKING:
    from anchorline.train.model.faster_rcnn import FasterRCNN

NAMES = ("cat", "dög", 'a "bird"\\')


@pytest.fixture(scope="session")
def exported(
    small_model: Callable[..., FasterRCNN],
    onnx_of: Callable[[FasterRCNN, Contract], onnx.ModelProto],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """``exported(free)``: a detector for a canvas of 128x160 or for any frame size, as a file.

    With ``floats=True`` its pixels are float32, as models have them that want frames scaled without rounding.
    """
    from anchorline.export.onnx_export import OUTPUTS
    from anchorline.train.checkpoint import contract_of

    folder = tmp_path_factory.mktemp("exported")

    def write(free: bool = False, task: str = "detections", floats: bool = False) -> Path:
        path = folder / f"{'free' if free else 'fixed'} {task}{' floats' * floats}.onnx"
        if not path.exists():
            # Those of the engine's tests, so that they are exported once.
            model = small_model("fpn" if task == "detections" else "single", len(NAMES))
            contract = contract_of(model.settings, NAMES, source={})
            canvas = None if free else model.settings.canvas
            contract = dataclasses.replace(contract, task=task, canvas=canvas)
            made = onnx_of(model, contract)
            if floats:  # the graph casts what it is given, so that an export of its own would be no other
                made.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
                readers = [node for node in made.graph.node if "images" in node.input]
                forget(made.graph, {name for node in readers for name in node.output})
                del made.metadata_props[:]
                contract = dataclasses.replace(contract, input_dtype="float32", outputs=OUTPUTS[task])
                onnx.helper.set_model_props(made, {CONTRACT_KEY: contract.to_json()})
            onnx.save(made, path)
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
