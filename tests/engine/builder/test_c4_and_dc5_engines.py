"""Detectron2's C4 and DC5 models built for TensorRT for RTX: small ones, and R50-C4 at full size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from anchorline.engine.build import BuildResult, build_engine
from anchorline.engine.options import BuildOptions

if TYPE_CHECKING:
    from anchorline.runtime.contract import Contract
    from anchorline.train.model.faster_rcnn import FasterRCNN

C4: dict[str, Any] = {
    "neck": "single",
    "box_head": "res5",
    "roi_size": 14,
    "bottleneck_stride": "1x1",
    "anchor_style": "unrounded",
    "anchor_sizes": ((32.0, 64.0, 128.0, 256.0, 512.0),),
    "roi_sampling": 0,
    "roi_aligned": True,
    "rpn_pre_nms": 6000,
    "rpn_min_side": 0.0,
    "box_min_side": 0.0,
}


def plugin_layers(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the layers that are plugins."""
    return [row for row in layers if row["type"] == "PLUGIN_V3"]


@pytest.fixture
def saved(
    onnx_of: Callable[[FasterRCNN, Contract], onnx.ModelProto], tmp_path: Path
) -> Callable[[FasterRCNN], Path]:
    """``saved(model)``: its file, for batches of 1 and 2."""
    from anchorline.train.checkpoint import contract_of

    def save(model: FasterRCNN) -> Path:
        classes = model.roi_heads.box_predictor.cls_score.out_features - 1
        names = tuple(f"class {number}" for number in range(classes))
        contract = contract_of(model.settings, names)
        contract = dataclasses.replace(contract, max_batch=2, canvas=model.settings.canvas)
        onnx.save(onnx_of(model, contract), tmp_path / "m.onnx")
        return tmp_path / "m.onnx"

    return save


def check_build(result: BuildResult) -> None:
    """Both NMS are plugins, and what the engine samples otherwise is said and recorded."""
    assert len(plugin_layers(result.manifest.raw["layers"])) == 2
    (line,) = [line for line in result.warnings if "adaptively" in line]
    assert "2 x 2 points in each cell" in line
    assert line in result.manifest.raw["warnings"]
    precisions = {
        layer["precision"] for layer in result.manifest.raw["layers"] if layer["type"] == "CONVOLUTION"
    }
    assert "fp16" in precisions


# Exported and lowered, the same models are run by tests/export/test_c4_and_dc5.py.
@pytest.mark.parametrize("kind", ["c4", pytest.param("dc5", marks=pytest.mark.slow)])
def test_a_small_one_builds_with_more_candidates_than_one_topk_takes(
    kind: str,
    rtx: Any,
    small_detectron2: Callable[[str], FasterRCNN],
    saved: Callable[[FasterRCNN], Path],
    tmp_path: Path,
) -> None:
    source = saved(small_detectron2(kind))
    options = BuildOptions(target="tensorrt-rtx", compute_capabilities=(86,))
    check_build(build_engine(source, tmp_path / "m.engine", options))


@pytest.mark.slow
def test_r50_c4_runs_in_onnxruntime_as_in_pytorch_and_builds(
    rtx: Any,
    small_model: Callable[..., FasterRCNN],
    check_same_rows: Callable[..., None],
    saved: Callable[[FasterRCNN], Path],
    tmp_path: Path,
) -> None:
    """Detectron2's R50-C4 with COCO's 80 classes on 800x1344: 6000 candidates, 1000 proposals."""
    import torch

    model = small_model(classes=80, backbone="resnet50", canvas=(800, 1344), rpn_post_nms=1000, **C4)
    patches = np.random.default_rng(0).integers(0, 256, (1, 50, 84, 3), dtype=np.uint8)
    images, sizes = patches.repeat(16, axis=1).repeat(16, axis=2), np.array([[800, 1344]], np.float32)
    tame(model, torch.from_numpy(images), torch.from_numpy(sizes))
    source = saved(model)
    with torch.inference_mode():
        found = model(torch.from_numpy(images), torch.from_numpy(sizes))
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {"images": images, "image_sizes": sizes}), strict=True))
    expected = rows({name: getattr(found, name).numpy() for name in names})
    print(f"{len(expected)} detections, scores from {expected[-1, 4]:.3f} to {expected[0, 4]:.3f}")
    assert len(expected) > 20
    check_same_rows(rows(outputs), expected)
    result = build_engine(source, tmp_path / "m.engine", BuildOptions(target="tensorrt-rtx"))
    check_build(result)
    print(result.describe())


def tame(model: FasterRCNN, images: Any, sizes: Any) -> None:
    """Give drawn heads the spread of trained ones: else scores are all 1 and boxes thinner than a pixel."""
    import torch

    def scale(layer: Any, values: Any, spread: float) -> None:
        factor = spread / values.std()
        layer.weight.mul_(factor)
        layer.bias.mul_(factor)

    with torch.no_grad():
        features = model.features(images, sizes)
        objectness, deltas = model.rpn.head(features)
        scale(model.rpn.head.cls_logits, objectness[0], 2.0)
        scale(model.rpn.head.bbox_pred, deltas[0], 0.2)
        logits, box_deltas = model.roi_heads.classify(features, model.rpn(features, sizes).boxes)
        scale(model.roi_heads.box_predictor.cls_score, logits, 2.0)
        scale(model.roi_heads.box_predictor.bbox_pred, box_deltas, 1.0)


def rows(found: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Detections of the first image as rows (x1, y1, x2, y2, score, label)."""
    count = int(found["num_detections"][0])
    columns = (found["boxes"][0], found["scores"][0, :, None], found["labels"][0, :, None])
    return np.concatenate(columns, axis=1)[:count].astype(np.float64)
