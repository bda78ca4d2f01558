"""PyAV's reader and writer, files that are damaged, disks that are full, the pictures and the display."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest

from anchorline.runtime.io.errors import DataError, OutputError, SettingsError
from anchorline.runtime.timing import Durations
from anchorline.runtime.video import writer as av_writer
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import VideoPipeline, detect
from anchorline.runtime.video.reader import AvReader, VideoReader
from anchorline.runtime.video.source import Source
from anchorline.runtime.video.writer import AvVideoWriter, VideoWriter, open_writer

av = pytest.importorskip("av", reason="needs PyAV: pip install 'anchorline[video]'")


def read(path, reader=AvReader):
    opened = reader(path)
    frames = list(opened)
    opened.close()
    return opened, frames


def test_both_decoders_read_the_same(tmp_path, moving_frames, write_raw_video):
    path = write_raw_video(tmp_path / "a.mp4", moving_frames)
    ours, frames = read(path)
    theirs, expected = read(path, VideoReader)
    assert (ours.size, ours.fps, ours.frame_count, ours.warnings) == (
        theirs.size, theirs.fps, theirs.frame_count, [],
    )  # fmt: skip
    assert [index for index, _, _ in frames] == [index for index, _, _ in expected]
    assert [t for _, t, _ in frames] == pytest.approx([t for _, t, _ in expected])
    for (_, _, frame), (_, _, other) in zip(frames, expected, strict=True):
        assert np.abs(frame.astype(int) - other).max() <= 4  # two conversions from YUV


def test_pyav_turns_rotated_videos_upright(tmp_path, video_frames, write_raw_video):
    path = write_raw_video(tmp_path / "a.mp4", video_frames)
    content = path.read_bytes()
    start = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    one = 1 << 16
    for a, b, c, d in ((0, one, -one, 0), (-one, 0, 0, -one), (0, -one, one, 0)):
        matrix = b"".join(v.to_bytes(4, "big", signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
        path.write_bytes(content[:start] + matrix + content[start + 36 :])
        _, ours = read(path)
        _, expected = read(path, VideoReader)
        assert ours[0][2].shape == expected[0][2].shape
        assert np.abs(ours[0][2].astype(int) - expected[0][2]).mean() < 3


@pytest.mark.parametrize("decoder", ["opencv", "pyav"])
def test_a_file_cut_off_in_the_middle(stub, tmp_path, moving_frames, write_raw_video, decoder):
    path = write_raw_video(tmp_path / "a.avi", moving_frames, "MJPG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    saved = tmp_path / "out.mp4"
    summary = VideoPipeline(stub(), [path], DetectOptions(save=saved, decoder=decoder)).run()
    assert 0 < summary.frames < 40
    assert any("of the 40 frames" in line or "damaged" in line for line in summary.warnings)
    with VideoReader(saved) as reader:
        assert len(list(reader)) == summary.frames


@pytest.mark.parametrize("where", [0.3, 0.5, 0.7])
def test_pyav_reads_past_damage_and_reports_it(tmp_path, moving_frames, write_raw_video, where):
    path = write_raw_video(tmp_path / "a.mp4", moving_frames)
    content = bytearray(path.read_bytes())
    start = int(len(content) * where)
    content[start : start + 400] = bytes(400)
    path.write_bytes(content)
    reader, frames = read(path)
    assert len(frames) >= 36
    assert reader.warnings
    assert all("\n" not in line and str(path) in line for line in reader.warnings)


@pytest.mark.parametrize("content", [b"", b"no video " * 50, bytes(999)])
def test_pyav_and_what_is_no_video(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.mp4: ") as caught:
        AvReader(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"none\.mp4"):
        AvReader(tmp_path / "none.mp4")


def test_without_pyav(monkeypatch, stub, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SettingsError, match=r"pip install 'anchorline\[video\]'"):
        VideoPipeline(stub(), ["0"], DetectOptions(decoder="pyav"))
    with open_writer(tmp_path / "a.mp4", (48, 64), 10) as writer:
        assert type(writer) is VideoWriter
        writer.write(np.zeros((48, 64, 3), np.uint8), 0.0)


# Writing H.264


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (1, 1), (2, 301)])
def test_h264_holds_every_frame_of_any_size(tmp_path, size):
    path = tmp_path / "new" / "a.mp4"
    with open_writer(path, size, 29.97) as writer:
        assert isinstance(writer, AvVideoWriter)
        for level in range(0, 250, 25):
            writer.write(np.full((*size, 3), level, np.uint8))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.frames) == ("h264", 10)
        assert float(stream.average_rate) == pytest.approx(29.97, rel=1e-3)
    _, frames = read(path, VideoReader)
    levels = [int(frame[: size[0], : size[1]].mean()) for _, _, frame in frames]
    assert np.abs(np.array(levels) - np.arange(0, 250, 25)).max() < 8
    assert os.listdir(path.parent) == ["a.mp4"]


def test_h264_frames_keep_their_times(tmp_path, grey):
    """A camera that drops frames keeps its pace; times that run backwards still give every frame."""
    path = tmp_path / "a.mp4"
    times = [3.0, 3.1, 3.5, 3.4, 4.0, 9.0]
    with AvVideoWriter(path, (48, 64), 10) as writer:
        for index, time_s in enumerate(times):
            writer.write(grey(40 * index), time_s)
    _, frames = read(path)
    found = [time_s - frames[0][1] for _, time_s, _ in frames]
    assert found == pytest.approx([0, 0.1, 0.5, 0.5, 1.0, 6.0], abs=1e-3)


def test_the_annotated_copy_has_the_source_s_frames_and_duration(
    stub, tmp_path, moving_frames, write_raw_video
):
    source, saved = write_raw_video(tmp_path / "a.mp4", moving_frames, fps=12.5), tmp_path / "out.mp4"
    VideoPipeline(stub(), [source], DetectOptions(save=saved)).run()
    lengths = []
    for path in (source, saved):
        with av.open(str(path)) as container:
            lengths.append((container.streams.video[0].frames, container.duration))
    assert lengths[0][0] == lengths[1][0] == 40
    assert lengths[0][1] == pytest.approx(lengths[1][1], abs=1e4)  # microseconds


FILL_THE_DISK = """
import resource, sys
import numpy as np
from anchorline.runtime import Detections, DetectOptions, OutputError, Source, VideoPipeline
class Stub:
    def batch(self, frames):
        return [Detections.empty() for _ in frames]
