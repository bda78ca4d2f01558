from __future__ import annotations

import functools
import io
import os
import struct
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anchorline.runtime.io import images
from anchorline.runtime.io.errors import DataError, OutputError, SettingsError
from anchorline.runtime.io.image_bytes import find_damage, read_header
from anchorline.runtime.io.images import (
    decode_image,
    find_images,
    is_image,
    is_video,
    read_image,
    unused_bits,
    write_image,
)
from anchorline.runtime.io.native_log import quiet_opencv

# What each EXIF orientation says was done to the picture, as a function of the upright one.
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


def encode(suffix: str, image: np.ndarray, *options: int) -> bytes:
    done, content = cv2.imencode(suffix, np.ascontiguousarray(image), list(options))
    assert done
    return content.tobytes()


def exif(orientation: int) -> bytes:
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"MM\x00\x2a" + struct.pack(">IH", 8, 1) + entry + bytes(4)


def jpeg_with_orientation(image: np.ndarray, orientation: int) -> bytes:
    content = encode(".jpg", image, cv2.IMWRITE_JPEG_QUALITY, 100)
    body = b"Exif\x00\x00" + exif(orientation)
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + content[2:]


def png_with_orientation(image: np.ndarray, orientation: int) -> bytes:
    content = encode(".png", image)
    body = b"eXIf" + exif(orientation)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    after_header = 8 + 25
    return content[:after_header] + chunk + content[after_header:]


def test_the_content_of_a_file_is_decoded_as_the_file_is_read(tmp_path: Path) -> None:
    content = jpeg_with_orientation(np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8), 6)
    (tmp_path / "a.jpg").write_bytes(content)
    assert decode_image(content).shape == (31, 20, 3)
    np.testing.assert_array_equal(decode_image(content), read_image(tmp_path / "a.jpg"))
    for damaged in (b"", content[:200], b"text"):
        with pytest.raises(DataError, match=r"^image 3: "):
            decode_image(damaged, "image 3")


