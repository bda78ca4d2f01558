"""Reading and writing image files."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.errors import DataError, OutputError
from anchorline.runtime.files import atomic_write_bytes
from anchorline.runtime.integrity import find_damage
from anchorline.runtime.opencv_log import quiet_opencv

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")


def is_image(path: str | Path) -> bool:
    """Whether the name of ``path`` ends as an image's does; the file itself is not opened."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def is_video(path: str | Path) -> bool:
    """Whether the name of ``path`` ends as a video's does; the file itself is not opened."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def find_images(path: str | Path) -> list[Path]:
    """The image files of a folder (not of its subfolders) in natural order, or the one image given.

    Hidden files are left out. Raises ``DataError`` where nothing is found.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give an image or a folder of images")
    if not path.is_dir():
        return [path]
    try:
        found = [p for p in path.iterdir() if is_image(p) and not p.name.startswith(".") and p.is_file()]
    except OSError as error:
        raise DataError(
            f"{path}: this folder cannot be read ({error.strerror}); check its permissions"
        ) from None
    if not found:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise DataError(f"{path}: no images in this folder; expected files ending in {suffixes}")
    return sorted(found, key=_natural_key)


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """Read an image file as uint8 BGR [H, W, 3], upright (EXIF orientation applied).

    Grey becomes three channels, an alpha channel is dropped, 16-bit samples become 8-bit. A file
    that is missing, empty, damaged, cut off or no image raises ``DataError``.
    """
    content = _read_bytes(Path(path))
    if not len(content):
        raise DataError(f"{path}: the file is empty, expected an image; copy or download it again")
    damage = find_damage(content.tobytes())
    if damage:
        raise DataError(f"{path}: {damage}; copy or download the image again")
    try:
        with quiet_opencv():
            image = cv2.imdecode(content, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise DataError(f"{path}: cannot be decoded ({_first_line(error)}); expected an image") from error
    if image is None:
        raise DataError(f"{path}: cannot be decoded; expected an undamaged image such as JPEG or PNG")
    return np.asarray(image, dtype=np.uint8)


def write_image(path: str | Path, image: NDArray[np.uint8]) -> None:
    """Write a uint8 BGR [H, W, 3] image in the format of the suffix, whole or not at all."""
    suffix = Path(path).suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise OutputError(
            f"{path}: unknown image suffix {suffix!r}; expected one of {', '.join(IMAGE_SUFFIXES)}"
        )
    try:
        with quiet_opencv():
            done, encoded = cv2.imencode(suffix, image)
    except cv2.error as error:
        raise OutputError(
            f"{path}: cannot be encoded as {suffix} ({_first_line(error)}); use .png"
        ) from error
    if not done:
        raise OutputError(f"{path}: cannot be encoded as {suffix}; use .png")
    atomic_write_bytes(path, encoded.tobytes())


def _read_bytes(path: Path) -> NDArray[np.uint8]:
    """The file as bytes: OpenCV's own file functions fail on non-ASCII paths on some systems."""
    try:
        if path.is_dir():
            raise DataError(f"{path}: is a folder, expected an image file")
        return np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected an image") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def _first_line(error: cv2.error) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "OpenCV error"


def _natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sorts ``frame2`` before ``frame10``; the name itself breaks ties such as ``01`` and ``1``."""
    parts = re.split(r"([0-9]+)", path.name.lower())
    key = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]
    return [*key, (2, 0, path.name)]
