"""A tiny model whose answers can be worked out by hand, and pictures and videos to feed it.

The model's first box covers the image's valid area, with the mean grey level of that area over 255
as its score and class 0; the second covers the top left quarter of it, with half that score and
class 1. A third slot is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from anchorline.runtime.contract import CONTRACT_KEY, Contract, Thresholds

CANVAS = (48, 64)
SLOTS = 3


def _constant(name: str, value: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(value, name)


def _nodes() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["pixels", "axes_hwc"], ["total"], keepdims=0),
        helper.make_node("ReduceProd", ["image_sizes", "axis_1"], ["area"], keepdims=0),
        helper.make_node("Mul", ["area", "full_scale"], ["white"]),
        helper.make_node("Div", ["total", "white"], ["grey"]),
        helper.make_node("Unsqueeze", ["grey", "axis_1"], ["grey_column"]),
        helper.make_node("Mul", ["grey_column", "score_factors"], ["scores"]),
        helper.make_node("Gather", ["image_sizes", "wh_twice"], ["corner"], axis=1),
        helper.make_node("Unsqueeze", ["corner", "axis_1"], ["corner_row"]),
        helper.make_node("Mul", ["corner_row", "box_factors"], ["boxes"]),
        helper.make_node("Shape", ["images"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "slots"], ["label_shape"], axis=0),
        helper.make_node("Expand", ["label_row", "label_shape"], ["labels"]),
        helper.make_node("Expand", ["two", "batch"], ["num_detections"]),
    ]


def _initializers() -> list[onnx.TensorProto]:
    return [
        _constant("axes_hwc", np.array([1, 2, 3])),
        _constant("axis_1", np.array([1])),
        _constant("full_scale", np.array(3 * 255, np.float32)),
        _constant("score_factors", np.array([[1.0, 0.5, 0.0]], np.float32)),
        _constant("wh_twice", np.array([1, 0, 1, 0])),
        _constant("box_factors", np.array([[[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0, 0, 0, 0]]], np.float32)),
        _constant("slots", np.array([SLOTS])),
        _constant("label_row", np.array([[0, 1, 0]], np.int32)),
        _constant("two", np.array([2], np.int32)),
    ]


@pytest.fixture(scope="session")
def contract() -> Contract:
    return Contract(
        task="detections",
        names=("whole", "quarter"),
        canvas=CANVAS,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        thresholds=Thresholds(score=0.05),
        category_ids=(7, 9),
    )


@pytest.fixture(scope="session")
def write_model(contract: Contract) -> Callable[..., Path]:
    """Write the model with a contract (the session's, another one, or none as metadata text).

    Height and width are free where the contract's canvas is.
    """

    def write(path: Path, promised: Contract | str | None = contract) -> Path:
        dtype = TensorProto.UINT8
        if isinstance(promised, Contract) and promised.input_dtype == "float32":
            dtype = TensorProto.FLOAT
        free = isinstance(promised, Contract) and promised.canvas is None
        height, width = ("height", "width") if free else CANVAS
        graph = helper.make_graph(
            _nodes(),
            "tiny",
            [
                helper.make_tensor_value_info("images", dtype, ["B", height, width, 3]),
                helper.make_tensor_value_info("image_sizes", TensorProto.FLOAT, ["B", 2]),
            ],
            [
                helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["B", SLOTS, 4]),
                helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", SLOTS]),
                helper.make_tensor_value_info("labels", TensorProto.INT32, ["B", SLOTS]),
                helper.make_tensor_value_info("num_detections", TensorProto.INT32, ["B"]),
            ],
            _initializers(),
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        text = promised.to_json() if isinstance(promised, Contract) else promised
        if text is not None:
            helper.set_model_props(model, {CONTRACT_KEY: text})
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path

    return write


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """A 60x80 picture of smooth patches, different in every corner."""
    patches = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(patches, (80, 60), interpolation=cv2.INTER_NEAREST)


@pytest.fixture(scope="session")
def video_frames() -> list[np.ndarray]:
    """Twelve 48x64 frames: red in the top left corner, a lower half that gets lighter."""
    frames = []
    for index in range(12):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[:24, :32] = (0, 0, 255)
        frame[24:] = 20 * index
        frames.append(frame)
    return frames


@pytest.fixture(scope="session")
def moving_frames() -> list[np.ndarray]:
    """Forty 120x160 frames of a window that moves over a textured plane: every packet holds data."""
    texture = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    plane = cv2.resize(texture, (240, 180))
    return [np.ascontiguousarray(plane[i // 2 : i // 2 + 120, i : i + 160]) for i in range(40)]


@pytest.fixture(scope="session")
def write_raw_video() -> Callable[..., Path]:
    """Write frames with OpenCV alone, so that the reader is not tested with our own writer."""

    def write(path: Path, frames: list[np.ndarray], fourcc: str = "mp4v", fps: float = 10.0) -> Path:
        height, width = frames[0].shape[:2]
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), fps, (width, height))
        for frame in frames:
            writer.write(frame)
        writer.release()
        assert path.stat().st_size > 0
        return path

    return write
