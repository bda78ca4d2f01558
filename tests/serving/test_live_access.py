"""Who is let in: tokens, host names, addresses."""

from __future__ import annotations

import json
import logging
import socket

import pytest

from anchorline.runtime.io.errors import SettingsError
from anchorline.serving.listening import Address, parse_address
from anchorline.serving.live_view import LiveView

TOKEN = "correct-horse-7"
PATHS = ("/", "/feed", "/stream/0", "/status", "/metrics", "/nothing", "/controls")


@pytest.fixture(scope="module")
def guarded(live_run):
    with live_run(token=TOKEN) as run:
        yield run


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "Bearer \xff\xfe"},
        {"Authorization": "Bearer"},
        {"Cookie": "anchorline-0=x; ;;="},
        {"Cookie": f"token={TOKEN}"},
    ],
)
def test_nothing_is_shown_without_the_token(guarded, path, headers):
    for method in ("GET", "POST", "HEAD"):
        code, answered, body = guarded.ask(path, method, **headers)
        assert code == 401
        assert answered["www-authenticate"] == "Bearer"
        assert b"cam1" not in body
        assert TOKEN not in str(answered)


@pytest.mark.parametrize("path", ["/", "/status", "/metrics", "/healthz"])
def test_the_header_is_accepted(guarded, path):
    assert guarded.ask(path, Authorization=f"Bearer {TOKEN}")[0] == 200
    assert guarded.ask(path, Authorization=f"bearer {TOKEN}")[0] == 200


def test_the_page_s_token_becomes_a_cookie_and_leaves_the_address(guarded, caplog):
    with caplog.at_level(logging.DEBUG):
        code, headers, _ = guarded.ask(f"/?token={TOKEN}")
        assert (code, headers["location"]) == (303, "./")
        cookie = headers["set-cookie"]
        assert cookie.startswith(f"anchorline-{guarded.port}=")
        assert "HttpOnly" in cookie
        assert "SameSite=lax" in cookie
        assert TOKEN not in str(headers)
        value = cookie.partition(";")[0]
        for path in ("/", "/status"):
            assert guarded.ask(path, Cookie=f"other=1; {value}")[0] == 200
        assert guarded.ask("/", Cookie=value + "0")[0] == 401
        assert guarded.ask("/", Cookie=value.replace(str(guarded.port), "1"))[0] == 401
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    "query", ["token=wrong", "token=", f"token={TOKEN}&token=x", "token=%ff", f"Token={TOKEN}", "&" * 500]
)
def test_a_wrong_token_of_the_page(guarded, query):
    assert guarded.ask(f"/?{query}")[0] == 401


def test_only_the_page_takes_the_token_in_its_address(guarded):
    assert guarded.ask(f"/status?token={TOKEN}")[0] == 401
    assert guarded.ask(f"//evil.example?token={TOKEN}")[0] == 401


def test_everybody_may_ask_for_the_bare_health(guarded, until):
    until(lambda: guarded.ask("/healthz")[0] == 200)
    assert json.loads(guarded.ask("/healthz")[2]) == {"status": "ok"}
    assert guarded.ask("/healthz", Authorization="Bearer wrong")[0] == 401
    told = guarded.ask("/healthz", Authorization=f"Bearer {TOKEN}")[2]
    assert json.loads(told) == {"status": "ok", "problems": {}}


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1", 200), ("127.0.0.1:9000", 200), ("localhost:80", 200), ("LOCALHOST", 200),
        ("[::1]:8080", 200), ("192.168.1.7", 200), ("a.localhost", 200), ("localhost.", 200),
        ("evil.example", 421), ("evil.example:8080", 421), ("", 421), ("127.0.0.1.evil.example", 421),
        ("127.0.0.1@evil.example", 421), ("localhost evil.example", 421), ("[::1", 421), ("1.2.3", 421),
        ("localhost:99999999", 421), ("xlocalhost", 421), ("[1.2.3.4.5]", 421),
    ],
)  # fmt: skip
def test_foreign_names_are_refused(common_run, host, code):
    assert common_run.ask("/status", Host=host)[0] == code


def test_own_names_are_accepted(live_run):
    with live_run(names=["Camera.example"]) as run:
        assert run.ask("/status", Host="camera.example:8080")[0] == 200
        assert run.ask("/status", Host=socket.gethostname())[0] == 200
        assert run.ask("/status", Host="other.example")[0] == 421


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", Address("127.0.0.1", 8080)),
        ("8080", Address("127.0.0.1", 8080)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:65535", Address("::1", 65535)),
        ("0.0.0.0:80", Address("0.0.0.0", 80)),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "127.0.0.1",
        "host:",
        ":8080",
        "host:65536",
        "host:-1",
        "::1:80",
        "a b:1",
        "http://x:1",
        "[::1]",
    ],
)
def test_addresses_that_are_none(text):
    with pytest.raises(SettingsError, match="expected HOST:PORT"):
        LiveView(text)


@pytest.mark.parametrize(
    ("address", "loopback", "url"),
    [
        (Address("127.0.0.1", 1), True, "http://127.0.0.1:1/"),
        (Address("::1", 1), True, "http://[::1]:1/"),
        (Address("0.0.0.0", 1), False, "http://localhost:1/"),
        (Address("::", 1), False, "http://localhost:1/"),
        (Address("192.168.0.2", 1), False, "http://192.168.0.2:1/"),
    ],
)
def test_what_an_address_means(address, loopback, url):
    assert address.is_loopback == loopback
    assert address.url == url


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("no.such.host.invalid:8080", "there is no host"),
        ("192.0.2.1:8080", "is no address of this machine"),
    ],
)
def test_places_where_nothing_can_be_served(where, message):
    with pytest.raises(SettingsError, match=message):
        LiveView(where)


def test_a_port_in_use_is_one_line(common_run):
    with pytest.raises(SettingsError) as caught:
        LiveView(common_run.port)
    assert str(caught.value) == (
        f"127.0.0.1:{common_run.port}: port {common_run.port} is in use; "
        "end the program that has it, or choose another port"
    )


def test_the_port_is_free_again_after_the_end(live_run):
    with live_run() as run:
        port = run.port
        with run.opened("/feed") as answer:
            answer.read(8)
    with live_run(where=port) as run:
        assert run.ask("/status")[0] == 200


def test_an_open_door_is_a_warning():
    for where, token, warned in (("0.0.0.0:0", None, True), ("0.0.0.0:0", TOKEN, False), ("0", None, False)):
        view = LiveView(where, token=token)
        view._socket.close()
        assert bool(view.warnings) == warned
        assert all("no token" in line and "\n" not in line for line in view.warnings)


@pytest.mark.parametrize("token", ["", "short", "with spaces", "with\nline", "tökentöken"])
def test_tokens_that_cannot_be_used(token):
    with pytest.raises(SettingsError, match="expected at least 8") as caught:
        LiveView(0, token=token)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a b", "http://x", "x:80", "-", "*"])
def test_names_that_are_none(name):
    with pytest.raises(SettingsError, match="is no host name"):
        LiveView(0, names=[name])
