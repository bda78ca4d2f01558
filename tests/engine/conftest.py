"""Exported models and onnxruntime sessions for the engine's tests.

PyTorch is imported inside the fixtures: the stage itself never needs it, making a model to lower does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.tensorrt.library import load_tensorrt

if TYPE_CHECKING:
    from anchorline.runtime.contract import Contract
    from anchorline.train.model.faster_rcnn import FasterRCNN

Outputs = dict[str, NDArray[np.generic]]
Run = Callable[..., Outputs]
NAMES = ("cat", "dog", "bird")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What would be written to the user's cache, such as the links to TensorRT's libraries."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(scope="session")
def rtx(cache: Path) -> Any:
    """The module of TensorRT for RTX, loaded as the builder loads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        try:
            return load_tensorrt("tensorrt-rtx")
        except SettingsError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def exported(
    small_model: Callable[..., FasterRCNN], onnx_of: Callable[[FasterRCNN, Contract], onnx.ModelProto]
) -> Callable[..., onnx.ModelProto]:
    """``exported(neck, task)``: the ONNX form of a small model on a canvas of 128x160, each made once and as
    the builder reads it.

    With ``free=True`` for any frame size. A copy each time, so that a test may change it. The proposals' is
    such a file, held to the canvas as a build does: other tests need that export as well.
    """
    from anchorline.engine.graph import take_for_engines
    from anchorline.engine.lowering import fix_canvas
    from anchorline.train.checkpoint import contract_of

    done: dict[tuple[str, str, bool], bytes] = {}

    def get(neck: str = "fpn", task: str = "detections", free: bool = False) -> onnx.ModelProto:
        if (neck, task, free) not in done:
            model = small_model(neck, len(NAMES))
            contract = contract_of(model.settings, NAMES, source={})
            held = task == "proposals" and not free
            canvas = None if free or held else model.settings.canvas
            made = onnx_of(model, dataclasses.replace(contract, task=task, canvas=canvas))
            take_for_engines(made)
            if held:
                fix_canvas(made, model.settings.canvas)
            done[neck, task, free] = made.SerializeToString()
        return onnx.load_model_from_string(done[neck, task, free])

    return get


@pytest.fixture(scope="session")
def run_onnx() -> Run:
    """``run_onnx(model, inputs)``: its outputs by name, from onnxruntime's CPU provider on one thread.

    With ``as_written=True`` node by node: which nodes are fused, and into what, depends on the processor.
    """

    def run(
        model: onnx.ModelProto, inputs: Mapping[str, NDArray[np.generic]], as_written: bool = False
    ) -> Outputs:
        options = onnxruntime.SessionOptions()
        if as_written:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return run


@pytest.fixture(scope="session")
def scenes() -> dict[str, NDArray[np.generic]]:
    """Three canvases of random patches, of which the second image fills only a part."""
    patches = np.random.default_rng(5).integers(0, 256, (3, 16, 20, 3), dtype=np.uint8)
    images = patches.repeat(8, axis=1).repeat(8, axis=2)
    return {"images": images, "image_sizes": np.array([(128, 160), (77, 101), (128, 160)], np.float32)}


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Outputs, int], NDArray[np.float64]]:
    """``rows_of(outputs, image)``: detections as rows (x1, y1, x2, y2, score[, label])."""

    def rows(outputs: Outputs, image: int) -> NDArray[np.float64]:
        count = int(outputs["num_detections" if "num_detections" in outputs else "num_proposals"][image])
        columns = [outputs["boxes"][image], outputs["scores"][image][:, None]]
        if "labels" in outputs:
            columns.append(outputs["labels"][image][:, None])
        return np.concatenate([column.astype(np.float64) for column in columns], axis=1)[:count]

    return rows
