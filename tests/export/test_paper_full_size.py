"""The paper's presets at full size on real images: training steps, export, the same detections."""

from __future__ import annotations

import dataclasses
import os
import resource
from pathlib import Path

import pytest

from anchorline.data.dataset import load_dataset
from anchorline.export.onnx_export import export_onnx
from anchorline.train.loop.train import train
from anchorline.train.settings import load_preset

STEPS = 6
# Weights, gradients and momentum of 137 million parameters are 1.6 GB.
MOST_MEMORY = 12e9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zf-paper", "vgg16-paper"])
def test_a_preset_trains_and_exports(name: str, tmp_path: Path) -> None:
    """Batch 1 from random weights, two photographs three times; ``export_onnx`` compares the detections."""
    shared = os.environ.get("ANCHORLINE_SHARED")
    if shared is None or not (Path(shared) / "data" / "bccd").is_dir():
        pytest.skip("needs $ANCHORLINE_SHARED with data/bccd")
    data = load_dataset(f"voc:{Path(shared) / 'data' / 'bccd'}@train")
    data = dataclasses.replace(data, images=data.images[:2])
    settings = load_preset(name, ["training.epochs=3", "training.flip=0.0", "training.workers=0"])
    losses: list[float] = []
    result = train(
        settings,
        data,
        tmp_path,
        device="cpu",
        report=lambda step: losses.append(step.losses["loss"]),
    )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{name}: losses {[round(loss, 3) for loss in losses]}, peak memory {memory / 1e9:.2f} GB")
    assert len(losses) == STEPS
    assert sum(losses[-2:]) < sum(losses[:2])
    assert memory < MOST_MEMORY
    exported = export_onnx(result.checkpoint, tmp_path / "model.onnx", images=[data.images[0].load()])
    assert exported.verification is not None
    assert exported.verification.passed
    assert exported.contract.profile == "caffe2015"
