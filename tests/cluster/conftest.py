"""A tiny model whose answer depends on the picture, files to feed it, and a small cluster of Ray's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from anchorline.runtime.contract import CONTRACT_KEY, Contract, Thresholds

CANVAS = (32, 64)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One box over the whole picture, with its mean grey level over 255 as the score."""
    constants = {
        "hwc": np.array([1, 2, 3]),
        "sides": np.array([1]),
        "white": np.array(3 * 255, np.float32),
        "corners": np.array([1, 0, 1, 0]),
        "from_origin": np.array([[[0, 0, 1, 1]]], np.float32),
        "label": np.array([[0]], np.int32),
        "one": np.array([1], np.int32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["pixels", "hwc"], ["total"], keepdims=0),
        helper.make_node("ReduceProd", ["image_sizes", "sides"], ["area"], keepdims=0),
        helper.make_node("Mul", ["area", "white"], ["full"]),
        helper.make_node("Div", ["total", "full"], ["grey"]),
        helper.make_node("Unsqueeze", ["grey", "sides"], ["scores"]),
        helper.make_node("Gather", ["image_sizes", "corners"], ["corner"], axis=1),
        helper.make_node("Unsqueeze", ["corner", "sides"], ["row"]),
        helper.make_node("Mul", ["row", "from_origin"], ["boxes"]),
        helper.make_node("Shape", ["images"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "sides"], ["label_shape"], axis=0),
        helper.make_node("Expand", ["label", "label_shape"], ["labels"]),
        helper.make_node("Expand", ["one", "batch"], ["num_detections"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", *CANVAS, 3]),
            helper.make_tensor_value_info("image_sizes", TensorProto.FLOAT, ["B", 2]),
        ],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["B", 1, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", 1]),
            helper.make_tensor_value_info("labels", TensorProto.INT32, ["B", 1]),
            helper.make_tensor_value_info("num_detections", TensorProto.INT32, ["B"]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    written = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    contract = Contract(
        "detections",
        ("thing",),
        CANVAS,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        thresholds=Thresholds(score=0.01),
    )
    helper.set_model_props(written, {CONTRACT_KEY: contract.to_json()})
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    onnx.save(written, path)
    return path


@pytest.fixture(scope="session")
def write_picture() -> Callable[[Path, int], Path]:
    """``write_picture(path, grey)``: a picture of one grey level, 24x48."""

    def write(path: Path, grey: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), np.full((24, 48, 3), grey, np.uint8))
        return path

    return write


@pytest.fixture(scope="session")
def write_clip() -> Callable[..., Path]:
    """``write_clip(path, frames)``: a video that gets lighter, 32x64 at ten frames a second."""

    def write(path: Path, frames: int = 12) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (64, 32))
        for index in range(frames):
            writer.write(np.full((32, 64, 3), 20 + 200 * index // frames, np.uint8))
        writer.release()
        return path

    return write


@pytest.fixture
def files(
    tmp_path: Path, write_picture: Callable[[Path, int], Path], write_clip: Callable[..., Path]
) -> list[Path]:
    """A folder of nine pictures, the fifth damaged, a clip, a picture of a known name, and a broken clip."""
    for index in range(9):
        write_picture(tmp_path / "in" / f"ä {index}.png", 20 + 20 * index)
    damaged = tmp_path / "in" / "ä 4.png"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    clip = write_clip(tmp_path / "clip.mp4")
    again = write_picture(tmp_path / "again" / "ä 0.png", 250)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"nonsense")
    return [tmp_path / "in", clip, again, broken]


@pytest.fixture(scope="module")  # it ends with its tests, not with all others
def cluster() -> Iterator[Any]:
    """A cluster of two cores on the loopback address, which this process has joined."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'anchorline[ray]'")
    from anchorline.cluster.connection import ClusterError, connected

    with contextlib.ExitStack() as stack:
        try:
            joined = stack.enter_context(connected("local", cores=2))
        except ClusterError as error:
            if "timed out during startup" not in str(error):
                raise
            pytest.skip("this machine is too busy to start Ray within the half minute that it grants itself")
        yield joined
