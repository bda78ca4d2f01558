"""Connections that take up room and time: idle, slow, too many. Who watches and who comes notice nothing."""

from __future__ import annotations

import contextlib
import http.client
import math
import socket
import time

import pytest

from anchorline.runtime.io.errors import SettingsError
from anchorline.serving.connections import Limits, network_of

TOKEN = "correct-horse-7"
ASKING = b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PATIENT = 600.0  # seconds that nothing in a test takes


@pytest.fixture
def dial():
    """``dial(run, bytes)``: a connection that has sent these."""
    with contextlib.ExitStack() as stack:

        def opened(run, sent=b""):
            made = stack.enter_context(socket.socket())
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            made.settimeout(60.0)
            made.connect(("127.0.0.1", run.port))
            made.sendall(sent)
            return made

        yield opened


def is_open(opened):
    opened.settimeout(0.01)
    try:
        return opened.recv(1, socket.MSG_PEEK) != b""
    except TimeoutError:
        return True
    except ConnectionError:
        return False
    finally:
        opened.settimeout(60.0)


def ends(opened):
    """Wait until the other side has ended it; what it sent before."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := opened.recv(65536):
            found += piece
    return found


def connected(run):
    return len(run.view._server.server_state.connections)


def test_who_asks_nothing_in_time_is_ended(live_run, dial, until):
    with live_run(limits=Limits(head_seconds=0.3)) as run, run.opened("/feed") as watching:
        for begin in (b"", ASKING[:20]):
            assert ends(dial(run, begin)) == b""
        assert watching.read(8)  # who watches is not idle
        assert len(run.live.viewers) == 1
        until(lambda: connected(run) == 1)


def test_bytes_that_trickle_are_no_request_in_time(live_run, dial, until):
    with live_run(limits=Limits(head_seconds=0.5)) as run:
        slow = dial(run, b"GET /status HTTP/1.1\r\nHost: localhost\r\nX: ")

        def has_ended():
            with contextlib.suppress(ConnectionError):
                slow.sendall(b"y")
            return not is_open(slow)

        until(has_ended)


def test_a_request_after_an_answer_has_to_come_in_time_too(live_run, dial):
    with live_run(limits=Limits(idle_seconds=0.5)) as run:
        slow = dial(run, ASKING + ASKING[:20])  # the rest of a request keeps uvicorn's own time from running
        answer = ends(slow)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1 ") == 1


def test_who_takes_no_answers_is_ended(live_run, dial, until):
    with live_run(limits=Limits(idle_seconds=0.5)) as run, run.opened("/feed") as watching:
        dial(run, ASKING.replace(b"/status", b"/") * 100)  # pages for more than all buffers hold
        until(lambda: connected(run) == 1)
        assert watching.read(8)


@pytest.mark.parametrize("path", ["/status", "/healthz"])
def test_an_answer_to_a_stranger_is_the_last_one(live_run, dial, path):
    with live_run(token=TOKEN) as run:
        asked = ASKING.replace(b"/status", path.encode())
        answer = ends(dial(run, asked + asked))
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"\r\nconnection: close\r\n" in answer.lower()
        assert "connection" not in run.ask(path, **BEARER)[1]
        connection = http.client.HTTPConnection("127.0.0.1", run.port, timeout=60.0)
        with contextlib.closing(connection):
            for _ in range(2):
                connection.request("GET", path, headers=BEARER)
                assert connection.getresponse().read()
                assert connection.sock is not None  # and stays for the next one


def test_a_full_house_lets_the_oldest_idle_stranger_go(live_run, dial, until):
    """Not who is answered, who watches, or who comes."""
    limits = Limits(connections=4, head_seconds=PATIENT, idle_seconds=PATIENT, young_seconds=0.0)
    with live_run(token=TOKEN, limits=limits) as run, run.opened("/feed", **BEARER) as watching:
        kept = dial(run, ASKING.replace(b"\r\n\r\n", f"\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()))
        assert kept.recv(12) == b"HTTP/1.1 200"
        idle = []
        for count in range(1, 6):
            idle.append(dial(run))
            until(lambda: connected(run) == min(2 + count, 4))  # noqa: B023
            until(lambda: [is_open(each) for each in idle] == [False] * (count - 2) + [True] * min(count, 2))  # noqa: B023
        assert run.ask("/status", **BEARER)[0] == 200
        assert is_open(kept)
        assert watching.read(8)


def test_a_full_house_spares_a_stranger_whose_request_may_be_on_its_way(live_run, dial, until):
    """Rather than one that was answered and asks no more."""
    limits = Limits(connections=3, head_seconds=PATIENT, idle_seconds=PATIENT, young_seconds=PATIENT)
    with live_run(limits=limits) as run:
        answered = [dial(run, ASKING) for _ in range(2)]
        assert all(each.recv(12) == b"HTTP/1.1 200" for each in answered)
        until(lambda: not any(each.is_answering for each in run.view._server.server_state.connections))
        young = [dial(run) for _ in range(3)]
        for each in answered:
            assert b"HTTP/1.1 " not in ends(each)
        assert all(map(is_open, young))


def test_no_address_fills_the_house_with_strangers(live_run, dial, until):
    limits = Limits(strangers=2, head_seconds=PATIENT, idle_seconds=PATIENT)
    with live_run(token=TOKEN, limits=limits) as run, contextlib.ExitStack() as stack:
        watching = [stack.enter_context(run.opened("/feed", **BEARER)) for _ in range(3)]  # who is none
        idle = [dial(run) for _ in range(6)]
        until(lambda: connected(run) == 5)
        until(lambda: sum(map(is_open, idle)) == 2)
        assert run.ask("/status", **BEARER)[0] == 200
        assert run.ask("/status")[0] == 401
        assert all(each.read(8) for each in watching)


def test_who_is_answered_makes_room_where_nobody_is_idle(live_run, dial, until):
    """As who sends a body for ever; and if all others watch, there is no room."""
    heads = b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    slow = b"POST /controls HTTP/1.1\r\n" + heads
    limits = Limits(connections=2, head_seconds=PATIENT, idle_seconds=PATIENT)
    with live_run(limits=limits) as run, run.opened("/feed") as first:
        busy = dial(run, slow)
        until(lambda: sum(each.is_answering for each in run.view._server.server_state.connections) == 2)
        with run.opened("/feed") as second:
            assert ends(busy) == b""
            assert ends(dial(run)) == b""
            assert first.read(8)
            assert second.read(8)


def test_a_crowd_of_idle_connections(live_run, dial):
    """Far more than there is room for, and some of them that come again at once."""
    limits = Limits(connections=60, strangers=30)
    with live_run(token=TOKEN, limits=limits) as run, run.opened("/feed", **BEARER) as watching:
        idle = [dial(run) for _ in range(150)]
        for number in range(20):
            assert run.ask("/status", **BEARER)[0] == 200
            idle[number].close()
            idle[number] = dial(run)
        assert connected(run) <= limits.connections
        assert watching.read(8)


def test_a_head_without_end_is_refused(common_run, dial):
    endless = dial(common_run, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000)
    assert ends(endless).startswith(b"HTTP/1.1 400 ")


def test_a_forwarded_address_is_nobody_s(live_run, dial, until):
    """Anybody can write that header: all behind a proxy count as one."""
    limits = Limits(strangers=2, head_seconds=PATIENT)
    with live_run(token=TOKEN, limits=limits) as run:
        begins = [f"GET / HTTP/1.1\r\nX-Forwarded-For: 192.0.2.{number}\r\n".encode() for number in range(4)]
        opened = [dial(run, begin) for begin in begins]
        until(lambda: sum(map(is_open, opened)) == 2)


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("", ""),
    ],
)
def test_what_counts_as_one_address(host, network):
    assert network_of(host) == network


def test_timers_go_with_their_connections(live_run, dial, until):
    with live_run(limits=Limits(head_seconds=PATIENT, idle_seconds=PATIENT)) as run:
        for sent in (b"", ASKING):
            opened = dial(run, sent)
            until(lambda: connected(run) == 1)
            (held,) = run.view._server.server_state.connections
            opened.close()
            until(lambda: connected(run) == 0)
            assert held._timer.cancelled()
        begun = time.monotonic()
    assert time.monotonic() - begun < 60.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"connections": 0},
        {"strangers": 1.5},
        {"head_seconds": -1.0},
        {"idle_seconds": math.nan},
        {"young_seconds": math.inf},
    ],
)
def test_limits_that_are_none(wrong):
    with pytest.raises(SettingsError, match=f"^{next(iter(wrong))} is "):
        Limits(**wrong)
