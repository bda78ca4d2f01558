"""Where few proposals pass the objectness threshold the head computes no more rows than they fill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from anchorline.data.synthetic import CLASS_NAMES, scenes
from anchorline.engine.graph import read_model, take_for_engines
from anchorline.engine.lowering import fix_canvas, lower
from anchorline.export.functions import save_model
from anchorline.export.onnx_export import to_onnx, verify_with_pytorch
from anchorline.runtime.backends.onnxruntime import open_for_checks
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import ArtefactError
from anchorline.train.checkpoint import contract_of
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.ops import SUPPRESSED
from anchorline.train.predict import TorchDetector
from anchorline.verify.compare import TOLERANCES
from anchorline.verify.stages import check_stages, first_differing_layer, onnx_subject

Arrays = dict[str, NDArray[np.generic]]


class Exported(NamedTuple):
    model: FasterRCNN
    path: Path
    frames: list[NDArray[np.uint8]]


@pytest.fixture(scope="module")
def exported(
    model_without_ties: FasterRCNN,
    onnx_of: Callable[[FasterRCNN, Contract], onnx.ModelProto],
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    """A model whose threshold leaves a quarter of the first frame's proposals, between two of the scores."""
    frames = [image.load() for image in scenes(CLASS_NAMES, 3).images]
    contract = contract_of(model_without_ties.settings, CLASS_NAMES)
    scores = torch.from_numpy(_proposals(model_without_ties, contract, frames[0])).sort().values
    cut = 3 * len(scores) // 4
    settings = dataclasses.replace(
        model_without_ties.settings, rpn_score_threshold=float(scores[cut - 1 : cut + 1].mean())
    )
    model = FasterRCNN(settings, len(CLASS_NAMES)).eval()
    model.load_state_dict(model_without_ties.state_dict())
    path = tmp_path_factory.mktemp("few") / "model.onnx"
    save_model(onnx_of(model, contract_of(settings, CLASS_NAMES)), path)
    return Exported(model, path, frames)


def _inputs(model: FasterRCNN, contract: Contract, frames: list[NDArray[np.uint8]]) -> Arrays:
    return TorchDetector(model, contract).prepare(frames)[0]


