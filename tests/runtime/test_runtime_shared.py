"""The readers on real files, where the project's data is at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from anchorline.runtime.io.images import find_images, read_image
from anchorline.runtime.video.reader import VideoReader

SHARED = os.environ.get("ANCHORLINE_SHARED")
pytestmark = pytest.mark.skipif(SHARED is None, reason="real data: ANCHORLINE_SHARED is not set")


@pytest.fixture
def shared():
    return Path(SHARED)


def test_real_photographs_pass_the_damage_checks(shared):
    paths = find_images(shared / "data" / "bccd" / "JPEGImages")
    assert len(paths) > 300
    for path in paths[::10]:
        assert read_image(path).ndim == 3


@pytest.mark.parametrize("name", ["bikes.mp4", "car-detection.mp4"])
def test_real_videos_are_read_to_the_end_without_warnings(shared, name):
    with VideoReader(shared / "video" / name) as reader:
        count = sum(1 for _ in reader)
        assert count == reader.frame_count
        assert reader.warnings == []
