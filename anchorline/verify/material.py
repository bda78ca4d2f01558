"""What two artefacts are compared on: labelled data, plain images, a video, or generated scenes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.data.dataset import Dataset, LabelledImage, image_size, load_image
from anchorline.data.synthetic import generate_scene
from anchorline.runtime.io.errors import DataError
from anchorline.runtime.io.images import find_images, is_video
from anchorline.runtime.video.files import VideoReader

VIDEO_FRAMES = 50
_SEED = 7
# Sizes that fill a canvas, that leave most of it empty, and extreme shapes.
_SCENE_SIZES = ((240, 320), (480, 640), (64, 512), (512, 64), (100, 100), (360, 203), (33, 47), (600, 900))


def has_labels(dataset: Dataset) -> bool:
    """Whether any image has an object to be found."""
    return any(len(image.boxes) for image in dataset)


def first_images(dataset: Dataset, limit: int | None) -> Dataset:
    """The first ``limit`` images of the data, all of them for None."""
    if limit is None or len(dataset) <= limit:
        return dataset
    return Dataset(dataset.spec, dataset.names, dataset.images[:limit], dataset.category_ids)


def scenes(names: tuple[str, ...], count: int = len(_SCENE_SIZES)) -> Dataset:
    """Generated scenes of varied sizes, without labels: a model of any classes can look at them."""
    frames = [_scene(_SCENE_SIZES[index % len(_SCENE_SIZES)], index) for index in range(count)]
    return from_frames(f"{count} generated scenes", names, frames)


def from_frames(spec: str, names: tuple[str, ...], frames: Sequence[NDArray[np.uint8]]) -> Dataset:
    """Frames (uint8 BGR [H, W, 3]) in memory, without labels, named by their number."""
    return _unlabelled(spec, names, [(f"image {i}", frame) for i, frame in enumerate(frames, start=1)])


def images_or_video(sources: Sequence[str | Path], names: tuple[str, ...]) -> Dataset:
    """Image files, folders of images, or videos, of which up to ``VIDEO_FRAMES`` frames are taken.

    Raises ``DataError`` for what is missing or unreadable.
    """
    images: list[LabelledImage] = []
    for source in map(Path, sources):
        if not source.exists():
            raise DataError(f"{source}: no such file or folder; give an image, a folder of images or a video")
        if is_video(source):
            images += _unlabelled("", names, _video_frames(source)).images
            continue
        for path in find_images(source):
            size = image_size(path)
            images.append(_image(path.name, size, partial(load_image, path, size)))
    if not images:
        raise DataError(f"{', '.join(map(str, sources))}: holds no image; expected at least one")
    return Dataset(", ".join(map(str, sources)), names, tuple(images))


def _scene(size: tuple[int, int], index: int) -> NDArray[np.uint8]:
    """A scene; sides too small for the generator are cut out of a larger one."""
    drawn = (max(size[0], 64), max(size[1], 64))
    return np.ascontiguousarray(generate_scene(_SEED, drawn, index)[0][: size[0], : size[1]])


def _video_frames(path: Path) -> list[tuple[str, NDArray[np.uint8]]]:
    """Frames at even distances over the whole video."""
    kept: list[tuple[str, NDArray[np.uint8]]] = []
    step = 1
    with VideoReader(path) as reader:
        for index, _, frame in reader:
            if index % step:
                continue
            kept.append((f"{path.name} frame {index}", frame))
            if len(kept) > VIDEO_FRAMES:  # longer than thought: keep every other frame from here on
                kept, step = kept[::2], step * 2
    return kept[:VIDEO_FRAMES]


def _unlabelled(
    spec: str, names: tuple[str, ...], frames: Sequence[tuple[str, NDArray[np.uint8]]]
) -> Dataset:
    images = tuple(_image(name, (f.shape[0], f.shape[1]), partial(np.copy, f)) for name, f in frames)
    return Dataset(spec, names, images)


def _image(name: str, size: tuple[int, int], load: partial[NDArray[np.uint8]]) -> LabelledImage:
    none = np.zeros(0, np.bool_)
    return LabelledImage(name, size, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), none, none, load)
