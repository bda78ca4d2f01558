"""The numeric rules of Detectron2 and MMDetection, each worked by hand or by a few lines of NumPy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.ops import roi_align

from anchorline.runtime.io.errors import SettingsError
from anchorline.train.model import ops
from anchorline.train.model.anchors import AnchorGenerator, unrounded_base_anchors
from anchorline.train.model.boxes import BoxCoder
from anchorline.train.model.roi_pooling import RoIPooling, assign_levels
from anchorline.train.model.settings import ModelSettings

Settings = Callable[..., ModelSettings]
HEIGHT, WIDTH = 128, 192
STRIDES = (4, 8, 16, 32)


def test_base_anchors_by_hand() -> None:
    """Size 32: a square of 32; at ratio 2 (h / w) 22.627 x 45.255, at ratio 1/2 turned."""
    short, long = 32 / math.sqrt(2) / 2, 32 * math.sqrt(2) / 2
    expected = [[-long, -short, long, short], [-16, -16, 16, 16], [-short, -long, short, long]]
    np.testing.assert_allclose(unrounded_base_anchors([32.0], [0.5, 1.0, 2.0]), expected, atol=1e-5)


def test_mmdetection_s_published_example() -> None:
    """Stride 16 and scale 1, ratio 1, a base size of 9 on a 2x2 grid: its docstring's four anchors."""
    anchors = AnchorGenerator([(9.0,)], (1.0,), "unrounded", (16,))([(2, 2)])[0][:]
    assert anchors.tolist() == [
        [-4.5, -4.5, 4.5, 4.5],
        [11.5, -4.5, 20.5, 4.5],
        [-4.5, 11.5, 4.5, 20.5],
        [11.5, 11.5, 20.5, 20.5],
    ]


def test_fifteen_anchors_at_a_place_run_ratio_by_ratio() -> None:
    """C4: five sizes on one map. Detectron2's own order is size by size, as the import has to know."""
    sizes, ratios = (32.0, 64.0, 128.0, 256.0, 512.0), (0.5, 1.0, 2.0)
    anchors = AnchorGenerator([sizes], ratios, "unrounded", (16,))([(4, 6)])[0][:]
    expected = [
        (16 * x - w / 2, 16 * y - r * w / 2, 16 * x + w / 2, 16 * y + r * w / 2)
        for y in range(4)
        for x in range(6)
        for r in ratios
        for w in (size * math.sqrt(1 / r) for size in sizes)
    ]
    np.testing.assert_allclose(anchors, expected, atol=1e-4)


def test_a_pyramid_keeps_its_strides(small_model: Callable[..., torch.nn.Module]) -> None:
    """160 is no multiple of 64: P6 has 3 columns, 53 pixels apart in torchvision and 64 in Detectron2."""
    torchvisions, detectrons = (
        small_model("fpn", anchor_style=style).rpn.anchors(
            [(-(-128 // stride), -(-160 // stride)) for stride in (4, 8, 16, 32, 64)]
        )
        for style in ("torchvision", "unrounded")
    )
    steps = [(level[:][3, 0] - level[:][0, 0]).item() for level in (torchvisions[-1], detectrons[-1])]
    assert steps == [53, 64]
    assert [len(level) for level in torchvisions] == [len(level) for level in detectrons]


def reference_level(side: np.float32, rule: str) -> int:
    """Index among four levels from stride 4, in float32 as the libraries compute."""
    if rule == "mmdetection":
        level = np.floor(np.log2(side / np.float32(56) + np.float32(1e-6)))
    else:
        level = np.floor(np.float32(4) + np.log2(side / np.float32(224) + np.float32(1e-8))) - 2
    return int(np.clip(level, 0, 3))


@pytest.mark.parametrize("rule", ["detectron2", "mmdetection"])
def test_levels(rule: str) -> None:
    sides = np.float32([0, 1, 55.9, 56, 111.9999, 112, 112.01, 223.999, 224, 300, 447.99, 448, 896, 5000])
    boxes = torch.tensor([[10.0, 20.0, 10 + float(s), 20 + float(s)] for s in sides])[None]
    drawn = torch.as_tensor(np.random.default_rng(0).uniform(0, 700, (1, 3000, 2)), dtype=torch.float32)
    boxes = torch.cat((boxes, torch.cat((torch.zeros_like(drawn), drawn), dim=2)), dim=1)
    found = assign_levels(boxes, 4, 4, 224.0, rule)[0]
    area = (boxes[0, :, 2] - boxes[0, :, 0]) * (boxes[0, :, 3] - boxes[0, :, 1])
    expected = [reference_level(side, rule) for side in np.sqrt(area.numpy())]
    assert found.tolist() == expected
    assert found[:14].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_the_rules_differ_just_below_a_step() -> None:
    """A side of 112 less 5e-7 of it is 7e-7 of a level below the step.

    torchvision adds 1e-6 to the level and MMDetection 1e-6 to s / 56 = 2 - 1e-6, which both reach the step;
    Detectron2's 1e-8 does not.
    """
    box = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]) * (112 * (1 - 5e-7))
    rules = ("torchvision", "detectron2", "mmdetection")
    assert [assign_levels(box, 4, 4, 224.0, rule).item() for rule in rules] == [1, 0, 1]


def random_rois(count: int) -> torch.Tensor:
    """RoIs [2, count, 4] of all sizes, clipped to the canvas, the whole canvas first."""
    limits = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT], dtype=torch.float32)
    centre = torch.rand(2, count, 2) * limits[:2]
    half = torch.exp(torch.rand(2, count, 2) * 5)
    boxes = torch.minimum(torch.cat((centre - half, centre + half), dim=-1).clamp(min=0), limits)
    boxes[:, 0] = limits * torch.tensor([0, 0, 1, 1])
    return boxes


