from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from anchorline.runtime.io.errors import DataError, FrameError, OutputError, SettingsError
from anchorline.runtime.io.native_log import ffmpeg_lines
from anchorline.runtime.video.reader import VideoReader
from anchorline.runtime.video.writer import VideoWriter

ONE = 1 << 16
MATRICES = {90: (0, ONE, 0, -ONE, 0), 180: (-ONE, 0, 0, 0, -ONE), 270: (0, -ONE, 0, ONE, 0)}


def read(path):
    with VideoReader(path) as reader:
        frames = list(reader)
        return reader, frames


def rotate(content: bytes, degrees: int) -> bytes:
    """Set the display matrix in an mp4's track header (tkhd, version 0), as phones do."""
    a, b, u, c, d = MATRICES[degrees]
    matrix = struct.pack(">9i", a, b, u, c, d, 0, 0, 0, 1 << 30)
    start = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    return content[:start] + matrix + content[start + 36 :]


def overwrite(content: bytes, where: float, length: int) -> bytes:
    start = int(len(content) * where)
    return content[:start] + bytes(length) + content[start + length :]


def is_red(pixel: np.ndarray) -> bool:
    return bool(pixel[2] > 150 and pixel[0] < 80 and pixel[1] < 80)


def test_reading_a_whole_video(tmp_path, video_frames, write_raw_video):
    reader, frames = read(write_raw_video(tmp_path / "a.mp4", video_frames))
    assert (reader.size, reader.fps, reader.frame_count, reader.warnings) == ((48, 64), 10.0, 12, [])
    assert [index for index, _, _ in frames] == list(range(12))
    assert [time_s for _, time_s, _ in frames] == pytest.approx([index / 10 for index in range(12)])
    for (_, _, frame), written in zip(frames, video_frames, strict=True):
        assert frame.dtype == np.uint8
        assert abs(int(frame[40, 32, 0]) - int(written[40, 32, 0])) < 8


@pytest.mark.parametrize(
    ("degrees", "size", "corner"),
    [(90, (64, 48), (5, -5)), (180, (48, 64), (-5, -5)), (270, (64, 48), (-5, 5))],
)
def test_rotated_videos_come_upright(tmp_path, video_frames, write_raw_video, degrees, size, corner):
    path = write_raw_video(tmp_path / "a.mp4", video_frames)
    path.write_bytes(rotate(path.read_bytes(), degrees))
    reader, frames = read(path)
    assert reader.size == size
    assert len(frames) == 12
    for _, _, frame in frames:
        assert frame.shape[:2] == size
        assert is_red(frame[corner])
        assert sum(is_red(frame[y, x]) for y in (5, -5) for x in (5, -5)) == 1


def test_names_beyond_ascii(tmp_path, video_frames, write_raw_video):
    path = write_raw_video(tmp_path / "a.mp4", video_frames).rename(tmp_path / "Vidéo 图.mp4")
    assert len(read(path)[1]) == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"no video " * 50, "cannot be read as a video"),
        (b"\x00" * 999, "cannot be read"),
    ],
)
def test_what_is_no_video(tmp_path, content, message, capfd):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.mp4: .*{message}|{message}") as caught:
        VideoReader(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_missing_and_folder(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        VideoReader(tmp_path / "none.mp4")
    with pytest.raises(DataError, match="is a folder"):
        VideoReader(tmp_path)


def test_an_mp4_without_its_index(tmp_path, video_frames, write_raw_video):
    path = write_raw_video(tmp_path / "a.mp4", video_frames)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"cut off or no video|no frame"):
        VideoReader(path)


def test_a_video_without_a_frame(tmp_path, video_frames, write_raw_video):
    path = write_raw_video(tmp_path / "a.avi", video_frames, "MJPG")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"movi") + 4])
    with pytest.raises(DataError, match=r"a\.avi: "):
        VideoReader(path)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_video_that_ends_early(tmp_path, moving_frames, write_raw_video, kept, capfd):
    path = write_raw_video(tmp_path / "a.avi", moving_frames, "MJPG")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    reader, frames = read(path)
    assert 0 < len(frames) < 40
    assert any(f"{len(frames)} of the 40 frames that its header promises" in w for w in reader.warnings)
    assert all("\n" not in w and str(path) in w for w in reader.warnings)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "fourcc"), [("a.mp4", "mp4v"), ("a.avi", "MJPG")])