def test_no_content_is_decoded_that_is_longer_than_images_are(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode(".png", np.zeros((4, 4, 3), np.uint8))
    monkeypatch.setenv("ANCHORLINE_MAX_PIXELS", "1")
    with pytest.raises(DataError, match="ANCHORLINE_MAX_PIXELS"):
        decode_image(content + bytes(1000))


@pytest.mark.parametrize("orientation", sorted(STORED))
@pytest.mark.parametrize(
    ("name", "build", "tolerance"),
    [("a.jpg", jpeg_with_orientation, 10.0), ("a.png", png_with_orientation, 0.0)],
)
def test_exif_orientation_is_applied(tmp_path, picture, orientation, name, build, tolerance):
    path = tmp_path / name
    path.write_bytes(build(STORED[orientation](picture), orientation))
    image = read_image(path)
    assert image.shape == picture.shape
    assert np.abs(image.astype(int) - picture).mean() <= tolerance  # JPEG blurs colour at the patches' edges


def test_grey_alpha_and_sixteen_bit_become_bgr_uint8(tmp_path, picture):
    grey = picture[..., 0]
    deep = grey.astype(np.uint16) * 257
    alpha = np.dstack([picture, np.zeros(grey.shape, np.uint8)])
    for name, stored, expected in [
        ("grey.png", grey, np.dstack([grey] * 3)),
        ("grey.jpg", np.full((20, 30), 90, np.uint8), np.full((20, 30, 3), 90)),
        ("rgba.png", alpha, picture),
        ("deep.png", deep, np.dstack([grey] * 3)),
        ("deep_colour.png", picture.astype(np.uint16) * 257, picture),
        ("deep_colour.tif", picture.astype(np.uint16) * 257, picture),
    ]:
        path = tmp_path / name
        path.write_bytes(encode(path.suffix, stored))
        image = read_image(path)
        assert (image.dtype, image.shape) == (np.uint8, expected.shape), name
        assert np.abs(image.astype(int) - expected).max() <= 1, name


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_extreme_sizes(tmp_path, size, suffix):
    path = tmp_path / f"a{suffix}"
    write_image(path, np.full((*size, 3), 128, np.uint8))
    assert read_image(path).shape == (*size, 3)


def test_names_beyond_ascii(tmp_path, picture):
    path = tmp_path / "Bild-å-图-🙂 1.png"
    write_image(path, picture)
    np.testing.assert_array_equal(read_image(path), picture)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif", ".ppm"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path, picture, suffix, kept):
    content = encode(suffix, cv2.resize(picture, (320, 240)))
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(content[: int(len(content) * kept)] if kept > 0 else content[:kept])
    with pytest.raises(DataError, match=r"cut\.\w+: ") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_a_thumbnails_end_is_not_the_pictures(picture):
    """A JPEG cut in its pixels, whose EXIF holds a whole JPEG with its own end marker."""
    content, thumbnail = encode(".jpg", picture), encode(".jpg", picture[:8, :8])
    body = b"Exif\x00\x00" + thumbnail
    content = content[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + content[2:]
    assert find_damage(content) is None
    assert "truncated" in find_damage(content[:-100])


@pytest.mark.parametrize(
    "options",
    [
        (),
        (cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        (cv2.IMWRITE_JPEG_RST_INTERVAL, 4),
        (cv2.IMWRITE_JPEG_OPTIMIZE, 1),
    ],
)
def test_whole_jpegs_pass_and_every_cut_is_found(picture, options):
    content = encode(".jpg", picture, *options)
    assert find_damage(content) is None
    assert find_damage(content + b"\x00\x00trailer of a camera \xff") is None
    assert all(find_damage(content[:end]) is not None for end in range(2, len(content)))


def test_every_cut_and_every_flipped_byte_of_a_png_is_found(picture):
    content = encode(".png", picture[:16, :16])
    assert find_damage(content) is None
    assert all(find_damage(content[:end]) is not None for end in range(8, len(content)))
    for position in range(8, len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        assert find_damage(bytes(damaged)) is not None, position


def with_pillow(image: np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


@functools.lru_cache
def every_format(shape: tuple[int, int]) -> dict[str, bytes]:
    """A picture of the shape in each format that is read, and in the variants of its header."""
    grey = np.full(shape, 77, np.uint8)
    colour, deep = np.dstack([grey] * 3), grey.astype(np.uint16) * 257
    height, width = shape
    return {
        **{suffix: encode(suffix, colour) for suffix in (".png", ".jpg", ".bmp", ".webp", ".tif", ".ppm")},
        **{suffix: encode(suffix, colour) for suffix in (".jp2", ".avif", ".gif")},
        "png of 16 bits": encode(".png", deep),
        "progressive jpg": encode(".jpg", colour, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        "lossless webp": encode(".webp", colour, cv2.IMWRITE_WEBP_QUALITY, 101),
        "extended webp": with_pillow(colour, "WEBP", exif=b"Exif\0\0" + exif(1)),
        "tif of 16 bits": encode(".tif", deep),
        "large tif": with_pillow(colour, "TIFF", big_tiff=True),
        "codestream": with_pillow(colour, "JPEG2000", no_jp2=True),
        "text pgm": b"P2 # a remark\n# 5 6\n%d\t%d\n255\n" % (width, height) + b"77 " * grey.size,
        "bitmap": encode(".pbm", grey),
        "old bmp": b"BM"
        + struct.pack("<IIIIHHHH", 26 + 96 * 64, 0, 26, 12, width, height, 1, 24)
        + bytes((3 * width + 3) // 4 * 4 * height),
    }


@pytest.mark.parametrize("shape", [(40, 60), (33, 64)])
def test_headers_state_what_the_decoder_finds(shape):
    for name, content in every_format(shape).items():
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        assert image.shape[:2] == shape, name
        header = read_header(content)
        assert header is not None, name
        assert header.size == shape, name
        assert header.bits == (16 if "16" in name else 8), name


def test_more_pixels_than_are_allowed_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    pictures = every_format((40, 60))
    monkeypatch.setenv("ANCHORLINE_MAX_PIXELS", "2400")
    for content in pictures.values():
        (tmp_path / "a.png").write_bytes(content)
        assert read_image(tmp_path / "a.png").shape == (40, 60, 3)
    monkeypatch.setenv("ANCHORLINE_MAX_PIXELS", "2399")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    for name, content in pictures.items():
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.png: the image is 60x40, more than the 2399") as caught:
            read_image(tmp_path / "a.png")
        assert "set ANCHORLINE_MAX_PIXELS=2400" in str(caught.value), name


def test_a_small_file_that_claims_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("ANCHORLINE_MAX_PIXELS", raising=False)
    content = bytearray(encode(".png", np.zeros((8, 8), np.uint8)))
    content[16:24] = struct.pack(">II", 30_000, 30_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match="30000x30000, more than the 178956970 pixels"):
        read_image(tmp_path / "a.png")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="has 1099511627776 bytes, more than the"):
        read_image(tmp_path / "sparse.png")


@pytest.mark.parametrize("value", ["0", "-5", "1e9", "many", "9" * 5000])
def test_a_limit_that_is_no_number_is_refused(tmp_path, picture, monkeypatch, value):
    (tmp_path / "a.png").write_bytes(encode(".png", picture))
    monkeypatch.setenv("ANCHORLINE_MAX_PIXELS", value)
    with pytest.raises(SettingsError, match=r"ANCHORLINE_MAX_PIXELS is '.*; expected a whole number"):
        read_image(tmp_path / "a.png")


@settings(max_examples=200)
@given(st.data())
def test_no_header_ends_in_a_traceback(data):
    content = bytearray(data.draw(st.sampled_from(sorted(every_format((40, 60)).values()))))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, min(len(content) - 1, 120)))] = data.draw(st.integers(0, 255))
    read_header(bytes(content[: data.draw(st.integers(0, len(content)))]))


@pytest.mark.parametrize("bits", [10, 12, 14, 15, 16])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm", ".jp2"])
def test_the_upper_eight_bits_are_read_whatever_the_picture_uses(tmp_path, monkeypatch, caplog, bits, suffix):
    """The same sample is the same grey in every picture; that most are dark is said once."""
    monkeypatch.setattr(images, "_told_of_depth", threading.Event())
    deep = np.linspace(0, 2**bits - 1, 2400).astype(np.uint16).reshape(40, 60)
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        path.write_bytes(encode(suffix, deep))
        np.testing.assert_array_equal(read_image(path), np.dstack([deep >> 8] * 3))
    told = [record.getMessage() for record in caplog.records]
    if bits > 14:
        assert not told
        assert unused_bits(paths[0]) == 0
    else:
        assert len(told) == 1
        assert f"a{suffix}: has 16-bit samples of which only {bits} bits are used" in told[0]
        assert f"multiply the samples by {2 ** (16 - bits)}" in told[0]
        assert unused_bits(paths[0]) == 16 - bits


@settings(max_examples=60)
@given(
    st.sampled_from([b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF\x20\0\0\0WEBP", b"BM"]),
    st.binary(max_size=200),
)
def test_noise_is_refused_in_one_line(tmp_path_factory, head, noise):
    path = tmp_path_factory.getbasetemp() / "noise.jpg"
    path.write_bytes(head + noise)
    with pytest.raises(DataError, match=r"noise\.jpg: ") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"II+\0\x08\0\0\0" + b"\xff" * 8,  # BigTIFF: where the directory lies
        b"II+\0\x08\0\0\0" + struct.pack("<QQHHQQ", 16, 1, 256, 4, 9, 2**63),  # and a value
        b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">I4sQ", 1, b"free", 2**64 - 1),  # JPEG 2000: a box
    ],
)
def test_places_beyond_any_file_are_damage(tmp_path, content):
    assert read_header(content + b"\0" * 64) is None
    (tmp_path / "a.tif").write_bytes(content + b"\0" * 64)
    with pytest.raises(DataError, match=r"a\.tif: cannot be decoded"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_samples_of_32_bits_are_called_so(tmp_path, kind):
    cv2.imwrite(str(tmp_path / "a.tif"), np.ones((6, 8), kind))
    with pytest.raises(
        DataError, match=r"a\.tif: has 32-bit samples, which are not read; save it with 8 or 16"
    ):
        read_image(tmp_path / "a.tif")


def test_missing_empty_and_folder(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(DataError, match="empty"):
        read_image(tmp_path / "empty.jpg")
    with pytest.raises(DataError, match="is a folder"):
        read_image(tmp_path)


def test_a_refused_image_prints_nothing(tmp_path, picture, capfd):
    path = tmp_path / "cut.tif"
    path.write_bytes(encode(".tif", picture)[:-50])
    with pytest.raises(DataError):
        read_image(path)
    assert capfd.readouterr().err == ""


def test_overlapping_quiet_blocks_put_the_log_level_back():
    before = cv2.utils.logging.getLogLevel()
    first, second = quiet_opencv(), quiet_opencv()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert cv2.utils.logging.getLogLevel() == 0
    second.__exit__(None, None, None)
    assert cv2.utils.logging.getLogLevel() == before


def test_find_images_is_natural_and_leaves_the_rest(tmp_path, picture):
    for name in ["b10.png", "b2.png", "B1.JPG", "a.jpeg", ".hidden.png", "notes.txt", "1.png", "01.png"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    names = [p.name for p in find_images(tmp_path)]
    assert names == ["01.png", "1.png", "a.jpeg", "B1.JPG", "b2.png", "b10.png"]
    assert find_images(tmp_path / "b2.png") == [tmp_path / "b2.png"]


def test_find_images_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="no images in this folder"):
        find_images(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        find_images(tmp_path / "absent")
    with pytest.raises(DataError, match="no such file or folder"):
        find_images("x" * 5000)
    with pytest.raises(DataError, match="nothing is given, expected the path of a file"):
        find_images("")


def test_find_images_leaves_no_image_out_in_silence(tmp_path, picture):
    (tmp_path / "a.png").touch()
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b\.png: is a pipe, expected a file"):
        find_images(tmp_path)
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"b\.png: is a link to nothing, expected an image"):
        find_images(tmp_path)


def test_suffixes():
    assert is_image("A.JPG")
    assert not is_image("a.mp4")
    assert is_video(Path("a.MP4"))
    assert not is_video("a")


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_write_image_round_trip(tmp_path, picture, suffix):
    path = tmp_path / "new" / f"a{suffix}"
    write_image(path, picture)
    np.testing.assert_array_equal(read_image(path), picture)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_write_image_refusals(tmp_path, picture):
    with pytest.raises(OutputError, match=r"unknown image suffix '.xyz'"):
        write_image(tmp_path / "a.xyz", picture)
    with pytest.raises(OutputError, match="cannot be encoded"):
        write_image(tmp_path / "a.jpg", np.zeros((70000, 1, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []
