"""Labelled images, whatever file format they came from."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.errors import DataError
from anchorline.runtime.io.images import read_image


@dataclass(frozen=True)
class LabelledImage:
    """One image and its ground truth.

    ``boxes`` float32 [N, 4], xyxy in pixels with continuous edges (a box that covers the first
    pixel only is 0, 0, 1, 1); ``labels`` int64 [N] index the dataset's ``names``; ``difficult`` and
    ``crowd`` bool [N] mark objects that an evaluation ignores. ``size`` is (height, width).
    ``load`` returns the pixels, uint8 BGR [H, W, 3], upright (EXIF orientation applied).
    """

    id: str
    size: tuple[int, int]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    load: Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True)
class Dataset:
    """Labelled images in a fixed order, with the class names their labels index.

    ``spec`` is the text it was opened with. ``category_ids`` are COCO's ids of ``names`` where the
    data has them. ``dropped`` counts what was left out by reason, such as boxes of ``"zero area"``.
    ``unlabelled`` counts the images without annotations of their own (YOLO's label file), which are
    taken as images without objects.
    """

    spec: str
    names: tuple[str, ...]
    images: tuple[LabelledImage, ...]
    category_ids: tuple[int, ...] | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    unlabelled: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[LabelledImage]:
        return iter(self.images)


# Class names: one message for a class nobody knows.


_SHOWN = 12


def list_names(names: Sequence[str]) -> str:
    """The names separated by commas, cut after a dozen."""
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def unknown_class(where: str, name: str, names: Sequence[str]) -> DataError:
    """The error for a class in the data that the expected ``names`` do not hold."""
    return DataError(f"{where}: unknown class {name!r}; expected one of {list_names(names)}")


# Image files of a labelled data set: found by name, measured cheaply, loaded when needed.


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers carry the size; C4, C8 and CC in that range are tables and extensions.
_JPEG_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_START_OF_SCAN = 0xDA
_JPEG_EXIF = 0xE1


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) in pixels of the upright image, from the file's header where that is enough.

    An image that carries EXIF (it may be turned) or is neither JPEG nor PNG is decoded. Raises
    ``DataError`` when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(65536)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; expected a readable image") from None
    size = _png_size(head) if head.startswith(_PNG_SIGNATURE) else _jpeg_size(head)
    if size is None or min(size) < 1:
        height, width = read_image(path).shape[:2]
        return height, width
    return size


def load_image(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The upright pixels, uint8 BGR [H, W, 3]; ``DataError`` when they are not of ``size`` (h, w)."""
    image = read_image(path)
    if image.shape[:2] != size:
        height, width = image.shape[:2]
        raise DataError(
            f"{path}: the image is {width}x{height}, its annotations were made for {size[1]}x{size[0]}; "
            "annotate the image again or put the annotated one back"
        )
    return image


def _png_size(head: bytes) -> tuple[int, int] | None:
    if b"eXIf" in head or len(head) < 24 or head[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", head[16:24])
    return height, width


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    """Walk the JPEG segments to the start of frame; None for EXIF, damage or another format."""
    if not head.startswith(b"\xff\xd8"):
        return None
    at = 2
    while at + 9 <= len(head):
        if head[at] != 0xFF:
            return None
        marker = head[at + 1]
        if marker == 0xFF:  # fill byte before a marker
            at += 1
            continue
        if marker in (_JPEG_EXIF, _JPEG_START_OF_SCAN):
            return None
        if marker in _JPEG_START_OF_FRAME:
            height, width = struct.unpack(">HH", head[at + 5 : at + 9])
            return height, width
        at += 2 + int(struct.unpack(">H", head[at + 2 : at + 4])[0])
    return None
