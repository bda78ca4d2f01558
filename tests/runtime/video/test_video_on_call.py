"""What goes wrong in weeks: errors as the loop is left, silent sources, figures that must be true."""

from __future__ import annotations

import gc
import logging
import threading
import time

import numpy as np
import pytest

from anchorline.runtime.io.errors import OutputError, SettingsError
from anchorline.runtime.video import intake
from anchorline.runtime.video import pipeline as video_pipeline
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import VideoPipeline
from anchorline.runtime.video.source import Source


def endless(grey, pause=0.0):
    index = 0
    while True:
        yield grey(index)
        index += 1
        time.sleep(pause)


# Leaving


class UnfinishedSink:
    """Its files cannot be completed, as on a disk that is full at the very end."""

    wants_drawing = False

    def write(self, result):
        pass

    def close(self):
        raise OutputError("no space for the index")

    def abandon(self):
        pass


def leave_after_three(pipeline, before=lambda: None):
    with pipeline:
        for result in pipeline:
            if result.index == 3:
                before()
                break


def test_files_that_cannot_be_completed_after_a_break_are_an_error_of_the_block(stub, grey):
    """Python swallows what a generator raises while it is dropped."""
    pipeline = VideoPipeline(stub(), [Source(endless(grey), name="a")], sinks=[UnfinishedSink()])
    with pytest.raises(OutputError, match="no space for the index"):
        leave_after_three(pipeline)
    pipeline.close()  # once


def test_a_detector_that_fails_on_what_was_read_before_a_break_is_an_error_of_the_block(stub, grey):
    class FailsLater(stub):
        def batch(self, frames):
            if frames[0].flat[0] > 3:
                called.set()
                left.wait(60.0)
                raise RuntimeError("the stub fails")
            return super().batch(frames)

    called, left = threading.Event(), threading.Event()
    pipeline = VideoPipeline(FailsLater(), [Source(endless(grey), name="a")])

    def stop():
        VideoPipeline.stop(pipeline)
        left.set()  # while the pipeline drains

    pipeline.stop = stop

    def before():
        assert called.wait(60.0)

    with pytest.raises(RuntimeError, match="the stub fails"):
        leave_after_three(pipeline, before)


def test_an_iteration_may_be_dropped_by_another_thread(stub, grey):
    """The garbage collector runs wherever it likes; signals belong to the main thread."""
    results = iter(VideoPipeline(stub(), [Source(endless(grey), name="a")]))
    next(results)
    raised = []

    def drop():
        try:
            results.close()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join(60.0)
    gc.collect()
    assert raised == []


def test_closing_while_the_reader_is_blocked(stub, grey, monkeypatch):
    """A driver that hangs is left to itself."""
    monkeypatch.setattr(video_pipeline, "_JOIN_SECONDS", 0.2)
    hang, is_over = threading.Event(), []

    def frames():
        yield grey(0)
        hang.wait(120.0)
        is_over.append(True)

    with VideoPipeline(stub(), [Source(frames(), name="a", live=True)]) as pipeline:
        next(iter(pipeline))
    assert is_over == []
    hang.set()


# The watch over silent sources


def test_a_source_that_never_delivers_anything_is_noticed(stub, until):
    hang = threading.Event()

    def frames():
        hang.wait(120.0)
        yield from ()

    pipeline = VideoPipeline(stub(), [Source(frames(), name="a", live=True)], DetectOptions(stall=0.2))
    figures = pipeline.figures.sources["a"]
    helper = threading.Thread(target=lambda: (until(lambda: figures.stalls), pipeline.stop(), hang.set()))
    helper.start()
    assert list(pipeline) == []
    helper.join()
    assert "a: nothing came for 0.2 s (after 0 frames)" in pipeline.summary().warnings


def test_a_slow_consumer_is_no_stall_of_the_source(stub, grey):
    camera = Source(endless(grey), name="a", live=True, policy="wait")
    with VideoPipeline(stub(), [camera], DetectOptions(stall=0.5)) as pipeline:
        for result in pipeline:
            if result.index == 2:
                time.sleep(1.2)  # the reader is held up by a full queue
            if result.index == 12:
                break
    assert pipeline.summary().sources["a"]["stalls"] == 0


