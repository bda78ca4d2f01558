"""Many viewers, slow viewers, viewers that go: nothing of it reaches the pipeline."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import threading
import time

import cv2
import numpy as np
import pytest

from anchorline.runtime.video.frames import Result, Stream
from anchorline.serving import application, painting
from anchorline.serving.painting import Painter


@contextlib.contextmanager
def dialled(port, *lines):
    """A raw connection that has asked for something and reads nothing."""
    with socket.socket() as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        opened.settimeout(60.0)
        opened.connect(("127.0.0.1", port))
        opened.sendall("".join(f"{line}\r\n" for line in lines).encode())
        yield opened


ASKING = ("GET /feed HTTP/1.1", "Host: localhost", "")


def answered(run):
    return run.pipeline.figures.frames()


def test_a_slow_reader_is_dropped_and_holds_nobody_up(live_run, read_pictures, until, monkeypatch):
    monkeypatch.setattr(application, "PATIENCE", 0.5)
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)  # large as a JPEG
    with live_run() as run:
        run.view.write = _noisy(run.view.write, noise)
        with dialled(run.port, *ASKING) as slow, run.opened("/stream/0") as answer:
            until(lambda: len(run.live.viewers) == 2)
            before, read = answered(run), read_pictures(answer)
            end = time.monotonic() + 60.0
            while run.live.dropped == 0:
                next(read)  # the other one goes on
                assert time.monotonic() < end
            assert answered(run) > before + 10
            until(lambda: len(run.live.viewers) == 1)
            with contextlib.suppress(ConnectionError):
                while slow.recv(65536):
                    pass
            assert b"anchorline_viewers_dropped_total 1.0" in run.ask("/metrics")[2]
            next(read)


def _noisy(write, noise):
    """``write`` with frames that make large JPEGs, and columns of three grey levels that tell their index."""

    def written(result):
        frame = noise.copy()
        for column, place in zip((520, 560, 600), (256, 16, 1), strict=True):
            frame[:, column : column + 40] = 16 * (result.index // place % 16) + 8
        write(Result(frame, result.detections, result.stream, result.index, result.time_s, result.captured))

    return written


def _index_of(picture):
    digits = (int(picture[:, column + 10 : column + 30].mean()) // 16 for column in (520, 560, 600))
    return sum(digit * place for digit, place in zip(digits, (256, 16, 1), strict=True))


def test_the_newest_frame_wins_for_who_reads_late(live_run, read_pictures, until, monkeypatch):
    """A viewer that pauses goes on with what is new, but for the little that was under way already."""
    painted, paint = [], Painter._paint
    monkeypatch.setattr(painting, "_MOST_FPS", 1000.0)
    monkeypatch.setattr(
        Painter, "_paint", lambda self, result: painted.append(result.index) or paint(self, result)
    )
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    with live_run() as run:
        run.view.write = _noisy(run.view.write, noise)
        with run.opened("/stream/0") as answer:
            read = read_pictures(answer)
            next(read)
            until(lambda: len(painted) > 60)
            last = painted[-1]
            seen = []
            while not seen or seen[-1] < last:
                seen.append(_index_of(next(read)))
    assert seen == sorted(set(seen))
    skipped = [sum(before < each < after for each in painted) for before, after in itertools.pairwise(seen)]
    assert max(skipped) > 15, seen


def test_nothing_is_drawn_where_nobody_looks(run, until):
    until(lambda: answered(run) > 30)
    assert run.live.painter.count == 0
    with run.opened("/feed"):
        until(lambda: run.live.painter.count > 2)
    until(lambda: len(run.live.viewers) == 0)

    def rests():
        count, before = run.live.painter.count, answered(run)
        until(lambda: answered(run) > before + 20)
        return run.live.painter.count == count

    until(rests)  # one picture may have been under way
    assert rests()
    assert run.live.painter.pictures == {}  # or the next viewer would first see an old picture


def test_a_frame_is_encoded_once_for_all(run, monkeypatch, until):
    encoded = []
    encode = cv2.imencode
    monkeypatch.setattr(painting.cv2, "imencode", lambda *words: encoded.append(1) or encode(*words))
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(run.opened("/feed"))
        until(lambda: run.status()["viewers"] == 8)
        until(lambda: run.live.painter.count > 10)
    assert len(encoded) <= run.live.painter.count + 1
    assert len(encoded) <= answered(run) + 1


def test_there_is_an_end_to_the_number_of_viewers(run, monkeypatch, until):
    monkeypatch.setattr(application, "MOST_VIEWERS", 2)
    with run.opened("/feed"), run.opened("/stream/0"):
        until(lambda: len(run.live.viewers) == 2)
        code, headers, _ = run.ask("/feed")
        assert code == 503
        assert headers["retry-after"] == "10"
        assert run.ask("/status")[0] == 200
    until(lambda: len(run.live.viewers) == 0)
    with run.opened("/feed"):
        pass


def test_it_ends_at_once_with_viewers_connected(live_run, until, monkeypatch):
    """However patient it would be with them otherwise."""
    monkeypatch.setattr(application, "PATIENCE", 600.0)
    with live_run() as run, contextlib.ExitStack() as stack:
        answers = [stack.enter_context(run.opened("/feed")) for _ in range(3)]
        with dialled(run.port, *ASKING):
            until(lambda: len(run.live.viewers) == 4)
            begun = time.monotonic()
            run.view.__exit__(None, None, None)
            assert time.monotonic() - begun < 60.0
            for answer in answers:
                with contextlib.suppress(Exception):
                    answer.read()
        before = answered(run)
        until(lambda: answered(run) > before)  # the run goes on without its viewers


def test_a_viewer_that_breaks_off_is_forgotten(run, until):
    for _ in range(5):
        with dialled(run.port, *ASKING) as opened:
            opened.recv(100)
    until(lambda: len(run.live.viewers) == 0)
    until(lambda: not any(run.live.painter._watched.values()))


@pytest.fixture
def painter():
    """A painter that runs, with one viewer of the source ``a``; ``came`` tells of new pictures."""
    came = threading.Event()
    found = Painter(came.set)
    found.came = came
    found.start()
    found.watch("a")
    yield found
    found.stop()


def decoded(jpeg):
    return cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)


@pytest.fixture
def held_up(monkeypatch):
    """Paints nothing until ``free``; ``begun`` tells that it has something to paint."""

    class HeldUp:
        begun, free = threading.Event(), threading.Event()

    paint = Painter._paint

    def wait(self, result):
        HeldUp.begun.set()
        assert HeldUp.free.wait(60.0)
        return paint(self, result)

    monkeypatch.setattr(Painter, "_paint", wait)
    return HeldUp


def test_of_many_results_the_newest_is_painted(painter, grey_result, held_up, until):
    painter.offer(grey_result("a", level=0))
    assert held_up.begun.wait(60.0)
    for level in range(1, 251):
        painter.offer(grey_result("a", level=level))
    held_up.free.set()
    until(lambda: painter.count == 2)
    assert abs(float(np.median(decoded(painter.pictures["a"]))) - 250) < 10


def test_large_frames_are_made_smaller_and_their_boxes_with_them(painter, grey_result, is_drawn):
    result = grey_result("a", (1440, 1920))
    big = result.detections
    result.detections = type(big)(big.boxes * 12, big.scores, big.labels, big.class_names)
    painter.offer(result)
    assert painter.came.wait(60.0)
    shown = decoded(painter.pictures["a"])
    assert shown.shape == (960, 1280, 3)
    small = cv2.resize(shown, (160, 120), interpolation=cv2.INTER_AREA)
    assert is_drawn(small, "cat")
    assert is_drawn(small, "dog")


def test_a_picture_that_was_drawn_for_a_file_is_not_drawn_again(painter, grey_result, monkeypatch):
    monkeypatch.setattr(painting, "draw", lambda *words, **options: pytest.fail("drawn"))
    result = grey_result("a")
    result.annotated = np.full((120, 160, 3), 200, np.uint8)
    painter.offer(result)
    assert painter.came.wait(60.0)
    assert decoded(painter.pictures["a"]).min() > 190


def test_a_source_that_cannot_be_drawn_is_told_of_once(painter, grey_result, caplog, until):
    bad = grey_result("a")
    bad.frame = np.zeros((0, 0, 3), np.uint8)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            painter.offer(bad)
            until(lambda: "a" not in painter._fresh)
        painter.offer(grey_result("a"))
        assert painter.came.wait(60.0)
    assert [record.getMessage() for record in caplog.records] == ["a: its frames cannot be shown"]


def test_sources_take_turns(painter, grey_result, monkeypatch):
    """Both have something new all the time."""
    order, results = [], [grey_result("a"), grey_result("b")]

    def paint(self, result):
        order.append(result.source)
        for each in results:
            painter.offer(each)
        return b""

    monkeypatch.setattr(Painter, "_paint", paint)
    painter.watch("b")
    painter.offer(results[0])
    while len(order) < 12:
        assert painter.came.wait(60.0)
        painter.came.clear()
    assert order[:12] == ["a", "b"] * 6


def test_results_are_laid_down_at_once(painter, grey_result, held_up):
    """However long the drawing takes."""
    result = grey_result("a")
    painter.offer(result)
    assert held_up.begun.wait(60.0)
    for _ in range(1000):
        painter.offer(result)
    assert painter.count == 0
    held_up.free.set()
    assert isinstance(result.stream, Stream)
