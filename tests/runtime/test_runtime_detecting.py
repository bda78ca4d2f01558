from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import DataError, OutputError, SettingsError
from anchorline.runtime.io.images import read_image, write_image
from anchorline.runtime.video import sinks
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import VideoPipeline, detect
from anchorline.runtime.video.reader import VideoReader
from anchorline.runtime.video.source import Source, plan

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def detector(model_path):
    with Detector(model_path, threads=1) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path, picture):
    path = tmp_path / "pictures"
    for name, image in [("a2.png", picture), ("a10.png", picture[:30]), ("b.jpg", picture)]:
        write_image(path / name, image)
    return path


@pytest.fixture
def video(tmp_path, video_frames, write_raw_video):
    return write_raw_video(tmp_path / "clip.mp4", video_frames)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_image(folder, tmp_path, detector):
    saved, lines = tmp_path / "out.png", tmp_path / "out.jsonl"
    summary = detect([folder / "a2.png"], detector, DetectOptions(save=saved, jsonl=lines), progress=False)
    picture = read_image(folder / "a2.png")
    found = detector(picture)
    assert read_lines(lines) == [
        {
            "source": str(folder / "a2.png"),
            "frame": 0,
            "time_s": 0.0,
            "size": [60, 80],
            "detections": json.loads(json.dumps(found.to_records())),
        }
    ]
    assert list(read_lines(lines)[0]["detections"][0]) == ["box", "score", "label", "name", "track_id"]
    annotated = read_image(saved)
    assert annotated.shape == picture.shape
    assert (annotated != picture).any()
    assert (summary.frames, summary.detections, summary.warnings) == (1, 2, ())


def test_a_folder(folder, tmp_path, detector):
    saved, lines = tmp_path / "out", tmp_path / "out.jsonl"
    summary = detect([folder], detector, DetectOptions(save=saved, jsonl=lines), progress=False)
    assert [os.path.basename(line["source"]) for line in read_lines(lines)] == ["a2.png", "a10.png", "b.jpg"]
    assert sorted(os.listdir(saved)) == ["a10.png", "a2.png", "b.jpg"]
    assert summary.frames == 3
    stages = ["decode", "preprocess", "upload", "network", "download", "postprocess", "draw", "write"]
    assert list(summary.stages) == stages
    assert all(0 <= t["p50"] <= t["p95"] <= t["p99"] < 60_000 for t in summary.stages.values())


def test_a_video(video, tmp_path, detector):
    saved, lines = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    summary = detect([video], detector, DetectOptions(save=saved, jsonl=lines), progress=False)
    rows = read_lines(lines)
    assert [row["frame"] for row in rows] == list(range(12))
    assert [row["time_s"] for row in rows] == pytest.approx([i / 10 for i in range(12)])
    scores = [row["detections"][0]["score"] for row in rows]
    assert scores == sorted(scores)  # the lower half gets lighter
    with VideoReader(saved) as reader:
        assert (reader.size, reader.fps, len(list(reader))) == ((48, 64), 10.0, 12)
    assert summary.frames == 12
    assert summary.fps > 0


def test_several_sources_of_every_kind(folder, video, tmp_path, detector):
    other = tmp_path / "other"
    write_image(other / "a2.png", np.zeros((9, 9, 3), np.uint8))
    saved = tmp_path / "out"
    summary = detect([folder, video, other / "a2.png"], detector, DetectOptions(save=saved), progress=False)
    assert sorted(os.listdir(saved)) == ["a10.png", "a2-2.png", "a2.png", "b.jpg", "clip.mp4"]
    assert read_image(saved / "a2-2.png").shape == (9, 9, 3)
    assert summary.frames == 16


def test_without_outputs_nothing_is_drawn_or_written(folder, detector):
    summary = detect([folder], detector, progress=False)
    assert "draw" not in summary.stages
    assert "write" not in summary.stages


