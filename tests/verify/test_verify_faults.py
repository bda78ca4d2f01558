"""Faults planted in an exported graph, one at a time: verification names the stage, and the layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anchorline.data.synthetic import scenes
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.io.errors import ArtefactError
from anchorline.train.checkpoint import contract_of, save_checkpoint
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.predict import checkpoint_subject
from anchorline.verify.stages import OnnxStages, Subject, onnx_subject
from anchorline.verify.verification import VerifyReport, verify_subjects

Plant = Callable[[onnx.ModelProto], None]
NAMES = ("cat", "dog", "bird")
CONV = "backbone.body.6.conv.2"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def reference(
    small_model: Callable[..., FasterRCNN],
    onnx_of: Callable[[FasterRCNN, Contract], onnx.ModelProto],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Subject, onnx.ModelProto]:
    """A model as PyTorch runs it, and the sound graph of it."""
    model = small_model("fpn", len(NAMES))
    path = tmp_path_factory.mktemp("reference") / "model.safetensors"
    contract = contract_of(model.settings, NAMES, source={"command": "test"})
    save_checkpoint(path, model.state_dict(), model.settings, contract)
    return checkpoint_subject(path), onnx_of(model, contract)


@pytest.fixture
def verified(reference: tuple[Subject, onnx.ModelProto], tmp_path: Path) -> Callable[..., VerifyReport]:
    """``verified(plant)``: the report on a copy of the graph with the fault in it.

    With ``bisect`` down to the layer, which takes three times as long.
    """

    def verified(plant: Plant, bisect: bool = False) -> VerifyReport:
        proto = onnx.ModelProto()
        proto.CopyFrom(reference[1])
        plant(proto)
        path = tmp_path / "model.onnx"
        onnx.save(proto, path)
        candidate = onnx_subject(path)
        return verify_subjects(reference[0], candidate, scenes(NAMES, 2), bisect=bisect, which_traps=())

    return verified


def producer(proto: onnx.ModelProto, value: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if value in node.output)


def constant(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def change(tensor: onnx.TensorProto, to: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
    changed = to(numpy_helper.to_array(tensor).copy()).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), tensor.name))


def pass_on(node: onnx.NodeProto, value: str) -> None:
    """Make ``node`` hand on ``value`` unchanged."""
    (output,) = node.output
    node.CopyFrom(helper.make_node("Identity", [value], [output], name=node.name))


def put_behind(proto: onnx.ModelProto, value: str, nodes: Sequence[onnx.NodeProto]) -> None:
    """Insert ``nodes``, which make ``value`` out of ``value/sound``, behind the node that makes it now."""
    place = next(i for i, node in enumerate(proto.graph.node) if value in node.output)
    node = proto.graph.node[place]
    node.output[:] = [f"{value}/sound" if name == value else name for name in node.output]
    rest = [*nodes, *proto.graph.node[place + 1 :]]
    del proto.graph.node[place + 1 :]
    proto.graph.node.extend(rest)


def red_and_blue_swapped(proto: onnx.ModelProto) -> None:
    (flip,) = [node for node in proto.graph.node if node.op_type == "Slice" and node.output[0] == "flip"]
    pass_on(flip, flip.input[0])


def another_mean(proto: onnx.ModelProto) -> None:
    change(constant(proto, "model.mean"), lambda mean: mean + 2.0)


def another_std(proto: onnx.ModelProto) -> None:
    change(constant(proto, "model.std"), lambda std: std * 1.02)


def padding_not_zeroed(proto: onnx.ModelProto) -> None:
    where = producer(proto, "pixels")
    assert where.op_type == "Where"
    pass_on(where, where.input[1])


def anchors_shifted(proto: onnx.ModelProto) -> None:
    """By half a stride of the finest level, as where anchors are centred on the cells."""
    anchors = [tensor for tensor in proto.graph.initializer if list(tensor.dims) == [3, 4]]
    assert len(anchors) == 5  # of the levels, finest first
    change(anchors[0], lambda boxes: boxes + 2.0)


def overflow_in_half_precision(proto: onnx.ModelProto) -> None:
    """One convolution computed in fp16, with weights whose results do not fit."""
    change(constant(proto, f"model.{CONV}.weight"), lambda weight: weight * 1e6)
    (value,) = next(node.output for node in proto.graph.node if f"model.{CONV}.weight" in node.input)
    halved = [
        helper.make_node("Cast", [f"{value}/sound"], [f"{value}/half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [f"{value}/half"], [value], to=TensorProto.FLOAT),
    ]
    put_behind(proto, value, halved)


def one_weight_off_by_1_percent(proto: onnx.ModelProto) -> None:
    change(constant(proto, f"model.{CONV}.weight"), lambda weight: weight * 1.01)


def a_batch_item_leaks(proto: onnx.ModelProto) -> None:
    """Each image's map takes a hundredth of the next image's."""
    ends = {"one": [1], "zero": [0], "all": [2**31 - 1], "first": [0]}
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.int64), f"leak/{name}") for name, value in ends.items()
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array(0.01, np.float32), "leak/share"))
    sound, others = "fpn.0/sound", "leak/others"
    nodes = [
        helper.make_node("Slice", [sound, "leak/one", "leak/all", "leak/first"], ["leak/rest"]),
        helper.make_node("Slice", [sound, "leak/zero", "leak/one", "leak/first"], ["leak/head"]),
        helper.make_node("Concat", ["leak/rest", "leak/head"], [others], axis=0),
        helper.make_node("Sub", [others, sound], ["leak/difference"]),
        helper.make_node("Mul", ["leak/difference", "leak/share"], ["leak/part"]),
        helper.make_node("Add", [sound, "leak/part"], ["fpn.0"]),
    ]
    put_behind(proto, "fpn.0", nodes)


def rpn_nms_at_half(proto: onnx.ModelProto) -> None:
    first = next(node for node in proto.graph.node if node.op_type == "BatchedNMS")
    (threshold,) = [a for a in first.attribute if a.name == "iou_threshold"]
    assert threshold.f == pytest.approx(0.7)
    threshold.f = 0.5


def roi_align_half_a_pixel_off(proto: onnx.ModelProto) -> None:
    (function,) = [f for f in proto.functions if f.name == "RoIAlign"]
    (node,) = [n for n in function.node if n.op_type == "RoiAlign"]
    (mode,) = [a for a in node.attribute if a.name == "coordinate_transformation_mode"]
    mode.s = b"output_half_pixel"


def classes_moved_by_one(proto: onnx.ModelProto) -> None:
    for part in ("weight", "bias"):
        name = f"model.roi_heads.box_predictor.cls_score.{part}"
        change(constant(proto, name), lambda values: np.roll(values, 1, axis=0))


def names_moved_by_one(proto: onnx.ModelProto) -> None:
    (entry,) = [p for p in proto.metadata_props if p.key == CONTRACT_KEY]
    contract = Contract.from_json(entry.value)
    names = (*contract.names[1:], contract.names[0])
    entry.value = dataclasses.replace(contract, names=names).to_json()


def head_deltas_not_scaled(proto: onnx.ModelProto) -> None:
    """Decoding with weights 1 instead of 10 and 5."""
    scalars = {
        tensor.name: numpy_helper.to_array(tensor).item()
        for tensor in proto.graph.initializer
        if not tensor.dims
    }
    changed = [n for n in proto.graph.node if n.op_type == "Div" and scalars.get(n.input[1]) in (10.0, 5.0)]
    assert len(changed) == 4
    for node in changed:
        pass_on(node, node.input[0])


@pytest.mark.parametrize(
    ("plant", "stage"),
    [
        (red_and_blue_swapped, "pixels"),
        (another_mean, "pixels"),
        (another_std, "pixels"),
        (padding_not_zeroed, "pixels"),
        (a_batch_item_leaks, "fpn"),
        (anchors_shifted, "proposals"),
        (rpn_nms_at_half, "proposals"),
        (roi_align_half_a_pixel_off, "roi_features"),
        (classes_moved_by_one, "class_logits"),
        (names_moved_by_one, "detections"),
    ],
)
def test_the_stage_at_fault_is_named_and_no_other(
    verified: Callable[..., VerifyReport], plant: Plant, stage: str
) -> None:
    check_the_stage(verified(plant), stage)


def check_the_stage(report: VerifyReport, stage: str) -> None:
    assert not report.passed
    assert report.first_divergence == stage
    assert [each.name for each in report.stages or () if not each.passed] == [stage]
    assert stage in str(report.reason)


@pytest.mark.parametrize("plant", [overflow_in_half_precision, one_weight_off_by_1_percent])
def test_the_layer_at_fault_is_named(verified: Callable[..., VerifyReport], plant: Plant) -> None:
    report = verified(plant, bisect=True)
    check_the_stage(report, "backbone")
    assert report.layer is not None
    assert report.layer.layer == CONV
    assert CONV in str(report.reason)


def test_no_layer_is_named_for_a_fault_behind_them_all(verified: Callable[..., VerifyReport]) -> None:
    report = verified(head_deltas_not_scaled, bisect=True)
    check_the_stage(report, "detections")
    assert report.layer is not None
    assert report.layer.layer is None
    assert "the fault lies between layers" in report.layer.detail


def test_a_sound_graph_raises_no_alarm(verified: Callable[..., VerifyReport]) -> None:
    report = verified(lambda proto: None, bisect=True)
    assert report.passed, report.reason
    assert report.layer is None
    assert all(stage.tolerance_used < 0.5 for stage in report.stages or ())


def test_stages_that_onnxruntime_cannot_open_are_one_clear_line(
    reference: tuple[Subject, onnx.ModelProto], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(reference[1], path)
    stages = onnx_subject(path).stages
    assert isinstance(stages, OnnxStages)
    stages._model.graph.node[0].op_type = "NoSuchOperator"
    inputs, _ = stages.prepare([np.zeros((20, 30, 3), np.uint8)])
    with pytest.raises(ArtefactError, match=r"model\.onnx: onnxruntime cannot run its stages") as raised:
        stages.run(inputs, {})
    assert len(str(raised.value).splitlines()) == 1


def test_pytorch_refuses_a_fed_value_of_another_shape(reference: tuple[Subject, onnx.ModelProto]) -> None:
    stages = reference[0].stages
    assert stages is not None
    inputs, _ = stages.prepare([np.full((20, 30, 3), 90, np.uint8)])
    with pytest.raises(ArtefactError, match=r"fpn\.0 is fed \[1, 2\]; expected \[1, 16, 32, 40\]"):
        stages.run(inputs, {"fpn.0": np.zeros((1, 2), np.float32)})


def test_another_resize_is_a_fault_of_preprocessing(
    reference: tuple[Subject, onnx.ModelProto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidate's frames resized with pixels at their corners, as ``align_corners`` does."""
    path = tmp_path / "model.onnx"
    onnx.save(reference[1], path)
    candidate = onnx_subject(path)
    assert candidate.stages is not None
    prepare = candidate.stages.prepare

    def prepare_otherwise(frames: Sequence[NDArray[np.uint8]]) -> object:
        inputs, placements = prepare(frames)
        for frame, placement, image in zip(frames, placements, inputs["images"], strict=True):
            height, width = placement.valid
            y, x = (np.linspace(0, n - 1, m) for n, m in zip(frame.shape[:2], (height, width), strict=True))
            grid = np.meshgrid(x.astype(np.float32), y.astype(np.float32))
            image[:height, :width] = cv2.remap(frame, *grid, cv2.INTER_LINEAR)
        return inputs, placements

    monkeypatch.setattr(candidate.stages, "prepare", prepare_otherwise)
    report = verify_subjects(reference[0], candidate, scenes(NAMES, 2), which_traps=())
    assert report.first_divergence == "preprocess"
    assert [stage.name for stage in report.stages or () if not stage.passed] == ["preprocess"]


def test_a_canvas_on_its_side_is_named(
    reference: tuple[Subject, onnx.ModelProto], small_model: Callable[..., FasterRCNN], tmp_path: Path
) -> None:
    height, width = reference[0].detector.contract.resize.within
    model = small_model("fpn", len(NAMES), canvas=(width, height))
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model.state_dict(), model.settings, contract_of(model.settings, NAMES))
    report = verify_subjects(reference[0], checkpoint_subject(path), scenes(NAMES, 2), which_traps=())
    assert report.first_divergence == "preprocess"
    assert f"the canvas is 96x{height}, expected {height}x{width}" in str(report.reason)


def test_a_contract_that_turns_the_canvas_is_refused(
    reference: tuple[Subject, onnx.ModelProto], tmp_path: Path
) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(reference[1])
    (entry,) = [p for p in proto.metadata_props if p.key == CONTRACT_KEY]
    contract = Contract.from_json(entry.value)
    entry.value = dataclasses.replace(contract, canvas=(160, 128)).to_json()
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ArtefactError, match=r"contract expects uint8 \[B, 160, 128, 3\]"):
        onnx_subject(tmp_path / "model.onnx")