@pytest.mark.parametrize("where", [0.3, 0.5, 0.7])
def test_damage_in_the_middle_is_read_past_and_reported(
    tmp_path, moving_frames, write_raw_video, name, fourcc, where, capfd
):
    path = write_raw_video(tmp_path / name, moving_frames, fourcc)
    path.write_bytes(overwrite(path.read_bytes(), where, 400))
    reader, frames = read(path)
    assert len(frames) >= 36
    assert reader.warnings
    # Where the damage hits a container's own header, the packet is gone without a trace.
    assert 38 <= frames[-1][0] <= 39
    assert frames[-1][1] == pytest.approx(frames[-1][0] / 10)
    np.testing.assert_array_equal(np.diff([index for index, _, _ in frames]) > 0, True)
    assert capfd.readouterr() == ("", "")


def test_frames_lost_in_the_middle_keep_the_numbers_of_the_others(tmp_path, moving_frames, write_raw_video):
    """An AVI packet without content gives no frame; those after it keep their index and time."""
    path = write_raw_video(tmp_path / "a.avi", moving_frames, "MJPG")
    content = bytearray(path.read_bytes())
    start = content.index(b"00dc", content.index(b"movi"))
    for _ in range(20):
        start = content.index(b"00dc", start + 4)
    length = struct.unpack("<I", content[start + 4 : start + 8])[0]
    content[start + 8 : start + 8 + length] = bytes(length)
    path.write_bytes(content)
    reader, frames = read(path)
    assert [index for index, _, _ in frames] == [i for i in range(40) if i != 20]
    assert [time_s for _, time_s, _ in frames] == pytest.approx([i / 10 for i in range(40) if i != 20])
    assert "39 of the 40 frames" in reader.warnings[0]


def test_stopping_early_is_no_damage(tmp_path, video_frames, write_raw_video):
    with VideoReader(write_raw_video(tmp_path / "a.mp4", video_frames)) as reader:
        next(iter(reader))
        assert reader.warnings == []
    reader.close()


# The writer


@pytest.mark.parametrize("size", [(48, 64), (47, 64), (48, 63), (1, 1), (1, 501), (2, 2)])
def test_writing_any_size(tmp_path, size):
    path = tmp_path / "new" / "a.mp4"
    with VideoWriter(path, size, 29.97) as writer:
        for level in range(0, 250, 25):
            writer.write(np.full((*size, 3), level, np.uint8))
        assert not path.exists()
    reader, frames = read(path)
    assert reader.size == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert reader.fps == pytest.approx(29.97)
    levels = [int(frame[: size[0], : size[1]].mean()) for _, _, frame in frames]
    assert np.abs(np.array(levels) - np.arange(0, 250, 25)).max() < 8
    assert os.listdir(path.parent) == ["a.mp4"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_a_block_that_raises_leaves_what_was_there(tmp_path, video_frames, error):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"before")

    def write_and_fail():
        with VideoWriter(path, (48, 64), 10) as writer:
            writer.write(video_frames[0])
            raise error

    with pytest.raises(type(error)):
        write_and_fail()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_without_a_frame_there_is_no_file(tmp_path):
    with (
        pytest.raises(OutputError, match="no frame was written"),
        VideoWriter(tmp_path / "a.mp4", (48, 64), 10),
    ):
        pass
    assert os.listdir(tmp_path) == []