def test_the_summary(folder, detector):
    from rich.console import Console

    summary = detect([folder], detector, progress=False)
    plain = json.loads(json.dumps(summary.to_json()))
    assert {"frames", "fps", "stages", "dropped", "provider", "precision"} <= set(plain)
    assert (plain["frames"], plain["dropped"], plain["provider"], plain["precision"]) == (3, 0, "cpu", "fp32")
    assert set(plain["stages"]["network"]) == {"p50", "p95", "p99"}
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(summary.render())
    text = console.export_text()
    assert "3 frames, 6 detections" in text
    assert "network" in text


def test_the_progress_bar_goes_to_stderr(folder, video, detector, capfd):
    detect([folder, video], detector)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "15/15" in captured.err


def test_an_unreadable_image_among_others_is_a_warning(folder, tmp_path, detector):
    (folder / "a3.png").write_bytes((folder / "a2.png").read_bytes()[:-30])
    (folder / "c.jpg").touch()
    lines = tmp_path / "out.jsonl"
    summary = detect([folder], detector, DetectOptions(save=tmp_path / "out", jsonl=lines), progress=False)
    assert summary.frames == len(read_lines(lines)) == 3
    assert [w.split(": ")[0] for w in summary.warnings] == [str(folder / "a3.png"), str(folder / "c.jpg")]
    assert summary.to_json()["warnings"] == list(summary.warnings)


def test_nothing_readable_is_an_error_and_leaves_nothing(tmp_path, detector):
    for name in ("a.png", "b.mp4"):
        (tmp_path / name).write_bytes(b"nonsense")
    for sources in (["a.png"], ["b.mp4"], ["a.png", "b.mp4"]):
        with pytest.raises(DataError, match=sources[0]):
            detect(
                [tmp_path / name for name in sources],
                detector,
                DetectOptions(save=tmp_path / "out", jsonl=tmp_path / "out.jsonl"),
            )
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.mp4"]


def test_a_damaged_video_goes_on_with_warnings(tmp_path, moving_frames, write_raw_video, detector):
    path = write_raw_video(tmp_path / "a.avi", moving_frames, "MJPG")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    saved = tmp_path / "out.mp4"
    summary = detect([path], detector, DetectOptions(save=saved), progress=False)
    assert 0 < summary.frames < 40
    assert f"{summary.frames} of the 40 frames" in summary.warnings[0]
    with VideoReader(saved) as reader:
        assert len(list(reader)) == summary.frames


@pytest.fixture
def stopped(monkeypatch):
    """Set once a pipeline reads no more."""
    event = threading.Event()
    for name in ("stop", "_abort"):  # the signal may come while the pipeline still starts
        end = getattr(VideoPipeline, name)
        monkeypatch.setattr(VideoPipeline, name, lambda self, end=end: end(self) or event.set())
    return event


class Interrupted:
    """A detector on which Ctrl-C falls during a certain call, as the main thread waits for results."""

    def __init__(self, detector, at, stopped=None):
        self.detector, self.at, self.calls, self.stopped = detector, at, 0, stopped
        self.provider, self.precision = detector.provider, detector.precision

    def batch(self, frames):
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGINT)
            assert self.stopped.wait(60.0)
        return self.detector.batch(frames)

    @property
    def timings(self):
        return self.detector.timings


def test_ctrl_c_finishes_the_files(tmp_path, video_frames, write_raw_video, detector, stopped):
    video = write_raw_video(tmp_path / "clip.mp4", video_frames * 10)
    saved, lines = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        detect(
            [video], Interrupted(detector, 6, stopped), DetectOptions(save=saved, jsonl=lines), progress=False
        )
    count = len(read_lines(lines))
    assert 6 <= count < 40  # what was read before is answered and written, and no more
    assert [line["frame"] for line in read_lines(lines)] == list(range(count))
    with VideoReader(saved) as reader:
        assert len(list(reader)) == count
    assert sorted(os.listdir(tmp_path)) == ["clip.mp4", "out.jsonl", "out.mp4"]


def test_ctrl_c_before_the_first_frame_leaves_no_empty_video(tmp_path, detector, stopped):
    def frames():
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped.wait(60.0)
        yield from ()

    with pytest.raises(KeyboardInterrupt):
        detect(
            [Source(frames(), name="a")], detector, DetectOptions(save=tmp_path / "out.mp4"), progress=False
        )
    assert os.listdir(tmp_path) == []


