"""Ignore regions follow the pixels through every random view, onto the canvas and into the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors

from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.runtime.contract import ResizeRule
from anchorline.train.data.dataset import (
    CanvasDataset,
    build_loader,
    collate,
    read_batches,
    write_sample_sheet,
)
from anchorline.train.data.transforms import IGNORE_LABEL, RandomZoom, build_transforms
from anchorline.train.loop.train import train
from anchorline.train.model.assign import Targets
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.settings import Settings, TrainingSettings

Box = tuple[int, int, int, int]
Labelled = Callable[..., LabelledImage]
CANVAS = (64, 96)
OBJECT, REGION = 255, 200  # shades; the padding is 114
VARIED = TrainingSettings(batch=2, workers=0, flip=0.5, vertical_flip=0.5, zoom=(0.6, 1.6))


def view(
    transform: torch.nn.Module, size: tuple[int, int], boxes: list[Box], regions: list[Box], seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``transform`` makes of bright objects and, on top, darker regions: pixels, boxes, labels."""
    torch.manual_seed(seed)
    pixels = torch.zeros(3, *size, dtype=torch.uint8)
    for shade, rectangles in ((OBJECT, boxes), (REGION, regions)):
        for x1, y1, x2, y2 in rectangles:
            pixels[:, y1:y2, x1:x2] = shade
    both = torch.tensor(boxes + regions, dtype=torch.float32).reshape(-1, 4)
    target = {
        "boxes": tv_tensors.BoundingBoxes(both, format="XYXY", canvas_size=size),
        "labels": torch.tensor([*range(len(boxes)), *[IGNORE_LABEL] * len(regions)], dtype=torch.int64),
    }
    image, target = transform(tv_tensors.Image(pixels), target)
    return image.as_subclass(Tensor), target["boxes"].as_subclass(Tensor), target["labels"]


def bounds(pixels: Tensor, shade: int) -> list[int] | None:
    """x1, y1, x2, y2 around the pixels of [3, H, W] that have ``shade``."""
    rows, columns = torch.nonzero(pixels[0] == shade, as_tuple=True)
    if not len(rows):
        return None
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@st.composite
def sizes_and_regions(draw: st.DrawFn) -> tuple[tuple[int, int], Box]:
    height, width = draw(st.integers(8, 60)), draw(st.integers(8, 60))
    x1, y1 = draw(st.integers(0, width - 2)), draw(st.integers(0, height - 2))
    return (height, width), (x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height)))


@hypothesis_settings(max_examples=80, deadline=None)
@given(sizes_and_regions(), st.integers(0, 2**31))
def test_flipped_and_zoomed_regions_are_their_shade_as_far_as_it_shows(
    scene: tuple[tuple[int, int], Box], seed: int
) -> None:
    size, region = scene
    transform = build_transforms(TrainingSettings(flip=0.5, vertical_flip=0.5, zoom=(0.4, 3.0)))
    pixels, boxes, labels = view(transform, size, [], [region], seed)
    shown = bounds(pixels, REGION)
    assert boxes.tolist() == ([] if shown is None else [shown])
    assert labels.tolist() == [IGNORE_LABEL] * len(boxes)


def test_a_crop_keeps_what_is_left_of_a_region_where_an_object_would_lose_its_box() -> None:
    transform = RandomZoom(2.0, 2.0)
    slivers = 0
    for seed in range(40):
        pixels, boxes, labels = view(transform, (80, 80), [], [(0, 0, 40, 40)], seed)
        _, as_object, _ = view(transform, (80, 80), [(0, 0, 40, 40)], [], seed)
        shown = bounds(pixels, REGION)
        assert boxes.tolist() == ([] if shown is None else [shown])
        assert len(boxes) >= len(as_object)
        slivers += len(boxes) > len(as_object)
        assert labels.tolist() == [IGNORE_LABEL] * len(boxes)
    assert slivers > 3


