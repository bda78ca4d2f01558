"""Files with other settings: what a fresh export of the same weights under these settings gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from anchorline.export.graph_settings import (
    GraphSettings,
    contract_in,
    proposal_counts,
    scaled,
    with_settings,
)
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.train.checkpoint import contract_of
from anchorline.train.model.faster_rcnn import FasterRCNN, run_task

NAMES = ("cat", "dog", "bird")
FEWER = GraphSettings(proposals=25, pre_nms=80)
Outputs = dict[str, NDArray[np.generic]]
Export = Callable[..., tuple[FasterRCNN, onnx.ModelProto]]


@pytest.fixture(scope="module")
def export(
    small_model: Callable[..., FasterRCNN], onnx_of: Callable[[FasterRCNN, Contract], onnx.ModelProto]
) -> Export:
    """``export(neck, task, **changes)``: a small model and its file; the weights are always the same."""

    def get(neck: str, task: str = "detections", **changes: Any) -> tuple[FasterRCNN, onnx.ModelProto]:
        model = small_model(neck, len(NAMES), **changes)
        contract = contract_of(model.settings, NAMES, source={})
        contract = dataclasses.replace(contract, task=task, category_ids=(7, 8, 9))
        return model, onnx_of(model, contract)

    return get


def run(proto: onnx.ModelProto, batch: int = 2, canvas: tuple[int, int] = (128, 160)) -> Outputs:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    images, sizes = scenes(batch, canvas)
    return dict(zip(names, session.run(names, {"images": images, "image_sizes": sizes}), strict=True))


def scenes(batch: int, canvas: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    random = np.random.default_rng(batch)
    patches = random.integers(0, 256, (batch, canvas[0] // 8, canvas[1] // 8, 3), dtype=np.uint8)
    return patches.repeat(8, axis=1).repeat(8, axis=2), np.array([canvas] * batch, np.float32)


def in_pytorch(
    model: FasterRCNN, settings: GraphSettings, task: str, canvas: tuple[int, int] = (128, 160)
) -> Outputs:
    """What the model itself gives with these counts."""
    rpn = model.rpn
    kept = rpn.pre_nms, rpn.post_nms
    rpn.pre_nms, rpn.post_nms = settings.pre_nms or kept[0], settings.proposals or kept[1]
    try:
        with torch.no_grad():
            images, sizes = map(torch.from_numpy, scenes(2, canvas))
            found = run_task(model, task, images, sizes)
    finally:
        rpn.pre_nms, rpn.post_nms = kept
    return {name: tensor.numpy() for name, tensor in found.items()}


def rows(outputs: Outputs, image: int) -> NDArray[np.float64]:
    count = int([*outputs.values()][-1][image])
    columns = [outputs["boxes"][image], outputs["scores"][image][:, None]]
    columns += [outputs["labels"][image][:, None]] if "labels" in outputs else []
    return np.concatenate([column.astype(np.float64) for column in columns], axis=1)[:count]


@pytest.mark.parametrize(("neck", "task"), [("fpn", "detections"), ("single", "proposals")])
@pytest.mark.parametrize("settings", [FEWER, GraphSettings(proposals=7), GraphSettings(30, 40)])
def test_fewer_proposals_are_those_of_the_model_with_fewer(
    export: Export,
    check_same_rows: Callable[..., None],
    neck: str,
    task: str,
    settings: GraphSettings,
) -> None:
    model, proto = export(neck, task)
    changed = with_settings(proto, settings)
    assert proposal_counts(proto) == (60, 200)
    assert proposal_counts(changed) == (settings.proposals or 60, settings.pre_nms or 200)
    for canvas in ((128, 160), (32, 64)):
        found = run(changed, canvas=canvas)
        expected = in_pytorch(model, settings, task, canvas)
        assert {name: v.shape for name, v in found.items()} == {n: v.shape for n, v in expected.items()}
        for image in range(2):
            assert len(rows(expected, image)) >= 5
            check_same_rows(rows(found, image), rows(expected, image))


def test_fewer_before_the_nms_are_other_proposals(export: Export) -> None:
    proto = export("fpn")[1]
    fewer = with_settings(proto, GraphSettings(pre_nms=15))  # 75 on five levels, of which 60 are kept
    assert proposal_counts(fewer) == (60, 15)
    assert not np.array_equal(run(fewer)["boxes"], run(proto)["boxes"])


@pytest.mark.parametrize(
    ("neck", "changes"),
    [
        ("single", {"rpn_score_threshold": 0.05}),  # whose head computes the slots with a proposal only
        pytest.param("fpn", {"rpn_score_threshold": 0.05}, marks=pytest.mark.slow),
        pytest.param("fpn", {}, marks=pytest.mark.slow),
    ],
)
def test_the_file_is_that_of_a_fresh_export_bit_for_bit(
    export: Export, neck: str, changes: dict[str, Any]
) -> None:
    fresh = export(neck, **changes, rpn_pre_nms=80, rpn_post_nms=25)[1]
    changed = with_settings(export(neck, **changes)[1], FEWER)
    for batch, canvas in ((1, (128, 160)), (3, (64, 96))):
        ours, theirs = run(changed, batch, canvas), run(fresh, batch, canvas)
        for name, values in theirs.items():
            assert np.array_equal(ours[name], values), name
    assert contract_in(changed).thresholds == contract_in(fresh).thresholds
    shapes = [
        {
            value.name: [(side.dim_value, side.dim_param) for side in value.type.tensor_type.shape.dim]
            for value in (*each.graph.output, *each.graph.input)
        }
        for each in (changed, fresh)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "settings", [FEWER, GraphSettings(classes=("dog",)), GraphSettings(30, 60, None, ("bird", "cat"))]
)
def test_every_noted_shape_is_what_shape_inference_finds(export: Export, settings: GraphSettings) -> None:
    changed = with_settings(export("fpn")[1], settings)
    onnx.checker.check_model(changed, full_check=True)
    noted = {v.name: v.type.tensor_type.shape for v in (*changed.graph.value_info, *changed.graph.output)}
    onnx.shape_inference.infer_shapes(changed, check_type=True, strict_mode=True, data_prop=True)
    bare = onnx.ModelProto()
    bare.CopyFrom(changed)
    customs = {name for node in changed.graph.node if node.domain for name in node.output}
    kept = [value for value in bare.graph.value_info if value.name in customs]
    del bare.graph.value_info[:]
    bare.graph.value_info.extend(kept)
    inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True)
    compared = 0
    for value in inferred.graph.value_info:
        for mine, other in zip(noted[value.name].dim, value.type.tensor_type.shape.dim, strict=True):
            if mine.HasField("dim_value") and other.HasField("dim_value"):
                compared += 1
                assert mine.dim_value == other.dim_value, value.name
    assert compared > 500


@pytest.mark.parametrize(("neck", "changes"), [("fpn", {}), ("single", {"rpn_score_threshold": 0.05})])
def test_a_class_left_out_changes_no_score_of_the_others(
    export: Export, check_same_rows: Callable[..., None], neck: str, changes: dict[str, Any]
) -> None:
    model, proto = export(neck, **changes)
    kept = ("bird", "cat")
    changed = with_settings(proto, GraphSettings(classes=kept))
    contract = contract_in(changed)
    assert contract.names == kept
    assert contract.category_ids == (9, 7)
    # Without a bound on the number, so that the other classes' detections take no place of these.
    model.roi_heads.max_detections, bound = 10_000, model.roi_heads.max_detections
    try:
        every = in_pytorch(model, GraphSettings(), "detections")
    finally:
        model.roi_heads.max_detections = bound
    found = run(changed)
    for image in range(2):
        expected = rows(every, image)
        expected = expected[np.isin(expected[:, 5], [0, 2])]
        expected[:, 5] = np.where(expected[:, 5] == 2, 0, 1)
        assert len({*expected[:100, 5]}) == 2
        check_same_rows(rows(found, image), expected[:100])
    one = with_settings(proto, GraphSettings(proposals=25, classes=("dog",)))
    assert run(one)["boxes"].shape == (2, 25, 4)
    assert not run(one)["labels"].any()


def test_the_resize_rule_stands_in_the_contract_alone(export: Export) -> None:
    proto = export("fpn")[1]
    rule = ResizeRule(96, 128, padding=64)
    changed = with_settings(proto, GraphSettings(resize=rule))
    padding = contract_in(proto).resize.padding
    assert contract_in(changed).resize == dataclasses.replace(rule, padding=padding)
    assert changed.graph == proto.graph
    assert scaled(ResizeRule(800, 1333), 0.5) == ResizeRule(400, 666)
    assert scaled(ResizeRule(within=(192, 256)), 0.75) == ResizeRule(within=(144, 192))


def test_a_changed_file_is_changed_again(export: Export) -> None:
    proto = export("fpn")[1]
    once = with_settings(proto, FEWER)
    twice = with_settings(with_settings(proto, GraphSettings(40, 120)), FEWER)
    for name, values in run(once).items():
        assert np.array_equal(run(twice)[name], values), name


def test_the_model_that_is_given_stays_as_it_is(export: Export) -> None:
    proto = export("fpn")[1]
    before = proto.SerializeToString(deterministic=True)
    with_settings(proto, GraphSettings(10, 20, None, ("dog",)))
    assert proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GraphSettings(proposals=61), "proposals is 61, but the file has 60; expected at most as many"),
        (GraphSettings(proposals=0), "proposals is 0; expected a whole number of at least 1"),
        (GraphSettings(pre_nms=1000), "pre_nms is 1000, but the file has 200; expected at most as many"),
        (GraphSettings(classes=("cat", "fish")), "classes has 'fish'; expected names of the model"),
        (GraphSettings(classes=("cat", "cat")), "expected names of the model, each once"),
        (GraphSettings(classes=()), "expected names of the model, each once"),
    ],
)
def test_what_a_file_cannot_have(export: Export, settings: GraphSettings, message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        with_settings(export("fpn")[1], settings)


def test_a_graph_that_is_not_ours_is_refused(export: Export) -> None:
    proto = export("fpn")[1]
    node = next(node for node in proto.graph.node if node.op_type == "TopK")
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    del other.metadata_props[:]
    with pytest.raises(ArtefactError, match="has no anchorline contract"):
        with_settings(other, FEWER)
    free = onnx.ModelProto()
    free.CopyFrom(proto)
    for each in free.graph.node:
        if each.name == node.name:
            each.input[1] = "elsewhere"
    with pytest.raises(ArtefactError, match="counts cannot be changed: its TopK nodes take no constant"):
        with_settings(free, FEWER)
    without = onnx.ModelProto()
    without.CopyFrom(proto)
    for each in without.graph.node:
        if each.op_type == "BatchedNMS":
            each.op_type = "Other"
    with pytest.raises(ArtefactError, match="it has no BatchedNMS"):
        proposal_counts(without)
