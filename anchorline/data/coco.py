"""COCO detection data: a folder of images and one JSON file with images, annotations and categories.

Numbers and flags are also read where a tool has written them as text, names of files also as Windows, URLs
and Label Studio write them. An object without a box has that of its segmentation.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from anchorline.data.boxes import count_fractions
from anchorline.data.dataset import Dataset, LabelledImage, class_index, image_size, labelled_image
from anchorline.data.files import FOUND_BY_END, absent_images, as_flag, as_number, as_whole, is_coordinate
from anchorline.runtime.contract import check_names
from anchorline.runtime.io.errors import DataError, shown
from anchorline.runtime.io.files import expect_regular, input_errors

Record = dict[str, Any]

WITHOUT_BOX = "without a box"
# A run's length in a compressed mask: five bits a character from the lowest on, 32 says that more follow.
_RUN = re.compile("[P-o]{0,6}[0-O]")
_ELSEWHERE = re.compile(r"(?P<upload>/?(data/)?upload/)|/|[A-Za-z][A-Za-z0-9+.-]*:/")
_LABEL_STUDIO = "file names of Label Studio, found without its prefix"
_UPLOAD_KEY = re.compile("[0-9a-f]{8}-(?=.)")


class _Object(NamedTuple):
    category_id: int
    box: tuple[float, float, float, float]  # xyxy
    crowd: bool


def load_coco(
    folder: Path,
    annotations: Path,
    names: Sequence[str] | None = None,
    spec: str = "",
    anywhere: bool = False,
) -> Dataset:
    """Read a COCO annotation file whose images lie in ``folder``, or ``anywhere`` if its names lead there.

    Labels index ``names``, or the categories in the order of their ids. A category that is not in
    ``names`` is a ``DataError`` when an annotation uses it. ``category_ids`` are the file's own, and
    ``iscrowd`` becomes ``crowd``. Raises ``DataError`` for anything missing, broken or contradictory.
    """
    spec = spec or f"coco:{folder},{annotations}"
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; expected the folder of COCO's images")
    content = _read_json(annotations)
    dropped: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    categories = _read_categories(content, annotations)
    objects = _read_objects(content, categories, dropped, annotations)
    used = {each.category_id for own in objects.values() for each in own}
    categories = _without_root(categories, content, used, remarks)
    own_names = check_names(categories.values(), f"{annotations}: categories", DataError)
    names = own_names if names is None else tuple(names)
    index = class_index(names, [categories[id] for id in sorted(used)], str(annotations))
    every = np.array([each.box for own in objects.values() for each in own]).reshape(-1, 4)
    remarks += count_fractions(every, str(annotations))
    paths = _find_images(content, folder, anywhere, remarks, annotations)
    images: list[LabelledImage] = []
    for (id, own), record, path in zip(objects.items(), content["images"], paths, strict=True):
        boxes = np.array([each.box for each in own], dtype=np.float64).reshape(-1, 4)
        size = _stated_size(record, f"{annotations}: image {len(images) + 1}") or image_size(path)
        labels = [index[categories[each.category_id]] for each in own]
        crowd = [each.crowd for each in own]
        images.append(labelled_image(str(id), path, size, boxes, labels, dropped, remarks, crowd=crowd))
    id_of = {name: id for id, name in categories.items()}
    ids = tuple(id_of[name] for name in names) if id_of.keys() >= set(names) else None
    return Dataset(spec, names, tuple(images), ids, dropped, remarks=remarks)


def _read_json(path: Path) -> Record:
    """The file's lists of images, annotations and categories, not yet checked one by one."""
    with input_errors(path, "expected COCO annotations as JSON", DataError):
        text = path.read_bytes()
    try:
        content = json.loads(text)
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


def _read_categories(content: Record, path: Path) -> dict[int, Any]:
    """What stands for the names of the categories by id, in the order of the ids."""
    categories: dict[int, Any] = {}
    for number, record in enumerate(content["categories"], start=1):
        where = f"{path}: category {number}"
        id = _whole(record, "id", where)
        if abs(id) >= 2**53:  # more than a model's contract can keep
            raise DataError(f"{where}: id is {id}; expected a whole number under 2^53")
        if id in categories:
            raise DataError(f"{where}: id {id} stands twice; expected each category once")
        categories[id] = record.get("name")
    return dict(sorted(categories.items()))


