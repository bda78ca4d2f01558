"""Reading and writing image files, and finding those that were cut off, damaged or are too large."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import struct
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.errors import DataError, OutputError, SettingsError, reason_of, shown
from anchorline.runtime.io.files import atomic_write_bytes, expect_regular, input_errors, utf8_path
from anchorline.runtime.io.native_log import quiet_opencv

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"),
    *(".3gp", ".ogv", ".gif", ".apng"),
)

# What video files begin with: GIF, Matroska, AVI, Flash, ASF, Ogg, IVF, YUV4MPEG; MP4 and QuickTime, whose
# container holds pictures as well; MPEG transport streams; and start codes, of MPEG, H.264 and HEVC.
_VIDEO_START = re.compile(
    rb"GIF8[79]a|\x1aE\xdf\xa3|RIFF.{4}AVI |FLV\x01|0&\xb2u\x8ef\xcf\x11|OggS|DKIF|YUV4MPEG2 "
    rb"|.{4}(?:ftyp(?!avi[fs]|hei|mif1|msf1)|moov|mdat|free|wide)"
    rb"|G.{187}G|\x00?\x00\x00\x01[\xb3\xba\x09\x27\x47\x67\x40\x46]",
    re.DOTALL,
)
_RAW_JPEGS = (".mjpg", ".mjpeg")  # begin as one picture does
_HEAD = 4096  # bytes
_NAME_PATTERN = re.compile(r"%0?[0-9]*d")

MAX_PIXELS_VARIABLE = "ANCHORLINE_MAX_PIXELS"
_MAX_PIXELS = 178_956_970  # as Pillow: half a gigabyte of BGR
_MOST_BYTES_PER_PIXEL = 16  # of any file that is read here
_MOST_BITS = 16  # of a sample
_LEAST_UNUSED = 2  # upper bits of 16: an exposure below a half is nothing odd, one below a quarter is

log = logging.getLogger("anchorline.runtime")
_told_of_depth = threading.Event()

_JPEG_START = b"\xff\xd8"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = 0xD9
_RESTART_INTERVAL = 0xDD
_JPEG_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}  # TEM, restarts and a second start: no segment follows
_JPEG_TABLES = {0xC4, *range(0xDA, 0xDE), *range(0xE0, 0xF0), 0xFE}  # tables, scans, APPn, comments
_JPEG_SEGMENTS = _JPEG_TABLES | set(range(0xC0, 0xF0)) - set(range(0xD0, 0xDA))  # frame headers as well

# Start-of-frame markers carry the size; C4, C8 and CC in that range are tables and extensions.
_JPEG_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

# Inside a scan FF 00 is a stuffed byte and FF FF padding; FF D0..D7 are restarts where the file has
# declared an interval for them. Anything else ends the scan.
_SCAN_END = re.compile(rb"\xff[^\x00\xff]")
_SCAN_END_WITH_RESTARTS = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def find_damage(content: bytes) -> str | None:
    """Say what is wrong with the bytes of an image file, which decoders may fill with grey in silence, or
    ``None``.

    Checks the structure of JPEG (down to the end-of-image marker) and PNG (down to IEND, with every
    checksum), and the length that WebP states; other formats are left to their decoder.
    """
    if content.startswith(_JPEG_START):
        return _jpeg_damage(content)
    if content.startswith(_PNG_SIGNATURE):
        return _png_damage(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        stated = int.from_bytes(content[4:8], "little") + 8
        if len(content) < stated:
            return f"truncated: {len(content)} bytes of the {stated} that its header states"
    return None


def _jpeg_damage(content: bytes) -> str | None:
    """Walk the segments from marker to marker: a thumbnail's end inside EXIF is not the picture's."""
    position = len(_JPEG_START)
    allowed, scan_end = _JPEG_SEGMENTS | _JPEG_BARE_MARKERS, _SCAN_END
    while True:
        position = content.find(b"\xff", position)
        if position < 0 or position + 1 >= len(content):
            return "truncated: the JPEG stops before its end-of-image marker"
        marker = content[position + 1]
        position += 1 if marker == 0xFF else 2
        if marker == _END_OF_IMAGE:
            return None
        if marker == 0xFF:
            continue
        if marker not in allowed:
            return f"damaged: JPEG marker FF{marker:02X} where none belongs, at byte {position - 2}"
        if marker in _JPEG_BARE_MARKERS:
            continue
        length = int.from_bytes(content[position : position + 2], "big")
        if marker == _RESTART_INTERVAL and any(content[position + 2 : position + 4]):
            scan_end = _SCAN_END_WITH_RESTARTS
        position += length
        if marker == _START_OF_SCAN:
            end = scan_end.search(content, position)
            position = end.start() if end else len(content)
            allowed = _JPEG_TABLES


def _png_damage(content: bytes) -> str | None:
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(content):
        body_end = position + 8 + int.from_bytes(content[position : position + 4], "big")
        if body_end + 4 > len(content):
            break
        checksum = int.from_bytes(content[body_end : body_end + 4], "big")
        kind = content[position + 4 : position + 8]
        if zlib.crc32(memoryview(content)[position + 4 : body_end]) != checksum:
            return f"damaged: the checksum of PNG chunk {kind.decode('latin-1')} does not match"
        if kind == b"IEND":
            return None
        position = body_end + 4
    return "truncated: the PNG stops before its IEND chunk"


class ImageHeader(NamedTuple):
    """What an image file states of itself: (height, width) as stored, before it is turned upright, and the
    bits of a sample."""

    size: tuple[int, int]
    bits: int = 8


def read_header(content: bytes) -> ImageHeader | None:
    """The header at the beginning of an image file; None where the format is none of those that are read
    (JPEG, PNG, BMP, GIF, TIFF, WebP, PBM to PPM, JPEG 2000 and AVIF), it is damaged, or lies further on."""
    try:
        for start, read in _HEADERS:
            if start.match(content):
                return read(content)
    except (struct.error, IndexError):
        pass
    return None


def _png_header(content: bytes) -> ImageHeader:
    width, height, bits = struct.unpack_from(">IIB", content, 16)
    return ImageHeader((height, width), bits)


def _jpeg_header(content: bytes) -> ImageHeader | None:
    at = len(_JPEG_START)
    while (at := content.find(b"\xff", at)) >= 0:  # the segments up to the start of frame
        marker = content[at + 1]
        if marker == _START_OF_SCAN:
            break
        if marker in _JPEG_START_OF_FRAME:
            bits, height, width = struct.unpack_from(">BHH", content, at + 4)
            return ImageHeader((height, width), bits)
        at += 1 if marker == 0xFF else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return None


def _bmp_header(content: bytes) -> ImageHeader:
    old = content[14] == 12
    width, height = struct.unpack_from("<HH" if old else "<ii", content, 18)
    return ImageHeader((abs(height), abs(width)))


def _gif_header(content: bytes) -> ImageHeader:
    width, height = struct.unpack_from("<HH", content, 6)
    return ImageHeader((height, width))


def _webp_header(content: bytes) -> ImageHeader:
    kind = content[12:16]
    if kind == b"VP8X":
        sides = (int.from_bytes(content[at : at + 3], "little") for at in (24, 27))
        width, height = (side + 1 for side in sides)
    elif kind == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))
    return ImageHeader((height, width))


def _tiff_header(content: bytes) -> ImageHeader | None:
    """Of the first directory, which is the one that is read."""
    order, big = "<>"[content[0] == ord("M")], 43 in content[2:4]
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), content, at)
    at += 8 if big else 2
    found: dict[int, int] = {}
    for entry in range(at, at + min(count, 1000) * (20 if big else 12), 20 if big else 12):
        tag, kind = struct.unpack_from(order + "HH", content, entry)
        (length,) = struct.unpack_from(order + ("Q" if big else "I"), content, entry + 4)
        number = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
        if tag not in (256, 257, 258) or number is None:
            continue
        value = entry + (12 if big else 8)
        if length * struct.calcsize(number) > (8 if big else 4):  # it stands elsewhere
            (value,) = struct.unpack_from(order + ("Q" if big else "I"), content, value)
        found[tag] = max(found.get(tag, 0), *struct.unpack_from(order + number, content, value))
    return ImageHeader((found[257], found[256]), found.get(258, 1)) if {256, 257} <= found.keys() else None


def _pnm_header(content: bytes) -> ImageHeader | None:
    numbers = _PNM_NUMBERS.match(content)
    if numbers is None:
        return None
    bitmap = content[1:2] in b"14"
    return ImageHeader(
        (int(numbers[2]), int(numbers[1])), 16 if not bitmap and int(numbers[3] or b"0") > 255 else 8
    )


def _jpeg2000_header(content: bytes) -> ImageHeader | None:
    at = 0
    while content[at : at + 2] != b"\xff\x4f":  # the boxes up to the codestream
        length, kind = struct.unpack_from(">I4s", content, at)
        body = at + (16 if length == 1 else 8)
        if length == 1:
            (length,) = struct.unpack_from(">Q", content, at + 8)
        if length < body - at and kind != b"jp2c":
            return None
        at = body if kind == b"jp2c" else at + length
    right, bottom, left, top = struct.unpack_from(">4I", content, at + 8)
    return ImageHeader((bottom - top, right - left), (content[at + 42] & 0x7F) + 1)


def _avif_header(content: bytes) -> ImageHeader | None:
    """The largest of the parts' sizes, all of which stand before the pixels."""
    places = [found.end() for found in re.finditer(b"ispe", content[: content.find(b"mdat")])]
    sizes = [struct.unpack_from(">II", content, place + 4) for place in places]
    width, height = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    return ImageHeader((height, width)) if sizes else None


