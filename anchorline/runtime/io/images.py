"""Reading and writing image files, and finding those that were cut off or damaged."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.errors import DataError, OutputError, reason_of
from anchorline.runtime.io.files import atomic_write_bytes, expect_regular, input_errors
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

_JPEG_START = b"\xff\xd8"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = 0xD9
_RESTART_INTERVAL = 0xDD
_JPEG_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}  # TEM, restarts and a second start: no segment follows
_JPEG_TABLES = {0xC4, *range(0xDA, 0xDE), *range(0xE0, 0xF0), 0xFE}  # tables, scans, APPn, comments
_JPEG_SEGMENTS = _JPEG_TABLES | set(range(0xC0, 0xF0)) - set(range(0xD0, 0xDA))  # frame headers as well

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
    with quiet_opencv():
        if cv2.haveImageReader(str(path)) or is_image(path):
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
    path = Path(path)
    parts = _NAME_PATTERN.split(path.name)
    is_pattern = len(parts) > 1 and not os.path.exists(path)
    if not is_pattern and not os.path.exists(path):  # unlike Path.exists, also False for too long a name
        raise DataError(f"{path}: no such file or folder; give an image, a folder of images or a video")
    if not is_pattern and not path.is_dir():
        return [path]
    fits = re.compile("[0-9]+".join(map(re.escape, parts)) if is_pattern else r"[^.].*", re.DOTALL).fullmatch
    try:
        folder = path.parent if is_pattern else path
        found = image_files(p for p in folder.iterdir() if fits(p.name))
    except OSError as error:
        raise DataError(
            f"{folder}: this folder cannot be read ({error.strerror}); check its name and permissions"
        ) from None
    if not found:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        what = "no images of such names" if is_pattern else "no images in this folder"
        raise DataError(f"{path}: {what}; expected files ending in {suffixes}")
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

    Grey becomes three channels, an alpha channel is dropped, 16-bit samples become 8-bit. A file
    that is missing, empty, damaged, cut off or no image raises ``DataError``.
    """
    # OpenCV's own file functions fail on non-ASCII paths on some systems.
    with input_errors(path, "expected an image", DataError):
        if Path(path).is_dir():
            raise DataError(f"{path}: is a folder, expected an image file")
        content = np.fromfile(path, dtype=np.uint8)
    if not len(content):
        raise DataError(f"{path}: the file is empty, expected an image; copy or download it again")
    damage = find_damage(content.tobytes())
    if damage:
        raise DataError(f"{path}: {damage}; copy or download the image again")
    try:
        with quiet_opencv():
            image = cv2.imdecode(content, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise DataError(f"{path}: cannot be decoded ({reason_of(error, 300)}); expected an image") from error
    if image is None:
        reason = "is a video" if _begins_as_video(content[:_HEAD].tobytes()) else "cannot be decoded"
        raise DataError(f"{path}: {reason}; expected an undamaged image such as JPEG or PNG")
    return np.asarray(image, dtype=np.uint8)


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