def by_hand(feature: NDArray[np.float64], roi: tuple[float, ...], size: int) -> NDArray[np.float64]:
    """Adaptive RoIAlign of one RoI in feature pixels on [H, W]; pixel centres at 0.5 (aligned)."""
    x1, y1, x2, y2 = (value - 0.5 for value in roi)
    height, width = feature.shape
    rows, columns = math.ceil((y2 - y1) / size), math.ceil((x2 - x1) / size)

    def read(y: float, x: float) -> float:
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        upper = feature[top, left] * (1 - x + left) + feature[top, right] * (x - left)
        lower = feature[bottom, left] * (1 - x + left) + feature[bottom, right] * (x - left)
        return float(upper * (1 - y + top) + lower * (y - top))

    cells = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            cells[row, column] = np.mean(
                [
                    read(
                        y1 + (row + (i + 0.5) / rows) * (y2 - y1) / size,
                        x1 + (column + (j + 0.5) / columns) * (x2 - x1) / size,
                    )
                    for i in range(rows)
                    for j in range(columns)
                ]
            )
    return cells


@pytest.mark.parametrize("roi", [(0.0, 0.0, 13.0, 9.0), (2.3, 1.1, 4.0, 8.7), (5.2, 3.3, 5.9, 3.4)])
def test_adaptive_sampling_by_hand(roi: tuple[float, ...]) -> None:
    feature = torch.randn(1, 1, 9, 13, dtype=torch.float32)
    found = ops.roi_align(feature, torch.tensor([[roi]]), output_size=3, sampling_ratio=0)
    np.testing.assert_allclose(found[0, 0], by_hand(feature[0, 0].double().numpy(), roi, 3), atol=1e-5)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("size", [7, 14])
def test_adaptive_sampling_on_one_map_is_torchvisions(
    small_settings: Settings, aligned: bool, size: int
) -> None:
    """torchvision's kernel is the one that Detectron2 calls for ``ROIAlignV2``."""
    settings = small_settings("single", roi_sampling=0, roi_aligned=aligned, roi_size=size)
    feature, rois = torch.randn(2, 3, HEIGHT // 16, WIDTH // 16), random_rois(100)
    found = RoIPooling((16,), settings)([feature], rois)
    expected = roi_align(feature, list(rois), size, 1 / 16, -1, aligned=aligned)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected - roi_align(feature, list(rois), size, 1 / 16, 2, aligned=aligned)).abs().max() > 0.1


