"""``anchorline detect --serve`` as a process, on a model whose answers are known."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def material(tmp_path_factory, one_box_model):
    """A folder with a model that finds one box, and sixty frames of video to be played at their own rate."""
    folder = tmp_path_factory.mktemp("serve")
    shutil.copy(one_box_model, folder / "model.onnx")
    writer = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 3.0, (64, 48))
    for level in range(0, 240, 4):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    return folder


@pytest.fixture
def words(material):
    def command(*options):
        sources = [f"cam={material / 'clip.mp4'}", "--model", str(material / "model.onnx")]
        return [sys.executable, "-m", "anchorline", "detect", *sources, "--policy", "latest", *options]

    return command


def ask(port, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_is_served_and_ends_by_a_signal(words, material, tmp_path, number):
    environment = {**os.environ, "ANCHORLINE_SERVE_TOKEN": "from-the-environment"}
    process = subprocess.Popen(
        words("--serve", "0", "--jsonl", str(tmp_path / "lines.jsonl")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    line = process.stderr.readline()
    matched = re.fullmatch(r"anchorline: live view at http://127\.0\.0\.1:(\d+)/\?token=\.\.\..*\n", line)
    assert matched, line
    port, token = int(matched.group(1)), {"Authorization": "Bearer from-the-environment"}
    assert ask(port, "/status")[0] == 401
    end = time.monotonic() + 60
    while ask(port, "/healthz")[0] != 200:
        assert time.monotonic() < end
        time.sleep(0.1)
    status, metrics = (ask(port, path, **token)[1].decode() for path in ("/status", "/metrics"))
    assert ask(port, "/status?token=from-the-environment")[0] == 401
    told = status + metrics
    status = json.loads(status)
    assert status["sources"][0]["name"] == "cam"
    assert status["controls"]["lowest_score"] == 0.05
    process.send_signal(number)
    shown, complaints = process.communicate(timeout=120)
    assert "from-the-environment" not in line + shown + complaints + told
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in complaints
    assert (tmp_path / "lines.jsonl").is_file()


def test_a_port_in_use_is_one_line_before_the_model_is_read(words, material, capfd):
    from anchorline import cli

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = cli.main(
            ["detect", "0", "--model", str(material / "none.onnx"), "--serve", f"127.0.0.1:{port}"]
        )
    error = capfd.readouterr().err
    assert code == 2
    assert error == (
        f"anchorline: 127.0.0.1:{port}: port {port} is in use; "
        "end the program that has it, or choose another port\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--serve", "somewhere"], "expected HOST:PORT"),
        (["--serve", "0", "--serve-token", "short"], "expected at least 8"),
        (["--serve", "0", "--serve-name", "a b"], "is no host name"),
    ],
)
def test_mistakes_are_one_line(material, capfd, options, message):
    from anchorline import cli

    code = cli.main(["detect", "0", "--model", str(material / "model.onnx"), *options])
    error = capfd.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_an_open_door_is_a_warning(words):
    done = subprocess.run(
        words("--serve", "0.0.0.0:0", "--policy", "wait"), capture_output=True, text=True, timeout=120
    )
    first, second = done.stderr.splitlines()[:2]
    assert first.startswith("anchorline: warning: the live view at 0.0.0.0:")
    assert "has no token" in first
    assert re.fullmatch(r"anchorline: live view at http://localhost:\d+/", second)
    assert done.returncode == 0


def test_what_is_saved_is_the_same_with_and_without_a_viewer(words, material, tmp_path):
    from anchorline import cli
    from anchorline.runtime.video.reader import VideoReader

    for name, options in (("plain", []), ("served", ["--serve", "0"])):
        out = ["--save", str(tmp_path / f"{name}.mp4"), "--jsonl", str(tmp_path / f"{name}.jsonl")]
        model = ["--model", str(material / "model.onnx")]
        assert cli.main(["detect", str(material / "clip.mp4"), *model, *out, *options]) == 0
    assert (tmp_path / "plain.jsonl").read_bytes() == (tmp_path / "served.jsonl").read_bytes()
    read = []
    for name in ("plain", "served"):
        with VideoReader(tmp_path / f"{name}.mp4") as reader:
            read.append([frame for _, _, frame in reader])
    assert len(read[0]) == len(read[1]) == 60
    # On a busy machine the encoder gives other bits for the same frames once in some hundred files; a box
    # that is missing or elsewhere differs by over 100 grey levels.
    different = np.abs(np.subtract(read[0], read[1], dtype=np.int16))
    assert different.mean() < 1
    assert different.max() < 64


def test_the_command_does_not_need_the_packages_until_it_serves():
    program = (
        "import sys, anchorline.cli, anchorline.runtime.video.pipeline; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"starlette", "uvicorn", "prometheus_client", "h11"} & set(done.stdout.split())


def test_the_help_does_not_show_the_token(monkeypatch, capfd):
    from anchorline import cli

    monkeypatch.setenv("ANCHORLINE_SERVE_TOKEN", "from-the-environment")
    assert cli.main(["detect", "--help"]) == 0
    assert "from-the-environment" not in "".join(capfd.readouterr())
