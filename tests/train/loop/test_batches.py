"""From labelled images to batches: which images, which views of them, and what stands in a batch."""

from __future__ import annotations

import contextlib
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

from anchorline.data.dataset import Dataset, LabelledImage, load_image
from anchorline.runtime.canvas import place, to_canvas
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import DataError
from anchorline.train.data.dataset import (
    Batch,
    CanvasDataset,
    EpochSampler,
    build_loader,
    collate,
    read_batches,
    single_threaded_opencv,
)
from anchorline.train.settings import TrainingSettings

CANVAS = (64, 96)
VARIED = TrainingSettings(
    batch=2, workers=0, flip=0.5, vertical_flip=0.5, zoom=(0.6, 1.6), photometric=1.0, seed=3
)
STRONG = dataclasses.replace(VARIED, mosaic=0.5, iou_crop=0.5)
PLAIN = TrainingSettings(batch=2, workers=0, flip=0.0)

Labelled = Callable[..., LabelledImage]


def views_of(data: Dataset, settings: TrainingSettings = VARIED) -> CanvasDataset:
    return CanvasDataset(data, CANVAS, ResizeRule(), settings)


def batches_of(data: Dataset, settings: TrainingSettings, epoch: int = 0) -> list[Batch]:
    loader, sampler = build_loader(views_of(data, settings), settings)
    sampler.epoch = epoch
    with single_threaded_opencv():
        return list(read_batches(loader))


def check_equal(one: Batch, other: Batch) -> None:
    assert one.ids == other.ids
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.image_sizes, other.image_sizes)
    assert torch.equal(one.targets.boxes, other.targets.boxes)
    assert torch.equal(one.targets.labels, other.targets.labels)
    assert torch.equal(one.targets.ignored, other.targets.ignored)


def test_a_view_depends_on_seed_epoch_and_index_alone(scenes: Dataset) -> None:
    views = views_of(scenes)
    first = views[0, 3]
    torch.manual_seed(99)
    views[0, 1]
    again = views_of(scenes)[0, 3]
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["boxes"], again["boxes"])
    assert not torch.equal(first["image"], views[1, 3]["image"])
    other_seed = views_of(scenes, dataclasses.replace(VARIED, seed=4))
    assert not torch.equal(first["image"], other_seed[0, 3]["image"])


def test_a_view_leaves_the_training_s_random_numbers_alone(scenes: Dataset) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    views_of(scenes)[0, 0]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("settings", [VARIED, STRONG], ids=["usual", "with mosaics and IoU crops"])
def test_workers_change_nothing(scenes: Dataset, settings: TrainingSettings) -> None:
    settings = dataclasses.replace(settings, batch=3)
    alone = batches_of(scenes, settings, epoch=1)
    together = batches_of(scenes, dataclasses.replace(settings, workers=1), epoch=1)
    assert len(alone) == len(together) == 2
    for one, other in zip(alone, together, strict=True):
        check_equal(one, other)


def test_a_loader_that_keeps_its_workers_follows_the_epoch(scenes: Dataset) -> None:
    settings = dataclasses.replace(VARIED, workers=1, batch=4)
    loader, sampler = build_loader(views_of(scenes, settings), settings)
    with single_threaded_opencv():
        for epoch in (0, 1):
            sampler.epoch = epoch
            expected = batches_of(scenes, dataclasses.replace(settings, workers=0), epoch)
            for one, other in zip(read_batches(loader), expected, strict=True):
                check_equal(one, other)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000), st.integers(0, 50))
def test_each_image_comes_at_most_once_an_epoch(images: int, batch: int, seed: int, epoch: int) -> None:
    sampler = EpochSampler(images, batch, seed)
    sampler.epoch = epoch
    batches = list(sampler)
    assert len(batches) == len(sampler) >= 1
    assert {len(each) for each in batches} == {min(batch, images)}
    keys = [key for each in batches for key in each]
    assert {e for e, _ in keys} == {epoch}
    indices = [index for _, index in keys]
    assert len(set(indices)) == len(indices)
    assert set(indices) <= set(range(images))
    assert images - len(indices) < batch
    assert list(sampler) == batches