def _without_root(
    categories: dict[int, Any], content: Record, used: set[int], remarks: Counter[str]
) -> dict[int, Any]:
    """Without Roboflow's category 0, which stands above all others, names the project and has no objects."""
    above = {_whole(each, "id", ""): each.get("supercategory") for each in content["categories"]}
    is_root = above.pop(0, "") == "none" and 0 not in used
    if not is_root or not above or any(each != categories[0] for each in above.values()):
        return categories
    remarks["category above all others without objects, taken for no class"] += 1
    return {id: name for id, name in categories.items() if id != 0}


def _read_objects(
    content: Record, categories: dict[int, Any], dropped: Counter[str], path: Path
) -> dict[int, list[_Object]]:
    """The objects of each image by its id, in the order of the images."""
    objects: dict[int, list[_Object]] = {}
    for number, record in enumerate(content["images"], start=1):
        id = _whole(record, "id", f"{path}: image {number}")
        if id in objects:
            raise DataError(f"{path}: image id {id} stands twice; expected each image once")
        objects[id] = []
    for number, record in enumerate(content["annotations"], start=1):
        where = f"{path}: annotation {number}"
        image_id, category_id = (_whole(record, key, where) for key in ("image_id", "category_id"))
        if image_id not in objects:
            raise DataError(
                f"{where}: image_id {image_id} is not among the images; take it out or add the image"
            )
        if category_id not in categories:
            raise DataError(f"{where}: category_id {category_id} is not among the categories")
        stated = record.get("iscrowd")
        crowd = False if stated is None else as_flag(stated)
        if crowd is None:
            raise DataError(f"{where}: iscrowd is {shown(stated)}; expected 0 or 1")
        box = _read_box(record, where)
        if box is None:
            dropped[WITHOUT_BOX] += 1
        else:
            objects[image_id].append(_Object(category_id, box, crowd))
    return objects


def _whole(record: Any, key: str, where: str) -> int:
    """A record's whole number."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: is {shown(record)}; expected an object with {key}")
    value = record.get(key)
    number = as_whole(value)
    if number is None:
        raise DataError(f"{where}: {key} is {shown(value)}; expected a whole number")
    return number


def _stated_size(record: Record, where: str) -> tuple[int, int] | None:
    """An image's (height, width) as the file states it; None where it is left open."""
    sides = []
    for key in ("height", "width"):
        side = as_whole(0 if record.get(key) is None else record[key])
        if side is None or not is_coordinate(side):
            raise DataError(f"{where}: {key} is {shown(record[key])}; expected a whole number of pixels")
        sides.append(side)
    return (sides[0], sides[1]) if min(sides) > 0 else None


def _read_box(record: Record, where: str) -> tuple[float, float, float, float] | None:
    """An object's box as xyxy, from ``bbox`` or around its segmentation; None where it has neither."""
    box = record.get("bbox")
    if box not in (None, []):
        values = list(map(as_number, box)) if isinstance(box, list) else []
        if len(values) != 4 or not all(map(is_coordinate, values)):
            raise DataError(f"{where}: bbox is {shown(box)}; expected x, y, width, height in pixels")
        x, y, width, height = values
        return x, y, x + width, y + height
    mask = record.get("segmentation")
    if mask in (None, [], [[]], {}):
        return None
    found = _box_of_runs(mask) if isinstance(mask, dict) else _box_of_polygons(mask)
    if found is None:
        raise DataError(
            f"{where}: has no bbox, and its segmentation is {shown(mask)}; expected polygons (lists of x, y "
            "in pixels) or a run-length mask of its size"
        )
    return found


def _box_of_polygons(polygons: Any) -> tuple[float, float, float, float] | None:
    """The box around polygons, each a list of x and y in turn (or only one such list); None for others."""
    if not isinstance(polygons, list):
        return None
    lists = polygons if isinstance(polygons[0], list) else [polygons]
    if not all(isinstance(each, list) and len(each) % 2 == 0 for each in lists):
        return None
    values = [as_number(value) for each in lists for value in each]
    if not values or not all(map(is_coordinate, values)):
        return None
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])


