"""The caffe2015 profile against few-line NumPy versions of py-faster-rcnn and tables worked by hand.

The references use caffe's boxes, which include x2 and y2: ours are one pixel further there.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.train.checkpoint import contract_of
from anchorline.train.model.anchors import AnchorGenerator, caffe_base_anchors
from anchorline.train.model.backbones import BACKBONES, SpatialResponseNorm, build_backbone
from anchorline.train.model.boxes import BoxCoder, clip_to_images
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.rpn import RPNHead
from anchorline.train.model.settings import ModelSettings
from anchorline.train.settings import load_preset

LAST_PIXEL = np.array([0, 0, 1, 1])
# The table in the comment of py-faster-rcnn's generate_anchors.py is Matlab's, counted from 1; this is
# what the Python code returns, in its order: ratios 0.5, 1, 2, and within each scales 8, 16, 32.
PUBLISHED = [
    [-84, -40, 99, 55],
    [-176, -88, 191, 103],
    [-360, -184, 375, 199],
    [-56, -56, 71, 71],
    [-120, -120, 135, 135],
    [-248, -248, 263, 263],
    [-36, -80, 51, 95],
    [-80, -168, 95, 183],
    [-168, -344, 183, 359],
]
CODER = BoxCoder(max_log_scale=float("inf"), last_pixel=1.0)
SMALL = ["model.canvas=[96, 128]", "model.representation=8", "model.roi_size=2"]


def reference_anchors(ratios: list[float], scales: list[float]) -> NDArray[np.float64]:
    found = []
    for ratio in ratios:
        width = np.round(np.sqrt(16 * 16 / ratio))
        height = np.round(width * ratio)
        for scale in scales:
            w, h = width * scale, height * scale
            found.append([7.5 - (w - 1) / 2, 7.5 - (h - 1) / 2, 7.5 + (w - 1) / 2, 7.5 + (h - 1) / 2])
    return np.array(found)


def reference_decode(boxes: NDArray[np.float64], deltas: NDArray[np.float64]) -> NDArray[np.float64]:
    size = boxes[:, 2:] - boxes[:, :2] + 1.0
    centre = boxes[:, :2] + 0.5 * size
    new_centre, new_size = deltas[:, :2] * size + centre, np.exp(deltas[:, 2:]) * size
    return np.concatenate([new_centre - 0.5 * new_size, new_centre + 0.5 * new_size], axis=1)


def reference_encode(boxes: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    size, true_size = boxes[:, 2:] - boxes[:, :2] + 1.0, truth[:, 2:] - truth[:, :2] + 1.0
    centre, true_centre = boxes[:, :2] + 0.5 * size, truth[:, :2] + 0.5 * true_size
    return np.concatenate([(true_centre - centre) / size, np.log(true_size / size)], axis=1)


def random_boxes(seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    corner = generator.integers(-50, 200, (30, 2))
    return np.concatenate([corner, corner + generator.integers(0, 150, (30, 2))], axis=1).astype(np.float64)


def test_the_nine_anchors_are_the_published_ones() -> None:
    ours = caffe_base_anchors([128.0, 256.0, 512.0], [0.5, 1.0, 2.0])
    assert (ours.numpy() - LAST_PIXEL).tolist() == PUBLISHED


@given(
    st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.lists(st.integers(1, 40), min_size=1, max_size=4)
)
@settings(max_examples=50, deadline=None)
def test_anchors_of_any_ratios_and_scales(ratios: list[float], scales: list[int]) -> None:
    expected = reference_anchors(ratios, [float(s) for s in scales])
    ours = caffe_base_anchors([16.0 * s for s in scales], ratios).numpy() - LAST_PIXEL
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3)


def test_a_grid_rounded_up_keeps_its_stride() -> None:
    """39 places on 608 pixels: canvas // grid would be 15."""
    anchors = AnchorGenerator([(128.0,)], (1.0,), "caffe", (16,))([(39, 65)])[0][:]
    last = anchors.reshape(39, 65, 4)[38, 64]
    assert last.tolist() == [64 * 16 - 56, 38 * 16 - 56, 64 * 16 + 72, 38 * 16 + 72]


