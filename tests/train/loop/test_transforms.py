"""Boxes follow the pixels: a bright rectangle on black is its own ground truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors

from anchorline.runtime.canvas import boxes_to_canvas, place, to_canvas
from anchorline.runtime.contract import ResizeRule
from anchorline.train.data.transforms import LEAST_VISIBLE, PAD_VALUE, RandomZoom, build_transforms
from anchorline.train.settings import TrainingSettings

Box = tuple[int, int, int, int]
View = tuple[Tensor, Tensor, Tensor]


def view(transform: torch.nn.Module, size: tuple[int, int], boxes: list[Box]) -> View:
    """What ``transform`` makes of bright rectangles: pixels [3, H, W], boxes [N, 4], labels [N]."""
    pixels = torch.zeros(3, *size, dtype=torch.uint8)
    for x1, y1, x2, y2 in boxes:
        pixels[:, y1:y2, x1:x2] = 255
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=size
        ),
        "labels": torch.arange(len(boxes)),
    }
    image, target = transform(tv_tensors.Image(pixels), target)
    return image.as_subclass(Tensor), target["boxes"].as_subclass(Tensor), target["labels"]


def bright_bounds(pixels: Tensor) -> list[int]:
    """x1, y1, x2, y2 around the bright pixels of [3, H, W]; padding is grey and does not count."""
    rows, columns = torch.nonzero(pixels[0] > 180, as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@st.composite
def sizes_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, int], Box]:
    height, width = draw(st.integers(8, 60)), draw(st.integers(8, 60))
    x1, y1 = draw(st.integers(0, width - 2)), draw(st.integers(0, height - 2))
    return (height, width), (x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height)))


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ({"flip": 1.0}, [28, 3, 37, 20]),
        ({"flip": 0.0, "vertical_flip": 1.0}, [3, 10, 12, 27]),
        ({"flip": 1.0, "vertical_flip": 1.0}, [28, 10, 37, 27]),
        ({"flip": 0.0}, [3, 3, 12, 20]),
    ],
)
def test_flips(which: dict[str, float], expected: list[int]) -> None:
    pixels, boxes, _ = view(build_transforms(TrainingSettings(**which)), (30, 40), [(3, 3, 12, 20)])
    assert boxes.tolist() == [expected]
    assert bright_bounds(pixels) == expected


@settings(max_examples=60, deadline=None)
@given(sizes_and_boxes(), st.integers(0, 2**31), st.sampled_from([(0.4, 0.99), (1.0, 3.0), (0.5, 2.0)]))
def test_zoomed_boxes_are_the_bright_area(
    scene: tuple[tuple[int, int], Box], seed: int, zoom: tuple[float, float]
) -> None:
    size, box = scene
    torch.manual_seed(seed)
    pixels, boxes, _ = view(RandomZoom(*zoom), size, [box])
    area = (box[2] - box[0]) * (box[3] - box[1])
    remaining = int((pixels[0] > 180).sum()) / area
    if abs(remaining - LEAST_VISIBLE) < 1e-6:
        return  # either is right
    assert len(boxes) == (remaining > LEAST_VISIBLE)
    if len(boxes):
        assert boxes[0].tolist() == bright_bounds(pixels)
    for new, old in zip(pixels.shape[1:], size, strict=True):
        assert old / zoom[1] - 1 <= new <= old / zoom[0] + 1


@settings(max_examples=60, deadline=None)
@given(sizes_and_boxes(), st.integers(0, 2**31))
def test_boxes_on_the_canvas_are_the_bright_area_within_a_pixel(
    scene: tuple[tuple[int, int], Box], seed: int
) -> None:
    """The whole way: flips, zoom, and the one resize onto the canvas."""
    size, box = scene
    torch.manual_seed(seed)
    transform = build_transforms(TrainingSettings(flip=0.5, vertical_flip=0.5, zoom=(0.6, 1.6)))
    pixels, boxes, _ = view(transform, size, [box])
    if not len(boxes):
        return
    frame = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    frame[frame < 200] = 0  # the padding, so that the resize blurs a bright edge against black alone
    placement = place((frame.shape[0], frame.shape[1]), (128, 160), ResizeRule())
    canvas = np.empty((128, 160, 3), np.uint8)
    to_canvas(frame, placement, canvas)
    found = boxes_to_canvas(boxes.numpy(), placement)[0]
    rows, columns = np.nonzero(canvas[..., 0] > 127)
    if len(rows):  # a sliver may fade away
        bright = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(found - bright).max() <= 1.0


def test_zoom_in_drops_what_is_mostly_cut_off_and_keeps_labels_with_their_boxes() -> None:
    boxes = [(0, 0, 10, 10), (45, 45, 55, 55), (90, 90, 100, 100), (20, 70, 60, 75)]
    dropped = 0
    for seed in range(40):
        torch.manual_seed(seed)
        pixels, found, labels = view(RandomZoom(1.8, 2.2), (100, 100), boxes)
        dropped += len(boxes) - len(found)
        for box, label in zip(found.tolist(), labels.tolist(), strict=True):
            x1, y1, x2, y2 = map(int, box)
            assert bool((pixels[0, y1:y2, x1:x2] == 255).all())
            whole = boxes[label]
            assert (x2 - x1) * (y2 - y1) >= LEAST_VISIBLE * (whole[2] - whole[0]) * (whole[3] - whole[1])
            assert x2 - x1 <= whole[2] - whole[0]
    assert 0 < dropped < 40 * len(boxes)


def test_zoom_out_sets_the_image_in_grey() -> None:
    pixels, boxes, _ = view(RandomZoom(0.5, 0.5), (20, 30), [(0, 0, 30, 20)])
    assert pixels.shape == (3, 40, 60)
    assert int((pixels[0] == 255).sum()) == 20 * 30
    assert int((pixels[0] == int(PAD_VALUE)).sum()) == 40 * 60 - 20 * 30
    assert boxes[0].tolist() == bright_bounds(pixels)


@pytest.mark.parametrize("zoom", [(0.3, 0.5), (1.0, 1.0), (2.0, 3.0)])
def test_images_without_objects_survive(zoom: tuple[float, float]) -> None:
    settings = TrainingSettings(flip=1.0, vertical_flip=1.0, zoom=zoom, photometric=1.0)
    pixels, boxes, labels = view(build_transforms(settings), (17, 31), [])
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)
    assert min(pixels.shape[1:]) >= 5


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
@pytest.mark.parametrize("zoom", [(0.5, 0.5), (4.0, 4.0)])
def test_images_one_pixel_wide_survive(size: tuple[int, int], zoom: tuple[float, float]) -> None:
    pixels, boxes, _ = view(RandomZoom(*zoom), size, [(0, 0, size[1], size[0])])
    assert min(pixels.shape[1:]) >= 1
    assert all(box == bright_bounds(pixels) for box in boxes.tolist())


def test_a_zoom_of_one_is_the_identity() -> None:
    box = (2, 3, 10, 12)
    for transform in (RandomZoom(1.0, 1.0), build_transforms(TrainingSettings(flip=0.0, zoom=(1.0, 1.0)))):
        pixels, boxes, labels = view(transform, (20, 30), [box])
        assert pixels.shape == (3, 20, 30)
        assert boxes.tolist() == [list(box)]
        assert bright_bounds(pixels) == list(box)
        assert labels.tolist() == [0]


def test_an_iou_crop_keeps_an_object_and_its_box() -> None:
    """A box is kept while its centre is, and is then the bright area that is left of the object."""
    transform = build_transforms(TrainingSettings(flip=0.0, iou_crop=1.0))
    cropped = 0
    for seed in range(60):
        torch.manual_seed(seed)
        pixels, boxes, labels = view(transform, (60, 80), [(20, 15, 50, 40)])
        assert boxes.tolist() == [bright_bounds(pixels)]
        assert labels.tolist() == [0]
        cropped += pixels.shape != (3, 60, 80)
    assert cropped > 20


def test_an_iou_crop_keeps_labels_with_their_boxes() -> None:
    whole = [(5, 5, 25, 25), (60, 5, 75, 50), (10, 45, 40, 58)]
    transform = build_transforms(TrainingSettings(flip=0.0, zoom=(0.8, 1.2), iou_crop=1.0))
    kept = []
    for seed in range(40):
        torch.manual_seed(seed)
        pixels, boxes, labels = view(transform, (60, 80), whole)
        kept.append(len(labels))
        for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
            assert bool((pixels[0, y1:y2, x1:x2] == 255).all())
            assert x2 - x1 <= whole[label][2] - whole[label][0]
            assert y2 - y1 <= whole[label][3] - whole[label][1]
    assert {1, 2, 3} <= set(kept)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 50), (50, 1), (40, 30)])
def test_an_iou_crop_survives_awkward_images(size: tuple[int, int]) -> None:
    transform = build_transforms(TrainingSettings(iou_crop=1.0, zoom=(0.7, 1.4)))
    for seed in range(20):
        torch.manual_seed(seed)
        for boxes in ([], [(0, 0, size[1], size[0])]):
            pixels, found, labels = view(transform, size, boxes)
            assert min(pixels.shape[1:]) >= 1
            assert len(found) == len(labels) <= len(boxes)


def test_photometric_changes_pixels_and_no_boxes() -> None:
    box = (2, 3, 10, 12)
    plain, *_ = view(build_transforms(TrainingSettings(flip=0.0)), (20, 30), [box])
    changed, boxes, _ = view(build_transforms(TrainingSettings(flip=0.0, photometric=1.0)), (20, 30), [box])
    assert changed.shape == plain.shape
    assert not torch.equal(changed, plain)
    assert boxes.tolist() == [list(box)]


def test_zoom_draws_its_whole_range_on_both_sides_of_one() -> None:
    transform = RandomZoom(0.5, 2.0)
    heights = [view(transform, (100, 100), [])[0].shape[1] for _ in range(300)]
    assert min(heights) < 60
    assert max(heights) > 170
    assert 0.35 < sum(height > 100 for height in heights) / 300 < 0.65  # even on a logarithmic scale
