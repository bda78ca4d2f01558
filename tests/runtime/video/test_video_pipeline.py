"""What the pipeline promises, with a detector of fixed cost: order, bounds, errors, an orderly end."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import DataError, OutputError, SettingsError
from anchorline.runtime.video.options import DetectOptions, Filters
from anchorline.runtime.video.pipeline import VideoPipeline
from anchorline.runtime.video.reader import VideoReader
from anchorline.runtime.video.sinks import LatestFrame
from anchorline.runtime.video.source import Source


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbered(grey, count, first=0):
    for index in range(count):
        yield grey(first + index)


def endless(grey, pause=0.0):
    index = 0
    while True:
        yield grey(index)
        index += 1
        time.sleep(pause)


# Under `wait` nothing is lost and nothing is reordered


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_waiting_loses_and_reorders_nothing(stub, grey, workers, batch):
    class Uneven(stub):
        def batch(self, frames):
            time.sleep(0.004 * (len(self.batches) % 3))  # later batches overtake earlier ones
            return super().batch(frames)

    sources = [Source(numbered(grey, 50, s), name=f"s{s}") for s in range(3)]
    seen = {f"s{s}": [] for s in range(3)}
    with VideoPipeline(Uneven(), sources, DetectOptions(batch=batch, workers=workers)) as pipeline:
        for result in pipeline:
            seen[result.source].append(result.index)
            offset = int(result.source[1:])
            assert result.frame[0, 0, 0] == result.index + offset  # the frame belongs to the result
            assert result.detections.scores[0] == pytest.approx((result.index + offset) / 255)
    assert seen == {name: list(range(50)) for name in seen}
    assert pipeline.summary().dropped == 0


def test_frames_of_several_sources_share_a_batch(stub, grey):
    detector = stub(cost=0.002)
    sources = [Source((grey(i) for i in range(40)), name=f"s{s}") for s in range(4)]
    VideoPipeline(detector, sources, DetectOptions(max_wait=1.0)).run()
    assert sum(detector.batches) == 160
    assert max(detector.batches) == 4
    assert np.mean(detector.batches) > 3.5


def test_a_batch_waits_no_longer_than_it_may(stub, grey):
    """A source that delivers nothing more does not hold a quick one up."""
    all_answered = threading.Event()
    was_in_time = []

    def frames():
        yield grey(0)
        was_in_time.append(all_answered.wait(60.0))

    quick = Source((grey(i) for i in range(20)), name="quick")
    pipeline = VideoPipeline(stub(), [quick, Source(frames(), name="slow")], DetectOptions(max_wait=0.02))
    indices = []
    for result in pipeline:
        if result.source == "quick":
            indices.append(result.index)
            if len(indices) == 20:
                all_answered.set()
    assert indices == list(range(20))
    assert was_in_time == [True]


def test_the_batch_is_bounded_by_the_contract(stub, grey, contract):
    detector = stub()
    detector.contract = dataclasses.replace(contract, max_batch=2)
    sources = [Source((grey(i) for i in range(9)), name=f"s{s}") for s in range(3)]
    VideoPipeline(detector, sources, DetectOptions(max_wait=0.2)).run()
    assert max(detector.batches) == 2
    with pytest.raises(SettingsError, match="at most 2 frames at once"):
        VideoPipeline(detector, ["0"], DetectOptions(batch=3))


@pytest.mark.parametrize("canvas", [None, (96, 96)])
def test_frames_of_other_canvases_do_not_share_a_run(stub, contract, canvas):
    """What is found in a source must not depend on the padding that another one's frames ask for."""
    runs = []

    class Noting(stub):
        def batch(self, frames):
            runs.append([frame.shape[:2] for frame in frames])
            return super().batch(frames)

    detector = Noting()
    detector.contract = dataclasses.replace(contract, canvas=canvas)
    tall = (100, 40)  # on a canvas of 128 x 64 where that is free, the others on 64 x 64
    sizes = [(48, 64), tall, (64, 48), (60, 50), tall]
    sources = [Source([np.full((*size, 3), 9, np.uint8)] * 6, name=f"s{s}") for s, size in enumerate(sizes)]
    results = list(VideoPipeline(detector, sources, DetectOptions(batch=30, max_wait=60.0)))
    for source in sources:
        assert [each.index for each in results if each.source == source.name] == list(range(6))
    assert all(len(each.detections) and each.times["network"] > 0 for each in results)
    if canvas is None:
        assert sorted(map(len, runs)) == [12, 18]
        assert {*min(runs, key=len)} == {tall}
    else:
        assert list(map(len, runs)) == [30]


