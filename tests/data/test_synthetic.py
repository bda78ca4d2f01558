"""Generated scenes and videos: deterministic, labelled tightly, and fair to the eye."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest

from anchorline.data.synthetic import (
    CLASS_NAMES,
    MIN_VISIBLE,
    SCENE_SIZE,
    TEXTURE_SIDE,
    Pose,
    enclosed_area,
    generate_scene,
    object_contours,
    paint,
    place,
    random_shape,
    synthetic_dataset,
    visible_fractions,
)
from anchorline.data.synthetic_video import (
    SyntheticVideo,
    synthetic_video_dataset,
    write_video,
)
from anchorline.runtime.io.errors import SettingsError


class VideoFrame(NamedTuple):
    """A frame of a video and its objects, without those of which less than ``MIN_VISIBLE`` shows."""

    frame: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


def generate_video(seed: int, frames: int) -> Iterator[VideoFrame]:
    video = SyntheticVideo(seed)
    for index in range(frames):
        truth = video.truth(index)
        clear = truth.visible >= MIN_VISIBLE
        yield VideoFrame(video.frame(index), truth.boxes[clear], truth.labels[clear], truth.ids[clear])


def test_a_scene_is_an_image_with_boxes_and_labels() -> None:
    image, boxes, labels = generate_scene(3)
    assert image.shape == (*SCENE_SIZE, 3)
    assert image.dtype == np.uint8
    assert boxes.dtype == np.float32
    assert labels.dtype == np.int64
    assert len(boxes) == len(labels) >= 1
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all()
    assert (boxes <= [320, 240, 320, 240]).all()


@pytest.mark.parametrize("size", [(64, 64), (64, 512), (720, 1280), (241, 333)])
def test_any_size(size: tuple[int, int]) -> None:
    image, boxes, _ = generate_scene(1, size)
    assert image.shape == (*size, 3)
    assert (boxes <= [size[1], size[0], size[1], size[0]]).all()


def test_a_scene_too_small_is_refused() -> None:
    with pytest.raises(SettingsError, match="scene size is 32x320; expected at least 64 pixels a side"):
        generate_scene(0, (32, 320))
    with pytest.raises(SettingsError, match="frames is 0"):
        synthetic_video_dataset(0, 0)


def test_scenes_depend_on_seed_and_index_alone() -> None:
    code = (
        "import hashlib; from anchorline.data.synthetic import generate_scene;"
        "print(hashlib.sha256(b''.join(p.tobytes() for p in generate_scene(5, index=9))).hexdigest())"
    )
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout}
    dataset = synthetic_dataset(12, 5)
    _ = dataset.images[3].load()
    image = dataset.images[9]
    parts = (image.load(), image.boxes, image.labels)
    import hashlib

    runs.add(hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest() + "\n")
    assert len(runs) == 1
    assert not np.array_equal(generate_scene(5, index=9)[0], generate_scene(6, index=9)[0])
    assert not np.array_equal(generate_scene(5, index=9)[0], generate_scene(5, index=10)[0])


def test_the_data_set_is_varied_and_balanced() -> None:
    dataset = synthetic_dataset(300)
    assert dataset.names == CLASS_NAMES
    counts = Counter(int(label) for image in dataset for label in image.labels)
    assert min(counts.values()) > 0.8 * max(counts.values())
    per_image = [len(image.boxes) for image in dataset]
    assert 3 < np.mean(per_image) < 5
    assert max(per_image) == 6
    sides = np.concatenate([(image.boxes[:, 2:] - image.boxes[:, :2]).max(axis=1) for image in dataset])
    assert np.percentile(sides, 2) > 18
    assert np.percentile(sides, 98) < 100
    assert len({image.id for image in dataset}) == 300
    assert pickle.loads(pickle.dumps(dataset.images[7])).load().shape == (*SCENE_SIZE, 3)


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)))
def test_boxes_are_tight_around_what_is_painted(label: int) -> None:
    rng = np.random.default_rng(label)
    white = np.full((TEXTURE_SIDE, TEXTURE_SIDE, 3), 255, np.float32)
    for _ in range(5):
        pose = Pose(*rng.uniform(60, 100, 2), radius=rng.uniform(12, 43), angle=rng.uniform(0, 6))
        placed = place(random_shape(rng, label), pose)
        image = np.zeros((160, 160, 3), np.float32)
        paint(image, placed, white, shadow=(0.0, 0.0))
        rows, columns = np.nonzero(image[..., 0] > 60)
        painted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(placed.box, painted, atol=1.6)
        # Half-covered pixels included, what is painted is what the outline encloses.
        assert image[..., 0].sum() / 255 == pytest.approx(enclosed_area(placed.contours), rel=0.12)


def test_holes_are_no_area() -> None:
    outer, inner = object_contours(CLASS_NAMES.index("ring"))
    ratio = enclosed_area([outer, inner]) / enclosed_area([outer])
    assert ratio == pytest.approx(1 - 0.55**2)


def test_visible_fractions_by_hand() -> None:
    rng = np.random.default_rng(0)
    cross = random_shape(rng, CLASS_NAMES.index("cross"))
    far, below, above, half, gone = (place(cross, Pose(x, 60, 30, 0.0)) for x in (50, 150, 150, 240, 400))
    shown = visible_fractions([far, below, above, half, gone], (120, 240))
    assert shown == pytest.approx([1, 0, 1, 0.5, 0], abs=0.06)


def test_colour_tells_nothing_about_the_class() -> None:
    """The mean hue of the objects of each class is spread around the whole circle."""
    hues: dict[int, list[float]] = {label: [] for label in range(len(CLASS_NAMES))}
    for image in synthetic_dataset(60, 2):
        hsv = cv2.cvtColor(image.load(), cv2.COLOR_BGR2HSV)
        for (x1, y1, x2, y2), label in zip(image.boxes.astype(int), image.labels, strict=True):
            hues[int(label)].append(float(np.median(hsv[y1 : y2 + 1, x1 : x2 + 1, 0])))
    for values in hues.values():
        histogram, _ = np.histogram(values, bins=4, range=(0, 180))
        assert histogram.min() >= 0.06 * len(values)


def test_a_scene_is_drawn_quickly() -> None:
    generate_scene(0)
    times = []
    for index in range(12):
        start = time.process_time()  # what other programs take does not count
        generate_scene(0, index=index)
        times.append(time.process_time() - start)
    assert min(times) < 0.05  # about 0.006 s where it is quiet


def test_video_objects_keep_their_identity_and_move_smoothly() -> None:
    last: dict[int, tuple[int, np.ndarray]] = {}
    frames = list(generate_video(4, 60))
    for each in frames:
        assert each.frame.shape == (*SCENE_SIZE, 3)
        assert len(set(each.ids.tolist())) == len(each.ids) == len(each.labels) == len(each.boxes)
        now = {}
        for id, label, box in zip(each.ids.tolist(), each.labels.tolist(), each.boxes, strict=True):
            if id in last:
                assert last[id][0] == label
                assert np.abs(last[id][1] - box).max() < 8
            now[id] = (label, box)
        last = now
    moved = [b for b, i in zip(frames[-1].boxes, frames[-1].ids, strict=True) if i in frames[0].ids]
    assert moved
    assert {int(label) for each in frames for label in each.labels} == set(range(len(CLASS_NAMES)))
    assert not np.array_equal(frames[0].frame, frames[1].frame)


def test_video_frames_do_not_depend_on_the_order_they_are_asked_for() -> None:
    forwards, backwards = SyntheticVideo(8), SyntheticVideo(8)
    late = backwards.frame(400)
    for index in (0, 399, 17):
        assert np.array_equal(forwards.frame(index), backwards.frame(index))
    assert np.array_equal(forwards.frame(400), late)


def test_the_video_data_set_is_the_videos_truth() -> None:
    dataset = synthetic_video_dataset(4, 30)
    for image, each in zip(dataset, generate_video(4, 30), strict=True):
        clear = ~image.difficult
        assert np.array_equal(image.boxes[clear], each.boxes)
        assert np.array_equal(image.labels[clear], each.labels)
        assert image.size == SCENE_SIZE
    assert np.array_equal(dataset.images[11].load(), list(generate_video(4, 12))[-1].frame)
    longer = synthetic_video_dataset(4, 40)
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(dataset, longer, strict=False))


def test_hidden_objects_of_a_video_are_difficult() -> None:
    images = synthetic_video_dataset(4, 250).images
    hidden = sum(int(image.difficult.sum()) for image in images)
    every = sum(len(image.labels) for image in images)
    assert 0 < hidden < 0.25 * every


def test_the_written_video_shows_the_frames(tmp_path: Path) -> None:
    path = tmp_path / "scene.mp4"
    write_video(path, 4, 8, fps=25)
    capture = cv2.VideoCapture(str(path))
    for each in generate_video(4, 8):
        read, frame = capture.read()
        assert read
        assert np.abs(frame.astype(float) - each.frame).mean() < 12
    assert not capture.read()[0]