@pytest.mark.parametrize("seed", range(3))
def test_decoding_is_bbox_transform_inv(seed: int) -> None:
    boxes = random_boxes(seed)
    deltas = np.random.default_rng(seed).normal(0, 1.5, (30, 4))
    deltas[0, 2:] = 5.0  # beyond the clamp of the other profile
    ours = CODER.decode(torch.from_numpy(deltas), torch.from_numpy(boxes + LAST_PIXEL)).numpy()
    np.testing.assert_allclose(ours - LAST_PIXEL, reference_decode(boxes, deltas), rtol=1e-9, atol=1e-6)


def test_encoding_is_bbox_transform() -> None:
    boxes, truth = random_boxes(5), random_boxes(6)
    ours = CODER.encode(torch.from_numpy(truth + LAST_PIXEL), torch.from_numpy(boxes + LAST_PIXEL)).numpy()
    np.testing.assert_allclose(ours, reference_encode(boxes, truth), rtol=1e-9, atol=1e-9)


def test_infinite_growth_ends_at_the_image() -> None:
    deltas = torch.tensor([[0.0, 0.0, 200.0, 200.0]])
    box = CODER.decode(deltas, torch.tensor([[10.0, 10.0, 20.0, 20.0]]))
    clipped = clip_to_images(box[None], torch.tensor([[50.0, 60.0]]), last_pixel=1.0)
    assert clipped.flatten().tolist() == [0, 0, 60, 50]


def test_clipping_is_clip_boxes() -> None:
    boxes, height, width = random_boxes(7), 120, 160
    limits = np.array([width - 1, height - 1, width - 1, height - 1])
    expected = np.maximum(np.minimum(boxes, limits), 0)
    ours = clip_to_images(
        torch.from_numpy(boxes + LAST_PIXEL)[None], torch.tensor([[height, width]]), last_pixel=1.0
    )
    np.testing.assert_array_equal(ours[0].numpy() - LAST_PIXEL, expected)


def test_pairs_are_softmax_scores_with_background_first() -> None:
    """caffe reshapes [18, H, W] to [2, 9 H, W] and takes the softmax over the two."""
    head = RPNHead(6, 9, width=4, pairs=True)
    torch.nn.init.normal_(head.cls_logits.weight)
    features = torch.randn(2, 6, 3, 5)
    objectness, _ = head([features])
    with torch.no_grad():
        scores = head.cls_logits(head.conv(features))
    assert scores.shape == (2, 18, 3, 5)
    softmax = scores.reshape(2, 2, 9 * 3, 5).softmax(dim=1).reshape(2, 18, 3, 5)
    expected = softmax[:, 9:].permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(objectness[0].sigmoid(), expected)


def test_the_log_loss_over_two_classes_is_the_binary_one_of_the_difference() -> None:
    scores, labels = torch.randn(20, 2), torch.arange(20) % 2
    two = torch.nn.functional.cross_entropy(scores, labels)
    one = torch.nn.functional.binary_cross_entropy_with_logits(scores[:, 1] - scores[:, 0], labels.float())
    torch.testing.assert_close(two, one)


def test_response_norm_by_hand() -> None:
    """A single 6 in a 3x3 map: at its place the mean of squares is 36 / 9 = 4, and zeros stay zero."""
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 1, 1] = 6.0
    out = SpatialResponseNorm(size=3, alpha=0.5, beta=0.75)(x)
    assert out[0, 0, 1, 1].item() == pytest.approx(6.0 * 3.0**-0.75)
    assert out.count_nonzero() == 1


@pytest.mark.parametrize(
    ("name", "convolutions", "width", "grid"), [("vgg16", 13, 512, (6, 8)), ("zf", 5, 256, (7, 9))]
)
def test_the_networks_end_at_stride_16(
    name: str, convolutions: int, width: int, grid: tuple[int, int]
) -> None:
    backbone = build_backbone(load_preset(f"{name}-paper").model)
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in backbone.modules()) == convolutions
    with torch.no_grad():
        (feature,) = backbone(torch.randn(1, 3, 96, 128))
    assert feature.shape == (1, width, *grid)
    assert 0.05 < feature.std() < 50