_PNM_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM_NUMBERS = re.compile(rb"P[1-6]%b(\d{1,10})%b(\d{1,10})(?:%b(\d{1,10}))?" % ((_PNM_GAP,) * 3))
_HEADERS = tuple(
    (re.compile(start, re.DOTALL), read)
    for start, read in (
        (rb"\xff\xd8", _jpeg_header),
        (rb"\x89PNG\r\n\x1a\n.{4}IHDR", _png_header),
        (rb"BM", _bmp_header),
        (rb"GIF8", _gif_header),
        (rb"RIFF.{4}WEBP", _webp_header),
        (rb"II[*+]\x00|MM\x00[*+]", _tiff_header),
        (rb"P[1-6]", _pnm_header),
        (rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", _jpeg2000_header),
        (rb".{4}ftyp", _avif_header),
    )
)


def max_pixels() -> int:
    """The most that an image, or a model's canvas, may have: a damaged number would take all memory."""
    text = os.environ.get(MAX_PIXELS_VARIABLE, "")
    if text and not re.fullmatch("[1-9][0-9]{0,15}", text):
        raise SettingsError(f"{MAX_PIXELS_VARIABLE} is {shown(text)}; expected a whole number of pixels")
    return int(text or _MAX_PIXELS)


def check_pixels(path: str | Path, size: tuple[int, int]) -> None:
    """Raise ``DataError`` for an image of a (height, width) that is not read without being asked for."""
    height, width = size
    if height * width > max_pixels():
        raise DataError(
            f"{path}: the image is {width}x{height}, more than the {max_pixels()} pixels that are read; "
            f"make it smaller, or set {MAX_PIXELS_VARIABLE}={height * width} if you trust the file"
        )


def check_header(path: str | Path) -> None:
    """``check_pixels`` by the file's own header, where it is that of an image."""
    expect_regular(path, DataError)
    try:
        with open(path, "rb") as file:
            header = read_header(file.read(_HEAD))
    except (OSError, ValueError):  # who reads it says so
        return
    if header is not None:
        check_pixels(path, header.size)


def is_image(path: str | Path) -> bool:
    """Whether the name of ``path`` ends as an image's does; the file itself is not opened."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def is_video(path: str | Path) -> bool:
    """Whether the name of ``path`` ends as a video's does; the file itself is not opened."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def image_files(paths: Iterable[Path]) -> list[Path]:
    """Those of ``paths`` that are named as images are and no folders.

    Raises ``DataError`` for a pipe, a socket, a device, or a link to nothing.
    """
    found = []
    for path in filter(is_image, paths):
        expect_regular(path, DataError)
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except OSError:
            raise DataError(
                f"{path}: is a link to nothing, expected an image; restore the image or delete it"
            ) from None
        if not is_folder:
            found.append(path)
    return found


def holds_video(path: str | Path) -> bool | None:
    """Whether a file holds a video and no picture: by what it begins with, or else by its name.

    None where neither says. GIF and animated PNG are videos. Raises ``DataError`` for pipes and devices only.
    """
    expect_regular(path, DataError)
    head = b""
    with contextlib.suppress(OSError), Path(path).open("rb") as file:
        head = file.read(_HEAD)
    if _begins_as_video(head) or Path(path).suffix.lower() in _RAW_JPEGS:
        return True
    with quiet_opencv(), contextlib.suppress(DataError):
        if is_image(path) or cv2.haveImageReader(utf8_path(path)):
            return False
    return True if is_video(path) else None


def _begins_as_video(head: bytes) -> bool:
    if head.startswith(_PNG_SIGNATURE):
        control = head.partition(b"IDAT")[0].partition(b"acTL")[2]  # begins with the number of frames
        return int.from_bytes(control[:4], "big") > 1
    return _VIDEO_START.match(head) is not None


def find_images(path: str | Path) -> list[Path]:
    """The image files of a folder (not of its subfolders) in natural order, or the one image given.

    A name with a number's place (``frames/%04d.png``) stands for the files of its folder that fit. Hidden
    files are left out. Raises ``DataError`` where nothing is found, or what is named as an image is no file.
    """
    folder = path = Path(path)
    names, none = r"[^.].*", "no images in this folder"
    if not os.path.exists(path):  # unlike Path.exists, also False for too long a name
        parts = _NAME_PATTERN.split(path.name)
        if len(parts) == 1:
            raise DataError(f"{path}: no such file or folder; give an image, a folder of images or a video")
        folder, names, none = path.parent, "[0-9]+".join(map(re.escape, parts)), "no images of such names"
    elif not path.is_dir():
        return [path]
    try:
        found = image_files(p for p in folder.iterdir() if re.fullmatch(names, p.name, re.DOTALL))
    except OSError as error:
        raise DataError(
            f"{folder}: this folder cannot be read ({error.strerror}); check its name and permissions"
        ) from None
    if not found:
        raise DataError(f"{path}: {none}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return sorted(found, key=_natural_key)


def find_inputs(path: str | Path) -> list[tuple[Path, bool]]:
    """The file at ``path``, or what ``find_images`` finds there, each with whether it is a video.

    Raises ``DataError`` for what is missing, or neither image nor video.
    """
    paths = find_images(path)
    if paths != [Path(path)]:
        return [(each, False) for each in paths]
    is_a_video = holds_video(path)
    if is_a_video is None:
        raise DataError(
            f"{path}: neither an image nor a video, by its content and by its suffix; "
            f"expected one of {', '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)}"
        )
    return [(Path(path), is_a_video)]


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """Read an image file as uint8 BGR [H, W, 3], upright (EXIF orientation applied).

    Grey becomes three channels, an alpha channel is dropped. Of 16-bit samples the upper 8 bits are kept,
    whatever the picture holds, so that equal pixels are equal in all pictures; one that leaves the upper bits
    empty becomes dark, which is said once. A file that is missing, empty, damaged, cut off, no image or
    of more pixels than ``ANCHORLINE_MAX_PIXELS`` (default 178,956,970) raises ``DataError``, before
    memory is taken for them.
    """
    image, bits = _decode(path)
    unused = _unused(image, bits)
    if unused and not _told_of_depth.is_set():
        _told_of_depth.set()
        log.warning(
            "%s: has 16-bit samples of which only %d bits are used, and is read almost black; multiply the "
            "samples by %d, here and in all such images",
            *(path, 16 - unused, 2**unused),
        )
    return image


def unused_bits(path: str | Path) -> int:
    """How many of the upper bits are empty in an image of 16-bit samples, from two on; 0 for others.

    Who asks tells the user: ``read_image`` says nothing of it any more.
    """
    unused = _unused(*_decode(path))
    if unused:
        _told_of_depth.set()
    return unused


def _unused(image: NDArray[np.uint8], bits: int) -> int:
    unused = 8 - int(image.max(initial=0)).bit_length() if bits > 8 else 0
    return unused if _LEAST_UNUSED <= unused < 8 else 0


def _decode(path: str | Path) -> tuple[NDArray[np.uint8], int]:
    """The image, and the bits of a sample in the file."""
    limit = _MOST_BYTES_PER_PIXEL * max_pixels()
    # OpenCV's own file functions fail on non-ASCII paths on some systems.
    with input_errors(path, "expected an image", DataError):
        if Path(path).is_dir():
            raise DataError(f"{path}: is a folder, expected an image file")
        length = os.stat(path).st_size
        if length > limit:
            raise DataError(
                f"{path}: has {length} bytes, more than the {limit} that the largest image may need; "
                f"expected an image file, or a larger {MAX_PIXELS_VARIABLE}"
            )
        content = Path(path).read_bytes()
    if not content:
        raise DataError(f"{path}: the file is empty, expected an image; copy or download it again")
    damage = find_damage(content)
    if damage:
        raise DataError(f"{path}: {damage}; copy or download the image again")
    header = read_header(content)
    if header is None:
        reason = "is a video" if _begins_as_video(content[:_HEAD]) else "cannot be decoded"
        raise DataError(f"{path}: {reason}; expected an undamaged image such as JPEG or PNG")
    check_pixels(path, header.size)
    try:
        with quiet_opencv():
            image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise DataError(f"{path}: cannot be decoded ({reason_of(error, 300)}); expected an image") from error
    if image is None:
        reason = "cannot be decoded; expected an undamaged image such as JPEG or PNG"
        if header.bits > _MOST_BITS:
            reason = f"has {header.bits}-bit samples, which are not read; save it with 8 or 16 bits a sample"
        raise DataError(f"{path}: {reason}")
    return np.asarray(image, dtype=np.uint8), header.bits


def write_image(path: str | Path, image: NDArray[np.uint8]) -> None:
    """Write a uint8 BGR [H, W, 3] image in the format of the suffix, whole or not at all."""
    suffix = Path(path).suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise OutputError(
            f"{path}: unknown image suffix {suffix!r}; expected one of {', '.join(IMAGE_SUFFIXES)}"
        )
    reason = ""
    try:
        with quiet_opencv():
            done, encoded = cv2.imencode(suffix, image)
    except cv2.error as error:
        done, reason = False, f" ({reason_of(error, 300)})"
    if not done:
        raise OutputError(f"{path}: cannot be encoded as {suffix}{reason}; use .png")
    atomic_write_bytes(path, encoded.tobytes())


def _natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sorts ``frame2`` before ``frame10``; the name itself breaks ties such as ``01`` and ``1``."""
    parts = re.split(r"([0-9]+)", path.name.lower())
    key = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]
    return [*key, (2, 0, path.name)]
