"""Finding, reading and writing image files; those that are cut off, damaged or too large are refused."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import threading
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.errors import DataError, OutputError, SettingsError, reason_of, shown
from anchorline.runtime.io.files import atomic_write_bytes, expect_regular, input_errors, utf8_path
from anchorline.runtime.io.image_bytes import begins_as_video, find_damage, read_header
from anchorline.runtime.io.native_log import quiet_opencv

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"),
    *(".3gp", ".ogv", ".gif", ".apng"),
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
    if begins_as_video(head) or Path(path).suffix.lower() in _RAW_JPEGS:
        return True
    with quiet_opencv(), contextlib.suppress(DataError):
        if is_image(path) or cv2.haveImageReader(utf8_path(path)):
            return False
    return True if is_video(path) else None


def find_images(path: str | Path) -> list[Path]:
    """The image files of a folder (not of its subfolders) in natural order, or the one image given.

    A name with a number's place (``frames/%04d.png``) stands for the files of its folder that fit. Hidden
    files are left out. Raises ``DataError`` where nothing is found, or what is named as an image is no file.
    """
    expect_regular(path, DataError)
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
    # OpenCV's own file functions fail on non-ASCII paths on some systems.
    with input_errors(path, "expected an image", DataError):
        if Path(path).is_dir():
            raise DataError(f"{path}: is a folder, expected an image file")
        _check_length(path, os.stat(path).st_size)
        content = Path(path).read_bytes()
    return _decode_bytes(content, path)


def decode_image(content: bytes, name: str = "image") -> NDArray[np.uint8]:
    """As ``read_image``, from the content of an image file; ``name`` is what errors call it."""
    _check_length(name, len(content))
    return _decode_bytes(content, name)[0]


def _check_length(path: str | Path, length: int) -> None:
    limit = _MOST_BYTES_PER_PIXEL * max_pixels()
    if length > limit:
        raise DataError(
            f"{path}: has {length} bytes, more than the {limit} that the largest image may need; "
            f"expected an image file, or a larger {MAX_PIXELS_VARIABLE}"
        )


def _decode_bytes(content: bytes, path: str | Path) -> tuple[NDArray[np.uint8], int]:
    if not content:
        raise DataError(f"{path}: the file is empty, expected an image; copy or download it again")
    damage = find_damage(content)
    if damage:
        raise DataError(f"{path}: {damage}; copy or download the image again")
    header = read_header(content)
    if header is None:
        reason = "is a video" if begins_as_video(content[:_HEAD]) else "cannot be decoded"
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
