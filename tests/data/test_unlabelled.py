"""What artefacts are compared on."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from anchorline.data.dataset import from_frames, images_or_video
from anchorline.data.synthetic import scenes
from anchorline.runtime.io.errors import DataError


def test_scenes_are_the_same_each_time_and_of_many_shapes() -> None:
    one, other = scenes(("cell",)), scenes(("cell",))
    assert [image.size for image in one] == [image.load().shape[:2] for image in one]
    assert len({image.size for image in one}) == len(one) == 8
    assert all(np.array_equal(a.load(), b.load()) for a, b in zip(one, other, strict=True))
    assert all(image.load().std() > 0 for image in one)
    assert not one.has_labels


def test_frames_come_as_copies() -> None:
    """A detector that draws into its frame must not change what the other side sees."""
    dataset = from_frames("frames", ("cell",), [np.zeros((4, 5, 3), np.uint8)])
    dataset.images[0].load()[...] = 9
    assert not dataset.images[0].load().any()


def test_the_first_images() -> None:
    dataset = scenes(("cell",), 3)
    assert [image.id for image in dataset.first(2)] == ["image 1", "image 2"]
    assert dataset.first(None) is dataset.first(3) is dataset


def test_files_and_folders(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        cv2.imwrite(str(tmp_path / name), np.full((6, 8, 3), 7, np.uint8))
    dataset = images_or_video([tmp_path, tmp_path / "b.png"], ("cell",))
    assert [image.id for image in dataset] == ["a.png", "b.png", "b.png"]
    assert dataset.images[0].load().shape == (6, 8, 3)


@pytest.mark.parametrize("content", ["nothing", "text", "empty folder"])
def test_what_holds_no_image(tmp_path: Path, content: str) -> None:
    path = tmp_path / "source.png"
    if content == "text":
        path.write_text("no image")
    elif content == "empty folder":
        path.mkdir()
    with pytest.raises(DataError, match=r"source\.png"):
        images_or_video([path], ("cell",))


@pytest.mark.parametrize("name", ["broken.mp4", "empty.avi"])
def test_what_is_no_video(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"no video" if name.startswith("broken") else b"")
    with pytest.raises(DataError, match=name):
        images_or_video([path], ("cell",))
