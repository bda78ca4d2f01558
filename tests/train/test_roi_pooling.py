"""RoIAlign on the canvas of levels against torchvision's ``MultiScaleRoIAlign`` and ``roi_align``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from anchorline.train.model.roi_pooling import RoIPooling, assign_levels, feature_canvas
from anchorline.train.model.settings import ModelSettings

CANVAS = (128, 192)
STRIDES = (4, 8, 16, 32)
CANONICAL = 56.0
HEIGHT, WIDTH = CANVAS


def pyramid(images: int = 2, channels: int = 3) -> list[torch.Tensor]:
    return [torch.randn(images, channels, HEIGHT // s, WIDTH // s, requires_grad=True) for s in STRIDES]


def random_rois(images: int, count: int) -> torch.Tensor:
    """RoIs [images, count, 4] of all sizes from a fraction of a pixel up, clipped to the canvas."""
    limits = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT], dtype=torch.float32)
    centre = torch.rand(images, count, 2) * limits[:2]
    half = torch.exp(torch.rand(images, count, 2) * 7 - 2)
    boxes = torch.cat((centre - half, centre + half), dim=-1)
    return torch.minimum(boxes.clamp(min=0), limits)


def awkward_rois() -> torch.Tensor:
    """RoIs [1, R, 4]: at every edge and corner, thinner than a cell, whole image, tiny, at level steps."""
    rois = [(0.0, 0.0, WIDTH, HEIGHT), (0.0, 0.0, 0.0, 0.0), (50.0, 50.0, 50.001, 50.001)]
    for thin in (0.01, 0.3, 1.0, 2.5, 3.99, 4.0, 7.7, 20.0):
        rois += [
            (WIDTH - thin, 20.0, WIDTH, 90.0),  # right edge
            (0.0, 20.0, thin, 90.0),
            (20.0, HEIGHT - thin, 150.0, HEIGHT),  # bottom edge
            (20.0, 0.0, 150.0, thin),
            (WIDTH - thin, HEIGHT - thin, WIDTH, HEIGHT),
            (WIDTH - thin, 0.0, WIDTH, thin),
            (0.0, HEIGHT - thin, thin, HEIGHT),
            (WIDTH - thin, 0.0, WIDTH, HEIGHT),  # a sliver as high as the image: coarse level, thin
            (0.0, HEIGHT - thin, WIDTH, HEIGHT),
        ]
    # Level steps of the canonical size 56: sides 28, 56 and 112, just below, at, and just above.
    for side in (28.0, 56.0, 112.0):
        for off in (-0.01, -1e-5, 0.0, 1e-5, 0.01):
            rois.append((10.0, 10.0, 10.0 + side + off, 10.0 + side + off))
            rois.append(
                (3.0, 5.0, 3.0 + side / 2, 5.0 + 2 * side + off)
                if side < 60
                else (0.0, 0.0, side, side + off)
            )
    return torch.tensor(rois)[None]


def multi_scale_roi_align(
    size: int, sampling: int, features: list[torch.Tensor], rois: torch.Tensor
) -> torch.Tensor:
    names = [str(i) for i in range(len(features))]
    pool = MultiScaleRoIAlign(names, size, sampling, canonical_scale=CANONICAL, canonical_level=4)
    return pool(OrderedDict(zip(names, features, strict=True)), list(rois), [CANVAS] * len(rois))


def check_equal(
    settings: ModelSettings,
    features: list[torch.Tensor],
    rois: torch.Tensor,
    reference: torch.Tensor,
    strides: tuple[int, ...] = STRIDES,
) -> None:
    """Values within 1e-4, and the gradients of the features too: by the canvas, and as in training."""
    weight = torch.randn_like(reference)
    theirs = torch.autograd.grad((reference * weight).sum(), features)
    for training in (False, True):
        pooled = RoIPooling(strides, settings).train(training)(features, rois)
        torch.testing.assert_close(pooled, reference, rtol=0, atol=1e-4)
        ours = torch.autograd.grad((pooled * weight).sum(), features)
        for level, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=2e-3, msg=lambda text, at=level: f"level {at}: {text}"
            )


@pytest.mark.parametrize(("size", "sampling"), [(7, 2), (14, 1), (14, 3), (1, 2)])
def test_random_rois_pool_as_in_torchvision(
    small_settings: Callable[..., ModelSettings], size: int, sampling: int
) -> None:
    features, rois = pyramid(), random_rois(2, 150)
    settings = small_settings(roi_size=size, roi_sampling=sampling, canonical_size=CANONICAL)
    check_equal(settings, features, rois, multi_scale_roi_align(size, sampling, features, rois))


@pytest.mark.parametrize(("size", "sampling"), [(7, 2), (14, 1), (14, 3)])
def test_awkward_rois_pool_as_in_torchvision(
    small_settings: Callable[..., ModelSettings], size: int, sampling: int
) -> None:
    features, rois = pyramid(images=1), awkward_rois()
    settings = small_settings(roi_size=size, roi_sampling=sampling, canonical_size=CANONICAL)
    check_equal(settings, features, rois, multi_scale_roi_align(size, sampling, features, rois))


def test_a_sliver_at_the_far_edge_reads_zeros_behind_the_map(
    small_settings: Callable[..., ModelSettings],
) -> None:
    """By hand: 1 pixel wide at stride 4 is widened to a cell, of which a quarter lies on the map."""
    features = [torch.ones_like(level, requires_grad=True) for level in pyramid(images=1)]
    settings = small_settings(roi_size=1, roi_sampling=4, canonical_size=CANONICAL)
    rois = torch.tensor([[[WIDTH - 1.0, 8.0, WIDTH, 16.0]]])
    # Samples at 1/8, 3/8, 5/8, 7/8 of the cell; the map ends at 1/4 of it.
    reference = multi_scale_roi_align(1, 4, features, rois)
    assert reference[0, 0].item() == pytest.approx(0.25)
    check_equal(settings, features, rois, reference)


@pytest.mark.parametrize("sampling", [1, 2])
def test_aligned_rois_pool_as_in_roi_align(
    small_settings: Callable[..., ModelSettings], sampling: int
) -> None:
    """Detectron2's convention; torchvision offers it for single maps only."""
    features, rois = pyramid(), torch.cat((random_rois(2, 100), awkward_rois().expand(2, -1, -1)), dim=1)
    settings = small_settings(roi_aligned=True, roi_sampling=sampling, canonical_size=CANONICAL)
    levels = LevelMapper(2, 5, CANONICAL, 4)(list(rois))
    reference = torch.zeros(len(levels), features[0].shape[1], 7, 7)
    for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        values = roi_align(feature, list(rois), 7, 1 / stride, sampling, aligned=True)
        reference = torch.where((levels == level)[:, None, None, None], values, reference)
    assert set(levels.tolist()) == {0, 1, 2, 3}
    check_equal(settings, features, rois, reference)