# Under `latest` the latency is bounded and the losses are counted


class Camera:
    """Frames on demand: ``deliver(5)`` returns when the pipeline has five more.

    It stands for a clock, so that a busy machine changes nothing.
    """

    def __init__(self, grey):
        self.grey, self.given, self.wanted, self.has_ended = grey, 0, 1, False
        self.changed, self.idle = threading.Condition(), threading.Event()

    def __iter__(self):
        while True:
            with self.changed:
                if self.given == self.wanted:
                    self.idle.set()  # whoever asks for a frame has handed the last one on
                self.changed.wait_for(lambda: self.has_ended or self.given < self.wanted)
                if self.has_ended:
                    return
                self.given += 1
            yield self.grey(self.given - 1)

    def deliver(self, count):
        with self.changed:
            self.wanted += count
            self.idle.clear()
            self.changed.notify()
        assert self.idle.wait(60.0)

    def end(self):
        with self.changed:
            self.has_ended = True
            self.changed.notify()

    def source(self):
        return Source(iter(self), name="cam", live=True)


def test_the_newest_frame_is_next_and_the_others_are_counted(stub, grey):
    """Five frames come while the model computes: it goes on with the fifth, and all are accounted for."""
    camera = Camera(grey)

    class Slow(stub):
        def batch(self, frames):
            if len(self.batches) < 20:
                camera.deliver(5)
            return super().batch(frames)

    pipeline = VideoPipeline(Slow(), [camera.source()])
    indices = []
    for result in pipeline:
        indices.append(result.index)
        if len(indices) == 21:
            camera.end()
    assert indices == list(range(0, 101, 5))
    found = pipeline.summary().sources["cam"]
    assert (found["frames_in"], found["frames"], found["dropped"]) == (101, 21, 80)


def test_a_consumer_slower_than_the_camera_gets_recent_frames(stub, grey):
    """What is under way is bounded: no queue of old frames builds up."""
    camera, behind = Camera(grey), []
    with VideoPipeline(stub(), [camera.source()]) as pipeline:
        for result in pipeline:
            camera.deliver(10)
            behind.append(camera.given - result.index)
            if len(behind) == 25:
                camera.end()
                break
    assert max(behind) <= 50  # of 250: three results and a frame may be under way, each ten frames older
    assert pipeline.summary().dropped > 150


def test_the_policy_can_be_chosen(stub, grey, tmp_path, video_frames, write_raw_video):
    """A live source that waits loses nothing; a file under `latest` is played at its own rate."""
    camera = Source((grey(i) for i in range(30)), name="cam", live=True, policy="wait")
    assert [r.index for r in VideoPipeline(stub(cost=0.002), [camera])] == list(range(30))
    video = write_raw_video(tmp_path / "a.mp4", video_frames, fps=40.0)
    start = time.monotonic()
    summary = VideoPipeline(stub(cost=0.06), [video], DetectOptions(policy="latest")).run()
    assert time.monotonic() - start > 11 / 40
    assert summary.dropped > 0
    assert summary.frames + summary.dropped == 12


# Errors reach the caller once, and everything ends


def broken_source(grey):
    yield grey(0)
    raise ZeroDivisionError("the source fails")


class BrokenSink:
    wants_drawing = False

    def __init__(self):
        self.ended = []

    def write(self, result):
        raise OSError("the sink fails")

    def close(self):
        self.ended.append("close")

    def abandon(self):
        self.ended.append("abandon")


def refuse(result):
    raise KeyError("the callback fails")


@pytest.mark.parametrize("where", ["source", "detector", "sink", "callback", "results"])
def test_an_exception_reaches_the_caller_once(stub, grey, tmp_path, where):
    frames = endless(grey)
    detector, sink = stub(), BrokenSink()
    options, outputs = DetectOptions(jsonl=tmp_path / "a.jsonl", save=tmp_path / "a.mp4"), {}
    expected = RuntimeError
    if where == "source":
        frames, expected = broken_source(grey), ZeroDivisionError
    elif where == "detector":
        detector = stub(fail_at=3)
    elif where == "sink":
        outputs["sinks"], expected = [sink], OSError
    elif where == "callback":
        outputs["callback"], expected = refuse, KeyError
    else:
        detector.batch = lambda frames: []
        expected = SettingsError
    pipeline = VideoPipeline(detector, [Source(frames, name="a")], options, **outputs)
    with pytest.raises(expected, match=r"fails|gave 0 results"):
        pipeline.run()
    pipeline.close()  # nothing is left to raise
    assert os.listdir(tmp_path) == []
    assert sink.ended == (["abandon"] if where == "sink" else [])


