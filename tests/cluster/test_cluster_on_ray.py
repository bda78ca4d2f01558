"""The whole on a real cluster of Ray's, with its own processes, on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import pytest

from anchorline.cluster import Progress, detect_on_cluster
from anchorline.cluster.worker import DetectionWorker
from anchorline.runtime import DetectOptions, Detector, detect
from anchorline.runtime.io.errors import DataError, SettingsError
from anchorline.runtime.io.files import process_state

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

LONGEST = 600.0  # seconds; on an idle machine it takes a few


@pytest.fixture
def local(model, tmp_path):
    """``local(sources)``: the lines and the summary of the run without a cluster."""

    def run(sources, **settings):
        with Detector(model, "cpu", threads=1) as detector:
            summary = detect(
                sources, detector, DetectOptions(jsonl=tmp_path / "local.jsonl", **settings), progress=False
            )
        return (tmp_path / "local.jsonl").read_bytes(), summary

    return run


@pytest.fixture
def on_cluster(cluster, model, tmp_path):
    """``on_cluster(sources)``: the same with two workers."""

    def run(sources, progress=lambda now: None, **settings):
        until = time.monotonic() + LONGEST

        def watched(now: Progress) -> None:
            assert time.monotonic() < until, f"no end in sight: {now}"
            progress(now)

        options = DetectOptions(
            provider="cpu", threads=1, jsonl=tmp_path / "out.jsonl", save=settings.pop("save", None)
        )
        return detect_on_cluster(sources, model, options, progress=watched, **settings)

    return run


@pytest.fixture
def pictures(tmp_path, write_picture):
    return [write_picture(tmp_path / "in" / f"{index}.png", 20 * index + 20) for index in range(8)]


def test_lines_copies_and_warnings_are_those_of_the_local_run(
    files, local, on_cluster, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    sources = [path.relative_to(tmp_path) for path in files]
    expected, summary = local(sources, save="local")
    found = on_cluster(sources, images_per_item=2, save="out")
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert found.detect.warnings == summary.warnings
    assert len(summary.warnings) == 2  # the damaged picture and the broken clip
    assert (found.detect.frames, found.detect.detections) == (summary.frames, summary.detections) == (21, 21)
    assert (found.files, found.answered, found.failed, found.retries) == (12, 12, (), 0)
    assert sum(node["files"] for node in found.nodes.values()) == 12
    names = sorted(os.listdir("local"))
    assert sorted(os.listdir("out")) == names
    for name in names:
        if name.endswith(".png"):
            assert (cv2.imread(f"out/{name}") == cv2.imread(f"local/{name}")).all()
    assert cv2.VideoCapture("out/clip.mp4").get(cv2.CAP_PROP_FRAME_COUNT) == 12
    left = {"in", "again", "clip.mp4", "broken.mp4", "local", "out", "local.jsonl", "out.jsonl"}
    assert set(os.listdir(tmp_path)) == left


def test_workers_that_are_killed(write_clip, pictures, local, on_cluster, tmp_path):
    """One amid a clip costs no file its answer; a file that always kills its worker is given up."""

    died = tmp_path / "died"

    class Mortal(DetectionWorker):  # inside the function, so that Ray sends the class itself
        def __init__(self, job):
            from anchorline.cluster import worker

            worker.PIECE_BYTES = 1000  # so that a short clip is answered in many pieces
            super().__init__(job)

        def answer(self, item):
            if any(path.endswith("5.png") for path in item.paths):
                os.kill(os.getpid(), signal.SIGKILL)
            for number, piece in enumerate(super().answer(item)):
                if item.is_video and number == 2:  # two have been given: only the first worker dies of it
                    with contextlib.suppress(FileExistsError):
                        died.touch(exist_ok=False)
                        os.kill(os.getpid(), signal.SIGKILL)
                yield piece

    clips = [write_clip(tmp_path / f"{index}.mp4", frames=100) for index in range(2)]
    expected, _ = local([*clips, *(path for path in pictures if path.name != "5.png")])
    found = on_cluster([*clips, *pictures], images_per_item=3, worker_type=Mortal)
    assert died.exists()
    (line,) = found.failed
    assert line.startswith(f"{pictures[5]}: given up after 3 tries: the worker on ")
    assert line.endswith("died: its process ended")
    assert (found.answered, found.retries) == (9, 1 + 2)
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_the_model_is_sent_where_it_is_not(pictures, local, on_cluster, tmp_path):
    cache, elsewhere = str(tmp_path / "cache"), str(tmp_path / "elsewhere" / "tiny.onnx")

    class Elsewhere(DetectionWorker):
        def __init__(self, job):
            os.environ["XDG_CACHE_HOME"] = cache
            super().__init__(replace(job, model=dict.fromkeys([elsewhere], *job.model.values())))

    expected, _ = local(pictures)
    assert on_cluster(pictures, worker_type=Elsewhere).answered == 8
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert [path.name for path in (tmp_path / "cache").rglob("*.onnx")] == ["tiny.onnx"]


def test_errors_of_the_workers_are_ours(pictures, on_cluster, tmp_path):
    pictures[0].write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"0\.png: cannot be decoded"):
        on_cluster(pictures[:1])
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.slow
def test_workers_that_refuse(pictures, on_cluster, tmp_path):
    class Older(DetectionWorker):
        def __init__(self, job):
            super().__init__(replace(job, version="0.0.1"))

    with pytest.raises(SettingsError, match=r"and the command is 0\.0\.1; install the same version"):
        on_cluster(pictures, worker_type=Older)
    assert os.listdir(tmp_path) == ["in"]


@pytest.fixture
def command(model):
    """``command(options...)``: the words of a run on a cluster of its own, or the one at ``ray``."""

    def words(*options, ray="local"):
        base = [sys.executable, "-m", "anchorline", "detect", *map(str, options)]
        return [*base, "--model", str(model), "--ray", ray, "--threads", "1"]

    return words


def below(pid: int) -> dict[int, str]:
    """The programs of the processes that ``pid`` has started, and those have, and so on."""
    found, looked_at = {}, [pid]
    while looked_at:
        for children in Path(f"/proc/{looked_at.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended
                for each in map(int, children.read_text().split()):
                    found[each] = Path(f"/proc/{each}/comm").read_text().strip()
                    looked_at.append(each)
    return found


def running(processes: dict[int, str]) -> list[str]:
    """Those of the ``processes`` that have not ended; who has not been waited for yet, has."""
    states = {pid: process_state(pid) for pid in processes}
    return [processes[pid] for pid, found in states.items() if found and found.state not in "ZX"]


def until_answered(process, pictures, out) -> None:
    """Wait until all pictures have their copies."""
    until = time.monotonic() + 400.0
    while not out.is_dir() or len([path for path in out.iterdir() if path.suffix == ".png"]) < len(pictures):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_the_command(command, pictures, local, tmp_path):
    pytest.importorskip("ray", reason="needs Ray: pip install 'anchorline[ray]'")
    pictures[3].write_bytes(b"nonsense")
    expected, _ = local(pictures)
    done = subprocess.run(command(tmp_path / "in", "--jsonl", "-"), capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected  # and nothing of Ray's
    assert b"8 of 8 files answered, 0 failed" in done.stderr
    assert done.stderr.count(b"warning: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_whole_outputs(number, code, command, pictures, local, write_clip, tmp_path):
    pytest.importorskip("ray", reason="needs Ray: pip install 'anchorline[ray]'")
    expected, _ = local(pictures)
    clip, out, lines = write_clip(tmp_path / "long.mp4", 20_000), tmp_path / "out", tmp_path / "out.jsonl"
    process = subprocess.Popen(
        command(*pictures, clip, "--jsonl", lines, "--save", out), start_new_session=True
    )
    until_answered(process, pictures, out)
    started = below(process.pid)
    process.send_signal(number)
    assert process.wait(400) == code
    assert not running(started)
    assert lines.read_bytes() == expected
    assert sorted(os.listdir(out)) == sorted(path.name for path in pictures)
    assert sorted(os.listdir(tmp_path)) == ["in", "local.jsonl", "long.mp4", "out", "out.jsonl"]


needs_linux = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="finds Ray's processes in Linux's /proc"
)


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "named"), [("gcs_server", "its head"), ("raylet", "Ray's process on this machine")]
)
def test_a_local_cluster_that_is_lost_is_one_line_and_leaves_nothing_running(
    killed, named, command, pictures, local, write_clip, tmp_path
):
    pytest.importorskip("ray", reason="needs Ray: pip install 'anchorline[ray]'")
    expected, _ = local(pictures)
    clip, out, lines = write_clip(tmp_path / "long.mp4", 50_000), tmp_path / "out", tmp_path / "out.jsonl"
    process = subprocess.Popen(
        command(*pictures, clip, "--jsonl", lines, "--save", out), stderr=subprocess.PIPE, text=True
    )
    until_answered(process, pictures, out)
    started = below(process.pid)
    (victim,) = (pid for pid, name in started.items() if name == killed)
    os.kill(victim, signal.SIGKILL)
    _, complaints = process.communicate(timeout=400)
    assert process.returncode == 2, complaints
    (line,) = (line for line in complaints.splitlines() if line.startswith("anchorline: "))
    assert line.startswith(f"anchorline: the cluster is lost: {named} (127.0.0.1:"), complaints
    assert line.endswith("; the outputs hold 8 of 9 files")
    assert lines.read_bytes() == expected
    assert sorted(os.listdir(tmp_path)) == ["in", "local.jsonl", "long.mp4", "out", "out.jsonl"]
    assert len(started) >= 6
    assert not running(started)


@needs_linux
@pytest.mark.slow
def test_the_head_of_a_cluster_that_is_lost_is_one_line(command, pictures, local, write_clip, tmp_path):
    pytest.importorskip("ray", reason="needs Ray: pip install 'anchorline[ray]'")
    expected, _ = local(pictures)
    clip, out, lines = write_clip(tmp_path / "long.mp4", 50_000), tmp_path / "out", tmp_path / "out.jsonl"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", "2"]
    start += ["--node-ip-address", "127.0.0.1", "--port", str(port), "--include-dashboard", "false"]
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    environment = {**os.environ, **own, "RAY_AUTH_MODE": "disabled"}
    with open(tmp_path / "head.log", "wb") as log:
        head = subprocess.Popen(
            [*start, "--object-store-memory", "200000000"], env=environment, stdout=log, stderr=log
        )
    started: dict[int, str] = {}
    try:
        until = time.monotonic() + 200.0
        while "raylet" not in below(head.pid).values():
            assert head.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.5)
        run = command(*pictures, clip, "--jsonl", lines, "--save", out, ray=f"127.0.0.1:{port}")
        process = subprocess.Popen(run, env=environment, stderr=subprocess.PIPE, text=True)
        until_answered(process, pictures, out)
        started = below(head.pid)
        (victim,) = (pid for pid, name in started.items() if name == "gcs_server")
        os.kill(victim, signal.SIGKILL)
        _, complaints = process.communicate(timeout=400)
        assert process.returncode == 2, complaints
        (line,) = (line for line in complaints.splitlines() if line.startswith("anchorline: "))
        assert line.startswith(f"anchorline: the cluster is lost: its head (127.0.0.1:{port})"), complaints
        assert lines.read_bytes() == expected
        assert not below(process.pid)
    finally:
        for pid in (head.pid, *started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait()
