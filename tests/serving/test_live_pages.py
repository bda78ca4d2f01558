"""What viewers are sent: the page, moving pictures, changing numbers, one choice of what is shown."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import re
import time

import cv2
import numpy as np
import pytest

from anchorline.runtime.drawing import draw
from anchorline.runtime.io.errors import SettingsError
from anchorline.serving import application, live_state
from anchorline.serving.access import content_policy
from anchorline.serving.application import read_page


def test_the_page_needs_nothing_from_elsewhere(common_run):
    code, headers, body = common_run.ask("/")
    html = body.decode()
    assert code == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert "Anchorline live" in html
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:)|https?://|@import|url\(", html)
    assert 'name="viewport"' in html


def test_only_the_page_s_own_script_and_style_may_run():
    html = read_page()
    policy = content_policy(html)
    for kind in ("style", "script"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"\s(?:style|on\w+)=", html)  # such attributes would need 'unsafe-inline'


@pytest.mark.parametrize("path", ["/", "/status", "/metrics", "/healthz", "/nothing", "/stream/9"])
def test_every_answer_is_strict(common_run, path):
    headers = common_run.ask(path)[1]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "server" not in headers


@pytest.mark.parametrize("path", ["/stream/cam1", "/stream/0"])
def test_the_stream_moves(common_run, read_pictures, path):
    with common_run.opened(path) as answer:
        assert answer.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=frame"
        seen = list(itertools.islice(read_pictures(answer), 4))
    assert all(picture.shape == (120, 160, 3) for picture in seen)
    for before, after in itertools.pairwise(seen):
        assert np.abs(after[105:].astype(int) - before[105:]).max() > 100  # the bar


def test_opencv_reads_the_stream(common_run):
    capture = cv2.VideoCapture(f"http://127.0.0.1:{common_run.port}/stream/cam1", cv2.CAP_FFMPEG)
    read = [capture.read() for _ in range(3)]
    capture.release()
    assert all(came and frame.shape == (120, 160, 3) for came, frame in read)


def test_one_connection_carries_all_sources_and_the_status(live_run, read_records, monkeypatch):
    monkeypatch.setattr(application, "_TICK", 0.3)
    monkeypatch.setattr(live_state, "_KEPT", 0.2)
    with live_run(("a", "b")) as run, run.opened("/feed") as answer:
        places, statuses = set(), []
        for place, content in read_records(answer):
            if place == 0xFFFFFFFF:
                statuses.append(json.loads(content))
            else:
                places.add(place)
                assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) is not None
            assert len(statuses) < 200
            # The rates are those of a whole second.
            if places == {0, 1} and len(statuses) >= 3 and statuses[-1]["sources"][0]["fps"] > 0:
                break
    assert [source["name"] for source in statuses[0]["sources"]] == ["a", "b"]
    assert statuses[-1]["sources"][0]["frames"] > statuses[0]["sources"][0]["frames"]
    assert set(statuses[-1]["sources"][0]["age"]) == {"p50", "p95", "p99"}
    assert {each["name"] for each in statuses[-1]["classes"]} == {"cat", "dog"}


def test_who_comes_before_the_run_sees_it_begin(live_run, read_records):
    with live_run(begins=False) as run, run.opened("/feed") as answer:
        read = read_records(answer)
        assert json.loads(next(read)[1])["sources"] == []
        assert run.health() == (503, {"pipeline": "the model is being loaded"})
        run.begin()
        assert any(place == 0 for place, _ in itertools.islice(read, 50))


def test_a_run_has_to_be_known_and_is_one(live_run, grey_result):
    with live_run(begins=False) as run:
        with pytest.raises(SettingsError, match=r"call view\.watch\(pipeline\) first"):
            run.view.write(grey_result("cam1"))
        run.begin()
        with pytest.raises(SettingsError, match="another LiveView"):
            run.view.watch(run.pipeline)


@pytest.mark.parametrize("path", ["/feed", "/stream/0"])
def test_a_head_request_ends(common_run, path):
    code, headers, body = common_run.ask(path, "HEAD")
    assert (code, body) == (200, b"")
    assert "content-type" in headers
    assert not any(common_run.live.painter._watched.values())


def test_the_controls_change_what_is_drawn_and_nothing_that_is_kept(live_run, read_pictures, is_drawn, until):
    class Kept:
        wants_drawing = True
        results: list = []  # noqa: RUF012 - one test's

        def write(self, result):
            self.results[:] = [result]

        def close(self):
            pass

        abandon = close

    with live_run(sinks=[Kept()]) as run, run.opened("/stream/0") as answer:
        read = read_pictures(answer)
        first = next(read)
        assert is_drawn(first, "cat")
        assert is_drawn(first, "dog")
        assert run.ask("/controls", "POST", {"min_score": 0.7})[0] == 200
        assert any(is_drawn(each, "cat") and not is_drawn(each, "dog") for each in itertools.islice(read, 30))
        assert run.ask("/controls", "POST", {"min_score": 0.5, "hidden": ["cat"]})[0] == 200
        assert any(is_drawn(each, "dog") and not is_drawn(each, "cat") for each in itertools.islice(read, 30))
        kept = Kept.results[0]
        np.testing.assert_array_equal(kept.annotated, draw(kept.frame, kept.detections))
        assert len(kept.detections) == 2


def test_the_controls_act_on_a_still_picture(run, read_pictures, is_drawn, until):
    """No frame comes any more, and the picture changes all the same."""
    with run.opened("/stream/0") as answer:
        read = read_pictures(answer)
        next(read)
        run.cameras["cam1"].playing.clear()
        time.sleep(0.3)
        run.ask("/controls", "POST", {"hidden": ["cat", "dog"]})
        assert any(not is_drawn(each, "cat") for each in itertools.islice(read, 30))


def test_two_viewers_see_the_same(run, read_records):
    def take(answer):
        found, shown = {}, None
        for number, (place, content) in enumerate(read_records(answer)):
            if place == 0xFFFFFFFF:
                shown = json.loads(content)["controls"]
            else:
                found[content] = number
            if len(found) >= 25 and shown and shown["min_score"] == 0.8:
                return found, shown
        raise AssertionError("ended")

    with run.opened("/feed") as first, run.opened("/feed") as second:
        run.ask("/controls", "POST", {"min_score": 0.8, "hidden": ["dog"]})
        (pictures, controls), (others, same) = take(first), take(second)
    assert controls == same
    assert controls["hidden"] == ["dog"]
    common = [jpeg for jpeg in pictures if jpeg in others]
    assert len(common) >= 5  # the same bytes, in the same order
    assert sorted(common, key=pictures.__getitem__) == sorted(common, key=others.__getitem__)


def test_a_score_below_the_model_s_becomes_the_model_s(live_run):
    from anchorline.runtime.video.options import Filters

    with live_run(filters=Filters(min_scores={"": 0.3})) as run:
        answer = json.loads(run.ask("/controls", "POST", {"min_score": 0.1})[2])
        assert answer["min_score"] == answer["lowest_score"] == 0.3


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"{}", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"min_score": NaN}',
        b'{"min_score": 1e999}', b'{"min_score": -0.1}', b'{"min_score": "0.5"}', b'{"min_score": true}',
        b'{"min_score": 1' + b"0" * 5000 + b"}", b'{"hidden": "cat"}', b'{"hidden": [1]}',
        b'{"hidden": ["wolf"]}', b'{"min_score": 0.5, "other": 1}', b'{"hidden": [["cat"]]}',
    ],
)  # fmt: skip
def test_controls_that_make_no_sense(common_run, body):
    before = common_run.status()["controls"]
    code, _, answer = common_run.ask("/controls", "POST", body, Content_Type="application/json")
    assert code == 400
    assert json.loads(answer)["error"].startswith(("expected", "min_score", "hidden"))
    assert common_run.status()["controls"] == before


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Content_Type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_who_may_change_the_controls(common_run, headers, code):
    sent = {"Content_Type": "application/json", **headers}
    assert common_run.ask("/controls", "POST", b'{"min_score": 0.9}', **sent)[0] == code
    own = f"http://127.0.0.1:{common_run.port}"
    assert common_run.ask("/controls", "POST", {"min_score": 0.9}, Origin=own)[0] == 200


def test_a_body_that_is_too_long_or_never_comes(common_run, monkeypatch):
    assert common_run.ask("/controls", "POST", b" " * 70_000, Content_Type="application/json")[0] == 413
    monkeypatch.setattr(application, "_BODY_SECONDS", 0.2)
    headers = {"Content_Type": "application/json", "Content_Length": "10"}
    with contextlib.suppress(ConnectionError):
        assert common_run.ask("/controls", "POST", b"{", **headers)[0] == 408
    assert common_run.status()["phase"] == "running"
