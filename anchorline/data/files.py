"""The files of labelled data: numbers and flags in them, lists of images, and which labels an image has."""

from __future__ import annotations

import codecs
import math
import os.path
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

from anchorline.runtime.io.errors import DataError, shown
from anchorline.runtime.io.files import files_below, input_errors
from anchorline.runtime.io.images import image_files

FOUND_BY_END = "file names found by their end"
WITHOUT_IMAGE = "label file without an image"
SPLITS = ("train", "val", "valid", "test")
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_NO_LABELS = {"classes.txt", *(f"{split}.txt" for split in SPLITS)}
_LONGEST_PATH = 4096  # characters
_DIGITS = re.compile(r"[+-]?[0-9]{1,19}")
_FARTHEST_PIXEL = 1e9  # annotated coordinates beyond this are damage, not boxes


class ImageFile(NamedTuple):
    """An image of a data set, and where its labels are, if it has any."""

    id: str
    path: Path
    labels: Path

    @property
    def has_labels(self) -> bool:
        return os.path.lexists(self.labels)


def files_in_folder(
    place: Path, label_folder: Path, suffix: str, dropped: Counter[str], base: Path | None = None
) -> list[ImageFile]:
    """The images in ``place`` and its subfolders; their labels have the same names in ``label_folder``, with
    ``suffix``. An id is the path from ``base``, or else from ``place``, without its suffix.

    Labels without an image are counted as ``dropped``. Raises ``DataError`` where there is no image, or two
    would share their labels.
    """
    files: dict[Path, ImageFile] = {}
    for path in image_files(files_below(place)):
        labels = label_folder / f"{without_suffix(path.relative_to(place))}{suffix}"
        if labels in files:
            other = files[labels].path.name
            raise DataError(f"{path}: shares its label file with {other}; rename one of the images")
        files[labels] = ImageFile(without_suffix(path.relative_to(base or place)), path, labels)
    if not files:
        raise DataError(f"{place}: has no images; expected at least one")
    found = {path for path in files_below(label_folder) if path.suffix == suffix}
    unused = sum(path.name not in _NO_LABELS for path in found - files.keys())
    dropped.update({WITHOUT_IMAGE: unused} if unused else {})
    return list(files.values())


def listed_images(
    listing: Path,
    folder: Path,
    find: Callable[[str], Path | None],
    remarks: Counter[str],
    flag: re.Pattern[str] | None = None,
) -> list[Path]:
    """The images in ``folder`` that a text file lists, each line a path, a file name or an id for ``find``.

    A ``flag`` may follow it. Raises ``DataError`` for an empty list, for what is not found, and for two lines
    that name one image in different ways.
    """
    lines = [line for line in read_lines(listing, "one image") if line.strip()]
    if not lines:
        raise DataError(f"{listing}: the list is empty; expected one image a line")
    line_of: dict[Path, str] = {}
    images: list[Path] = []
    absent: list[str] = []
    for line in lines:
        texts = dict.fromkeys([line, line.strip(), *([flag.sub("", line.strip())] if flag else [])])
        found = ((text, path) for text in texts if (path := find(text)) is not None)
        text, path = next(found, ([*texts][-1], None))
        if path is None:
            absent.append(text)
            continue
        images.append(path)
        if _is_shortened(text, path):
            remarks[FOUND_BY_END] += 1
        if line_of.setdefault(path, line) != line:
            both = f"{shown(line_of[path])} and {shown(line)}"
            raise DataError(f"{listing}: {both} both name {path.name}; expected each image once")
    if absent:
        remedy = "restore them, link their folder into it, or take them out of the list"
        raise absent_images(listing, len(lines), absent, folder, remedy)
    return images


def absent_images(listing: Path, total: int, absent: list[str], folder: Path, remedy: str) -> DataError:
    """The error for a file that lists ``total`` images of which those in ``absent`` are not there."""
    return DataError(
        f"{listing}: lists {total} images and {len(absent)} are not in {folder}, the first is "
        f"{shown(absent[0])}; {remedy}"
    )


def without_suffix(path: PurePath | str) -> str:
    """A path from a folder without the suffix of a file; dots before it stay."""
    return (path if isinstance(path, str) else path.as_posix()).rpartition(".")[0]


def read_lines(path: Path, expected: str) -> list[str]:
    """The lines of a text file in UTF-8, or in UTF-16 with a byte-order mark, without their ends.

    Raises ``DataError``, which says what was ``expected`` on each.
    """
    with input_errors(path, f"expected {expected} a line", DataError):
        content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content.startswith(UTF16_MARKS) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read ({error}); expected {expected} a line in UTF-8") from None
    if "\0" in text:
        raise DataError(f"{path}: holds NUL characters; expected text, {expected} a line")
    return re.split("\r\n|\r|\n", text)  # str.splitlines would also cut at U+0085, U+2028 and others


def path_tails(text: str) -> Iterator[str]:
    """A path in a list, and what is left of it without its first folders, which another machine had.

    ``./data/images/a.jpg`` gives itself, ``images/a.jpg`` and ``a.jpg``. Windows' backslashes become slashes.
    """
    if len(text) > _LONGEST_PATH:
        return
    for written in dict.fromkeys((text, text.replace("\\", "/"))):
        parts = PurePosixPath(written).parts
        yield from (str(PurePosixPath(*parts[start:])) for start in range(len(parts)))


def _is_shortened(text: str, path: Path) -> bool:
    """Whether only the end of what a list calls ``text`` leads to ``path``."""
    written = os.path.normpath(text.strip().replace("\\", "/")).lstrip("./").lower()
    whole = path.as_posix().lower()
    return not any(f"/{end}".endswith(f"/{written}") for end in (whole, whole.rpartition(".")[0]))


def is_coordinate(value: object) -> bool:
    """Whether a value read from a file is a number that can be a place in an image, in pixels."""
    return type(value) in (float, int) and abs(value) <= _FARTHEST_PIXEL  # type: ignore[arg-type]


def as_number(value: object) -> float:
    """The number that a file states, also as text; NaN for what is none."""
    if type(value) not in (float, int, str):
        return math.nan
    try:
        return math.nan if type(value) is str and "_" in value else float(value)  # type: ignore[arg-type]
    except (ValueError, OverflowError):
        return math.nan


def as_whole(value: object) -> int | None:
    """The whole number of up to 64 bits that a file states, also as text or 1.0; None for what is none."""
    if type(value) is str and _DIGITS.fullmatch(value.strip()):
        value = int(value)
    elif type(value) in (float, str) and as_number(value).is_integer():
        value = int(as_number(value))
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def as_flag(value: object) -> bool | None:
    """The yes or no that a file states as 0 or 1, true or false, also as text; None for anything else."""
    if type(value) is bool:
        return value
    if type(value) is str and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    number = as_number(value)
    return bool(number) if number in (0, 1) else None