def test_losses_are_logged_as_they_happen(stub, camera, monkeypatch, caplog):
    monkeypatch.setattr(intake, "FIRST_PAUSE", 0.05)
    with caplog.at_level(logging.WARNING, "anchorline.video"):
        pipeline = VideoPipeline(stub(), [f"door={camera.url}"])
        figures = pipeline.figures.sources["door"]
        timer = threading.Timer(120.0, pipeline.stop)
        timer.start()
        for result in pipeline:
            if result.index == 3:
                camera.mode = "die"
            if figures.reconnects:
                break
        timer.cancel()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("door: broke off (after ")
    assert lines[1] == "door: is back"


# Fairness and figures


def test_a_quick_source_does_not_starve_the_others(stub, grey, until):
    """One batch at a time, and always of one frame: the turn goes round among those that have one."""

    class Patient(stub):
        def batch(self, frames):
            until(lambda: all(queue.frames or queue.ended for queue in pipeline._intake.queues))
            return super().batch(frames)

    quick = Source(endless(grey), name="quick", live=True)
    slow = [Source((grey(i) for i in range(20)), name=f"s{s}") for s in range(2)]
    order = []
    pipeline = VideoPipeline(Patient(), [quick, *slow], DetectOptions(batch=1))
    with pipeline:
        for result in pipeline:
            order.append(result.source)
            if order.count("s0") == order.count("s1") == 20:
                break
    assert 15 < order.count("quick") < 25


def test_the_figures_against_an_independent_count(stub, grey):
    """A camera that is three times as fast as the model, counted and timed from outside."""
    given, network, received = [], [], []

    def frames():
        while len(received) < 80:
            time.sleep(0.007)
            given.append(time.monotonic())
            yield grey(len(given))

    class Timed(stub):
        def batch(self, frames):
            start = time.perf_counter()
            found = super().batch(frames)
            network.append(time.perf_counter() - start)
            return found

    with VideoPipeline(Timed(cost=0.02), [Source(frames(), name="cam", live=True)]) as pipeline:
        for result in pipeline:
            received.append((time.monotonic(), result))
            assert result.age <= received[-1][0] - result.captured
    found = pipeline.summary().sources["cam"]
    assert found["frames_in"] == len(given)
    assert found["frames"] == len(network) == len(received) >= 80
    assert found["frames_in"] == found["frames"] + found["dropped"]
    answered = [result.index for _, result in received]
    assert found["dropped"] >= answered[-1] + 1 - len(answered) > 40
    for percent in (50, 95, 99):  # a busy machine may hold the pipeline up beside the call itself
        own, whole = (
            1000 * np.percentile(each, percent) for each in (network, [result.age for _, result in received])
        )
        assert own <= found["stages"]["network"][f"p{percent}"] <= whole
    assert found["stages"]["network"]["p50"] == pytest.approx(1000 * np.percentile(network, 50), abs=5.0)
    stamps = [at for at, _ in received]
    assert found["fps_out"] == pytest.approx((len(stamps) - 1) / (stamps[-1] - stamps[0]), rel=0.1)
    assert found["fps_in"] == pytest.approx((len(given) - 1) / (given[-1] - given[0]), rel=0.1)


def test_the_ages_of_the_summary_are_those_of_the_results(stub, grey):
    pipeline = VideoPipeline(stub(cost=0.005), [Source((grey(i) for i in range(50)), name="a")])
    ages = [1000 * result.age for result in pipeline]
    expected = {f"p{p}": np.percentile(ages, p) for p in (50, 95, 99)}
    assert pipeline.summary().age == pytest.approx(expected, rel=1e-6)
    assert pipeline.summary().sources["a"]["age"] == pytest.approx(expected, rel=1e-6)
    assert min(ages) >= 5.0


def test_a_callback_and_a_sink_know_the_age_so_far(stub, grey):
    ages = []
    source = Source([grey(i) for i in range(5)], name="a")
    for result in VideoPipeline(stub(cost=0.01), [source], callback=lambda each: ages.append(each.age)):
        assert 0.01 <= ages[result.index] <= result.age


def test_times_of_a_live_source_only_rise(stub, grey):
    results = list(
        VideoPipeline(stub(), [Source((grey(i) for i in range(200)), name="a", live=True, policy="wait")])
    )
    times = [result.time_s for result in results]
    assert times[0] == 0.0
    assert times == sorted(times)


@pytest.mark.parametrize("score", [-0.1, 1.5, float("nan"), True, "x"])
def test_a_shown_score_that_cannot_be(stub, score):
    with pytest.raises(SettingsError, match="shown_score is"):
        VideoPipeline(stub(), ["0"], DetectOptions(shown_score=score))