def _box_of_runs(mask: Record) -> tuple[float, float, float, float] | None:
    """The box around a run-length mask; None for what is none, and where it is empty no area.

    The runs go down the columns, by turns outside the object and inside. As text (after pycocotools'
    maskApi.c) each from the third on is the difference from the one before the last.
    """
    size, runs = mask.get("size"), mask.get("counts")
    height, width = map(as_whole, size) if isinstance(size, list) and len(size) == 2 else (None, None)
    if height is None or width is None or not 0 < height * width <= 1 << 40 or min(height, width) < 1:
        return None
    if isinstance(runs, str):
        runs = _runs_of_text(runs)
    lengths = [as_whole(run) for run in runs] if isinstance(runs, list) else []
    known = [length for length in lengths if length is not None and 0 <= length <= height * width]
    if len(known) != len(lengths) or sum(known) != height * width:
        return None
    ends = np.cumsum(known, dtype=np.int64)
    first, last = ends[:-1:2], ends[1::2] - 1  # the pixels of each run inside, in the order of the columns
    first, last = first[first <= last], last[first <= last]
    if not len(first):
        return 0.0, 0.0, 0.0, 0.0
    left, right = first // height, last // height
    within = left == right  # one that goes on into the next column touches the bottom and the top
    top = np.where(within, first % height, 0).min()
    bottom = np.where(within, last % height, height - 1).max()
    return float(left.min()), float(top), float(right.max() + 1), float(bottom + 1)


def _runs_of_text(text: str) -> list[int]:
    """The lengths that a compressed mask holds; none for what is damaged."""
    found = _RUN.findall(text)
    if "".join(found) != text:
        return []
    runs: list[int] = []
    for digits in found:
        bits = [ord(digit) - 48 for digit in digits]
        length = sum((each & 31) << (5 * place) for place, each in enumerate(bits))
        length -= 1 << (5 * len(bits)) if bits[-1] & 16 else 0  # the highest bit is the sign
        runs.append(length + runs[-2] if len(runs) > 2 else length)
    return runs


def _find_images(
    content: Record, folder: Path, anywhere: bool, remarks: Counter[str], annotations: Path
) -> list[Path]:
    """The file of each image; raises ``DataError`` for names that lead out of ``folder`` or to nothing."""
    root = os.path.join(os.path.abspath(folder), "")

    def inside(name: str) -> bool:  # by its spelling; links are followed
        return os.path.normpath(os.path.join(root, name)).startswith(root)

    paths: list[Path] = []
    absent: list[str] = []
    read_otherwise: dict[Path, str] = {}
    for number, record in enumerate(content["images"], start=1):
        name = record.get("file_name")
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{annotations}: image {number}: file_name is {shown(name)}; expected a name")
        allowed = anywhere or inside(name)
        if not (allowed and os.path.isfile(folder / name)):
            readings = ((text, remark) for text, remark in _readings(name) if inside(text))
            found = next((each for each in readings if os.path.isfile(folder / each[0])), None)
            if found is not None:
                read_otherwise[folder / found[0]] = name
                remarks[found[1]] += 1
                name = found[0]
            elif allowed:
                absent.append(name)
            else:
                raise DataError(
                    f"{annotations}: image {number}: file_name {shown(name)} leads out of {folder}; expected "
                    "a name inside it, or coco:IMAGES,ANNOTATIONS.json,anywhere for a file that you trust"
                )
        paths.append(folder / name)
    if absent:
        if os.path.exists(folder / absent[0]):
            expect_regular(folder / absent[0], DataError)
        above = os.path.isfile(folder.parent / absent[0])
        remedy = (
            f"give {folder.parent} as the folder" if above else "restore them or take them out of the file"
        )
        raise absent_images(annotations, len(paths), absent, folder, remedy)
    for path, count in Counter(paths).items():
        if count > 1 and path in read_otherwise:
            raise DataError(
                f"{annotations}: {count} images are read as {path}, one of them from the file_name "
                f"{shown(read_otherwise[path])}; write the names as they stand in {folder}"
            )
    return paths


def _readings(name: str) -> Iterator[tuple[str, str]]:
    """Names that the tool which wrote ``name`` may mean, and the remark on each.

    A name that begins in another place (the root, a drive, a URL, Label Studio's store) may lie in the
    folder by any of its ends, the longest first.
    """
    slashed = name.replace("\\", "/")
    _, local_files, place = slashed.partition("?d=")
    texts = [
        (slashed, "file names with backslashes, read as /"),
        (unquote(slashed), "URL-encoded file names"),
    ]
    for text, remark in [(unquote(place), _LABEL_STUDIO)] if local_files else texts:
        yield text, remark
        start = _ELSEWHERE.match(text)
        if not start and not local_files:
            continue
        is_upload = local_files or (start and start["upload"])
        parts = text.split("/")
        for end in range(1, len(parts)):
            yield "/".join(parts[end:]), _LABEL_STUDIO if is_upload else FOUND_BY_END
        if is_upload and (key := _UPLOAD_KEY.match(parts[-1])):
            yield parts[-1][key.end() :], _LABEL_STUDIO