def test_the_images_left_out_are_others_in_every_epoch() -> None:
    sampler = EpochSampler(10, 4, seed=0)
    seen: set[int] = set()
    orders = []
    for epoch in range(8):
        sampler.epoch = epoch
        orders.append([index for batch in sampler for _, index in batch])
        seen.update(orders[-1])
    assert seen == set(range(10))
    assert len({tuple(order) for order in orders}) == 8


def test_fewer_images_than_a_batch_make_one_batch_of_all(scenes: Dataset) -> None:
    few = dataclasses.replace(scenes, images=scenes.images[:3])
    (batch,) = batches_of(few, dataclasses.replace(VARIED, batch=16))
    assert sorted(batch.ids) == [image.id for image in few]
    assert batch.images.shape == (3, *CANVAS, 3)


def test_a_batch_is_padded_to_its_fullest_image(labelled: Labelled) -> None:
    pixels = np.zeros((*CANVAS, 3), np.uint8)
    boxes = [(0.0, 0.0, 10.0, 12.0), (20.0, 20.0, 30.0, 30.0)]
    images = (
        labelled(pixels, boxes, [2, 1], id="two"),
        labelled(pixels, [], id="none"),
        labelled(pixels[:32], boxes[:1], [1], id="one"),
    )
    views = views_of(Dataset("hand", ("a", "b", "c"), images), PLAIN)
    batch = collate([views[0, index] for index in range(3)])
    assert batch.images.dtype == torch.uint8
    assert batch.image_sizes.tolist() == [[64, 96], [64, 96], [32, 96]]
    assert batch.image_sizes.dtype == torch.float32
    assert batch.targets.labels.tolist() == [[2, 1], [-1, -1], [1, -1]]
    assert batch.targets.boxes[0].tolist() == [list(box) for box in boxes]
    assert not batch.targets.boxes[1].any()
    assert not batch.targets.boxes[2, 1].any()
    assert batch.ids == ("two", "none", "one")


def test_crowds_and_difficult_objects_are_regions_to_ignore(labelled: Labelled) -> None:
    boxes = [(float(10 * i), 0.0, 10.0 * i + 8, 8.0) for i in range(4)]
    image = labelled(
        np.zeros((*CANVAS, 3), np.uint8),
        boxes,
        [0, 1, 2, 3],
        difficult=[False, True, False, False],
        crowd=[False, False, True, False],
    )
    view = views_of(Dataset("hand", ("a", "b", "c", "d"), (image,)), PLAIN)[0, 0]
    assert view["labels"].tolist() == [0, 3]
    assert view["boxes"].tolist() == [list(boxes[0]), list(boxes[3])]
    assert view["ignored"].tolist() == [list(boxes[1]), list(boxes[2])]


