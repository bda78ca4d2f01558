"""``anchorline serve`` as a process: its start, its mistakes, and its end with requests in hand."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
uvicorn = pytest.importorskip("uvicorn")

from anchorline.serving.inference_server import InferenceServer  # noqa: E402


@pytest.fixture
def start(one_box_model):
    """``start(*options)``: the process, once it serves, and its port."""
    begun = []

    def started(*options, **environment):
        serve = ["serve", f"street={one_box_model}", "--port", "0", *options]
        command = [sys.executable, "-m", "anchorline", *serve]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        begun.append(process)
        lines = []
        while not (lines and lines[-1].startswith("anchorline: serving ")):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        return process, int(re.search(r":(\d+)/$", lines[-1].strip())[1]), lines

    yield started
    for process in begun:
        process.kill()
        process.communicate(timeout=60)


def post(port, path, body, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_sigterm_ends_it_well_with_its_requests_answered(start, png):
    """A request whose body is half there when the signal comes is answered, new ones are not taken."""
    process, port, _ = start("--max-wait", "0.5")
    assert post(port, "/detect", png(51))[0] == 200
    content = png(51)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as half:
        head = f"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        half.sendall(head.encode() + content[:20])
        answers = []
        waiting = threading.Thread(target=lambda: answers.append(post(port, "/detect/street", content)))
        waiting.start()
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 60
        while _takes_connections(port):
            assert time.monotonic() < end
            time.sleep(0.05)
        half.sendall(content[20:])
        answer = http.client.HTTPResponse(half, method="POST")
        answer.begin()
        assert answer.status == 200
        assert json.loads(answer.read())["detections"][0]["name"] == "thing"
        waiting.join(60)
    assert [code for code, _ in answers] == [200]
    shown, complaints = process.communicate(timeout=60)
    assert process.returncode == 0
    assert shown == complaints == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_ends_it(start):
    process, _, _ = start()
    process.send_signal(signal.SIGINT)
    shown, complaints = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (shown, complaints) == ("", "anchorline: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_before_uvicorn_listens_to_signals_ends_it_too(one_box_model, monkeypatch, recwarn):
    serve = uvicorn.Server.serve

    def interrupted(self, sockets=None):
        serving = serve(self, sockets)
        signal.raise_signal(signal.SIGINT)
        return serving

    monkeypatch.setattr(uvicorn.Server, "serve", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        InferenceServer({"street": one_box_model}).run()
        pytest.fail("the interruption is lost")
    gc.collect()  # what was never awaited complains when it goes
    assert [str(each.message) for each in recwarn] == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_token_comes_from_the_environment_and_is_not_shown(start, png):
    token = "from-the-environment"
    process, port, lines = start(ANCHORLINE_SERVE_TOKEN=token)
    assert post(port, "/detect", png(51))[0] == 401
    assert post(port, "/detect", png(51), Authorization=f"Bearer {token}")[0] == 200
    process.terminate()
    assert token not in "".join([*lines, *process.communicate(timeout=60)])


def test_an_open_door_is_a_warning(start):
    _, _, (first, second) = start("--host", "0.0.0.0")
    assert first.startswith("anchorline: warning: the server at 0.0.0.0:")
    assert "has no token" in first
    assert re.fullmatch(r"anchorline: serving street at http://localhost:\d+/\n", second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.onnx"], "none.onnx"),
        (["a b.onnx"], "the model's name is 'a b'"),
        (["a/m.onnx", "b/m.onnx"], "two models are called 'm'"),
        (["m.onnx", "--token", "short"], "expected at least 8"),
        (["m.onnx", "--batch", "0"], "'--batch'"),
        (["m.onnx", "--host", "nowhere.invalid"], "there is no host"),
        ([], "MODEL"),
    ],
)
def test_mistakes_are_one_line(capfd, arguments, message):
    from anchorline import cli

    assert cli.main(["serve", *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_told_of_before_the_model_is_read(capfd):
    from anchorline import cli

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", "none.onnx", "--port", str(port)]) == 2
    assert f"port {port} is in use" in capfd.readouterr().err


def _takes_connections(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionRefusedError:
        return False
    return True