def test_an_exception_of_the_caller_s_own_ends_everything_and_finishes_the_files(stub, grey, tmp_path):
    def work():
        with VideoPipeline(
            stub(), [Source(endless(grey), name="a")], DetectOptions(jsonl=tmp_path / "a.jsonl")
        ) as pipeline:
            for _ in pipeline:
                raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        work()
    assert len(lines_of(tmp_path / "a.jsonl")) > 0
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("given", [None, 1, "ab", [1], (each for each in ())])
def test_a_detector_that_gives_no_detections(stub, grey, given, monkeypatch):
    monkeypatch.setattr(stub, "batch", lambda self, frames: given)
    with pytest.raises(
        SettingsError, match=r"^the detector's batch\(\) gave .*; expected a list of Detections"
    ):
        VideoPipeline(stub(), [Source([grey(0)], name="a")]).run()


def test_leaving_the_loop_finishes_the_files(stub, grey, tmp_path):
    with VideoPipeline(
        stub(),
        [Source(endless(grey), name="a")],
        DetectOptions(save=tmp_path / "a.mp4", jsonl=tmp_path / "a.jsonl"),
    ) as pipeline:
        for result in pipeline:
            if result.index == 20:
                break
    frames = [line["frame"] for line in lines_of(tmp_path / "a.jsonl")]
    assert frames == list(range(len(frames)))
    assert len(frames) > 20
    with VideoReader(tmp_path / "a.mp4") as reader:
        assert len(list(reader)) == len(frames)


def test_stopping_from_another_thread(stub, grey):
    pipeline = VideoPipeline(stub(), [Source(endless(grey), name="a")])
    threading.Timer(0.2, pipeline.stop).start()
    indices = [result.index for result in pipeline]
    assert indices == list(range(len(indices)))


def test_a_pipeline_runs_once(stub, grey):
    pipeline = VideoPipeline(stub(), [Source([grey(0)], name="a")])
    pipeline.run()
    with pytest.raises(SettingsError, match="has run already"):
        pipeline.run()
    with VideoPipeline(stub(), [Source([grey(0)], name="a")]):
        pass  # never started


