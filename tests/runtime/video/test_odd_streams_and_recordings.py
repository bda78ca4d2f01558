"""Odd streams, odd names, and recordings that must not overwrite anything."""

from __future__ import annotations

import functools
import sys
import threading
from fractions import Fraction
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from anchorline.runtime.io.errors import DataError, SettingsError
from anchorline.runtime.video import reader as stream_reader
from anchorline.runtime.video import sinks
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import VideoPipeline
from anchorline.runtime.video.reader import AvReader, StreamReader, VideoReader
from anchorline.runtime.video.sinks import AnnotatedFiles
from anchorline.runtime.video.source import Source, is_stdout, parse_source, plan

# Streams


@pytest.mark.parametrize("decoder", ["opencv", "pyav"])
def test_pictures_that_cannot_be_decoded_are_no_reason_to_reconnect(stub, camera, decoder):
    """One enters most streams between two key frames: the first packets cannot be decoded either."""
    if decoder == "pyav":
        pytest.importorskip("av")
    camera.mode = "damage"
    pipeline = VideoPipeline(stub(), [f"cam={camera.url}"], DetectOptions(decoder=decoder, stall=30.0))
    timer = threading.Timer(120.0, pipeline.stop)
    timer.start()
    count = 0
    for _ in pipeline:
        count += 1
        if count == 10:
            camera.mode = "damage"
        if count == 30:
            break
    timer.cancel()
    assert (count, camera.connections, pipeline.summary().reconnects) == (30, 1, 0)


class Capture:
    """An OpenCV capture whose decoder raises after three frames, or cannot be opened."""

    def __init__(self, opens=True):
        self.opens, self.grabbed = opens, 0

    def open(self, *arguments):
        if not self.opens:
            raise cv2.error("the driver fails")

    def isOpened(self):
        return self.opens

    def set(self, *arguments):
        pass

    def get(self, what):
        return 0.0

    def grab(self):
        self.grabbed += 1
        if self.grabbed > 3:
            raise cv2.error("the decoder fails")
        return True

    def retrieve(self):
        return True, np.zeros((4, 4, 3), np.uint8)

    def release(self):
        pass


@pytest.mark.parametrize("opens", [True, False])
def test_an_error_of_opencv_is_a_lost_connection(monkeypatch, opens):
    monkeypatch.setattr(stream_reader.cv2, "VideoCapture", functools.partial(Capture, opens))
    if opens:
        assert len(list(StreamReader(0, 1.0, "cam"))) == 3
    else:
        with pytest.raises(DataError, match="cam: cannot be opened"):
            StreamReader(0, 1.0, "cam")