@hypothesis_settings(max_examples=60, deadline=None)
@given(sizes_and_regions(), st.integers(0, 2**31), st.booleans())
def test_a_region_changes_no_other_box_and_no_draw(
    scene: tuple[tuple[int, int], Box], seed: int, iou_crop: bool
) -> None:
    size, region = scene
    objects = [(1, 1, size[1] - 2, size[0] // 2), (0, 0, size[1] // 2, size[0])]
    options = {"iou_crop": 0.9} if iou_crop else {}
    transform = build_transforms(TrainingSettings(flip=0.5, zoom=(0.5, 2.0), **options))
    pixels, boxes, labels = view(transform, size, objects, [], seed)
    with_region = view(transform, size, objects, [region], seed)
    assert with_region[0].shape == pixels.shape
    untouched = with_region[0] != REGION
    assert torch.equal(with_region[0][untouched], pixels[untouched])
    is_object = with_region[2] != IGNORE_LABEL
    assert torch.equal(with_region[1][is_object], boxes)
    assert torch.equal(with_region[2][is_object], labels)


def test_an_iou_crop_cuts_regions_with_the_image() -> None:
    """The region stays with any part of it that shows, wherever its centre is."""
    transform = build_transforms(TrainingSettings(flip=0.0, iou_crop=1.0))
    cut = gone = 0
    for seed in range(60):
        pixels, boxes, labels = view(transform, (60, 80), [(20, 15, 50, 40)], [(52, 2, 79, 58)], seed)
        shown = bounds(pixels, REGION)
        assert boxes[labels == 0].tolist() == [bounds(pixels, OBJECT)]
        assert boxes[labels == IGNORE_LABEL].tolist() == ([] if shown is None else [shown])
        gone += shown is None
        cut += shown is not None and shown[2] - shown[0] < 13
    assert gone > 3
    assert cut > 3


def test_an_image_of_regions_alone_is_not_cropped_by_them() -> None:
    transform = build_transforms(TrainingSettings(flip=0.0, iou_crop=1.0))
    for seed in range(20):
        pixels, boxes, _ = view(transform, (60, 80), [], [(52, 2, 79, 58)], seed)
        assert pixels.shape == (3, 60, 80)
        assert boxes.tolist() == [[52, 2, 79, 58]]


def region_image(labelled: Labelled, shade: int, **marks: list[bool]) -> LabelledImage:
    """A grey object in the left half, and a region in the right half whose shade tells the image."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 5:20], pixels[10:30, 30:50] = 90, shade
    boxes = [(30.0, 10.0, 50.0, 30.0), (5.0, 10.0, 20.0, 30.0)]
    return labelled(pixels, boxes, [1, 0], id=str(shade), **marks)


@pytest.mark.parametrize("mark", ["difficult", "crowd"])
def test_a_mosaic_carries_the_regions_of_all_its_images(labelled: Labelled, mark: str) -> None:
    images = tuple(region_image(labelled, 150 + 20 * i, **{mark: [True, False]}) for i in range(5))
    settings = TrainingSettings(flip=0.0, mosaic=1.0)
    views = CanvasDataset(Dataset("hand", ("a", "b"), images), CANVAS, ResizeRule(), settings)
    for epoch in range(4):
        item = views[epoch, 1]
        assert item["labels"].tolist() == [0] * 4
        assert len(item["ignored"]) == 4
        shades = []
        for quarter, (x1, y1, x2, y2) in enumerate(item["ignored"].round().int().tolist()):
            assert divmod(quarter, 2) == (y1 >= 32, x1 >= 48)
            inside = item["image"][y1 + 1 : y2 - 1, x1 + 1 : x2 - 1]
            assert inside.unique().numel() == 1
            assert not item["image"][y1 - 2, x1:x2].any()
            shades.append(str(int(inside[0, 0, 0])))
        assert item["id"] == " + ".join(dict.fromkeys(shades))


def bright_box(pixels: NDArray[np.uint8], least: int) -> list[int]:
    rows, columns = np.nonzero(pixels[..., 1] >= least)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_regions_on_the_canvas_are_the_bright_area(labelled: Labelled, workers: int) -> None:
    images = tuple(region_image(labelled, 255, crowd=[True, False]) for _ in range(6))
    settings = dataclasses.replace(VARIED, workers=workers, zoom=(0.7, 1.2))
    views = CanvasDataset(Dataset("hand", ("a", "b"), images), CANVAS, ResizeRule(), settings)
    seen = 0
    for batch in read_batches(build_loader(views, settings)[0]):
        for image, regions in zip(batch.images.numpy(), batch.targets.ignored.numpy(), strict=True):
            assert len(regions) == 1
            # Half way between the padding and the region.
            assert np.abs(regions[0] - bright_box(image, 185)).max() <= 1.0
            seen += 1
    assert seen == 6


def test_a_batch_pads_regions_apart_from_objects(labelled: Labelled) -> None:
    plain = region_image(labelled, 200)
    crowd = region_image(labelled, 200, crowd=[True, False])
    both = region_image(labelled, 200, difficult=[True, True])
    data = Dataset("hand", ("a", "b"), (plain, crowd, both))
    views = CanvasDataset(data, CANVAS, ResizeRule(), TrainingSettings(flip=0.0))
    targets = collate([views[0, index] for index in range(3)]).targets
    assert targets.labels.tolist() == [[1, 0], [0, -1], [-1, -1]]
    assert targets.ignored.shape == (3, 2, 4)
    assert targets.ignored.any(dim=2).tolist() == [[False, False], [True, False], [True, True]]
    assert torch.equal(targets.ignored[2], targets.boxes[0])


def with_difficult(data: Dataset) -> Dataset:
    """Every image's first object is difficult where it has another one."""
    marks = [np.arange(len(image.boxes)) < (len(image.boxes) > 1) for image in data]
    images = [dataclasses.replace(i, difficult=d) for i, d in zip(data, marks, strict=True)]
    return dataclasses.replace(data, images=tuple(images))


def test_regions_reach_the_losses_of_a_training(
    tiny: Callable[..., Settings], scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without their being ignored the losses are others."""
    given: list[Targets] = []
    real = FasterRCNN.losses

    def losses(self: FasterRCNN, images: Tensor, sizes: Tensor, targets: Targets, *rest: object) -> object:
        given.append(targets)
        return real(self, images, sizes, targets, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(FasterRCNN, "losses", losses)
    data = with_difficult(scenes)
    assert any(image.difficult.any() for image in data)
    found = []
    for ignore in (True, False):
        if not ignore:
            monkeypatch.setattr(
                "anchorline.train.data.dataset.collate",
                lambda items: collate([{**item, "ignored": torch.zeros(0, 4)} for item in items]),
            )
        reports: list[dict[str, float]] = []
        settings = tiny(epochs=1, mosaic=0.5, iou_crop=0.3)
        train(
            settings, data, tmp_path / str(ignore), report=lambda r, into=reports: into.append(dict(r.losses))
        )
        found.append(reports)
    assert [targets.ignored.shape[1] > 0 for targets in given] == [True, True, False, False]
    assert found[0] != found[1]
    assert all(np.isfinite(value) for losses in found[0] for value in losses.values())


def test_the_sample_sheet_shows_regions(labelled: Labelled, tmp_path: Path) -> None:
    sheets = []
    for mark in (False, True):
        image = region_image(labelled, 200, difficult=[mark, False])
        views = CanvasDataset(
            Dataset("hand", ("a", "b"), (image,)), CANVAS, ResizeRule(), TrainingSettings(flip=0.0)
        )
        write_sample_sheet(views, tmp_path / f"{mark}.png")
        sheets.append(cv2.imread(str(tmp_path / f"{mark}.png")))
    assert sheets[0].shape == sheets[1].shape
    assert (sheets[0] != sheets[1]).any()
