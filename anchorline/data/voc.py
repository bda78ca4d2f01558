"""Pascal VOC: JPEGImages, Annotations and ImageSets/Main. Written after the VOC devkit's layout.

VOC counts pixels from 1 and includes the last one; boxes become continuous edges:
x1 = xmin - 1, y1 = ymin - 1, x2 = xmax, y2 = ymax, clipped to the image. Without ImageSets, all images of
the folder are read, be their annotations in Annotations or beside them, as labelImg writes them.
"""

from __future__ import annotations

import math
import os.path
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import count_fractions
from anchorline.data.dataset import Dataset, class_index, image_size, labelled_image, list_names
from anchorline.data.files import (
    UTF16_MARKS,
    ImageFile,
    as_flag,
    as_number,
    as_whole,
    files_in_folder,
    is_coordinate,
    listed_images,
    path_tails,
    without_suffix,
)
from anchorline.runtime.contract import check_names
from anchorline.runtime.io.errors import DataError, shown
from anchorline.runtime.io.files import files_below, input_errors
from anchorline.runtime.io.images import IMAGE_SUFFIXES, image_files

POLYGON, ROTATED = "taken as the box around a polygon", "taken as the upright box around a rotated one"
OTHER_SIZE = "annotations that state another size than their image has"

# A class's own split (cat_train.txt) adds -1, 0 or 1 after the image id.
_CLASS_SPLIT = re.compile(r".+_(train|val|trainval|test)", re.DOTALL)
_CLASS_FLAG = re.compile(r"\s+(-1|0|1)$")
_NOT_STATED = ("", "unspecified")


class _Annotation(NamedTuple):
    """Names, boxes [N, 4] and flags of an image's objects, and the (height, width) that it states."""

    names: list[str]
    boxes: NDArray[np.float64]
    difficult: list[bool]
    size: tuple[int, int] | None


def load_voc(folder: Path, split: str | None, names: Sequence[str] | None = None, spec: str = "") -> Dataset:
    """Read the images that ``folder/ImageSets/Main/split.txt`` lists, with their annotations.

    Without such a list, those of the folder ``folder/split``, or of ``folder`` itself for None, in the order
    of their names; an image without an annotation then has no objects and is counted as ``unlabelled``.
    Labels index ``names``, or the classes found in the split, sorted. A polygon or a rotated box without a
    ``bndbox`` becomes the box around it. ``remarks`` counts those, and annotations of another size. Raises
    ``DataError`` for anything missing or broken, and for a class that is not in ``names``.
    """
    spec = spec or f"voc:{folder}" + (f"@{split}" if split else "")
    dropped: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    files = _find_files(folder, split, dropped, remarks)
    nothing = _Annotation([], np.zeros((0, 4)), [], None)
    annotations = [_read_annotation(each.labels, remarks) if each.has_labels else nothing for each in files]
    if names is None:
        names = check_names(sorted({name for each in annotations for name in each.names}), spec, DataError)
        if not names:
            raise DataError(
                f"{spec}: no image of the split has an object; expected at least one labelled object"
            )
    remarks += count_fractions(np.concatenate([each.boxes for each in annotations]), spec)
    images = []
    for each, (found, boxes, difficult, stated) in zip(files, annotations, strict=True):
        index = class_index(names, found, str(each.labels))
        labels = [index[name] for name in found]
        size = image_size(each.path)  # the image's own: <size> is often absent, zero or swapped
        if stated not in (None, size):
            remarks[OTHER_SIZE] += 1
        # xmin = xmax in the file becomes a side of 1 pixel, so that is what an empty box has.
        add = partial(labelled_image, difficult=difficult, empty_side=1.0)
        images.append(add(each.id, each.path, size, boxes, labels, dropped, remarks))
    unlabelled = sum(not each.has_labels for each in files)
    return Dataset(spec, tuple(names), tuple(images), dropped=dropped, unlabelled=unlabelled, remarks=remarks)