def test_output_that_cannot_be_opened(stub, grey, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        VideoPipeline(
            stub(), [Source(endless(grey), name="a")], DetectOptions(jsonl=tmp_path / "file" / "a.jsonl")
        ).run()


PROGRAM = """
import sys, time
import numpy as np
from anchorline.runtime import Detections, DetectOptions, Source, VideoPipeline
class Stub:
    def batch(self, frames):
        time.sleep(0.005)
        print("a call", flush=True)
        return [Detections.empty() for _ in frames]
def frames():
    while True:
        yield np.zeros((48, 64, 3), np.uint8)
folder = sys.argv[1]
options = DetectOptions(save=folder + "/a.mp4", jsonl=folder + "/a.jsonl")
VideoPipeline(Stub(), [Source(frames(), name="a")], options).run()
"""


def start(program, folder):
    """The process, after twenty calls of its detector."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    for _ in range(20):
        assert process.stdout.readline() == b"a call\n"
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_finish_the_files(tmp_path, name):
    number = getattr(signal, name)
    process = start(PROGRAM, tmp_path)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + number)
    rows = lines_of(tmp_path / "a.jsonl")
    assert [row["frame"] for row in rows] == list(range(len(rows)))
    with VideoReader(tmp_path / "a.mp4") as reader:
        assert len(list(reader)) == len(rows) > 0
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.mp4"]


# Once the pipeline drains, a call of the detector takes until nobody waits for it any more.
HELD_UP = """
import threading
from anchorline.runtime import VideoPipeline
draining, given_up = threading.Event(), threading.Event()
class Watched(VideoPipeline):
    def stop(self):
        super().stop()
        draining.set()
        print("stopped", flush=True)
    def _abort(self):
        super()._abort()
        given_up.set()
""" + PROGRAM.replace("time.sleep(0.005)", "draining.is_set() and given_up.wait(100.0)").replace(
    "VideoPipeline(Stub()", "Watched(Stub()"
)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_second_ctrl_c_does_not_wait_for_what_was_read_but_finishes_the_files(tmp_path):
    process = start(HELD_UP, tmp_path)
    process.send_signal(signal.SIGINT)
    while (line := process.stdout.readline()) != b"stopped\n":
        assert line == b"a call\n"
    process.send_signal(signal.SIGINT)
    after, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    # The call under way, and one that may have begun as the signal came; four frames were waiting.
    assert after in (b"", b"a call\n", b"a call\n" * 2)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.mp4"]
    with VideoReader(tmp_path / "a.mp4") as reader:
        assert len(list(reader)) == len(lines_of(tmp_path / "a.jsonl")) > 0


def test_the_detector_called_by_several_threads_gives_what_it_gives_alone(model_path):
    pytest.importorskip("onnxruntime")
    generator = np.random.default_rng(0)
    frames = [generator.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(40)]
    with Detector(model_path, threads=1) as detector:
        expected = [detector(frame).scores for frame in frames]
        pipeline = VideoPipeline(detector, [Source(frames, name="a")], DetectOptions(workers=3))
        found = [result.detections.scores for result in pipeline]
    np.testing.assert_allclose(found, expected, atol=1e-6)


# Sinks, filters, figures


def test_the_callback_and_the_latest_frame(stub, grey):
    latest, called = LatestFrame(), []
    assert latest.get() is None
    assert latest.annotated() is None
    source = Source((grey(i) for i in range(10)), name="a")
    VideoPipeline(stub(), [source], sinks=[latest], callback=lambda result: called.append(result.index)).run()
    assert called == list(range(10))
    assert latest.get("a").index == latest.get().index == 9
    assert latest.annotated("a").shape == (48, 64, 3)
    assert latest.get("b") is None


def test_filters_and_stride_reach_the_results(stub, grey):
    frames = (grey(i * 20) for i in range(12))
    source = Source(frames, name="a", stride=3)
    results = list(VideoPipeline(stub(), [source], DetectOptions(filters=Filters(min_scores={"": 0.5}))))
    assert [r.index for r in results] == [0, 3, 6, 9]
    assert [len(r.detections) for r in results] == [0, 0, 0, 1]


def test_a_class_that_the_model_does_not_know(stub, contract):
    detector = stub()
    detector.contract = contract
    with pytest.raises(SettingsError, match="knows no class 'cat'; it knows whole, quarter"):
        VideoPipeline(detector, ["0"], DetectOptions(filters=Filters(classes=("cat",))))


def test_the_figures_of_each_source(stub, grey, tmp_path):
    sources = [Source((grey(i) for i in range(n)), name=name) for name, n in (("a", 20), ("b", 10))]
    pipeline = VideoPipeline(stub(cost=0.002), sources, DetectOptions(jsonl=tmp_path / "a.jsonl"))
    for result in pipeline:
        assert {"decode", "network", "write"} <= set(result.times)
        assert 0 < result.age < 60
    plain = json.loads(json.dumps(pipeline.summary().to_json()))
    assert plain["frames"] == 30
    assert plain["age"]["p50"] >= 2.0  # milliseconds: the detector's own cost
    assert {name: each["frames"] for name, each in plain["sources"].items()} == {"a": 20, "b": 10}
    for each in plain["sources"].values():
        assert each["stages"]["network"]["p50"] >= 2.0
        assert each["age"]["p99"] >= each["age"]["p50"]
        assert each["fps_in"] > 0
        assert each["fps_out"] > 0
        assert (each["dropped"], each["reconnects"], each["stalls"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"max_wait": -1}, "max_wait is -1"),
        ({"max_wait": float("nan")}, "max_wait is nan"),
        ({"workers": 0}, "workers is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"stall": 0}, "stall is 0"),
        ({"policy": "newest"}, "policy is 'newest'"),
        ({"decoder": "gstreamer"}, "decoder is 'gstreamer'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(SettingsError, match=message):
        DetectOptions(**options)


def test_nothing_readable_is_the_source_s_error(stub, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        VideoPipeline(stub(), [tmp_path / "none.mp4"])
    (tmp_path / "a.mp4").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"a\.mp4"):
        VideoPipeline(stub(), [tmp_path / "a.mp4"], DetectOptions(jsonl=tmp_path / "a.jsonl")).run()
    assert os.listdir(tmp_path) == ["a.mp4"]
