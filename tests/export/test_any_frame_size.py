"""One exported file on frames of every shape, one by one and in one batch: torchvision's own boxes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torchvision.ops.misc import SqueezeExcitation

from anchorline.data.synthetic import generate_scene
from anchorline.export.functions import save_model
from anchorline.export.importers.torchvision import TorchvisionDetector
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.train.checkpoint import contract_of
from anchorline.train.model.backbones import build_backbone
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.settings import ModelSettings
from anchorline.train.predict import TorchDetector
from anchorline.verify.compare import TOLERANCES, compare_all, cuts_of

# Height and width: landscape, portrait, the shapes of 3000x200 and 90x700 (smaller, since a
# frame that shrinks much makes much of rounding), and one that double precision makes a pixel smaller.
SHAPES = ((240, 320), (320, 230), (64, 960), (498, 64), (97, 97))
RULE = ResizeRule(200, 333)
EXACT = dataclasses.replace(TOLERANCES["fp32"], box_px=0.01, score=1e-4)

Frame = NDArray[np.uint8]


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return [generate_scene(7, size, number)[0] for number, size in enumerate(SHAPES)]


@pytest.fixture(scope="module")
def model(small_model: Callable[..., FasterRCNN]) -> FasterRCNN:
    return small_model(backbone="resnet10")


@pytest.fixture(scope="module")
def contract(model: FasterRCNN) -> Contract:
    made = contract_of(model.settings, ("a", "b", "c"))
    return dataclasses.replace(made, input_dtype="float32", resize=RULE)


@pytest.fixture(scope="module")
def torchvisions(model: FasterRCNN, contract: Contract) -> TorchvisionDetector:
    return TorchvisionDetector.of(model, contract)


def check_equal(expected: Sequence[Detections], found: Sequence[Detections], contract: Contract) -> None:
    summary = compare_all(expected, found, **vars(cuts_of(contract, EXACT)))
    assert summary.agrees, summary.first_disagreement
    assert all(map(len, expected))
    assert summary.total.matched >= 100, "too few detections to compare anything"
    assert summary.total.borderline + summary.total.nms_ties <= 2


def test_boxes_are_torchvisions(
    model: FasterRCNN,
    contract: Contract,
    torchvisions: TorchvisionDetector,
    frames: list[Frame],
    onnx_of: Callable[..., object],
    tmp_path: Path,
) -> None:
    save_model(onnx_of(model, contract), tmp_path / "model.onnx")  # type: ignore[arg-type]
    with Detector(tmp_path / "model.onnx", provider="cpu") as exported:
        assert exported.contract.canvas is None
        for detector in (TorchDetector(model, contract), exported):
            check_equal(list(map(torchvisions, frames)), list(map(detector, frames)), contract)
            check_equal(torchvisions.batch(frames), detector.batch(frames), contract)
        together = exported.prepare(frames)[0][contract.inputs[0]].shape[1:3]
    with Detector(tmp_path / "model.onnx", provider="cpu", canvas=together) as held:
        for found in (held.batch(frames), list(map(held, frames))):
            check_equal(torchvisions.batch(frames), found, contract)


def test_a_mean_over_a_padded_map_is_exact_in_onnxruntime(tmp_path: Path) -> None:
    """Squeeze and excitation of a map of which most is equal, as an empty canvas is."""
    sizes = ((32.0, 64.0, 128.0, 256.0, 512.0),) * 3
    backbone = build_backbone(ModelSettings("mobilenet_v3_large", "fpn32", anchor_sizes=sizes)).eval()
    means = [each.avgpool for each in backbone.modules() if isinstance(each, SqueezeExcitation)]
    assert len(means) == 8
    maps = torch.rand(1, 8, 336, 336, generator=torch.Generator().manual_seed(0))
    maps[:, :, 100:] = maps[:, :, :1, :1]
    path = tmp_path / "mean.onnx"
    torch.onnx.export(means[0], (maps,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: maps.numpy()})
    np.testing.assert_allclose(found, maps.double().mean(dim=(2, 3), keepdim=True), rtol=1e-5)


def test_a_batch_padded_to_its_largest_is_another_thing_than_its_frames_alone(
    contract: Contract, torchvisions: TorchvisionDetector, frames: list[Frame]
) -> None:
    """What makes the comparison above one of padding: torchvision's own boxes depend on the neighbours."""
    alone, together = list(map(torchvisions, frames)), torchvisions.batch(frames)
    assert not compare_all(alone, together, **vars(cuts_of(contract, EXACT))).agrees