def _find_files(
    folder: Path, split: str | None, dropped: Counter[str], remarks: Counter[str]
) -> list[ImageFile]:
    """The images of the split, in its order, or in the order of their names where it has no list."""
    place, listing = _find_split(folder, split)
    image_folder, label_folder = _folders(place)
    if listing is None:
        if split is None and image_folder == place:
            _expect_images(folder)
        files = files_in_folder(image_folder, label_folder, ".xml", dropped)
    else:
        find = _finder(image_files(files_below(image_folder)), image_folder)
        flag = _CLASS_FLAG if _CLASS_SPLIT.fullmatch(listing.stem) else None
        files = []
        for path in listed_images(listing, image_folder, find, remarks, flag):
            id = without_suffix(path.relative_to(image_folder))
            files.append(ImageFile(id, path, label_folder / f"{id}.xml"))
    unlabelled = [each.id for each in files if not each.has_labels]
    if unlabelled and (listing is not None or len(unlabelled) == len(files)):
        raise DataError(
            f"{listing or image_folder}: of its {len(files)} images {len(unlabelled)} have no annotation, "
            f"the first is {shown(unlabelled[0])}; add {label_folder.name}/{unlabelled[0]}.xml"
            + (" or take it out of the split" if listing is not None else "")
        )
    return files


def _folders(place: Path) -> tuple[Path, Path]:
    """Those of the images and of the annotations: JPEGImages and Annotations, also with ``images`` for the
    former and in other letters' cases, or ``place``."""
    folders = {path.name.lower(): path for path in sorted(place.iterdir()) if path.is_dir()}
    labels = folders.get("annotations")
    images = folders.get("jpegimages") or (labels and folders.get("images")) or place
    return images, labels or images


def _expect_images(folder: Path) -> None:
    """Raise ``DataError`` where ``folder`` has no images of its own: those of subfolders may be splits."""
    if image_files(folder.iterdir()):
        return
    found = image_files(files_below(folder))
    remedy = "expected images and their annotations side by side, or JPEGImages and Annotations"
    if found:
        first = found[0].relative_to(folder).parts[0]
        remedy = f"did you mean voc:{folder}@{first}, or voc:{folder}@. for all of its subfolders?"
    raise DataError(f"{folder}: has no images; {_nested(folder) or remedy}")


def _find_split(folder: Path, split: str | None) -> tuple[Path, Path | None]:
    """The folder that holds the images and annotations, and the list of those meant; None means all."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected a VOC folder with JPEGImages, Annotations and ImageSets"
        )
    lists = folder / "ImageSets" / "Main"
    if split is not None and not Path(split).is_absolute():
        for path in (lists / f"{split}.txt", folder / f"{split}.txt"):
            if os.path.lexists(path):
                return folder, path
        if (folder / split).is_dir():
            return folder / split, None
    found = list_names(sorted(path.stem for path in lists.glob("*.txt")))
    if split is None:
        if found:
            raise DataError(f"{folder}: has splits; expected voc:{folder}@SPLIT with one of {found}")
        return folder, None
    none = f"no list in ImageSets/Main and no folder has that name, voc:{folder} takes all images"
    remedy = f"use one of {found}" if found else none
    raise DataError(f"{folder}: no split {shown(split)}; {_nested(folder) or remedy}")


def _nested(folder: Path) -> str:
    """A hint where Pascal VOC's layout lies one or two levels further down, as in VOCdevkit/VOC2007."""
    nested = sorted(path.parent for level in ("*", "*/*") for path in folder.glob(f"{level}/JPEGImages"))
    has_own = (folder / "JPEGImages").is_dir()
    return f"it has no JPEGImages folder, did you mean {nested[0]}?" if nested and not has_own else ""


def _finder(images: Sequence[Path], folder: Path) -> Callable[[str], Path | None]:
    """A search of ``images`` by their names in ``folder`` or the ends of paths, with or without a suffix, and
    in other letters' cases where none fits as it stands."""
    names = {path.relative_to(folder).as_posix(): path for path in images}
    by_suffix = sorted(names.items(), key=lambda item: IMAGE_SUFFIXES.index(item[1].suffix.lower()))
    called: dict[str, Path] = {}
    for form in (without_suffix, str, lambda name: without_suffix(name).lower(), str.lower):
        for name, path in by_suffix:
            called.setdefault(form(name), path)

    def find(text: str) -> Path | None:
        keys = (key for tail in path_tails(text) for key in (tail, tail.lower()))
        return next((called[key] for key in keys if key in called), None)

    return find


