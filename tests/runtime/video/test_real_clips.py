"""Real videos through detect, where the project's data is at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import detect
from anchorline.runtime.video.reader import VideoReader
from anchorline.runtime.video.writer import has_h264

SHARED = os.environ.get("ANCHORLINE_SHARED")


@pytest.mark.skipif(SHARED is None, reason="real data: ANCHORLINE_SHARED is not set")
@pytest.mark.parametrize(
    ("name", "frames"),
    [("bikes.mp4", 250), pytest.param("car-detection.mp4", 377, marks=pytest.mark.slow)],
)
def test_every_frame_is_answered_in_order_and_the_copy_is_as_long(stub, tmp_path, name, frames):
    source = Path(SHARED) / "video" / name
    saved, lines = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    summary = detect([source], stub(), DetectOptions(save=saved, jsonl=lines), progress=False)
    assert (summary.frames, summary.warnings) == (frames, ())
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [row["frame"] for row in rows] == list(range(frames))
    lengths, ends = [], []
    for path in (source, saved):
        with VideoReader(path) as reader:
            lengths.append(reader.frame_count)
            ends.append([time_s for _, time_s, _ in reader][-1])
    assert lengths == [frames, frames]
    assert ends[0] == pytest.approx(ends[1], abs=0.002)
    if has_h264():
        import av

        with av.open(str(saved)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