@pytest.mark.parametrize("rule", ["detectron2", "mmdetection"])
def test_a_pyramid_is_pooled_level_by_level(small_settings: Settings, rule: str) -> None:
    settings = small_settings(roi_sampling=0, roi_aligned=True, roi_level_rule=rule, canonical_size=56.0)
    features = [torch.randn(2, 3, HEIGHT // s, WIDTH // s) for s in STRIDES]
    rois = random_rois(200)
    found = RoIPooling(STRIDES, settings)(features, rois).unflatten(0, (2, 200))
    levels = assign_levels(rois, 4, 4, 56.0, rule)
    assert set(levels.flatten().tolist()) == {0, 1, 2, 3}
    for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        expected = roi_align(feature, list(rois), 7, 1 / stride, 0, aligned=True).unflatten(0, (2, 200))
        chosen = levels == level
        torch.testing.assert_close(found[chosen], expected[chosen], rtol=0, atol=1e-4)


def test_an_unused_slot_is_pooled_from_one_point(small_settings: Settings) -> None:
    """Not from none: TensorRT's kernel would divide 0 by 0."""
    settings = small_settings("single", roi_sampling=0, roi_aligned=True)
    found = RoIPooling((16,), settings)([torch.full((1, 1, 4, 4), 3.0)], torch.zeros(1, 1, 4))
    torch.testing.assert_close(found, torch.full((1, 1, 7, 7), 3.0))


def test_dw_and_dh_are_limited_on_both_sides_where_asked() -> None:
    """A box of 100x100 under dw = -9 and dh = 9: 0.0123 wide unlimited, 1.6 at -log(62.5); 6250 high."""
    box, deltas = torch.tensor([0.0, 0.0, 100.0, 100.0]), torch.tensor([0.0, 0.0, -9.0, 9.0])
    above = ModelSettings(anchor_style="unrounded")
    both = ModelSettings(anchor_style="unrounded", clamp_deltas_below=True)
    sides = []
    for settings in (above, both):
        x1, y1, x2, y2 = BoxCoder.of(settings).decode(deltas, box).tolist()
        sides.append((x2 - x1, y2 - y1))
        assert (x1 + x2, y1 + y2) == pytest.approx((100, 100))
    assert sides[0] == pytest.approx((100 * math.exp(-9), 6250), rel=1e-3)
    assert sides[1] == pytest.approx((1.6, 6250), rel=1e-5)
    # The head's deltas are divided by 5 first: -15 / 5 is within the limits.
    head = BoxCoder.of(both, both.box_weights).decode(torch.tensor([0.0, 0.0, -15.0, 0.0]), box)
    assert (head[2] - head[0]).item() == pytest.approx(100 * math.exp(-3), rel=1e-5)


def reference_delta2bbox(boxes: NDArray[np.float64], deltas: NDArray[np.float64]) -> NDArray[np.float64]:
    """MMDetection's decoding with its defaults of the head: target_stds (0.1, 0.1, 0.2, 0.2)."""
    moved = deltas * (0.1, 0.1, 0.2, 0.2)
    limit = abs(math.log(16 / 1000))
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    centre = centre + moved[:, :2] * side
    half = side * np.exp(np.clip(moved[:, 2:], -limit, limit)) / 2
    return np.concatenate((centre - half, centre + half), axis=1)


def test_decoding_is_mmdetection_s() -> None:
    random = np.random.default_rng(4)
    corner = random.uniform(0, 500, (400, 2))
    boxes = np.concatenate((corner, corner + random.uniform(1, 400, (400, 2))), axis=1)
    deltas = random.normal(0, 20, (400, 4))
    assert (np.abs(deltas[:, 2:]) * 0.2 > 4.2).any(axis=1).sum() > 40
    settings = ModelSettings(anchor_style="unrounded", clamp_deltas_below=True)
    found = BoxCoder.of(settings, settings.box_weights).decode(
        torch.as_tensor(deltas, dtype=torch.float32), torch.as_tensor(boxes, dtype=torch.float32)
    )
    np.testing.assert_allclose(found, reference_delta2bbox(boxes, deltas), rtol=2e-5, atol=5e-3)


@pytest.mark.parametrize(
    ("changes", "profile"),
    [
        ({}, "torchvision"),
        ({"anchor_style": "unrounded"}, "detectron2"),
        ({"anchor_style": "unrounded", "clamp_deltas_below": True}, "mmdetection"),
        ({"clamp_deltas_below": True}, "mixed"),
    ],
)
def test_the_profile_is_named(changes: dict[str, object], profile: str) -> None:
    settings = ModelSettings(**changes)  # type: ignore[arg-type]
    assert settings.profile == profile
    assert ModelSettings.from_json(settings.to_json()) == settings


def test_an_architecture_saved_before_these_settings_reads_as_it_was() -> None:
    new = ("bottleneck_stride", "clamp_deltas_below", "roi_level_rule", "box_head")
    fields = json.loads(ModelSettings().to_json())
    old = {name: value for name, value in fields.items() if name not in new}
    assert len(old) == len(fields) - 4
    assert ModelSettings.from_json(json.dumps(old)) == ModelSettings()


C4_SIZES = ((32.0, 64.0),)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"box_head": "res5"}, "model.box_head is 'res5'; expected another for the neck 'fpn'"),
        ({"box_head": "res5", "neck": "dc5", "anchor_sizes": C4_SIZES}, "it wants 'single'"),
        (
            {"box_head": "res5", "neck": "single", "anchor_sizes": C4_SIZES, "box_convs": 4},
            "model.box_convs is 4; expected 0 for the box head 'res5'",
        ),
        (
            {"box_head": "res5", "neck": "single", "anchor_sizes": C4_SIZES, "box_dropout": 0.5},
            "model.box_dropout is 0.5; expected 0 for",
        ),
        ({"neck": "dc5"}, "expected 1 group of as many sizes each for the neck 'dc5'"),
        (
            {"clamp_deltas": False, "clamp_deltas_below": True},
            "model.clamp_deltas_below is True; expected false",
        ),
        ({"roi_sampling": -1}, "model.roi_sampling is -1; expected a whole number from 0 to 100"),
        ({"roi_level_rule": "fpn"}, "one of torchvision, detectron2, mmdetection"),
        ({"bottleneck_stride": "2x2"}, "model.bottleneck_stride is '2x2'; expected one of 3x3, 1x1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        ModelSettings(**changes)  # type: ignore[arg-type]
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
