"""The chain on real photographs: train on BCCD, evaluate, export, compare every test image."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="trains with PyTorch")

from anchorline.data.dataset import Dataset, load_dataset
from anchorline.evaluation.evaluation import evaluate
from anchorline.export.onnx_export import export_onnx
from anchorline.runtime import Detector
from anchorline.train.loop.train import train
from anchorline.train.predict import TorchDetector
from anchorline.train.settings import load_preset
from anchorline.verify.compare import compare_all

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared() -> Path:
    folder = os.environ.get("ANCHORLINE_SHARED")
    if not folder:
        pytest.skip("ANCHORLINE_SHARED is not set: no real images")
    return Path(folder)


@pytest.fixture(scope="module")
def val_split(shared: Path) -> Dataset:
    return load_dataset(f"voc:{shared / 'data' / 'bccd'}@val")


@pytest.fixture(scope="module")
def run(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of the quick preset: minutes, and well on the way."""
    out = tmp_path_factory.mktemp("bccd")
    settings = load_preset("mobilenet-v2-fpn-quick", ["training.epochs=3"])
    weights = shared / "weights" / "mobilenet_v2_imagenet_features.pth"
    train(settings, load_dataset(f"voc:{shared / 'data' / 'bccd'}@train"), out, backbone_weights=weights)
    export_onnx(out / "model.safetensors", out / "model.onnx")
    return out


def test_a_short_training_finds_cells_and_onnx_finds_the_same(run: Path, val_split: Dataset) -> None:
    checkpoint = TorchDetector.load(run / "model.safetensors")
    reports = [
        evaluate(each.batch, val_split, 4, provider=each.provider)
        for each in (checkpoint, Detector(run / "model.onnx", provider="cpu"))
    ]
    assert reports[0].map50 > 0.6
    assert reports[1].map50 == pytest.approx(reports[0].map50, abs=0.002)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_image_agrees_in_every_batch(run: Path, val_split: Dataset, batch: int) -> None:
    checkpoint = TorchDetector.load(run / "model.safetensors")
    candidate = Detector(run / "model.onnx", provider="cpu")
    frames = [image.load() for image in val_split]
    # Crops of every third image, so that a batch mixes sizes.
    frames = [np.ascontiguousarray(f[:300, : 200 + 5 * i]) if i % 3 else f for i, f in enumerate(frames)]
    expected = [checkpoint(frame) for frame in frames]
    found = [one for i in range(0, len(frames), batch) for one in candidate.batch(frames[i : i + batch])]
    thresholds = candidate.contract.thresholds
    summary = compare_all(
        expected,
        found,
        score_threshold=thresholds.score,
        nms_iou=thresholds.nms_iou,
        max_detections=thresholds.max_detections,
    )
    assert summary.agrees, summary.first_disagreement
    assert summary.total.matched > 500
