"""Whole exported detectors in OpenVINO: the detections of onnxruntime's CPU provider."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from anchorline.data.synthetic import CLASS_NAMES, generate_scene
from anchorline.export import winograd
from anchorline.runtime.backends.openvino import has_openvino
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.train.checkpoint import contract_of
from anchorline.train.model.faster_rcnn import FasterRCNN

pytestmark = pytest.mark.skipif(not has_openvino(), reason="needs the package openvino")

NAMES = ("cat", "dog", "bird")
SIZES = [(120, 160), (90, 70), (200, 150), (128, 160)]


def rows(detections: Detections) -> NDArray[np.float64]:
    columns = [detections.boxes, detections.scores[:, None], detections.labels[:, None]]
    return np.hstack([np.asarray(column, np.float64) for column in columns])


@pytest.mark.parametrize("name", ["fpn", "without ties", "winograd"])
def test_the_detections_of_the_cpu_provider(
    name: str,
    small_model: Callable[..., FasterRCNN],
    model_without_ties: FasterRCNN,
    onnx_of: Callable[[FasterRCNN, Contract], onnx.ModelProto],
    check_same_rows: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    apart = name != "fpn"
    model = model_without_ties if apart else small_model(name, len(NAMES), backbone="resnet10")
    path = tmp_path / "model.onnx"
    contract = contract_of(model.settings, CLASS_NAMES if apart else NAMES)
    if name == "winograd":
        contract = dataclasses.replace(contract, source={"winograd": 1})
    proto = onnx_of(model, contract)
    if name == "winograd":
        monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 1)
        monkeypatch.setattr(winograd, "LEAST_WORK", 1)
        assert winograd.use_winograd(proto, SIZES[0]) > 0
    onnx.save(proto, path)
    frames = [generate_scene(3, size, index)[0] for index, size in enumerate(SIZES)]
    with Detector(path, "cpu") as cpu, Detector(path, "openvino", cpu_precision="fp32") as openvino:
        # A batch is padded to its largest sides, on either.
        together = openvino.batch(frames), cpu.batch(frames)
        alone = [openvino(frame) for frame in frames], [cpu(frame) for frame in frames]
        for found, expected in (together, alone):
            assert min(map(len, expected)) > 20
            for ours, theirs in zip(found, expected, strict=True):
                check_same_rows(rows(ours), rows(theirs))
