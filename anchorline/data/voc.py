"""Pascal VOC: JPEGImages, Annotations and ImageSets/Main. Written after the VOC devkit's layout.

VOC counts pixels from 1 and includes the last one; boxes become continuous edges:
x1 = xmin - 1, y1 = ymin - 1, x2 = xmax, y2 = ymax, clipped to the image.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import clip_labelled_boxes, is_coordinate
from anchorline.data.dataset import (
    IMAGE_SUFFIXES,
    Dataset,
    LabelledImage,
    image_size,
    load_image,
    unknown_class,
)
from anchorline.runtime.io.errors import DataError

# A class's own split (cat_train.txt) adds -1, 0 or 1 after the image id.
_CLASS_FLAG = re.compile(r"\s+(-1|0|1)$")
# xmin = xmax in the file becomes a side of 1 pixel.
_EMPTY_SIDE = 1.0
_COORDINATES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class _Annotation:
    """One XML file: class names, VOC boxes [N, 4] as continuous edges, and difficult flags [N]."""

    names: tuple[str, ...]
    boxes: NDArray[np.float64]
    difficult: NDArray[np.bool_]


def load_voc(folder: Path, split: str, names: Sequence[str] | None = None, spec: str = "") -> Dataset:
    """Read the images that ``folder/ImageSets/Main/split.txt`` lists, with their annotations.

    Labels index ``names``, or the classes found in the split, sorted. Boxes of zero area, reversed
    or outside the image are dropped and counted. Raises ``DataError`` for anything missing or
    broken, and for a class that is not in ``names``.
    """
    spec = spec or f"voc:{folder}@{split}"
    ids = _read_split(folder, split)
    image_paths = _find_images(folder, ids, split)
    annotations = [_read_annotation(_annotation_path(folder, id)) for id in ids]
    if names is None:
        names = sorted({name for annotation in annotations for name in annotation.names})
        if not names:
            raise DataError(
                f"{spec}: no image of the split has an object; expected at least one labelled object"
            )
    index = {name: label for label, name in enumerate(names)}
    dropped: Counter[str] = Counter()
    images = []
    for id, path, annotation in zip(ids, image_paths, annotations, strict=True):
        for name in annotation.names:
            if name not in index:
                raise unknown_class(str(_annotation_path(folder, id)), name, names)
        image, reasons = _labelled_image(id, path, annotation, index)
        images.append(image)
        dropped.update(reasons)
    return Dataset(spec, tuple(names), tuple(images), dropped=dropped)


def _labelled_image(
    id: str, path: Path, annotation: _Annotation, index: dict[str, int]
) -> tuple[LabelledImage, Counter[str]]:
    """The image with its usable boxes, and the reasons for the others."""
    # The image's own size counts: <size> is often absent, zero or swapped.
    size = image_size(path)
    boxes, kept, dropped = clip_labelled_boxes(annotation.boxes, size, _EMPTY_SIDE)
    labels = np.array([index[name] for name in annotation.names], dtype=np.int64)[kept]
    difficult = annotation.difficult[kept]
    load = partial(load_image, path, size)
    return LabelledImage(id, size, boxes, labels, difficult, np.zeros_like(difficult), load), dropped


def _annotation_path(folder: Path, id: str) -> Path:
    return folder / "Annotations" / f"{id}.xml"


def _read_split(folder: Path, split: str) -> list[str]:
    """The image ids of a split, in the file's order."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected a VOC folder with JPEGImages, Annotations and ImageSets"
        )
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        if not (folder / part).is_dir():
            raise DataError(
                f"{folder}: has no {part} folder; expected Pascal VOC's layout{_nested_hint(folder)}"
            )
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        found = sorted(p.stem for p in path.parent.glob("*.txt"))
        listed = f"use one of {', '.join(found[:12])}" if found else "the folder ImageSets/Main lists none"
        raise DataError(f"{folder}: no split {split!r}; {listed}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected one image id a line") from None
    ids = [_CLASS_FLAG.sub("", line.strip()) for line in lines if line.strip()]
    if not ids:
        raise DataError(f"{path}: the split is empty; expected one image id a line")
    return ids


def _nested_hint(folder: Path) -> str:
    """Point to VOC folders one or two levels further down, as in VOCdevkit/VOC2007."""
    nested = sorted(p.parent for pattern in ("*/JPEGImages", "*/*/JPEGImages") for p in folder.glob(pattern))
    return f"; did you mean {nested[0]}?" if nested else ""


def _find_images(folder: Path, ids: list[str], split: str) -> list[Path]:
    """The image file of each id; one ``DataError`` that counts all that are absent."""
    present = {p.name for p in (folder / "JPEGImages").iterdir()}
    by_lower_name = {name.lower(): name for name in present}
    paths: list[Path] = []
    absent: list[str] = []
    for id in ids:
        found = next((n for s in IMAGE_SUFFIXES if (n := by_lower_name.get((id + s).lower()))), None)
        if found is None:
            absent.append(id)
        else:
            paths.append(folder / "JPEGImages" / found)
    if absent:
        raise DataError(
            f"{folder}: split {split!r} lists {len(ids)} images and {len(absent)} are not in JPEGImages, "
            f"the first is {absent[0]!r}; restore them as .jpg, .jpeg or .png, or take them out of the split"
        )
    unlabelled = [id for id in ids if not _annotation_path(folder, id).is_file()]
    if unlabelled:
        raise DataError(
            f"{folder}: split {split!r} lists {len(ids)} images and {len(unlabelled)} have no annotation, "
            f"the first is {unlabelled[0]!r}; add Annotations/{unlabelled[0]}.xml or take it out of the split"
        )
    return paths


def _read_annotation(path: Path) -> _Annotation:
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path}: broken XML ({error}); expected a Pascal VOC annotation") from None
    if root.tag != "annotation":
        raise DataError(f"{path}: the root element is <{root.tag}>; expected Pascal VOC's <annotation>")
    names, boxes, difficult = [], [], []
    for number, element in enumerate(root.findall("object"), start=1):
        where = f"{path}: object {number}"
        name = (element.findtext("name") or "").strip()
        if not name:
            raise DataError(f"{where} has no name; expected <name> with the class")
        xmin, ymin, xmax, ymax = (
            _coordinate(element, tag, where) for tag in ("xmin", "ymin", "xmax", "ymax")
        )
        names.append(name)
        boxes.append((xmin - 1, ymin - 1, xmax, ymax))
        difficult.append((element.findtext("difficult") or "0").strip() in ("1", "true", "True"))
    return _Annotation(
        tuple(names), np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(difficult, dtype=np.bool_)
    )


def _coordinate(element: ElementTree.Element, tag: str, where: str) -> float:
    text = element.findtext(f"bndbox/{tag}")
    try:
        value = float(text if text is not None else "nan")
    except ValueError:
        value = math.nan
    if not is_coordinate(value):
        raise DataError(f"{where}: bndbox/{tag} is {text!r}; expected a number of pixels")
    return value
