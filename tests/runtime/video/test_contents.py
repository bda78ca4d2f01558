"""What a file is, its content decides and not its name; and whatever stands in it, reading ends."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from anchorline.bench.work import load_frames
from anchorline.data.dataset import images_or_video
from anchorline.runtime.io.errors import DataError
from anchorline.runtime.io.images import find_inputs, read_image
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import detect
from anchorline.runtime.video.reader import VideoReader, open_file
from anchorline.runtime.video.source import plan

FRAMES = 5
ENCODERS = {"mp4": "mpeg4", "gif": "gif", "apng": "apng", "h264": "libx264", "mpegts": "mpeg2video"}


def encode(path: Path, form: str, codec: str, frames: int = FRAMES) -> Path:
    """A clip of a grey that rises by 40 a frame."""
    av = pytest.importorskip("av")
    try:
        encoder = av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 64, encoder.video_formats[0].name
        for number in range(frames):
            pixels = np.full((64, 128, 3), 40 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="bgr24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def av1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("av1") / "a.mp4", "mp4", "libsvtav1")


@pytest.mark.parametrize("form", ENCODERS)
@pytest.mark.parametrize("suffix", ["own", ".jpg", ".mp4", ".data"])
def test_videos_under_any_name(tmp_path, form, suffix):
    path = encode(tmp_path / "clip", form, ENCODERS[form])
    path = path.rename(path.with_suffix(f".{form}" if suffix == "own" else suffix))
    assert find_inputs(path) == [(path, True)]
    with open_file(path, is_video=True) as reader:
        levels = [int(frame.mean()) for _, _, frame in reader]
    assert levels == pytest.approx([40 * number for number in range(FRAMES)], abs=12)
    assert len(images_or_video([path], ("thing",))) == len(load_frames(str(path))) == FRAMES
    assert plan([path], tmp_path / "out")[0].target is None
    assert plan([path], tmp_path / "out")[0].items[0].target == tmp_path / "out" / "clip.mp4"
    if form in ("mp4", "h264"):  # of the others OpenCV reads a first frame
        with pytest.raises(DataError, match="is a video; expected an undamaged image"):
            read_image(path)


@pytest.mark.parametrize("decoder", ["opencv", "pyav"])
def test_an_animation_that_was_cut_off_is_told_of(tmp_path, decoder):
    path = encode(tmp_path / "clip.png", "apng", "apng")
    for kept, told in ((1.0, []), (0.6, [f"{path}: truncated: the PNG stops before its IEND chunk; "])):
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
        with open_file(path, is_video=True, decoder=decoder) as reader:
            frames = sum(1 for _ in reader)
            assert [line for line in reader.warnings if "truncated" in line] == [
                line + "what is left of it is read" for line in told
            ]
        assert 0 < frames < FRAMES if told else frames == FRAMES


def test_an_empty_name_is_not_the_folder_one_is_in(tmp_path, picture, monkeypatch):
    (tmp_path / "a.png").write_bytes(cv2.imencode(".png", picture)[1].tobytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="nothing is given, expected the path of a file"):
        images_or_video(["a.png", ""], ("thing",))


@pytest.mark.parametrize(
    ("kind", "suffix"), [(".jpg", ".mp4"), (".png", ".jpg"), (".bmp", ""), (".png", ".gif")]
)
def test_pictures_under_any_name(tmp_path, picture, kind, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(cv2.imencode(kind, picture)[1].tobytes())
    assert find_inputs(path) == [(path, False)]
    assert images_or_video([path], ("thing",)).images[0].size == picture.shape[:2]
    assert np.abs(load_frames(str(path))[0].astype(int) - picture).mean() < 12
    target = plan([path], tmp_path / "out")[0].items[0].target
    assert target == tmp_path / "out" / f"a{suffix if suffix == '.jpg' else '.png'}"


@pytest.mark.parametrize("frames", [1, 2])
def test_a_png_is_a_video_if_it_says_so_and_holds_several_frames(tmp_path, picture, frames):
    content = cv2.imencode(".png", picture)[1].tobytes()
    chunk = b"acTL" + struct.pack(">II", frames, 0)
    place = content.index(b"IDAT") - 4
    path = tmp_path / "a.png"
    path.write_bytes(content[:place] + struct.pack(">I12sI", 8, chunk, zlib.crc32(chunk)) + content[place:])
    assert find_inputs(path) == [(path, frames > 1)]


@pytest.mark.parametrize("name", ["f%04d.png", "f%d.png"])
def test_a_row_of_numbered_pictures(stub, tmp_path, grey, name):
    for number in (2, 10, 9):
        cv2.imwrite(str(tmp_path / f"f{number:04}.png"), grey(number))
    cv2.imwrite(str(tmp_path / "g0001.png"), grey(1))
    found = [(tmp_path / f"f{number:04}.png", False) for number in (2, 9, 10)]
    assert find_inputs(tmp_path / name) == found
    assert [frame[0, 0, 0] for frame in load_frames(str(tmp_path / name))] == [2, 9, 10]
    assert len(images_or_video([str(tmp_path / name)], ("thing",))) == 3
    summary = detect([tmp_path / name], stub(), DetectOptions(save=tmp_path / "out"), progress=False)
    assert (summary.frames, len(list((tmp_path / "out").iterdir()))) == (3, 3)
    with pytest.raises(DataError, match="no images of such names"):
        find_inputs(tmp_path / "h%d.png")


def test_av1_is_read_with_pyav(stub, av1):
    assert len(images_or_video([av1], ("thing",))) == len(load_frames(str(av1))) == FRAMES
    summary = detect([av1], stub(), DetectOptions(), progress=False)
    assert (summary.frames, summary.warnings) == (FRAMES, ())


def test_av1_by_its_address_is_read_with_pyav(stub, av1):
    summary = detect([f"file://{av1}"], stub(), DetectOptions(), progress=False)
    assert (summary.frames, summary.warnings) == (FRAMES, ())


def test_av1_without_pyav_is_not_called_damaged(stub, av1, monkeypatch):
    with contextlib.suppress(DataError), VideoReader(av1):
        pytest.skip("this OpenCV decodes AV1")
    monkeypatch.setitem(sys.modules, "av", None)
    for read in (VideoReader, lambda path: images_or_video([path], ("thing",)), load_frames):
        with pytest.raises(DataError, match=r"AV1.*pip install 'anchorline\[video\]'") as caught:
            read(str(av1))
        assert "damaged" not in str(caught.value)


# Reads what seeds make of files: any frames, or one of our errors. In a process of its own, which a fault of
# a decoder would end.
READ = """
import random, sys
from pathlib import Path
from anchorline.runtime.io.errors import AnchorlineError
from anchorline.runtime.io.images import find_inputs
from anchorline.runtime.video.reader import open_file
read = refused = 0
for path in sys.argv[2:]:
    whole = Path(path).read_bytes()
    for seed in range(int(sys.argv[1])):
        chance = random.Random(f"{Path(path).suffix} {seed}")
        content = bytearray(whole)
        for _ in range(chance.choice((1, 4, 40))):
            content[chance.randrange(len(content))] = chance.randrange(256)
        if chance.random() < 0.3:
            del content[chance.randrange(len(content)) :]
        mutated = Path(path).with_name("mutated" + chance.choice((Path(path).suffix, ".jpg", ".mp4")))
        mutated.write_bytes(content)
        for decoder in ("opencv", "pyav"):
            try:
                for each, is_video in find_inputs(mutated):
                    with open_file(each, is_video, decoder) as reader:
                        assert sum(frame.shape[2] == 3 for _, _, frame in reader) < 1000
                        assert all(chr(10) not in line for line in reader.warnings)
                read += 1
            except AnchorlineError as error:
                assert chr(10) not in str(error), error
                refused += 1
        mutated.unlink()