def test_a_pyramid_from_stride_8_pools_as_in_torchvision(
    small_settings: Callable[..., ModelSettings],
) -> None:
    features, rois = pyramid(images=1)[1:], torch.cat((random_rois(1, 100), awkward_rois()), dim=1)
    settings = small_settings(canonical_size=CANONICAL)
    reference = multi_scale_roi_align(7, 2, features, rois)
    check_equal(settings, features, rois, reference, strides=STRIDES[1:])


def test_one_map_is_pooled_alone(small_settings: Callable[..., ModelSettings]) -> None:
    feature = torch.randn(2, 3, HEIGHT // 16, WIDTH // 16, requires_grad=True)
    rois = random_rois(2, 60)
    reference = roi_align(feature, list(rois), 7, 1 / 16, 2, aligned=False)
    check_equal(small_settings("single"), [feature], rois, reference, strides=(16,))


def test_training_pools_rois_that_leave_the_map_as_roi_align(
    small_settings: Callable[..., ModelSettings],
) -> None:
    """Ours are clipped to their image; a caller's own need not be."""
    feature = torch.randn(2, 3, HEIGHT // 16, WIDTH // 16, requires_grad=True)
    rois = random_rois(2, 60) + torch.randn(2, 60, 2).repeat(1, 1, 2) * 100
    pooled = RoIPooling((16,), small_settings("single")).train()([feature], rois)
    expected = roi_align(feature, list(rois), 7, 1 / 16, 2, aligned=False)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-4)
    by_ours, by_theirs = (torch.autograd.grad((each**2).sum(), feature)[0] for each in (pooled, expected))
    torch.testing.assert_close(by_ours, by_theirs, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("canonical_size", [56.0, 224.0])
def test_levels_equal_torchvisions(canonical_size: float) -> None:
    rois = torch.cat((random_rois(1, 2000) * 4, awkward_rois()), dim=1)
    expected = LevelMapper(2, 5, int(canonical_size), 4)([rois[0]])
    assert torch.equal(assign_levels(rois, 4, 4, canonical_size)[0], expected)


def test_levels_by_hand() -> None:
    """FPN paper, equation 1: 224 pixels belong to the level of stride 16, half of it one level down."""
    sides = [0.0, 20.0, 111.9, 112.0, 224.0, 447.9, 448.0, 5000.0]
    rois = torch.tensor([[0.0, 0.0, side, side] for side in sides])[None]
    assert assign_levels(rois, 4, 4, 224.0)[0].tolist() == [0, 0, 0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "grids", [[(5, 7)], [(8, 12), (4, 6)], [(6, 2), (3, 1), (1, 1)], [(32, 48), (16, 24), (8, 12)]]
)
def test_each_level_lies_untouched_at_its_origin(grids: list[tuple[int, int]]) -> None:
    features = [torch.randn(2, 3, *grid) for grid in grids]
    canvas, origins = feature_canvas(features)
    assert canvas.shape[:2] == (2, 3)
    claimed = torch.zeros(canvas.shape[2:], dtype=torch.int64)
    for feature, (y, x) in zip(features, origins, strict=True):
        height, width = feature.shape[2:]
        assert torch.equal(canvas[:, :, y : y + height, x : x + width], feature)
        # The border around it repeats its edge: one pixel before, two behind.
        assert torch.equal(canvas[:, :, y - 1, x : x + width], feature[:, :, 0])
        assert torch.equal(canvas[:, :, y + height + 1, x : x + width], feature[:, :, -1])
        assert torch.equal(canvas[:, :, y : y + height, x - 1], feature[:, :, :, 0])
        assert torch.equal(canvas[:, :, y : y + height, x + width + 1], feature[:, :, :, -1])
        claimed[y - 1 : y + height + 2, x - 1 : x + width + 2] += 1
    assert claimed.max() == 1, "levels overlap"
