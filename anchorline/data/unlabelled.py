"""Images without labels as a data set, to compare artefacts on: files, videos, frames, generated scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.data.dataset import Dataset, LabelledImage, image_size, load_image
from anchorline.data.synthetic import generate_scene
from anchorline.runtime.io.errors import DataError
from anchorline.runtime.io.images import find_images, is_video
from anchorline.runtime.video.reader import VideoReader

VIDEO_FRAMES = 50
_SEED = 7
# Sizes that fill a canvas, that leave most of it empty, and extreme shapes.
_SCENE_SIZES = ((240, 320), (480, 640), (64, 512), (512, 64), (100, 100), (360, 203), (33, 47), (600, 900))


def scenes(names: tuple[str, ...], count: int = len(_SCENE_SIZES)) -> Dataset:
    """Generated scenes of varied sizes: a model of any classes can look at them."""
    frames = []
    for index in range(count):
        height, width = _SCENE_SIZES[index % len(_SCENE_SIZES)]
        # Sides too small for the generator are cut out of a larger scene.
        scene = generate_scene(_SEED, (max(height, 64), max(width, 64)), index)[0]
        frames.append(np.ascontiguousarray(scene[:height, :width]))
    return from_frames(f"{count} generated scenes", names, frames)


def from_frames(spec: str, names: tuple[str, ...], frames: Sequence[NDArray[np.uint8]]) -> Dataset:
    """Frames (uint8 BGR [H, W, 3]) in memory, named by their number."""
    images = [_from_frame(f"image {number}", frame) for number, frame in enumerate(frames, start=1)]
    return Dataset(spec, names, tuple(images))


def images_or_video(sources: Sequence[str | Path], names: tuple[str, ...]) -> Dataset:
    """Image files, folders of images, or videos, of which up to ``VIDEO_FRAMES`` frames are taken.

    Raises ``DataError`` for what is missing or unreadable.
    """
    images: list[LabelledImage] = []
    for source in map(Path, sources):
        if not source.exists():
            raise DataError(f"{source}: no such file or folder; give an image, a folder of images or a video")
        if is_video(source):
            images += [_from_frame(name, frame) for name, frame in _video_frames(source)]
            continue
        for path in find_images(source):
            size = image_size(path)
            images.append(_unlabelled(path.name, size, partial(load_image, path, size)))
    spec = ", ".join(map(str, sources))
    if not images:
        raise DataError(f"{spec}: holds no image; expected at least one")
    return Dataset(spec, names, tuple(images))


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


def _from_frame(name: str, frame: NDArray[np.uint8]) -> LabelledImage:
    return _unlabelled(name, (frame.shape[0], frame.shape[1]), partial(np.copy, frame))


def _unlabelled(name: str, size: tuple[int, int], load: Callable[[], NDArray[np.uint8]]) -> LabelledImage:
    none = np.zeros(0, np.bool_)
    return LabelledImage(name, size, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), none, none, load)
