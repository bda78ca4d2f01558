"""A tiny model that finds one box in any frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from anchorline.runtime.contract import CONTRACT_KEY, Contract


@pytest.fixture(scope="session")
def bench_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    constants = {
        "box": np.array([[[0, 0, 8, 8]]], np.float32),
        "score": np.array([[0.9]], np.float32),
        "label": np.array([[0]], np.int32),
        "one": np.array([1], np.int32),
        "single": np.array([1]),
    }
    nodes = [
        helper.make_node("Shape", ["image_sizes"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "single"], ["row"], axis=0),
        helper.make_node("Concat", ["batch", "single", "single"], ["plane"], axis=0),
        helper.make_node("Expand", ["box", "plane"], ["boxes"]),
        helper.make_node("Expand", ["score", "row"], ["scores"]),
        helper.make_node("Expand", ["label", "row"], ["labels"]),
        helper.make_node("Expand", ["one", "batch"], ["num_detections"]),
    ]
    graph = helper.make_graph(
        nodes,
        "bench",
        [
            helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 32, 64, 3]),
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
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    contract = Contract("detections", ("thing",), (32, 64), mean=(0.0,) * 3, std=(1.0,) * 3)
    helper.set_model_props(model, {CONTRACT_KEY: contract.to_json()})
    path = tmp_path_factory.mktemp("bench") / "tiny.onnx"
    onnx.save(model, path)
    return path
