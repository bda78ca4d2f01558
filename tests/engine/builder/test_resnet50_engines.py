"""The model people deploy: ResNet-50-FPN at 800x1344, built for TensorRT for RTX."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from anchorline.engine.build import build_engine
from anchorline.engine.options import BuildOptions

pytestmark = pytest.mark.slow
CANVAS = (800, 1344)
SECONDS, BYTES, ACTIVATION_BYTES = 20, 110e6, 2.5e9


def plugin_layers(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the layers that are plugins."""
    return [row for row in layers if row["type"] == "PLUGIN_V3"]


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``resnet50(task)``: the model of 90 classes with random weights, exported for batches of 1 to 8."""
    import torch

    from anchorline.export.onnx_export import to_onnx
    from anchorline.train.checkpoint import contract_of
    from anchorline.train.model.faster_rcnn import FasterRCNN
    from anchorline.train.model.settings import ModelSettings

    torch.manual_seed(0)
    settings = ModelSettings(
        backbone="resnet50",
        backbone_norm="frozen",
        canvas=CANVAS,
        fpn_channels=256,
        anchor_sizes=((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)),
        rpn_pre_nms=1000,
        rpn_post_nms=1000,
        representation=1024,
    )
    names = tuple(f"class {number}" for number in range(90))
    model = FasterRCNN(settings, len(names)).eval()
    folder = tmp_path_factory.mktemp("resnet50")

    def export(task: str) -> Path:
        path = folder / f"{task}.onnx"
        if not path.exists():
            contract = contract_of(settings, names)
            contract = dataclasses.replace(contract, task=task, max_batch=8, canvas=CANVAS)
            onnx.save(to_onnx(model, contract), path)
        return path

    return export


@pytest.mark.parametrize("batch", [(1, 1, 1), (1, 4, 8)], ids=["static", "dynamic"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("task", ["detections", "proposals"])
def test_resnet50_builds(
    task: str,
    precision: str,
    batch: tuple[int, int, int],
    rtx: Any,
    resnet50: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = resnet50(task)
    started = time.process_time()
    result = build_engine(
        source, tmp_path / "m.engine", BuildOptions(target="tensorrt-rtx", precision=precision, batch=batch)
    )
    processor_seconds = time.process_time() - started  # of all threads, so that other work does not count
    raw = result.manifest.raw
    assert len(plugin_layers(raw["layers"])) == (2 if task == "detections" else 1)
    assert raw["activation_bytes"] <= ACTIVATION_BYTES
    if precision == "fp16":
        assert processor_seconds < SECONDS
        assert raw["engine"]["bytes"] < BYTES


def test_resnet50_builds_without_a_plugin(rtx: Any, resnet50: Callable[[str], Path], tmp_path: Path) -> None:
    result = build_engine(
        resnet50("detections"),
        tmp_path / "m.engine",
        BuildOptions(target="tensorrt-rtx", batch=(1, 1, 8), nms="fixed-point"),
    )
    assert plugin_layers(result.manifest.raw["layers"]) == []
    assert result.manifest.raw["activation_bytes"] <= ACTIVATION_BYTES


def test_resnet50_builds_with_roi_align_as_gather(
    rtx: Any, resnet50: Callable[[str], Path], tmp_path: Path
) -> None:
    """A pooled sample of each cell of 1000 RoIs and 256 channels is 50 MB an image, and there are 16."""
    source, memory = resnet50("detections"), {}
    for form in ("grid-sample", "gather"):
        options = BuildOptions(target="tensorrt-rtx", batch=(1, 1, 1), roi_align=form)
        result = build_engine(source, tmp_path / f"{form}.engine", options, verify=False)
        memory[form] = result.manifest.raw["activation_bytes"]
    assert memory["gather"] <= memory["grid-sample"] + 10e6
