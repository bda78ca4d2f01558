"""Cameras that misbehave: a real HTTP server of MJPEG streams on loopback."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from anchorline.runtime.io.errors import DataError
from anchorline.runtime.video import intake
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import VideoPipeline
from anchorline.runtime.video.reader import VideoReader
from anchorline.runtime.video.source import Source

DECODERS = ["opencv", "pyav"]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(intake, "FIRST_PAUSE", 0.05)


def run(pipeline, step, seconds=60.0):
    """Call ``step(result)`` with each result until it returns true; stops and fails when time is up."""
    end = time.monotonic() + seconds
    timer = threading.Timer(seconds + 1, pipeline.stop)
    timer.start()
    try:
        for result in pipeline:
            if step(result):
                return
        raise AssertionError(f"ended too soon: {pipeline.summary().to_json()['sources']}")
    finally:
        timer.cancel()
        assert time.monotonic() < end, pipeline.summary().to_json()["sources"]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stall_of_years_opens_as_well(stub, camera, decoder):
    """OpenCV took no limit of more than 31 bits, and the camera was said to be off."""
    pipeline = VideoPipeline(stub(), [camera.url], DetectOptions(decoder=decoder, stall=1e9, patience=0.1))
    run(pipeline, lambda result: True)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_camera_is_read(stub, camera, decoder):
    pipeline = VideoPipeline(stub(), [f"cam={camera.url}"], DetectOptions(decoder=decoder))
    results = []
    run(pipeline, lambda result: results.append(result) or len(results) == 20)
    assert {result.source for result in results} == {"cam"}
    indices = [result.index for result in results]
    assert indices == sorted(set(indices))
    assert results[0].index > 0 or results[0].time_s == 0.0  # on a busy machine the first may be dropped
    stamps = np.array([result.time_s for result in results])
    assert (np.diff(stamps) > 0).all()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("mode", ["die", "garbage", "stall"])
def test_a_camera_that_fails_is_opened_again_while_the_other_goes_on(
    stub, camera, second_camera, mode, decoder, monkeypatch
):
    monkeypatch.setattr(intake, "FIRST_PAUSE", 0.3)
    sources = [f"bad={camera.url}", f"good={second_camera.url}"]
    pipeline = VideoPipeline(
        stub(), sources, DetectOptions(decoder=decoder, stall=1.0 if mode == "stall" else 10.0)
    )
    bad, good = pipeline.figures.sources["bad"], pipeline.figures.sources["good"]
    failed, meanwhile = [], []

    def step(result):
        if result.source == "bad" and bad.frames_out > 5 and not failed:
            failed.append(result.index)
            camera.mode = mode
        if result.source == "good" and bad.state != "playing":
            meanwhile.append(result.index)
        return bad.reconnects and result.source == "bad" and result.index > failed[0] + 10

    run(pipeline, step)
    assert bad.reconnects == 1
    assert camera.connections == 2
    assert good.reconnects == 0
    assert len(meanwhile) > 2  # it did not wait for the other, which was away for fifteen of its frames
    kinds = [kind for _, kind in bad.events]
    assert kinds == (["stalled", "lost", "reconnected"] if mode == "stall" else ["lost", "reconnected"])
    assert bad.stalls == (mode == "stall")
    assert any("bad" in line and "broke off" in line for line in pipeline.summary().warnings)
    assert pipeline.summary().reconnects == 1


def test_a_camera_that_is_away_for_a_while(stub, camera, until):
    """Nobody listens for half a second: attempts go on, further and further apart."""
    pipeline = VideoPipeline(stub(), [f"cam={camera.url}"], DetectOptions(stall=10.0))
    figures = pipeline.figures.sources["cam"]
    helper = threading.Thread(
        target=lambda: (until(lambda: figures.state == "lost"), time.sleep(0.5), camera.up())
    )

    def step(result):
        if figures.frames_out == 5:
            camera.down()
            helper.start()
        return figures.reconnects

    run(pipeline, step)
    helper.join()
    assert figures.reconnects == 1
    assert [kind for _, kind in figures.events] == ["lost", "reconnected"]


@pytest.mark.parametrize("decoder", DECODERS)
def test_another_size_after_coming_back_begins_a_new_file(stub, camera, tmp_path, decoder):
    pipeline = VideoPipeline(
        stub(),
        [f"cam={camera.url}"],
        DetectOptions(save=tmp_path, jsonl=tmp_path / "a.jsonl", decoder=decoder),
    )
    seen = {}

    def step(result):
        seen[result.frame.shape[:2]] = seen.get(result.frame.shape[:2], 0) + 1
        if seen.get((48, 64)) == 5 and camera.size == (48, 64):
            camera.size = (96, 128)
            camera.mode = "die"
        return seen.get((96, 128)) == 5

    run(pipeline, step)
    counts = {}
    for name, size in (("cam.mp4", (48, 64)), ("cam-2.mp4", (96, 128))):
        with VideoReader(tmp_path / name) as reader:
            assert reader.size == size
            counts[size] = len(list(reader))
    sizes = [tuple(json.loads(line)["size"]) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert counts == {size: sizes.count(size) for size in set(sizes)}


def test_nobody_there(stub, tmp_path):
    """With no source that ever delivered, the run ends with what is wrong."""
    pipeline = VideoPipeline(
        stub(),
        ["cam=http://user:secret@127.0.0.1:1/x"],
        DetectOptions(patience=0.3, jsonl=tmp_path / "a.jsonl"),
    )
    with pytest.raises(DataError, match=r"cam \(http://127.0.0.1:1/x\): cannot be opened") as caught:
        pipeline.run()
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "a.jsonl").exists()


def test_an_iterator_that_hangs_is_noticed(stub, grey, until):
    hang = threading.Event()

    def frames():
        yield grey(0)
        hang.wait(120.0)

    pipeline = VideoPipeline(stub(), [Source(frames(), name="a", live=True)], DetectOptions(stall=0.2))
    figures = pipeline.figures.sources["a"]
    helper = threading.Thread(target=lambda: (until(lambda: figures.stalls), pipeline.stop(), hang.set()))
    helper.start()
    assert len(list(pipeline)) == 1
    helper.join()
    assert "a: nothing came for 0.2 s (after 1 frames)" in pipeline.summary().warnings


def test_the_age_of_a_live_source_faster_than_the_model(stub, camera):
    """No older than two inferences, its own and the one it waited for, however long these take.

    A reader that is held up on its way to the queue may hand on an older frame, now and then.
    """
    begun, results = [], []

    class Timed(stub):
        def batch(self, frames):
            begun.append(time.monotonic())
            return super().batch(frames)

    pipeline = VideoPipeline(Timed(cost=0.05), [f"cam={camera.url}"])
    run(pipeline, lambda result: results.append(result) or len(results) == 25)
    assert pipeline.summary().dropped > 12
    older = [result.captured < before for before, result in zip(begun, results[1:], strict=False)]
    assert np.mean(older) < 0.1


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_stream_that_is_left_leaves_no_connection(stub, camera, decoder, until):
    for _ in range(5):
        with VideoPipeline(stub(), [f"cam={camera.url}"], DetectOptions(decoder=decoder)) as pipeline:
            next(iter(pipeline))
    assert camera.connections == 5
