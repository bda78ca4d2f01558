"""Long runs in short: thousands of frames, flat memory, and a hundred starts and stops."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import VideoPipeline
from anchorline.runtime.video.source import Source

FRAMES, SOURCES = 1000, 8


def resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to know the memory in use")
def test_eight_sources_and_thousands_of_frames(stub, tmp_path):
    """Nothing is lost or reordered, and from the second quarter on memory stays within 5 %."""

    def frames(first):
        for index in range(FRAMES):
            frame = np.full((120, 160, 3), 7, np.uint8)
            frame[0, 0] = first, index // 256, index % 256
            yield frame

    sources = [Source(frames(s), name=f"s{s}") for s in range(SOURCES)]
    expected = [0] * SOURCES
    memory = []
    with VideoPipeline(
        stub(concurrent_calls=2), sources, DetectOptions(jsonl=tmp_path / "a.jsonl")
    ) as pipeline:
        for count, result in enumerate(pipeline):
            source = int(result.source[1:])
            assert result.index == expected[source]
            assert result.frame[0, 0].tolist() == [source, result.index // 256, result.index % 256]
            expected[source] += 1
            if count % 500 == 499:
                memory.append(resident())
    assert expected == [FRAMES] * SOURCES
    assert pipeline.summary().dropped == 0
    settled = memory[len(memory) // 4 :]
    assert max(settled) - min(settled) < 0.05 * min(settled)


@pytest.mark.parametrize("way", ["end", "break", "error"])
def test_a_hundred_starts_and_stops_leave_no_thread(stub, grey, way):
    before = set(threading.enumerate())
    for _ in range(34):
        detector = stub(fail_at=5 if way == "error" else None)
        sources = [Source((grey(i) for i in range(12)), name=f"s{s}") for s in range(2)]
        pipeline = VideoPipeline(detector, sources)
        try:
            for result in pipeline:
                if way == "break" and result.index == 3:
                    break
        except RuntimeError:
            assert way == "error"
        assert set(threading.enumerate()) <= before


@pytest.mark.slow
def test_a_camera_that_comes_and_goes_sixty_times(stub, camera):
    """It dies every second: memory, descriptors and threads stay."""
    open_files = Path("/proc/self/fd")
    if not open_files.exists():
        pytest.skip("needs /proc to count descriptors")
    memory, descriptors = [], []
    pipeline = VideoPipeline(stub(), [f"cam={camera.url}"], DetectOptions(stall=2.0))
    figures = pipeline.figures.sources["cam"]
    for result in pipeline:
        if result.index % 50 == 49:
            camera.mode = "die"
        if result.index % 100 == 60:
            memory.append(resident())
            descriptors.append(len(list(open_files.iterdir())))
        if figures.reconnects >= 60:
            break
    settled = memory[len(memory) // 4 :]
    assert max(settled) - min(settled) < 0.05 * min(settled)
    assert max(descriptors) - min(descriptors[1:]) <= 4
    assert threading.active_count() < 10