@torch.inference_mode()
def _proposals(model: FasterRCNN, contract: Contract, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The scores of a frame's proposals."""
    images, sizes = map(torch.from_numpy, _inputs(model, contract, [frame]).values())
    scores = model.rpn(model.features(images, sizes), sizes).scores[0].numpy()
    found: NDArray[np.float32] = scores[scores > SUPPRESSED]
    return found


def _run(proto: onnx.ModelProto, inputs: Arrays) -> Arrays:
    session = open_for_checks(proto.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _rows(outputs: Arrays, image: int) -> NDArray[np.float64]:
    """Boxes, scores and labels of one image, a row each."""
    there = slice(int(outputs["num_detections"][image]))
    columns = (outputs["boxes"][image], outputs["scores"][image][:, None], outputs["labels"][image][:, None])
    return np.concatenate([column[there] for column in columns], axis=1)


def _with_output(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return proto


def test_no_more_rows_than_the_fullest_image_fills(exported: Exported) -> None:
    contract = contract_of(exported.model.settings, CLASS_NAMES)
    proto = _with_output(_with_output(onnx.load(exported.path), "roi_features"), "proposal_scores")
    for frames in (*([frame] for frame in exported.frames), exported.frames):
        found = _run(proto, _inputs(exported.model, contract, frames))
        filled = (found["proposal_scores"] > SUPPRESSED).sum(axis=1)
        assert len(found["roi_features"]) == len(frames) * max(1, filled.max())
        assert filled.max() < exported.model.settings.rpn_post_nms
    assert filled.max() > 1


def test_the_same_detections_as_with_all_rows(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, check_same_rows: Callable[..., None]
) -> None:
    """PyTorch with every slot pooled is the reference."""
    contract = contract_of(exported.model.settings, CLASS_NAMES)
    frames = [*exported.frames, np.zeros_like(exported.frames[0])]
    inputs = _inputs(exported.model, contract, frames)
    found = _run(onnx.load(exported.path), inputs)
    monkeypatch.setattr(exported.model.roi_heads, "few_proposals", False)
    with torch.inference_mode():
        batch = exported.model(*map(torch.from_numpy, inputs.values()))
    expected = {name: value.numpy() for name, value in vars(batch).items()}
    assert found["num_detections"][:3].min() > 0
    for image in range(len(frames)):
        check_same_rows(_rows(found, image), _rows(expected, image))


def test_export_s_own_check_passes(exported: Exported, tmp_path: Path) -> None:
    report = verify_with_pytorch(tmp_path / "model.safetensors", exported.model, exported.path, ())
    assert report.passed, report.describe()


def test_an_engine_wants_to_know_how_many_rows_there_are(exported: Exported) -> None:
    proto = onnx.load(exported.path)
    (cut,) = (node for node in proto.graph.node if node.op_type == "Occupied")
    kept = [value for value in proto.graph.value_info if value.name != cut.input[0]]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    with pytest.raises(ArtefactError, match=r"proposals: the file does not state its shape"):
        take_for_engines(proto)


def test_an_engine_takes_all_rows(exported: Exported, check_same_rows: Callable[..., None]) -> None:
    contract = contract_of(exported.model.settings, CLASS_NAMES)
    inputs = _inputs(exported.model, contract, exported.frames)
    expected = _run(onnx.load(exported.path), inputs)
    plain = read_model(exported.path)
    assert not any(node.op_type == "Occupied" for node in plain.graph.node)
    fixed = read_model(exported.path)
    height, width = inputs["images"].shape[1:3]
    fix_canvas(fixed, (height, width))
    lowered = lower(fixed, "tensorrt", nms="fixed-point")
    for proto in (plain, lowered):
        found = _run(proto, inputs)
        for image in range(len(exported.frames)):
            check_same_rows(_rows(found, image), _rows(expected, image))
    proto = _with_output(plain, "roi_features")
    assert len(_run(proto, inputs)["roi_features"]) == 3 * exported.model.settings.rpn_post_nms


@pytest.fixture(scope="module", params=["in other ops", pytest.param("exported", marks=pytest.mark.slow)])
def with_all_rows(
    exported: Exported, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same model in a file without the cut, as exports were before there was one."""
    path = tmp_path_factory.mktemp("all") / "model.onnx"
    if request.param == "exported":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exported.model.roi_heads, "few_proposals", False)
            save_model(to_onnx(exported.model, contract_of(exported.model.settings, CLASS_NAMES)), path)
    else:
        save_model(read_model(exported.path), path)
    return path


def _compared(
    exported: Exported, reference: Path, candidate: Path
) -> tuple[list[str], str | None, dict[str, str]]:
    """The stages and the first layer that differ, and what each stage said, on batches of one and two."""
    with onnx_subject(reference) as ours, onnx_subject(candidate) as theirs:
        batches = [exported.frames[:1], exported.frames[1:]]
        stages = check_stages(ours, theirs, batches, TOLERANCES["fp32"])
        layer = first_differing_layer(ours, theirs, batches[-1], TOLERANCES["fp32"]).layer
    return (
        [each.name for each in stages if not each.passed],
        layer,
        {each.name: each.detail for each in stages},
    )


@pytest.mark.parametrize("newer_first", [False, True])
def test_a_verification_looks_at_the_slots_of_proposals_alone(
    exported: Exported, with_all_rows: Path, tmp_path: Path, newer_first: bool
) -> None:
    """So files with and without the cut agree, and a fault in the head is found as ever."""
    spoiled = onnx.load(exported.path if newer_first else with_all_rows)
    (weight,) = (each for each in spoiled.graph.initializer if each.name.endswith("cls_score.weight"))
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name))
    save_model(spoiled, tmp_path / "spoiled.onnx")
    sides = (exported.path, with_all_rows) if newer_first else (with_all_rows, exported.path)
    differing, layer, details = _compared(exported, *sides)
    assert (differing, layer) == ([], None), details
    differing, layer, details = _compared(exported, tmp_path / "spoiled.onnx", sides[1])
    assert (differing, layer) == (["class_logits"], "roi_heads.box_predictor.cls_score"), details
