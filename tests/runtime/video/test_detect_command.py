"""The command as a process: pipes, signals, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from anchorline.runtime.video.reader import VideoReader

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and pipes")


@pytest.fixture
def command(model_path):
    """``command(source, options...)``: the words of a run that shows no progress."""

    def words(*options):
        return [sys.executable, "-m", "anchorline", "detect", *map(str, options), "--model", str(model_path)]

    return words


@pytest.fixture
def video(tmp_path, moving_frames, write_raw_video):
    """Forty frames, under an odd name."""
    (tmp_path / "in").mkdir()
    return write_raw_video(tmp_path / "in" / "ä clip=1.mp4", moving_frames)


@pytest.fixture
def long_video(tmp_path, moving_frames, write_raw_video):
    """200 frames, forty seconds where it is played at its own rate.

    The encoder holds back the first ten or so, and the file of a copy begins with what it lets go.
    """
    return write_raw_video(tmp_path / "clip=1.mp4", moving_frames * 5, fps=5.0)


def frames_of(path):
    with VideoReader(path) as reader:
        return len(list(reader))


def test_lines_on_stdout_are_nothing_but_lines(command, video, tmp_path):
    done = subprocess.run(
        command(video, "--jsonl", "-", "--json", tmp_path / "a.json"),
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert [json.loads(line)["frame"] for line in done.stdout.splitlines()] == list(range(40))
    assert b"40 frames" in done.stderr  # the figures
    assert json.loads((tmp_path / "a.json").read_bytes())["frames"] == 40


def test_stdout_may_be_a_file_that_goes_on(command, video, tmp_path):
    """``>> lines``: what stands there stays."""
    lines = tmp_path / "lines"
    lines.write_text("before\n")
    with lines.open("a") as file:
        subprocess.run(command(video, "--stride", "10", "--jsonl", "-"), stdout=file, check=True, timeout=120)
    assert lines.read_text().splitlines()[0] == "before"
    assert len(lines.read_text().splitlines()) == 5


def test_whoever_read_the_lines_has_gone(command, video):
    process = subprocess.Popen(
        command(video, "--jsonl", "-", "--policy", "latest"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"{")
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_completes_all_files(command, long_video, tmp_path, name, code, until):
    out = tmp_path / "out"
    options = ["--save", out / "a.mp4", "--jsonl", out / "a.jsonl", "--json", out / "a.json"]
    process = subprocess.Popen(
        command(f"cam={long_video}", "--policy", "latest", *options, "--pictures", out / "a.png"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: any(out.rglob("*.mp4")), 60.0)
    process.send_signal(getattr(signal, name))
    shown, complaints = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in complaints
    assert sorted(os.listdir(out)) == ["a.json", "a.jsonl", "a.mp4", "a.png"]
    rows = [json.loads(line) for line in (out / "a.jsonl").read_text().splitlines()]
    assert 0 < len(rows) < 200
    assert frames_of(out / "a.mp4") == len(rows)
    assert json.loads((out / "a.json").read_text())["frames"] == len(rows)
    assert "cam" in shown


# Runs its arguments in a terminal of their own, which is closed when stdin is.
TERMINAL = """
import os, pty, sys
child, terminal = pty.fork()
if child == 0:
    os.execv(sys.argv[1], sys.argv[1:])
sys.stdin.read()
os.close(terminal)
os.waitpid(child, 0)
"""


def test_a_closed_terminal_completes_all_files(command, long_video, tmp_path, until):
    """Its progress and its figures have nowhere to go; the files still do."""
    out = tmp_path / "out"
    options = ["--save", out / "a.mp4", "--jsonl", out / "a.jsonl", "--json", out / "a.json"]
    terminal = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, *command(f"cam={long_video}", "--policy", "latest", *options)],
        stdin=subprocess.PIPE,
    )
    assert terminal.stdin is not None
    until(lambda: any(out.rglob("*.mp4")), 60.0)
    terminal.stdin.close()
    assert terminal.wait(timeout=120) == 0
    assert sorted(os.listdir(out)) == ["a.json", "a.jsonl", "a.mp4"]
    rows = (out / "a.jsonl").read_text().splitlines()
    assert 0 < len(rows) < 200
    assert frames_of(out / "a.mp4") == len(rows)
    assert json.loads((out / "a.json").read_text())["frames"] == len(rows)


def test_a_hangup_that_nohup_ignores_changes_nothing(
    command, moving_frames, write_raw_video, tmp_path, until
):
    """It comes early in a run of two seconds, which goes on to its last frame."""
    video, out = write_raw_video(tmp_path / "clip.mp4", moving_frames, fps=20.0), tmp_path / "a.jsonl"
    process = subprocess.Popen(
        ["nohup", *command(video, "--jsonl", out, "--policy", "latest")], stderr=subprocess.DEVNULL
    )
    until(lambda: any(tmp_path.glob("*a.jsonl*")), 60.0)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[-1]["frame"] == 39


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jsonl", "{video}"], "is a source"),
        (["--json", "{model}"], "is a source, the model"),
        (["--jsonl", "{folder}/a", "--json", "{folder}/a"], "another output"),
        (["--pictures", "{folder}/a.png", "--json", "{folder}/a.png"], "another output"),
        (["--save", "/dev/null/out"], "cannot be written"),
        (["--shown-score", "7"], "shown_score is 7.0"),
    ],
)
def test_mistakes_are_one_line(capfd, model_path, video, tmp_path, options, message):
    from anchorline import cli

    model = tmp_path / "in" / "model.onnx"
    model.write_bytes(model_path.read_bytes())
    before = video.read_bytes(), model.read_bytes()
    places = {"video": video, "model": model, "folder": tmp_path}
    words = [option.format(**places) for option in options]
    assert cli.main(["detect", str(video), "--model", str(model), *words]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (video.read_bytes(), model.read_bytes()) == before
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_files_that_cannot_be_read_as_video(capfd, model_path, tmp_path):
    from anchorline import cli

    (tmp_path / "a.mp4").write_bytes(b"")
    assert cli.main(["detect", str(tmp_path / "a.mp4"), "--model", str(model_path)]) == 2
    assert capfd.readouterr().err.count("\n") == 1