def _read_annotation(path: Path, remarks: Counter[str]) -> _Annotation:
    """One XML file, the boxes as continuous edges."""
    with input_errors(path, "it is a link to nothing", DataError):
        content = path.read_bytes()
    # Entities can multiply themselves without end, and no tool declares any.
    if b"<!ENTITY" in content.replace(b"\0", b""):
        raise DataError(f"{path}: declares entities; expected a Pascal VOC annotation, which needs none")
    try:
        # A file that was saved anew in UTF-16 may still declare its former encoding.
        wide = content.startswith(UTF16_MARKS)
        root = ElementTree.fromstring(content.decode("utf-16") if wide else content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path}: broken XML ({error}); expected a Pascal VOC annotation") from None
    if root.tag != "annotation":
        raise DataError(f"{path}: the root element is <{root.tag}>; expected Pascal VOC's <annotation>")
    names, boxes, difficult = [], [], []
    for number, element in enumerate(root.findall("object"), start=1):
        where = f"{path}: object {number}"
        name = (element.findtext("name") or "").strip()
        if not name:
            raise DataError(f"{where} has no name; expected <name> with the class")
        names.append(name)
        boxes.append(_read_box(element, where, remarks))
        difficult.append(_read_flag(element, "difficult", where))
    height, width = (as_whole(root.findtext(f"size/{side}")) or 0 for side in ("height", "width"))
    size = (height, width) if min(height, width) > 0 else None
    return _Annotation(names, np.array(boxes, dtype=np.float64).reshape(-1, 4), difficult, size)


def _read_box(element: ElementTree.Element, where: str, remarks: Counter[str]) -> list[float]:
    """The edges of an object's box, or of the upright box around what it has instead."""
    if element.find("bndbox") is not None:
        x1, y1, x2, y2 = _read_numbers(element, "bndbox", ("xmin", "ymin", "xmax", "ymax"), where)
        return [x1 - 1, y1 - 1, x2, y2]
    polygon = element.find("polygon")
    if polygon is not None:  # x1, y1, x2, ... or points of x and y; pixels, as xmin and xmax are
        x, y = (
            [as_number(each.text) for each in polygon.iter() if re.fullmatch(f"{axis}[0-9]*", each.tag)]
            for axis in "xy"
        )
        if len(x) < 3 or len(x) != len(y) or not all(map(is_coordinate, x + y)):
            raise DataError(f"{where}: its polygon has no 3 corners; expected x and y of each, in pixels")
        remarks[POLYGON] += 1
        return [min(x) - 1, min(y) - 1, max(x), max(y)]
    if element.find("robndbox") is None:
        raise DataError(f"{where} has no bndbox; expected <bndbox> with xmin, ymin, xmax and ymax")
    cx, cy, width, height, angle = _read_numbers(element, "robndbox", ("cx", "cy", "w", "h", "angle"), where)
    if abs(angle) > 2 * math.pi:
        raise DataError(f"{where}: robndbox/angle is {angle:g}; expected radians, as roLabelImg writes them")
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    # It states its size, so its edges are continuous; one pixel is empty, as where xmin = xmax.
    half_x, half_y = (max(0.5, side / 2) for side in (width * cos + height * sin, width * sin + height * cos))
    remarks[ROTATED] += 1
    return [cx - half_x, cy - half_y, cx + half_x, cy + half_y]


def _read_numbers(element: ElementTree.Element, group: str, tags: Sequence[str], where: str) -> list[float]:
    numbers = []
    for tag in tags:
        text = element.findtext(f"{group}/{tag}")
        numbers.append(as_number(text))
        if not is_coordinate(numbers[-1]):
            raise DataError(f"{where}: {group}/{tag} is {shown(text)}; expected a number of pixels")
    return numbers


def _read_flag(element: ElementTree.Element, tag: str, where: str) -> bool:
    text = element.findtext(tag) or ""
    flag = False if text.strip().lower() in _NOT_STATED else as_flag(text)
    if flag is None:
        raise DataError(f"{where}: {tag} is {shown(text)}; expected 0 or 1")
    return flag
