"""torchvision's form of our models, and its resizing against ours: the same pixels, the same detections."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from anchorline.export.importers.torchvision import TorchvisionDetector, torchvision_model
from anchorline.runtime.canvas import Preprocessor, frame_canvas
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import SettingsError
from anchorline.train.checkpoint import contract_of
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.predict import TorchDetector

FIVE = (8.0, 16.0, 32.0, 64.0, 128.0)
MODELS: dict[str, dict[str, object]] = {
    "fpn": {"neck": "fpn"},
    "fpn from stride 8": {
        "neck": "fpn",
        "finest_stride": 8,
        "anchor_sizes": ((16.0,), (32.0,), (64.0,), (128.0,)),
    },
    "single": {"neck": "single"},
    "live norms, two convolutions, convolutional head": {
        "backbone": "resnet18",
        "backbone_norm": "live",
        "rpn_convs": 2,
        "box_convs": 4,
    },
    "fpn32 with a score threshold": {
        "backbone": "mobilenet_v3_large",
        "neck": "fpn32",
        "anchor_sizes": (FIVE, FIVE, FIVE),
        "rpn_score_threshold": 0.6,
        "rpn_post_nms": 300,
    },
    "fpn32 of MobileNetV2": {"neck": "fpn32", "anchor_sizes": (FIVE, FIVE, FIVE), "backbone_norm_eps": 1e-3},
}


def patches(height: int, width: int) -> NDArray[np.uint8]:
    """Patches of 16 pixels in random colours."""
    rng = np.random.default_rng(height * width)
    cells = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return cells.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]


def contract_for(model: FasterRCNN, **changes: object) -> Contract:
    import dataclasses

    contract = contract_of(model.settings, ("a", "b", "c"))
    return dataclasses.replace(contract, input_dtype="float32", **changes)  # type: ignore[arg-type]


def rows_of(found: Detections) -> NDArray[np.float32]:
    return np.column_stack((found.boxes, found.scores, found.labels)).astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_our_models_detect_as_torchvisions_form_of_them(
    small_model: Callable[..., FasterRCNN], check_same_rows: Callable[..., None], name: str
) -> None:
    model = small_model(**MODELS[name])
    for resize, frame in ((ResizeRule(), patches(128, 160)), (ResizeRule(120, 160), patches(300, 400))):
        contract = contract_for(model, resize=resize)
        expected = TorchvisionDetector.of(model, contract)(frame)
        assert len(expected) > 20, "too few detections to compare anything"
        check_same_rows(rows_of(TorchDetector(model, contract)(frame)), rows_of(expected))


@pytest.mark.parametrize("resize", [ResizeRule(120, 160), ResizeRule(within=(128, 160))])
def test_a_batch_is_padded_as_torchvision_pads_it(
    small_model: Callable[..., FasterRCNN], check_same_rows: Callable[..., None], resize: ResizeRule
) -> None:
    """On the sides of the largest, on which a smaller frame has other boxes than alone."""
    model = small_model("fpn")
    contract = contract_for(model, resize=resize)
    frames = [patches(300, 400), patches(200, 90), patches(100, 100)]
    reference = TorchvisionDetector.of(model, contract)
    expected = reference.batch(frames)
    for found, each in zip(TorchDetector(model, contract).batch(frames), expected, strict=True):
        assert len(each) > 20, "too few detections to compare anything"
        check_same_rows(rows_of(found), rows_of(each))
    alone = reference(frames[1])
    assert (
        rows_of(alone).shape != rows_of(expected[1]).shape
        or np.abs(rows_of(alone) - rows_of(expected[1])).max() > 1e-3
    )


def test_the_rpn_drops_proposals_below_its_score_threshold(small_model: Callable[..., FasterRCNN]) -> None:
    """A lower score never suppresses a higher one, so the proposals above the threshold stay as they were."""
    images, sizes = torch.from_numpy(patches(128, 160))[None], torch.tensor([[128.0, 160.0]])

    def scores(threshold: float) -> Tensor:
        model = small_model("fpn", rpn_score_threshold=threshold, rpn_post_nms=1000)
        with torch.no_grad():
            proposals = model.rpn(model.features(images, sizes), sizes)
        return proposals.scores[proposals.present]

    every = scores(0.0)
    threshold = float(every.median())
    assert torch.equal(scores(threshold), every[every >= threshold])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 260), st.integers(1, 260), st.integers(20, 130), st.integers(0, 80))
def test_pixels_sizes_and_padding_are_torchvisions(height: int, width: int, shorter: int, more: int) -> None:
    """Also for sides that double precision makes a pixel smaller, such as 97 at a shorter side of 800."""
    resize = ResizeRule(shorter, shorter + more)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    contract = Contract("detections", ("a",), None, mean, std, input_dtype="float32", resize=resize)
    canvas = frame_canvas((height, width), contract)
    transform = GeneralizedRCNNTransform(
        shorter, shorter + more, [value / 255 for value in mean], [value / 255 for value in std]
    ).eval()
    frame = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rgb = torch.from_numpy(frame[:, :, ::-1].copy()).permute(2, 0, 1).float() / 255
    scale = min(shorter / min(height, width), (shorter + more) / max(height, width))
    if int(min(height, width) * scale) < 1:
        return  # torchvision cannot resize to nothing; ours keeps one pixel
    expected, _ = transform([rgb])
    inputs, _ = Preprocessor(contract)([frame])
    images, sizes = inputs.values()
    assert expected.image_sizes == [tuple(sizes[0].astype(int).tolist())]
    assert tuple(expected.tensors.shape[2:]) == canvas
    ours = (torch.from_numpy(images[0].astype(np.float32)).flip(2) - torch.tensor(mean)) / torch.tensor(std)
    rows, columns = expected.image_sizes[0]
    theirs = expected.tensors[0].permute(1, 2, 0)
    # Where a pixel comes from is a float32 of up to the frame's side, so its weight is off by as much as that
    # is rounded, on a step of up to 255 grey levels (4.5 here); not all of PyTorch's kernels fuse.
    rounding = 3e-6 + 2 * 4.5 * np.finfo(np.float32).eps * max(height, width)
    torch.testing.assert_close(ours[:rows, :columns], theirs[:rows, :columns], rtol=0, atol=float(rounding))


@pytest.mark.parametrize(
    ("size", "shorter", "placed"), [((97, 97), 800, (799, 799)), ((193, 400), 800, (799, 1658))]
)
def test_a_side_that_rounding_makes_shorter(
    size: tuple[int, int], shorter: int, placed: tuple[int, int]
) -> None:
    transform = GeneralizedRCNNTransform(shorter, 5000, [0.0] * 3, [1.0] * 3).eval()
    assert transform([torch.zeros(3, *size)])[0].image_sizes == [placed]


def test_a_narrow_first_frame_misleads_nobody(
    small_model: Callable[..., FasterRCNN], check_same_rows: Callable[..., None]
) -> None:
    """torchvision keeps the pooling scales that it derives from its first image."""
    model = small_model("fpn")
    contract = contract_for(model, resize=ResizeRule(120, 160))
    detector = TorchvisionDetector.of(model, contract)
    narrow, usual = patches(20, 400), patches(300, 400)
    detector(narrow)
    check_same_rows(rows_of(detector(usual)), rows_of(TorchvisionDetector.of(model, contract)(usual)))


def test_models_that_torchvision_has_no_parts_for_are_refused(
    small_model: Callable[..., FasterRCNN],
) -> None:
    model = small_model("fpn", roi_aligned=True)
    with pytest.raises(SettingsError, match="torchvision has no model with these settings"):
        torchvision_model(model, contract_for(model))
