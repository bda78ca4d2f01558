"""COCO detection data: a folder of images and one JSON file with images, annotations and categories."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from anchorline.data.boxes import is_coordinate
from anchorline.data.dataset import Dataset, class_index, image_size, labelled_image
from anchorline.runtime.io.errors import DataError
from anchorline.runtime.io.files import expect_regular

Record = dict[str, Any]
Value = TypeVar("Value", int, str)


def load_coco(folder: Path, annotations: Path, names: Sequence[str] | None = None, spec: str = "") -> Dataset:
    """Read a COCO annotation file whose images lie in ``folder``.

    Labels index ``names``, or the categories in the order of their ids. A category that is not in
    ``names`` is a ``DataError`` when an annotation uses it. ``category_ids`` are the file's own, and
    ``iscrowd`` becomes ``crowd``. Raises ``DataError`` for anything missing, broken or contradictory.
    """
    spec = spec or f"coco:{folder},{annotations}"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected the folder of COCO's images")
    content = _read_json(annotations)
    categories = _read_categories(content, annotations)
    objects = _objects_by_image(content, categories, annotations)
    used = sorted({each["category_id"] for records in objects.values() for each in records})
    names = list(categories.values()) if names is None else names
    index = class_index(names, [categories[id] for id in used], str(annotations))
    paths = [
        folder / _field(record, "file_name", str, f"{annotations}: image {number}")
        for number, record in enumerate(content["images"], start=1)
    ]
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise DataError(
            f"{annotations}: lists {len(paths)} images and {len(absent)} are not in {folder}, the first is "
            f"{absent[0].name!r}; restore them or take them out of the file"
        )
    dropped: Counter[str] = Counter()
    images = []
    for record, path in zip(content["images"], paths, strict=True):
        own = objects[record["id"]]
        boxes = np.array([each["bbox"] for each in own], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        size: Any = record.get("height"), record.get("width")
        if not all(isinstance(side, int) and side > 0 for side in size):
            size = image_size(path)
        labels = [index[categories[each["category_id"]]] for each in own]
        crowd = [bool(each.get("iscrowd", 0)) for each in own]
        images.append(labelled_image(str(record["id"]), path, size, boxes, labels, dropped, crowd=crowd))
    id_of = {name: id for id, name in categories.items()}
    ids = tuple(id_of[name] for name in names) if set(names) <= set(id_of) else None
    return Dataset(spec, tuple(names), tuple(images), ids, dropped)


def _read_json(path: Path) -> Record:
    """The file's lists of images, annotations and categories, not yet checked one by one."""
    expect_regular(path, DataError)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected COCO annotations as JSON") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); expected a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON ({error}); expected COCO annotations") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: holds a {type(content).__name__}; expected COCO's object with images, annotations"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{path}: has no list {key!r}; expected COCO's images, annotations and categories"
            )
        if not content[key] and key != "annotations":
            raise DataError(f"{path}: lists no {key}; expected at least one")
    return content


def _read_categories(content: Record, path: Path) -> dict[int, str]:
    """Category names by id, in the order of the ids."""
    categories: dict[int, str] = {}
    for number, record in enumerate(content["categories"], start=1):
        where = f"{path}: category {number}"
        id, name = _field(record, "id", int, where), _field(record, "name", str, where)
        if id in categories or name in categories.values():
            raise DataError(f"{where}: id {id} or name {name!r} stands twice; expected each once")
        categories[id] = name
    return dict(sorted(categories.items()))


def _objects_by_image(content: Record, categories: dict[int, str], path: Path) -> dict[int, list[Record]]:
    objects: dict[int, list[Record]] = {}
    for number, record in enumerate(content["images"], start=1):
        id = _field(record, "id", int, f"{path}: image {number}")
        if id in objects:
            raise DataError(f"{path}: image id {id} stands twice; expected each image once")
        objects[id] = []
    for number, record in enumerate(content["annotations"], start=1):
        where = f"{path}: annotation {number}"
        image_id, category_id = (_field(record, key, int, where) for key in ("image_id", "category_id"))
        if image_id not in objects:
            raise DataError(
                f"{where}: image_id {image_id} is not among the images; take it out or add the image"
            )
        if category_id not in categories:
            raise DataError(f"{where}: category_id {category_id} is not among the categories")
        box = record.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_coordinate, box))):
            raise DataError(f"{where}: bbox is {box!r}; expected x, y, width, height in pixels")
        objects[image_id].append(record)
    return objects


def _field(record: Any, key: str, kind: type[Value], where: str) -> Value:
    """A record's whole number or name."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) or not str(value).strip():
        expected = "a whole number" if kind is int else "a name"
        raise DataError(f"{where}: {key} is {value!r}; expected {expected}")
    return value