print(read > 100, refused > 100)
"""


def test_mutated_files_are_read_or_refused(tmp_path, picture):
    paths = [encode(tmp_path / f"a.{form}", form, codec) for form, codec in ENCODERS.items()]
    for suffix in (".jpg", ".png"):
        paths.append(tmp_path / f"b{suffix}")
        cv2.imwrite(str(paths[-1]), picture)
    arguments = [sys.executable, "-c", READ, "40", *map(str, paths)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr[-2000:]


@pytest.mark.parametrize("form", ENCODERS)
@pytest.mark.parametrize("decoder", ["opencv", "pyav"])
def test_pictures_beyond_the_limit_are_refused_in_videos_too(tmp_path, monkeypatch, form, decoder):
    path = encode(tmp_path / f"a.{form}", form, ENCODERS[form])
    monkeypatch.setenv("ANCHORLINE_MAX_PIXELS", str(128 * 64 - 1))
    with pytest.raises(DataError, match=r"the image is 128x64, more than the 8191 pixels that are read"):
        open_file(path, is_video=True, decoder=decoder)
    monkeypatch.setenv("ANCHORLINE_MAX_PIXELS", str(128 * 64))
    open_file(path, is_video=True, decoder=decoder).close()


def test_a_small_gif_that_claims_much_is_refused(tmp_path):
    path = encode(tmp_path / "a.gif", "gif", "gif")
    content = bytearray(path.read_bytes())
    content[6:10] = struct.pack("<HH", 65_535, 65_535)
    path.write_bytes(content)
    with pytest.raises(DataError, match="the image is 65535x65535, more than the 178956970 pixels"):
        images_or_video([path], ("thing",))
