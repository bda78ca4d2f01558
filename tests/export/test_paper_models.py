"""RoIPool as an ONNX function, and small models of the caffe2015 profile exported to ONNX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from onnx import TensorProto, helper

from anchorline.data.synthetic import generate_scene
from anchorline.engine.lowering import lower
from anchorline.export.functions import attach_functions
from anchorline.export.onnx_export import export_onnx
from anchorline.runtime.contract import DOMAIN
from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.train.checkpoint import contract_of, save_checkpoint
from anchorline.train.model import ops
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.roi_pooling import RoIMaxPooling
from anchorline.train.model.settings import ModelSettings
from anchorline.train.predict import TorchDetector
from anchorline.train.settings import load_preset

NAMES = ("cat", "dog", "bird")
# Odd places: halves after the scale, one pixel, reversed, empty, an unused slot with its last pixel at -1.
ODD = torch.tensor(
    [
        [8.0, 24, 40, 56],
        [0, 0, 0, 0],
        [100, 80, 20, 10],
        [0, 0, -1, -1],
        [-8, -8, 8, 8],
        [300, 300, 320, 330],
        [-60, -40, 400, 300],
        [31.999, 16, 32.001, 96],
    ]
)


def roi_pool_model(size: int, scale: float) -> onnx.ModelProto:
    node = helper.make_node(
        "RoIPool",
        ["features", "rois"],
        ["pooled"],
        domain=DOMAIN,
        output_size=size,
        spatial_scale=scale,
        **ops.PLUGIN_ATTRIBUTES,
    )
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (
            ("features", ["b", 5, 9, 13]),
            ("rois", ["b", "r", 4]),
            ("pooled", ["n", 5, size, size]),
        )
    ]
    graph = helper.make_graph([node], "pooling", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    attach_functions(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def rois_of(seed: int) -> torch.Tensor:
    """[2, 48, 4] on an image of 144x208, the odd ones first."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, 40, 2, generator=generator) * 260 - 40
    boxes = torch.cat((corner, corner + torch.rand(2, 40, 2, generator=generator) * 150), dim=2)
    return torch.cat((ODD.expand(2, -1, -1), boxes), dim=1)


@pytest.mark.parametrize(("size", "scale"), [(7, 1 / 16), (6, 1 / 16), (1, 1.0), (14, 0.125)])
def test_the_function_is_torchvisions_roi_pool(size: int, scale: float) -> None:
    features, rois = torch.randn(2, 5, 9, 13), rois_of(size)
    features[0, 0, 0, 0] = -0.0
    session = onnxruntime.InferenceSession(
        roi_pool_model(size, scale).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"features": features.numpy(), "rois": rois.numpy()})
    expected = torchvision.ops.roi_pool(features, list(rois), size, scale)
    np.testing.assert_array_equal(found, expected.numpy())
    np.testing.assert_array_equal(
        ops.roi_pool(features, rois, output_size=size, spatial_scale=scale).numpy(), expected.numpy()
    )


def test_two_poolings_of_different_size_have_no_common_function() -> None:
    model = roi_pool_model(7, 0.5)
    model.graph.node.append(model.graph.node[0])
    next(a for a in model.graph.node[1].attribute if a.name == "output_size").i = 6
    with pytest.raises(ValueError, match="RoIPool"):
        attach_functions(model)


@pytest.mark.parametrize(("edges", "last"), [("inclusive", 1), ("continuous", 0)])
def test_a_box_is_pooled_up_to_its_last_pixel(edges: str, last: int) -> None:
    """By hand: x2 = 40 is pixel 39 for caffe, 2.4 on the map, so column 2 is the last, and 40 rounds to 3."""
    settings = ModelSettings(neck="single", anchor_sizes=((32.0,),), box_edges=edges, roi_size=1)
    feature = torch.arange(5.0).expand(1, 1, 5, 5)
    pooled = RoIMaxPooling(16, settings)([feature], torch.tensor([[[0.0, 0, 40, 40]]]))
    assert pooled.item() == 3 - last


def small(name: str) -> FasterRCNN:
    """A paper model on 96x160 with narrow fully connected layers and heads that spread their scores."""
    torch.manual_seed(2)
    overrides = [
        "model.canvas=[96, 160]",
        "model.shorter_side=90",
        "model.longer_side=150",
        "model.anchor_sizes=[[16.0, 32.0, 64.0]]",
        "model.representation=16",
        "model.rpn_min_side=4.0",
        "model.mean=[110.0, 115.0, 120.0]",
        "model.std=[58.0, 58.0, 58.0]",
        # Frames of another scale, as for an imported model; VGG-16's stay those of the canvas.
        f"model.frame_scale={1.25 if name == 'zf' else 1.0}",
        # No ties between overlapping boxes, which rounding would decide.
        "model.rpn_nms_iou=1.0",
        "model.nms_iou=1.0",
    ]
    model = FasterRCNN(load_preset(f"{name}-paper", overrides).model, len(NAMES)).eval()
    with torch.no_grad():
        model.rpn.head.conv[0][0].weight.mul_(0.3)
        model.roi_heads.box_head.fc6.weight.mul_(0.2)
        model.roi_heads.box_head.fc7.weight.mul_(20)
        model.roi_heads.box_predictor.cls_score.weight.mul_(40)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(4)
    return model


@pytest.mark.parametrize("name", ["zf", pytest.param("vgg16", marks=pytest.mark.slow)])
def test_a_small_paper_model_is_the_same_in_onnxruntime(name: str, tmp_path: Path) -> None:
    model = small(name)
    contract = contract_of(model.settings, NAMES)
    checkpoint = tmp_path / "model.safetensors"
    save_checkpoint(checkpoint, model.state_dict(), model.settings, contract)
    result = export_onnx(checkpoint, tmp_path / "model.onnx", canvas=(96, 160))
    assert result.verification is not None
    assert result.verification.passed
    stages = {stage.name for stage in result.verification.stages}
    assert {"pixels", "backbone", "objectness", "proposals", "roi_features", "detections"} <= stages
    proto = onnx.load(result.path)
    (node,) = [node for node in proto.graph.node if node.op_type == "RoIPool"]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["output_size"] == (7 if name == "vgg16" else 6)
    assert attributes["spatial_scale"] == 1 / 16
    lowered = lower(proto, "tensorrt-rtx")
    assert {node.op_type for node in lowered.graph.node if node.domain == DOMAIN} == {"RoIPool", "BatchedNMS"}


def rows_of(found: Detections) -> NDArray[np.float64]:
    """Detections as rows (x1, y1, x2, y2, score, label)."""
    return np.column_stack((found.boxes, found.scores, found.labels)).astype(np.float64)


def test_zf_takes_sides_that_its_poolings_round_up(
    check_same_rows: Callable[..., None], tmp_path: Path
) -> None:
    """caffe pads nothing, so the canvas has the frame's own odd sides, and every pooling rounds up."""
    model = small("zf")
    checkpoint, out = tmp_path / "model.safetensors", tmp_path / "model.onnx"
    save_checkpoint(checkpoint, model.state_dict(), model.settings, contract_of(model.settings, NAMES))
    export_onnx(checkpoint, out, verify=False)
    reference = TorchDetector.load(checkpoint)
    with Detector(out, "cpu") as detector:
        for size in ((97, 150), (66, 160)):
            frame = generate_scene(0, size, 0)[0]
            (canvas,) = detector.prepare([frame])[0][detector.contract.inputs[0]]
            assert any(side % 2 for side in canvas.shape[:2])
            expected = reference(frame)
            assert len(expected) > 20
            check_same_rows(rows_of(detector(frame)), rows_of(expected))