generator = np.random.default_rng(0)
frames = (generator.integers(0, 256, (240, 320, 3), dtype=np.uint8) for _ in range(60))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    VideoPipeline(Stub(), [Source(frames, name="a")], DetectOptions(save=sys.argv[1])).run()
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
@pytest.mark.parametrize("limit", [0, 100_000])
def test_the_disk_fills_up_while_writing(tmp_path, limit):
    """A limit on the size of files stands for a full disk; the first part is flushed long before the end."""
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(tmp_path / "a.mp4"), str(limit)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "a.mp4: " in done.stdout
    assert "free space" in done.stdout
    assert done.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_lines_on_a_full_disk(stub, grey, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, a disk that is always full")
    with pytest.raises(OutputError, match="No space left"):
        VideoPipeline(stub(), [Source([grey(0)], name="a")], DetectOptions(jsonl="/dev/full")).run()


def test_lines_to_a_pipe_come_at_once(stub, grey, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    pipeline = VideoPipeline(stub(), [Source([grey(0), grey(1)], name="a")], DetectOptions(jsonl=pipe))
    results = iter(pipeline)
    next(results)
    assert json.loads(os.read(descriptor, 10_000).splitlines()[0])["source"] == "a"
    list(results)
    os.close(descriptor)


# The picture, the display, the percentiles


def test_the_report_is_a_picture(stub, video_frames, write_raw_video, tmp_path):
    video = write_raw_video(tmp_path / "a.mp4", video_frames)
    report = tmp_path / "latency.png"
    detect([video], stub(cost=0.001), DetectOptions(report=report), progress=False)
    picture = cv2.imread(str(report))
    assert picture.shape[0] > 400
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    with pytest.raises(OutputError, match=r"unknown suffix of a report; expected one of \.png"):
        detect([video], stub(), DetectOptions(report=tmp_path / "a.txt"), progress=False)


def test_the_report_without_matplotlib(stub, video_frames, write_raw_video, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    video = write_raw_video(tmp_path / "a.mp4", video_frames)
    with pytest.raises(SettingsError, match=r"pip install 'anchorline\[evaluate\]'"):
        detect([video], stub(), DetectOptions(report=tmp_path / "a.png"), progress=False)


def test_the_display_of_several_sources(stub, grey, capfd, tmp_path, video_frames, write_raw_video):
    video = write_raw_video(tmp_path / "a.mp4", video_frames)
    sources = [Source((grey(i) for i in range(30)), name="door", live=True, policy="wait"), video]
    detect(sources, stub(), progress=True)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "door" in shown.err
    assert "42" in shown.err


def test_percentiles_of_very_many_durations_stay_within_one_percent():
    durations = Durations()
    values = np.random.default_rng(0).lognormal(-4, 1.5, 40_000)
    for value in values:
        durations.add(float(value))
    assert len(durations) == 40_000
    exact = {f"p{p}": 1000 * np.percentile(values, p) for p in (50, 95, 99)}
    assert durations.percentiles() == pytest.approx(exact, rel=0.011)
    for value in (0.0, 1e-12, 1e9):
        durations.add(value)
    assert len(durations) == 40_003


def test_the_writer_that_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(av_writer, "_CODEC", "no such codec")
    assert type(open_writer(tmp_path / "a.mp4", (4, 4), 5)) is VideoWriter


@pytest.mark.parametrize("decoder", ["opencv", "pyav"])
def test_a_video_file_on_a_server(stub, tmp_path, video_frames, write_raw_video, decoder):
    """Read once, every frame, at the file's own times."""
    write_raw_video(tmp_path / "a.mp4", video_frames)
    handler = functools.partial(QuietFiles, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.mp4"
        results = list(VideoPipeline(stub(), [url], DetectOptions(decoder=decoder, stall=30.0)))
        with pytest.raises(DataError, match=r"127\.0\.0\.1"):
            VideoPipeline(
                stub(), [url.replace("a.mp4", "b.mp4")], DetectOptions(decoder=decoder, stall=30.0)
            ).run()
        server.shutdown()
    assert [result.index for result in results] == list(range(12))
    assert [result.time_s for result in results] == pytest.approx([i / 10 for i in range(12)])


class QuietFiles(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass
