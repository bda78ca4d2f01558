"""Requests of several callers at once: joined, refused, late, given up, failed; and the end of the server."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading

import pytest

from anchorline.runtime.io.errors import GpuError


@pytest.fixture
def calling(ask):
    """``calling(server, path, bodies)``: threads that ask, and the list in which their answers will stand."""
    threads: list[threading.Thread] = []

    def begin(server, bodies, path="/detect"):
        answers: list[tuple[int, bytes] | None] = [None] * len(bodies)

        def call(number):
            code, _, body = ask(server, path, bodies[number])
            answers[number] = code, json.loads(body)

        begun = [threading.Thread(target=call, args=(number,)) for number in range(len(bodies))]
        threads.extend(begun)
        for each in begun:
            each.start()
        return answers

    yield begin
    for each in threads:
        each.join(60)
        assert not each.is_alive()


def batcher(server):
    return server.models["model"].batcher


def scores(answers):
    return [round(answer[1]["detections"][0]["score"] * 255) for answer in answers]


def test_frames_that_wait_are_joined_and_each_gets_its_own(serving, scripted, calling, png, until):
    detector = scripted()
    detector.free.clear()
    with serving(detector, batch=4) as server:
        first = calling(server, [png(10)])
        assert detector.entered.wait(60)
        others = calling(server, [png(level) for level in range(20, 29)])
        until(lambda: batcher(server).waiting == 9)
        detector.free.set()
        until(lambda: all((*first, *others)))
    assert [len(each) for each in detector.batches] == [1, 4, 4, 1]
    assert scores(first) == [10]
    assert scores(others) == list(range(20, 29))


def test_a_frame_waits_for_others_no_longer_than_it_may(serving, scripted, calling, png, until):
    with serving(scripted(), batch=100, max_wait=0.2) as server:
        answers = calling(server, [png(10), png(20)])
        until(lambda: all(answers))
    assert scores(answers) == [10, 20]


def test_only_frames_of_one_canvas_are_joined(serving, scripted, calling, png, until):
    detector = scripted()
    detector.free.clear()
    sizes = [(24, 32), (40, 32), (30, 31), (33, 64), (24, 33), (32, 32)]
    with serving(detector) as server:
        first = calling(server, [png(1)])
        assert detector.entered.wait(60)
        answers = calling(server, [png(10 * number, *size) for number, size in enumerate(sizes)])
        until(lambda: batcher(server).waiting == len(sizes))
        detector.free.set()
        until(lambda: all((*first, *answers)))
    for batch in detector.batches:
        assert len({(-(-height // 32), -(-width // 32)) for height, width in batch}) == 1
    assert sorted(map(len, detector.batches)) == [1, 1, 1, 1, 3]
    assert [tuple(answer[1]["size"]) for answer in answers] == sizes


def test_no_batch_is_larger_than_the_model_takes(serving, scripted, calling, png, until):
    detector = scripted(max_batch=2)
    detector.free.clear()
    with serving(detector, batch=8) as server:
        first = calling(server, [png(1)])
        assert detector.entered.wait(60)
        answers = calling(server, [png(level) for level in range(5)])
        until(lambda: batcher(server).waiting == 5)
        detector.free.set()
        until(lambda: all((*first, *answers)))
    assert [len(each) for each in detector.batches] == [1, 2, 2, 1]


def test_a_full_queue_is_503_at_once(serving, scripted, calling, ask, png, until):
    detector = scripted()
    detector.free.clear()
    with serving(detector, queue=3) as server:
        answers = calling(server, [png(level) for level in (1, 2, 3)])
        until(lambda: batcher(server).in_hand == 3)
        code, headers, body = ask(server, "/detect", png(4))  # while nothing else goes on
        assert code == 503
        assert headers["retry-after"] == "1"
        assert json.loads(body) == {"error": "model has 3 requests in hand; try again later"}
        detector.free.set()
        until(lambda: all(answers))
        assert ask(server, "/detect", png(4))[0] == 200
    assert [answer[0] for answer in answers] == [200] * 3
    assert sum(map(len, detector.batches)) == 4


def test_a_late_answer_is_504_and_costs_no_run(serving, scripted, calling, ask, png, until):
    detector = scripted()
    detector.free.clear()
    with serving(detector, deadline=60.0) as server:
        first = calling(server, [png(1)])
        assert detector.entered.wait(60)
        assert ask(server, "/detect?timeout=0.05", png(2))[0] == 504
        assert batcher(server).waiting == 0
        detector.free.set()
        until(lambda: all(first))
        assert batcher(server).figures.late == 1
    assert len(detector.batches) == 1


def test_who_leaves_costs_no_run(serving, scripted, calling, png, until):
    detector = scripted()
    detector.free.clear()
    with serving(detector) as server:
        first = calling(server, [png(1)])
        assert detector.entered.wait(60)
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", server.address.port, timeout=60)
            with contextlib.closing(connection):
                connection.request("POST", "/detect", png(2))
                until(lambda: batcher(server).waiting == 1)
            until(lambda: batcher(server).waiting == 0)
        until(lambda: batcher(server).in_hand == 1)
        detector.free.set()
        until(lambda: all(first))
        assert batcher(server).figures.gone == 3
    assert len(detector.batches) == 1


def test_a_frame_that_fails_does_not_fail_its_neighbours(serving, scripted, calling, png, until, caplog):
    detector = scripted()
    detector.poison = {2: RuntimeError("this one\nis bad")}
    detector.free.clear()
    with serving(detector) as server:
        first = calling(server, [png(9)])
        assert detector.entered.wait(60)
        answers = calling(server, [png(level) for level in (1, 2, 3)])
        until(lambda: batcher(server).waiting == 3)
        detector.free.set()
        until(lambda: all((*first, *answers)))
        assert batcher(server).failure is None
    assert [answer[0] for answer in answers] == [200, 500, 200]
    assert answers[1][1] == {"error": "model could not answer: this one is bad"}


def test_a_lost_gpu_is_told_by_the_probes(serving, scripted, ask, png):
    lost = GpuError("the GPU is lost")
    lost.sticky = True
    detector = scripted()
    detector.poison = {2: lost}
    with serving({"one": detector, "other": scripted()}) as server:
        assert ask(server, "/v2/health/ready")[0] == 200
        assert ask(server, "/detect/one", png(2))[0] == 500
        code, _, body = ask(server, "/v2/health/ready")
        assert code == 503
        assert json.loads(body) == {"ready": False, "problems": {"one": "the GPU is lost"}}
        assert ask(server, "/v2/models/one/ready")[0] == 503
        assert ask(server, "/v2/models/other/ready")[0] == 200
        assert ask(server, "/v2/health/live")[0] == 200


def test_the_end_waits_for_what_is_there(serving, scripted, calling, png, until):
    detector = scripted()
    detector.free.clear()
    with serving(detector) as server:
        answers = calling(server, [png(1), png(2)])
        assert detector.entered.wait(60)
        until(lambda: batcher(server).in_hand == 2)
        server.stop()
        until(
            lambda: server._server.servers and not any(each.is_serving() for each in server._server.servers)
        )
        detector.free.set()
        until(lambda: all(answers))
    assert [answer[0] for answer in answers] == [200, 200]