class QuietFiles(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def file_server(tmp_path):
    handler = functools.partial(QuietFiles, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def read_remote(stub, url, decoder):
    if decoder == "pyav":
        pytest.importorskip("av")
    pipeline = VideoPipeline(stub(), [url], DetectOptions(decoder=decoder, stall=30.0))
    return [result.time_s for result in pipeline], pipeline.summary()


@pytest.mark.parametrize("decoder", ["opencv", "pyav"])
def test_a_remote_video_that_breaks_off_is_a_warning(
    stub, tmp_path, file_server, moving_frames, write_raw_video, decoder
):
    path = write_raw_video(tmp_path / "a.avi", moving_frames, "MJPG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    times, summary = read_remote(stub, f"{file_server}/a.avi", decoder)
    assert 0 < len(times) < 40
    assert any(f"{len(times)} of the 40 frames" in line for line in summary.warnings)


@pytest.mark.parametrize("decoder", ["opencv", "pyav"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_variable_frame_rate(stub, grey, tmp_path, file_server, decoder, remote):
    av_writer = pytest.importorskip("anchorline.runtime.video.writer")
    pytest.importorskip("av")
    expected = [0.0, 0.1, 0.5, 0.6, 2.0, 2.1]
    with av_writer.AvVideoWriter(tmp_path / "a.mp4", (48, 64), 10) as writer:
        for index, time_s in enumerate(expected):
            writer.write(grey(40 * index), time_s)
    where = f"{file_server}/a.mp4" if remote else str(tmp_path / "a.mp4")
    times, summary = read_remote(stub, where, decoder)
    assert times == pytest.approx(expected, abs=2e-3)
    assert summary.warnings == ()


def test_a_source_of_one_frame_and_one_of_none(stub, grey, tmp_path):
    sources = [Source([grey(1)], name="one"), Source([], name="none")]
    summary = VideoPipeline(
        stub(), sources, DetectOptions(save=tmp_path / "out", jsonl=tmp_path / "a.jsonl")
    ).run()
    assert {name: each["frames"] for name, each in summary.sources.items()} == {"one": 1, "none": 0}
    with VideoReader(tmp_path / "out" / "one.mp4") as reader:
        assert len(list(reader)) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".ts", ".mkv"])
def test_a_video_that_does_not_begin_at_zero(grey, tmp_path, suffix):
    """As what was cut out of a longer one; both decoders count from its first frame."""
    av = pytest.importorskip("av")
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if suffix == ".mp4" else "libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(12):
            frame = av.VideoFrame.from_ndarray(grey(20 * index), format="bgr24")
            frame.pts, frame.time_base = 30 + index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for reader in (AvReader(path), VideoReader(path)):
        assert [t for _, t, _ in reader] == pytest.approx([i / 10 for i in range(12)], abs=2e-3)
        # A matroska file states its length alone, and OpenCV counts from zero.
        assert all("or its rate varies" in line for line in reader.warnings)
        reader.close()


# What is written


def test_parts_of_a_camera_s_recording_spare_the_other_cameras_files(stub, grey, tmp_path):
    """Two streams of one host are called h and h-2, and a camera's second size h-2 as well."""

    def frames(level):
        yield grey(level)
        yield np.full((96, 128, 3), level, np.uint8)

    sources = [Source(frames(level), name=name) for name, level in (("h", 50), ("h-2", 200))]
    VideoPipeline(stub(), sources, DetectOptions(save=tmp_path)).run()
    found = {}
    for path in tmp_path.iterdir():
        with VideoReader(path) as reader:
            found[path.name] = (reader.size, round(float(next(iter(reader))[2][40:].mean()), -1))
    assert found == {
        "h.mp4": ((48, 64), 50),
        "h-3.mp4": ((96, 128), 50),
        "h-2.mp4": ((48, 64), 200),
        "h-2-2.mp4": ((96, 128), 200),
    }


def test_each_part_has_a_number_of_its_own(tmp_path):
    files = AnnotatedFiles([tmp_path / "a.mp4", tmp_path / "a-3.mp4"])
    names = [files._next_part(tmp_path / "a.mp4").name for _ in range(4)]
    assert names == ["a.mp4", "a-2.mp4", "a-4.mp4", "a-5.mp4"]


def test_nothing_overwrites_a_source_or_another_output(stub, tmp_path):
    for name in ("a/x.mp4", "b/x.mp4"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    first, second = tmp_path / "a/x.mp4", tmp_path / "b/x.mp4"
    with pytest.raises(SettingsError, match="would overwrite the source"):
        plan([first, second], tmp_path / "b")  # the copy of the first one
    with pytest.raises(SettingsError, match="would overwrite the source"):
        plan([f"x={first}", f"y={second}"], tmp_path / "b")
    (tmp_path / "link.jsonl").symlink_to(first)
    for jsonl in (first, tmp_path / "b/../a/x.mp4", tmp_path / "link.jsonl"):
        with pytest.raises(SettingsError, match="is a source, the model or another output"):
            VideoPipeline(stub(), [first], DetectOptions(jsonl=jsonl))
    with pytest.raises(SettingsError, match="is a source, the model or another output"):
        VideoPipeline(stub(), [first], DetectOptions(save=tmp_path / "out.mp4", jsonl=tmp_path / "out.mp4"))


def test_standard_output_is_never_a_file_to_be_replaced(tmp_path):
    """/dev/stdout looks like a file where it is redirected to one; a rename would replace the device."""
    assert is_stdout("/dev/stdout")
    assert is_stdout(Path("-"))
    assert not is_stdout(tmp_path / "-")
    assert not is_stdout(None)


def test_a_camera_with_an_endless_name(tmp_path):
    assert plan([f"{'x' * 300}=0"], tmp_path)[0].target is not None  # the writer says that it is too long


def test_without_time_stamps_a_stride_keeps_the_pace(
    stub, tmp_path, moving_frames, write_raw_video, monkeypatch
):
    monkeypatch.setitem(sys.modules, "av", None)
    video = write_raw_video(tmp_path / "a.mp4", moving_frames, fps=20.0)
    VideoPipeline(stub(), [video], DetectOptions(stride=4, save=tmp_path / "out.mp4")).run()
    with VideoReader(tmp_path / "out.mp4") as reader:
        assert (len(list(reader)), reader.fps) == (10, 5.0)  # two seconds, as before


def test_a_camera_s_recording_is_a_row_of_files(stub, grey, tmp_path, monkeypatch):
    """An mp4 without end would need memory without end, and be lost with its process."""
    monkeypatch.setattr(sinks, "LONGEST_PART", 10)
    frames = (grey(i) for i in range(25))
    camera = Source(frames, name="cam", live=True, policy="wait")
    clip = Source((grey(i) for i in range(25)), name="clip")
    VideoPipeline(stub(), [camera, clip], DetectOptions(save=tmp_path)).run()
    counts = {}
    for path in tmp_path.iterdir():
        with VideoReader(path) as reader:
            counts[path.name] = len(list(reader))
    assert counts == {"cam.mp4": 10, "cam-2.mp4": 10, "cam-3.mp4": 5, "clip.mp4": 25}


# Names


@pytest.mark.parametrize(
    ("text", "name", "where"),
    [
        ("Übersicht=0", "Übersicht", 0),
        ("a=b=c d.mp4", "a", "b=c d.mp4"),
        ("tür 1.mp4", "", "tür 1.mp4"),
        ("a=http://h/x?b=c&d=e", "a", "http://h/x?b=c&d=e"),
        ("9" * 5000, "", "9" * 5000),
    ],
)
def test_odd_names(text, name, where):
    source = parse_source(text)
    assert (source.name, source.where) == (name, where)


@pytest.mark.parametrize(
    ("text", "message"),
    [("http://[x", "no address"), ("a=rtsp://u:pw@[x/y", "no address"), ("777777", "webcam")],
)
def test_addresses_that_cannot_be(text, message):
    with pytest.raises(SettingsError, match=message) as caught:
        plan([text])
    assert "pw" not in str(caught.value)


def test_passwords_stay_out_of_messages():
    for url in ("rtsp://u:secret@host/x", "rtsp://u:secr@t@host/x", "rtsp://u:@secret@host/x"):
        shown = Source(url, name="cam").describe()
        assert shown == "cam (rtsp://host/x)"
