"""What TensorRT itself refuses, at parsing and at building: one line with node, operator and reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest

from anchorline.engine import build as builder
from anchorline.engine import toolkit as flavours
from anchorline.engine import toolkit as parsing
from anchorline.engine.build import build_engine
from anchorline.engine.graph import check_exported
from anchorline.engine.options import BuildOptions
from anchorline.runtime.contract import CONTRACT_KEY
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError

ModelFile = Callable[[str], Path]
RTX = "tensorrt-rtx"


def graph_that(nodes: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 18, "anchorline": 1]>
        g (float[1, 3, 5000] x) => (float[1, 3, N] y) {{ {nodes} }}"""
    )


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("y = Frobnicate (x)", r"node \S+ \(Frobnicate\): "),
        (
            'y = anchorline.BatchedNMS <plugin_namespace = "anchorline", plugin_version = "1"> (x, x)',
            r"node y \(BatchedNMS\): .*the plugin is not registered or refused",
        ),
    ],
)
def test_a_parser_error_names_node_operator_and_cause(rtx: Any, nodes: str, message: str) -> None:
    toolkit = flavours.load_toolkit(BuildOptions(target=RTX, compute_capabilities=(86,)))
    with pytest.raises(ArtefactError, match=f"cannot parse the graph: {message}") as raised:
        parsing.parse(toolkit, toolkit.create_builder(), graph_that(nodes), (1, 1, 1))
    assert "\n" not in str(raised.value)


def test_a_build_that_tensorrt_gives_up_says_why(
    rtx: Any, model_file: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that parses and that nothing runs: the reason is in TensorRT's log."""
    monkeypatch.setattr(builder, "lower", lambda model, *_, **__: half_nms(model))
    with pytest.raises(AnchorlineError, match=r"could not build the engine: .*") as raised:
        build_engine(
            model_file("proposals"),
            tmp_path / "m.engine",
            BuildOptions(target=RTX, compute_capabilities=(86,)),
        )
    assert "no reason given" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == []


def half_nms(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model with our contract and tensors whose NMS gets half precision, which the plugin does not take."""
    contract = check_exported(model)
    height, width = contract.canvas
    made = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 18, "anchorline": 1]>
        g (uint8[B, {height}, {width}, 3] images, float[B, 2] image_sizes)
        => (float16[B, 2] boxes, float[B, 2] scores, float[B] num_proposals) {{
            four = Constant <value_ints = [-1, 1, 2]> ()
            sizes = Cast <to = 10> (image_sizes)
            sizes_3d = Reshape (sizes, four)
            places = Concat <axis = 2> (sizes_3d, sizes_3d)
            two_places = Concat <axis = 1> (places, places)
            boxes = anchorline.BatchedNMS <iou_threshold = 0.5, score_threshold = 0.1,
                plugin_namespace = "anchorline", plugin_version = "1"> (two_places, sizes)
            scores = Neg (image_sizes)
            pixels = Cast <to = 1> (images)
            axes = Constant <value_ints = [1, 2, 3]> ()
            num_proposals = ReduceMax <keepdims = 0> (pixels, axes)
        }}"""
    )
    onnx.helper.set_model_props(made, {CONTRACT_KEY: contract.to_json()})
    return made