def test_the_paper_fixes_conv1_and_conv2_of_vgg() -> None:
    settings = load_preset("vgg16-paper")
    body = build_backbone(settings.model).body
    body.freeze(settings.training.frozen_stages)
    frozen = [name for name, p in body.named_parameters() if not p.requires_grad and "weight" in name]
    assert frozen == ["0.weight", "2.weight", "5.weight", "7.weight"]


@pytest.mark.parametrize("name", ["vgg16", "zf"])
@pytest.mark.parametrize("neck", ["fpn", "fpn32"])
def test_a_pyramid_of_them_is_refused(name: str, neck: str) -> None:
    sizes = ((32.0,),) * (5 if neck == "fpn" else 3)
    with pytest.raises(ArtefactError, match=name):
        build_backbone(ModelSettings(backbone=name, neck=neck, anchor_sizes=sizes))


def test_every_network_has_what_its_spec_names() -> None:
    assert BACKBONES["resnet18"].maps == {
        4: ("layer1", 64),
        8: ("layer2", 128),
        16: ("layer3", 256),
        32: ("layer4", 512),
    }


@pytest.mark.parametrize(
    "change",
    [
        "model.roi_pooling=max",
        "model.anchor_style=caffe",
        "model.box_dropout=1.0",
        "model.rpn_score=both",
        "training.roi_background_iou=0.9",
        "training.rpn_normalisation=mean",
    ],
)
def test_settings_that_do_not_fit_are_refused(change: str) -> None:
    with pytest.raises(SettingsError, match=change.partition("=")[0].partition(".")[2]):
        load_preset("mobilenet-v2-fpn-quick", [change])


@pytest.mark.parametrize("name", ["vgg16", "zf"])
def test_the_contract_says_the_profile(name: str) -> None:
    contract = contract_of(load_preset(f"{name}-paper").model, ("cat",))
    assert (contract.profile, contract.channel_order) == ("caffe2015", "bgr")
    assert (contract.resize.shorter_side, contract.resize.longer_side) == (600, 1000)
    assert contract_of(ModelSettings(), ("cat",)).profile == "torchvision"


def test_an_architecture_saved_before_has_torchvisions_choices() -> None:
    old = ModelSettings.from_json('{"backbone": "mobilenet_v2", "neck": "fpn"}')
    assert old == ModelSettings()
    assert (old.channel_order, old.anchor_style, old.box_edges) == ("rgb", "torchvision", "continuous")
    assert (old.clamp_deltas, old.rpn_score, old.roi_pooling) == (True, "sigmoid", "align")
    assert (old.rpn_channels, old.box_dropout, old.box_init_std) == (0, 0.0, 0.0)


def test_new_layers_start_from_the_papers_distribution_and_dropout_is_for_training() -> None:
    torch.manual_seed(0)
    model = FasterRCNN(load_preset("zf-paper", SMALL).model, 2)
    assert model.roi_heads.box_head.fc6.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not model.roi_heads.box_head.fc6.bias.any()
    pooled = torch.rand(4, 256, 2, 2) * 100
    assert not torch.equal(model.train().roi_heads.box_head(pooled), model.roi_heads.box_head(pooled))
    assert torch.equal(model.eval().roi_heads.box_head(pooled), model.roi_heads.box_head(pooled))


def test_bgr_pixels_are_not_turned() -> None:
    model = FasterRCNN(load_preset("zf-paper", SMALL).model, 2)
    images = torch.arange(3.0).expand(1, 96, 128, 3) * 10
    pixels = model.normalise(images, torch.tensor([[96.0, 128.0]]))
    expected = torch.tensor([0 - 102.9801, 10 - 115.9465, 20 - 122.7717])
    torch.testing.assert_close(pixels[0, :, 5, 5], expected)