FILL_THE_DISK = """
import resource, sys
import numpy as np
from anchorline.runtime import OutputError, VideoWriter
limit, size = int(sys.argv[2]), (240, 320)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
try:
    with VideoWriter(sys.argv[1], size, 10) as writer:
        for _ in range(30):
            writer.write(noise)
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
@pytest.mark.parametrize("limit", [0, 1000, 50_000, 200_000])
def test_no_space_left(tmp_path, limit):
    """A limit on the size of files stands for a disk that fills up."""
    path = tmp_path / "a.mp4"
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(path), str(limit)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "a.mp4: " in done.stdout
    assert "free space" in done.stdout
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert os.listdir(tmp_path) == []


def test_a_file_that_lacks_frames_is_not_published(tmp_path, video_frames):
    path = tmp_path / "a.mp4"
    writer = VideoWriter(path, (48, 64), 10)
    writer.write(video_frames[0])
    writer.frames = 2
    with pytest.raises(OutputError, match="only 1 of 2 frames could be written"):
        writer.close()
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_is_refused(tmp_path, video_frames):
    with pytest.raises(OutputError, match=r"unknown video suffix '.avi'; expected .mp4"):
        VideoWriter(tmp_path / "a.avi", (48, 64), 10)
    for fps in (0, -1, float("nan"), float("inf"), 1e9):
        with pytest.raises(SettingsError, match="frame rate is"):
            VideoWriter(tmp_path / "a.mp4", (48, 64), fps)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        VideoWriter(tmp_path / "file" / "a.mp4", (48, 64), 10)
    with VideoWriter(tmp_path / "a.mp4", (48, 64), 10) as writer:
        writer.write(video_frames[0])
        with pytest.raises(FrameError, match=r"Expected frames of 64x48 .* got 32x24"):
            writer.write(video_frames[0][:24, :32])
        with pytest.raises(FrameError, match="got None"):
            writer.write(None)
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "file"]


def test_writing_prints_nothing(tmp_path, video_frames, capfd):
    with VideoWriter(tmp_path / "a.mp4", (48, 64), 10) as writer:
        writer.write(video_frames[0])
    assert capfd.readouterr() == ("", "")


# The log that is caught meanwhile


def test_ffmpeg_s_lines_are_kept_and_the_rest_is_passed_on(capfd):
    with ffmpeg_lines() as lines:
        os.write(2, b"[h264 @ 0x12ab] one\nother\n[mov,mp4 @ 0xfe] two\nrest")
    assert lines == ["[h264 @ 0x12ab] one", "[mov,mp4 @ 0xfe] two"]
    with ffmpeg_lines() as lines:
        pass
    assert lines == []
    assert capfd.readouterr().err == "other\nrest"


def test_stderr_comes_back_after_an_error_and_threads_get_their_own_lines(capfd):
    with pytest.raises(ZeroDivisionError), ffmpeg_lines():
        raise ZeroDivisionError

    def work(number):
        for _ in range(200):
            with ffmpeg_lines() as lines:
                os.write(2, b"[h264 @ 0x%d] x\n" % number)
            assert lines == [f"[h264 @ 0x{number}] x"]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    os.write(2, b"visible\n")
    assert capfd.readouterr().err == "visible\n"


def test_one_file_is_read_while_frames_of_another_are_written(tmp_path, video_frames):
    """A decoder that holds stderr holds no encoder up."""
    writer = VideoWriter(tmp_path / "a.mp4", (48, 64), 10)
    with ThreadPoolExecutor(1) as pool, ffmpeg_lines():
        pool.submit(writer.write, video_frames[0]).result(timeout=60.0)
    writer.close()


def test_blocks_exclude_each_other():
    entered = threading.Event()

    def work():
        with ffmpeg_lines():
            entered.set()

    thread = threading.Thread(target=work)
    with ffmpeg_lines():
        thread.start()
        assert not entered.wait(0.1)
    thread.join(60.0)
    assert entered.is_set()


def test_a_picture_size_that_changes_is_reported(tmp_path, video_frames, write_raw_video, monkeypatch):
    path = write_raw_video(tmp_path / "a.mp4", video_frames)
    with VideoReader(path) as reader:
        real = reader._next
        monkeypatch.setattr(
            reader,
            "_next",
            lambda: None if (timed := real()) is None else (timed[0], cv2.resize(timed[1], (32, 24))),
        )
        shapes = {frame.shape for _, _, frame in reader}
        assert shapes == {(48, 64, 3)}
        assert "the picture size changes at frame 1" in reader.warnings[0]
