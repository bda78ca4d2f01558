"""Whatever a client sends: an answer of 4xx or a cut connection, and the server goes on."""

from __future__ import annotations

import contextlib
import logging
import socket
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=FIXTURES, derandomize=True)
KNOWN = ("/", "/feed", "/stream/0", "/stream/cam1", "/status", "/controls", "/metrics", "/healthz")
METHODS = (
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PATCH",
    "PROPFIND",
    "get",
    "A" * 300,
)
VALUE = st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=60)
HEADER = st.tuples(
    st.sampled_from(
        ("Host", "Content-Length", "Transfer-Encoding", "Authorization", "Cookie", "Origin", "Content-Type",
         "Connection", "Upgrade", "Expect", "Range", "Sec-Fetch-Site", "Accept", "X-Forwarded-For", "")
    )
    | st.text(string.ascii_letters + "-_", min_size=1, max_size=20),
    st.sampled_from(("chunked", "gzip, chunked", "-1", "99999999999999999999", "close", "websocket",
                     "100-continue", "localhost", "Bearer", "bytes=0-", "a=b; c", "null", "application/json"))
    | VALUE,
)  # fmt: skip
SEGMENT = st.sampled_from(
    ("..", ".", "%2e%2e", "%00", "%ff", "%", "stream", "9" * 5000, "cam1", "//", "٣", "\\")
)
PATH = st.builds(lambda parts: "/" + "/".join(parts), st.lists(SEGMENT | st.text(max_size=12), max_size=4))


def send(port: int, request: bytes, seconds: float = 60.0) -> bytes:
    """The beginning of the answer to the bytes; empty where the connection was cut."""
    with (
        socket.create_connection(("127.0.0.1", port), seconds) as opened,
        contextlib.suppress(ConnectionError),
    ):
        opened.sendall(request)
        opened.shutdown(socket.SHUT_WR)
        return opened.recv(4096)
    return b""


@pytest.fixture
def alive(common_run, caplog):
    """The run, which still answers after the test, without a word of complaint in any log."""
    with caplog.at_level(logging.WARNING):
        yield common_run
        assert common_run.ask("/status")[0] == 200
    records = [record for when in ("call", "teardown") for record in caplog.get_records(when)]
    # What uvicorn says of nonsense goes nowhere, but pytest listens there as well.
    assert [record for record in records if record.name != "anchorline.live.http"] == []
    assert common_run.thread.is_alive()


def check(answer: bytes, also: tuple[bytes, ...] = ()) -> None:
    if answer:
        assert answer.startswith(b"HTTP/1.1 "), answer
        code = answer.split(b" ", 2)[1]
        assert code.startswith(b"4") or code in also, answer


@FUZZ
@given(st.sampled_from(METHODS), st.sampled_from(KNOWN) | PATH, st.lists(HEADER, max_size=4), st.booleans())
def test_methods_paths_and_headers(alive, method, path, headers, has_host):
    lines = [f"{method} {path} HTTP/1.1", *(["Host: localhost"] if has_host else [])]
    lines += [f"{name}: {value}" for name, value in headers]
    request = "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass")
    known = path in KNOWN and method in ("GET", "HEAD")
    check(send(alive.port, request), (b"200", b"100") if known else (b"100",))


@FUZZ
@given(st.sampled_from(KNOWN), st.sampled_from(METHODS))
def test_methods_that_a_path_does_not_know(alive, path, method):
    code = alive.ask(path, method)[0] if method not in ("GET", "HEAD") else 400
    assert 400 <= code < 500


@FUZZ
@given(st.binary(max_size=400))
def test_bytes_that_are_no_request(alive, noise):
    check(send(alive.port, noise))


@FUZZ
@given(st.binary(max_size=200), st.sampled_from(KNOWN))
def test_noise_after_a_request(alive, noise, path):
    """Damage while an answer is under way, or in the body."""
    begin = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    check(send(alive.port, begin + noise), (b"200",))


@FUZZ
@given(st.binary(max_size=300))
def test_bodies_that_are_no_controls(alive, body):
    code, _, _ = alive.ask("/controls", "POST", body, Content_Type="application/json")
    assert code == 400


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /stream/" + b"9" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /controls HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
        b"POST /controls HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /controls HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_requests_that_have_hurt_others(alive, request_bytes):
    readable = request_bytes.startswith((b"GET / HTTP/9.9", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "))
    check(send(alive.port, request_bytes), (b"200",) if readable else ())


def test_an_upgrade_is_not_followed(alive):
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert send(alive.port, request).startswith(b"HTTP/1.1 200 ")


def test_our_own_mistakes_are_logged_and_told_in_one_line(live_run, caplog, monkeypatch):
    with live_run() as run:
        monkeypatch.setattr(run.live, "status", lambda: 1 / 0)
        code, headers, body = run.ask("/status")
        assert (code, headers["x-content-type-options"]) == (500, "nosniff")
        assert b"Traceback" not in body
        assert b"ZeroDivision" not in body
        monkeypatch.undo()
        assert run.ask("/status")[0] == 200
    assert "ZeroDivisionError" in caplog.text