def test_without_augmentation_the_canvas_is_the_runtime_s(labelled: Labelled) -> None:
    """Same pixels in the same channel order: what is trained on is what the detector will see."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 37, 3), dtype=np.uint8)
    image = labelled(pixels, [(4.0, 5.0, 20.0, 40.0)])
    view = views_of(Dataset("hand", ("a",), (image,)), PLAIN)[0, 0]
    placement = place((50, 37), CANVAS, ResizeRule())
    expected = np.empty((*CANVAS, 3), np.uint8)
    to_canvas(pixels, placement, expected)
    assert np.array_equal(view["image"].numpy(), expected)
    scale = 64 / 50
    assert view["size"].tolist() == [64, int(37 * scale)]
    assert view["boxes"][0].tolist() == pytest.approx([4 * 47 / 37, 5 * scale, 20 * 47 / 37, 40 * scale])


@pytest.mark.parametrize("workers", [0, 1])
def test_boxes_of_random_views_are_the_bright_area(labelled: Labelled, workers: int) -> None:
    pixels = np.zeros((100, 150, 3), np.uint8)
    pixels[40:80, 30:90] = 255
    data = Dataset("hand", ("a",), tuple(labelled(pixels, [(30.0, 40.0, 90.0, 80.0)]) for _ in range(6)))
    settings = dataclasses.replace(VARIED, photometric=0.0, workers=workers)
    for batch in batches_of(data, settings):
        for image, boxes in zip(batch.images.numpy(), batch.targets.boxes.numpy(), strict=True):
            rows, columns = np.nonzero(image[..., 1] > 184)  # half way between the padding and the object
            bright = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(boxes[0] - bright).max() <= 1.0


def test_a_mosaic_shows_four_images_with_their_boxes(labelled: Labelled) -> None:
    """Each image has one object in a shade of its own, which is its label."""
    images = []
    for label in range(5):
        pixels = np.zeros((40, 60, 3), np.uint8)
        pixels[10:30, 15:45] = 100 + 30 * label
        images.append(labelled(pixels, [(15.0, 10.0, 45.0, 30.0)], [label], id=str(label)))
    data = Dataset("hand", tuple("abcde"), tuple(images))
    views = views_of(data, dataclasses.replace(PLAIN, mosaic=1.0))
    shown = set()
    for epoch in range(6):
        view = views[epoch, 2]
        assert view["id"] == " + ".join(dict.fromkeys(map(str, view["labels"].tolist())))
        assert view["size"].tolist() == list(CANVAS)
        assert view["labels"][0] == 2, "the image asked for comes first"
        assert len(view["boxes"]) == 4
        for quarter, (box, label) in enumerate(
            zip(view["boxes"].tolist(), view["labels"].tolist(), strict=True)
        ):
            x1, y1, x2, y2 = map(round, box)
            assert (y1 >= 32, x1 >= 48) == divmod(quarter, 2)
            assert (y2 > 32, x2 > 48) == divmod(quarter, 2)
            inside = view["image"][y1 + 1 : y2 - 1, x1 + 1 : x2 - 1]
            assert bool((inside == 100 + 30 * label).all())
            assert not view["image"][y1 - 2, x1:x2].any()
        shown.add(tuple(view["labels"].tolist()))
    assert len(shown) > 1, "the other three are drawn anew in every epoch"
    again = views_of(data, dataclasses.replace(PLAIN, mosaic=1.0))
    assert torch.equal(again[3, 2]["image"], views[3, 2]["image"])


def test_a_mosaic_of_images_without_objects(labelled: Labelled) -> None:
    data = Dataset("hand", ("a",), (labelled(np.full((33, 20, 3), 90, np.uint8), []),))
    view = views_of(data, dataclasses.replace(VARIED, mosaic=1.0))[0, 0]
    assert view["boxes"].shape == (0, 4)
    assert view["labels"].shape == (0,)
    assert view["image"].any()


def test_some_views_are_mosaics(scenes: Dataset) -> None:
    views = views_of(scenes, dataclasses.replace(PLAIN, mosaic=0.5))
    plain = views_of(scenes, PLAIN)[0, 0]["image"]
    same = sum(torch.equal(views[epoch, 0]["image"], plain) for epoch in range(40))
    assert 8 < same < 32


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_line(labelled: Labelled, tmp_path: Path, workers: int) -> None:
    path = tmp_path / "cut.png"
    assert cv2.imwrite(str(path), np.zeros((40, 40, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-20])
    broken = labelled(np.zeros((40, 40, 3), np.uint8), [(1.0, 1.0, 9.0, 9.0)])
    broken = dataclasses.replace(broken, load=lambda: load_image(path, (40, 40)))
    data = Dataset("hand", ("a",), (broken, broken))
    with pytest.raises(DataError, match=f"^{path}: ") as caught:
        batches_of(data, dataclasses.replace(PLAIN, workers=workers))
    assert "\n" not in str(caught.value)


def test_the_broken_image_of_a_mosaic_is_named_wherever_it_stands(labelled: Labelled, tmp_path: Path) -> None:
    sound = labelled(np.zeros((40, 40, 3), np.uint8), [], id="sound")
    path = tmp_path / "gone.png"
    broken = dataclasses.replace(sound, id="broken", load=lambda: load_image(path, (40, 40)))
    views = views_of(Dataset("hand", ("a",), (sound, *[broken] * 9)), dataclasses.replace(PLAIN, mosaic=1.0))
    with pytest.raises(DataError, match=f"^{path}: "):
        views[0, 0]


def test_opencv_gets_its_threads_back() -> None:
    before = cv2.getNumThreads()
    with contextlib.suppress(KeyError), single_threaded_opencv():
        assert cv2.getNumThreads() == 1
        raise KeyError
    assert cv2.getNumThreads() == before
