"""Small models of Detectron2's kinds as ONNX: C4 with 6000 candidates, DC5, a pyramid sampled adaptively."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from anchorline.engine.graph import constants
from anchorline.engine.lowering import MOST, deviations, lower
from anchorline.export.functions import default_functions
from anchorline.export.onnx_export import export_onnx
from anchorline.runtime.contract import CONTRACT_KEY, DOMAIN
from anchorline.train.checkpoint import contract_of, save_checkpoint
from anchorline.train.model.faster_rcnn import FasterRCNN

NAMES = ("cat", "dog", "bird")
INSIDE = ("pixels", "backbone", "objectness", "proposals", "roi_features")


def exported(
    model: FasterRCNN, kind: str, folder: Path, task: str = "detections", inside: Sequence[str] = INSIDE
) -> onnx.ModelProto:
    """The model's file, which onnxruntime runs as PyTorch does, stage by stage."""
    checkpoint = folder / "model.safetensors"
    contract = contract_of(model.settings, NAMES, source={"arch": f"detectron2_r50_{kind}"})
    save_checkpoint(checkpoint, model.state_dict(), model.settings, contract)
    result = export_onnx(checkpoint, folder / "model.onnx", task=task)
    assert result.verification is not None
    assert result.verification.passed, result.verification.reason
    assert {*inside, task} <= {stage.name for stage in result.verification.stages}
    proto = onnx.load(result.path)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata[CONTRACT_KEY]) == json.loads(result.contract.to_json())
    return proto


def rows_of(found: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Detections of the first image as rows (x1, y1, x2, y2, score, label)."""
    count = int(found["num_detections"][0])
    columns = (found["boxes"][0], found["scores"][0, :, None], found["labels"][0, :, None])
    return np.concatenate(columns, axis=1)[:count].astype(np.float64)


def run(proto: onnx.ModelProto, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Rows of ``proto``, a lowered graph whose plugins take their meaning from the file's own functions."""
    used = {node.op_type for node in proto.graph.node if node.domain == DOMAIN}
    proto.functions.extend(f for f in default_functions() if f.name in used)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    sizes = np.array([images.shape[1:3]], np.float32)
    values = session.run(names, {"images": images, "image_sizes": sizes})
    return rows_of(dict(zip(names, values, strict=True)))


@torch.no_grad()
def rows_in_pytorch(model: FasterRCNN, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    found = model(torch.from_numpy(images), torch.tensor([images.shape[1:3]], dtype=torch.float32))
    return rows_of({name: getattr(found, name).numpy() for name in dataclasses.asdict(found)})


def largest_topk(proto: onnx.ModelProto) -> int:
    values = constants(proto.graph)
    return max(int(values[n.input[1]].max()) for n in proto.graph.node if n.op_type == "TopK")


@pytest.mark.parametrize("kind", ["c4", *(pytest.param(k, marks=pytest.mark.slow) for k in ("dc5", "fpn"))])
def test_it_is_the_same_in_onnxruntime_and_after_lowering(
    kind: str,
    small_detectron2: Callable[[str], FasterRCNN],
    onnx_of: Callable[..., onnx.ModelProto],
    check_same_rows: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("anchorline.export.onnx_export.to_onnx", onnx_of)  # an engine is built of the same
    model = small_detectron2(kind)
    proto = exported(model, kind, tmp_path)
    assert largest_topk(proto) == model.settings.rpn_pre_nms
    rows, columns = (side // 16 for side in model.settings.canvas)
    patches = np.random.default_rng(3).integers(0, 256, (1, rows, columns, 3), dtype=np.uint8)
    images = patches.repeat(16, axis=1).repeat(16, axis=2)
    expected = rows_in_pytorch(model, images)
    assert len(expected) > 20

    full = lower(proto, "tensorrt")
    assert largest_topk(full) <= MOST
    check_same_rows(run(full, images), expected)
    assert deviations(proto, "tensorrt") == deviations(proto, "onnxruntime") == ()

    # TensorRT for RTX: two sampling points a cell and axis, which is another model.
    (line,) = deviations(proto, "tensorrt-rtx")
    assert "2 x 2 points" in line
    rtx = run(lower(proto, "tensorrt-rtx"), images)
    model.roi_heads.pooling.sampling = 2
    fixed = rows_in_pytorch(model, images)
    check_same_rows(rtx, fixed)
    assert len(fixed) != len(expected) or np.abs(fixed - expected).max() > 1e-3


@pytest.mark.slow
def test_dc5_proposes_the_same_in_onnxruntime(
    small_detectron2: Callable[[str], FasterRCNN], tmp_path: Path
) -> None:
    """The dilated stage and what is chosen on its map; half the nodes of a whole detector."""
    model = small_detectron2("dc5")
    proto = exported(model, "dc5", tmp_path, "proposals", INSIDE[:3])
    assert largest_topk(proto) == model.settings.rpn_pre_nms
    dilations = [
        tuple(attribute.ints)
        for node in proto.graph.node
        for attribute in node.attribute
        if node.op_type == "Conv" and attribute.name == "dilations"
    ]
    assert (2, 2) in dilations
