"""Pascal VOC: JPEGImages, Annotations and ImageSets/Main. Written after the VOC devkit's layout.

VOC counts pixels from 1 and includes the last one; boxes become continuous edges:
x1 = xmin - 1, y1 = ymin - 1, x2 = xmax, y2 = ymax, clipped to the image.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import as_number, is_coordinate
from anchorline.data.dataset import Dataset, class_index, image_size, labelled_image, read_lines
from anchorline.runtime.io.errors import DataError
from anchorline.runtime.io.files import expect_regular

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# A class's own split (cat_train.txt) adds -1, 0 or 1 after the image id.
_CLASS_FLAG = re.compile(r"\s+(-1|0|1)$")


def load_voc(folder: Path, split: str, names: Sequence[str] | None = None, spec: str = "") -> Dataset:
    """Read the images that ``folder/ImageSets/Main/split.txt`` lists, with their annotations.

    Labels index ``names``, or the classes found in the split, sorted. Raises ``DataError`` for anything
    missing or broken, and for a class that is not in ``names``.
    """
    spec = spec or f"voc:{folder}@{split}"
    files = _find_files(folder, split)
    annotations = {id: _read_annotation(xml) for id, _, xml in files}
    if names is None:
        names = sorted({name for found, *_ in annotations.values() for name in found})
        if not names:
            raise DataError(
                f"{spec}: no image of the split has an object; expected at least one labelled object"
            )
    dropped: Counter[str] = Counter()
    images = []
    for id, path, xml in files:
        found, boxes, difficult = annotations[id]
        index = class_index(names, found, str(xml))
        labels = [index[name] for name in found]
        size = image_size(path)  # the image's own: <size> is often absent, zero or swapped
        # xmin = xmax in the file becomes a side of 1 pixel, so that is what an empty box has.
        images.append(
            labelled_image(id, path, size, boxes, labels, dropped, difficult=difficult, empty_side=1.0)
        )
    return Dataset(spec, tuple(names), tuple(images), dropped=dropped)


def _find_files(folder: Path, split: str) -> list[tuple[str, Path, Path]]:
    """The id, image and annotation of each image of the split, in its order."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected a VOC folder with JPEGImages, Annotations and ImageSets"
        )
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        if not (folder / part).is_dir():
            # Perhaps one or two levels further down, as in VOCdevkit/VOC2007.
            nested = sorted(p.parent for level in ("*", "*/*") for p in folder.glob(f"{level}/JPEGImages"))
            hint = f"; did you mean {nested[0]}?" if nested else ""
            raise DataError(f"{folder}: has no {part} folder; expected Pascal VOC's layout{hint}")
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        found = sorted(p.stem for p in path.parent.glob("*.txt"))
        listed = f"use one of {', '.join(found[:12])}" if found else "the folder ImageSets/Main lists none"
        raise DataError(f"{folder}: no split {split!r}; {listed}")
    lines = [line.strip() for line in read_lines(path, "one image id")]
    ids = [_CLASS_FLAG.sub("", line) for line in lines if line]
    if not ids:
        raise DataError(f"{path}: the split is empty; expected one image id a line")
    by_name = {p.name.lower(): p for p in sorted((folder / "JPEGImages").iterdir())}
    files = []
    for id in ids:
        image = next((by_name[n] for s in _IMAGE_SUFFIXES if (n := (id + s).lower()) in by_name), None)
        files.append((id, image, folder / "Annotations" / f"{id}.xml"))
    listing = f"{folder}: split {split!r} lists {len(ids)} images and"
    absent = [id for id, image, _ in files if image is None]
    if absent:
        raise DataError(
            f"{listing} {len(absent)} are not in JPEGImages, the first is {absent[0]!r}; "
            "restore them as .jpg, .jpeg or .png, or take them out of the split"
        )
    unlabelled = [id for id, _, xml in files if not xml.is_file()]
    if unlabelled:
        raise DataError(
            f"{listing} {len(unlabelled)} have no annotation, the first is {unlabelled[0]!r}; "
            f"add Annotations/{unlabelled[0]}.xml or take it out of the split"
        )
    return [(id, image, xml) for id, image, xml in files if image is not None]


def _read_annotation(path: Path) -> tuple[list[str], NDArray[np.float64], list[bool]]:
    """One XML file: class names, boxes [N, 4] as continuous edges, and difficult flags."""
    expect_regular(path, DataError)
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
        corners = []
        for tag in ("xmin", "ymin", "xmax", "ymax"):
            text = element.findtext(f"bndbox/{tag}")
            corners.append(as_number(text))
            if not is_coordinate(corners[-1]):
                raise DataError(f"{where}: bndbox/{tag} is {text!r}; expected a number of pixels")
        names.append(name)
        boxes.append(corners)
        difficult.append((element.findtext("difficult") or "0").strip() in ("1", "true", "True"))
    edges = np.array(boxes, dtype=np.float64).reshape(-1, 4) - [1, 1, 0, 0]
    return names, edges, difficult