def test_ctrl_c_between_images(tmp_path, picture, detector, stopped):
    for index in range(30):
        write_image(tmp_path / "in" / f"{index}.png", picture)
    lines = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        detect(
            [tmp_path / "in"],
            Interrupted(detector, 3, stopped),
            DetectOptions(save=tmp_path / "out", jsonl=lines),
            progress=False,
        )
    assert 3 <= len(read_lines(lines)) == len(os.listdir(tmp_path / "out")) < 30


def test_an_error_of_the_detector_leaves_nothing(video, tmp_path, detector):
    class Broken(Interrupted):
        def batch(self, frames):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        detect(
            [video],
            Broken(detector, 0),
            DetectOptions(save=tmp_path / "o.mp4", jsonl=tmp_path / "o.jsonl"),
            progress=False,
        )
    assert os.listdir(tmp_path) == ["clip.mp4"]


FILL_THE_DISK = """
import resource, sys
from anchorline.runtime import detect, DetectOptions, Detector, OutputError
model, source, jsonl = sys.argv[1:]
detector = Detector(model)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    detect([source], detector, DetectOptions(jsonl=jsonl))
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_no_space_left_for_the_lines(video, tmp_path, model_path):
    command = [sys.executable, "-c", FILL_THE_DISK, str(model_path), str(video), str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "out.jsonl: cannot be written (File too large)" in done.stdout
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_no_space_left_for_an_image(folder, tmp_path, detector, monkeypatch):
    def full(path, image):
        raise OutputError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(sinks, "write_image", full)
    with pytest.raises(OutputError, match="No space left"):
        detect(
            [folder],
            detector,
            DetectOptions(save=tmp_path / "out", jsonl=tmp_path / "out.jsonl"),
            progress=False,
        )
    assert not (tmp_path / "out.jsonl").exists()


# What goes where, before anything is read


@pytest.mark.parametrize(
    ("sources", "save", "kind", "message"),
    [
        ([], None, SettingsError, "no sources given"),
        (["none.png"], None, DataError, "no such file or folder"),
        (["notes.txt"], None, DataError, "neither an image nor a video, by its content"),
        (["empty"], None, DataError, "no images in this folder"),
        (["a.png"], "out.mp4", SettingsError, "an image is saved as one of"),
        (["a.png"], "out.xyz", SettingsError, "an image is saved as one of"),
        (["a.mp4"], "out.avi", SettingsError, "a video is saved as .mp4"),
        (["a.mp4"], "out.png", SettingsError, "a video is saved as .mp4"),
        (["a.png", "b.png"], "out.png", SettingsError, "one file; several results need a folder"),
        (["a.png", "b.png"], "notes.txt", OutputError, "is a file; several results need a folder"),
        (["a.png"], "a.png", SettingsError, "would overwrite the source"),
        (["a.png", "b.png"], ".", SettingsError, "would overwrite the source"),
        (["a.mp4"], ".", SettingsError, "would overwrite the source"),
    ],
)
def test_plans_that_cannot_be(tmp_path, sources, save, kind, message):
    for name in ("a.png", "b.png", "a.mp4", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(kind, match=message):
        plan([tmp_path / s for s in sources], None if save is None else tmp_path / save)


def test_plans(tmp_path):
    for name in ("a.png", "b.avi", "in/a.png", "in/A.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def targets(sources, save):
        (files,) = plan([tmp_path / s for s in sources], tmp_path / save)
        items = files.items
        return [str(item.target.relative_to(tmp_path)) for item in items]

    assert targets(["a.png"], "x.jpg") == ["x.jpg"]
    assert targets(["a.png"], "out") == [os.path.join("out", "a.png")]
    assert targets(["b.avi"], "out") == [os.path.join("out", "b.mp4")]
    assert targets(["a.png", "in"], "out") == [
        os.path.join("out", name) for name in ("a.png", "A.jpg", "a-2.png")
    ]
    (files,) = plan([tmp_path / "b.avi", tmp_path / "a.png"])
    assert [item.is_video for item in files.items] == [True, False]
