"""YOLO detection data: images, and beside them one text file each with the objects' boxes.

Two layouts are known: ``images/SPLIT`` with ``labels/SPLIT`` (Ultralytics) and ``SPLIT/images`` with
``SPLIT/labels`` (Roboflow). A line of a label file is a class index and centre x, centre y, width
and height as fractions of the image, or a class index and the corners of a polygon, which becomes
its bounding box. Fractions become continuous edges, clipped to the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import as_number
from anchorline.data.dataset import Dataset, class_index, image_size, labelled_image, list_names, read_lines
from anchorline.runtime.io.errors import DataError, SettingsError, one_line
from anchorline.runtime.io.files import expect_regular
from anchorline.runtime.io.images import is_image

WITHOUT_IMAGE = "label file without an image"

_CLASS_FILES = ("classes.txt", "labels/classes.txt")
# Boxes may reach a little over the edge. Beyond this, the numbers are pixels or damage.
_FARTHEST_FRACTION = 2.0
_BOX_VALUES = 4
_SMALLEST_POLYGON = 6  # values: three corners


@dataclass(frozen=True)
class YoloConfig:
    """``names`` in the order of the labels' indices; ``keypoints``: labels hold keypoints after the box."""

    names: tuple[str, ...]
    keypoints: bool = False


def load_yolo(folder: Path, split: str, names: Sequence[str] | None = None, spec: str = "") -> Dataset:
    """Read the images of a split, its subfolders included, in the order of their names.

    Labels index ``names``, or the data's own in its order. An image without a label file has no
    objects and is counted as ``unlabelled``. Raises ``DataError`` for anything missing or broken, and for
    a class that is used and not in ``names``.
    """
    spec = spec or f"yolo:{folder}@{split}"
    image_folder, label_folder = _split_folders(folder, split)
    config = read_yolo_config(folder)
    own_names = config.names if names is None else tuple(names)
    image_paths = _find_images(image_folder)
    label_paths = [label_folder / f"{id}.txt" for id in image_paths]
    labelled = [path.is_file() for path in label_paths]
    if not any(labelled):
        raise DataError(
            f"{label_folder}: none of the {len(label_paths)} images of {split!r} has a label file, the first "
            f"would be {label_paths[0].name}; give images without objects empty label files"
        )
    label_files = {path for path in label_folder.rglob("*.txt") if path.name != "classes.txt"}
    unused = len(label_files - set(label_paths))
    dropped: Counter[str] = Counter({WITHOUT_IMAGE: unused} if unused else {})
    images = []
    for (id, path), label_path, has_labels in zip(image_paths.items(), label_paths, labelled, strict=True):
        classes, fractions = _read_labels(label_path, config) if has_labels else ([], np.zeros((0, 4)))
        used = [config.names[each] for each in classes]
        index = class_index(own_names, used, str(label_path))
        size = height, width = image_size(path)
        boxes = fractions * [width, height, width, height]
        images.append(labelled_image(id, path, size, boxes, [index[name] for name in used], dropped))
    return Dataset(spec, own_names, tuple(images), dropped=dropped, unlabelled=labelled.count(False))


def _split_folders(folder: Path, split: str) -> tuple[Path, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a YOLO data set with images and labels")
    for images, labels in ((f"images/{split}", f"labels/{split}"), (f"{split}/images", f"{split}/labels")):
        if (folder / images).is_dir():
            if not (folder / labels).is_dir():
                raise DataError(f"{folder}: has {images} and no {labels}; expected the label files there")
            return folder / images, folder / labels
    found = {path.name for path in folder.glob("images/*") if path.is_dir()}
    found |= {path.parent.name for path in folder.glob("*/images") if path.is_dir()}
    if found:
        remedy = f"use one of {list_names(sorted(found))}"
    elif (folder / "images").is_dir():
        remedy = "its images have no splits, use @. for all of them"
    else:
        remedy = "expected its images in images/SPLIT or SPLIT/images"
    raise DataError(f"{folder}: no split {split!r}; {remedy}")


def _find_images(folder: Path) -> dict[str, Path]:
    """The image files by id: the path inside the folder without its suffix."""
    paths: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not is_image(path) or any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        id = inside.with_suffix("").as_posix()
        if id in paths:
            raise DataError(f"{path}: shares its label file with {paths[id].name}; rename one of the images")
        paths[id] = path
    if not paths:
        raise DataError(f"{folder}: has no images; expected at least one")
    return paths


def _read_labels(path: Path, config: YoloConfig) -> tuple[list[int], NDArray[np.float64]]:
    """One label file: class indices, and boxes [N, 4] as xyxy fractions of the image."""
    classes, boxes = [], []
    for number, line in enumerate(read_lines(path, "one object"), start=1):
        if line.strip():
            index, values = _read_object(line.split(), config, f"{path}: line {number}")
            points = np.array(values).reshape(-1, 2)
            low, high = points.min(axis=0), points.max(axis=0)
            if len(values) == _BOX_VALUES:  # the centre and the size
                low, high = points[0] - points[1] / 2, points[0] + points[1] / 2
            classes.append(index)
            boxes.append([*low, *high])
    return classes, np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _read_object(fields: list[str], config: YoloConfig, where: str) -> tuple[int, list[float]]:
    """The class index and the numbers behind it, of a box or a polygon."""
    values = []
    for text in fields[1:]:
        values.append(as_number(text))
        if not abs(values[-1]) <= _FARTHEST_FRACTION:
            raise DataError(f"{where}: {text!r} is no fraction of the image; expected 0 to 1, not pixels")
    if config.keypoints:
        values = values[:_BOX_VALUES]
    if len(values) != _BOX_VALUES and (len(values) < _SMALLEST_POLYGON or len(values) % 2):
        raise DataError(
            f"{where} has {len(fields)} values; expected class, centre x, centre y, width, height, "
            "or class and the x, y of at least 3 corners"
        )
    index, count = as_number(fields[0]), len(config.names)  # some tools write 0.0
    if not (0 <= index < count and index.is_integer()):
        raise DataError(
            f"{where}: class {fields[0]!r}; expected a whole number from 0 to {count - 1}, the names being "
            f"{list_names(config.names)}"
        )
    return int(index), values


def read_yolo_config(folder: Path) -> YoloConfig:
    """Read ``data.yaml``, else the one other YAML file in ``folder`` with ``names``, else ``classes.txt``.

    ``names`` may be a list or a mapping from 0, 1, ... to the names. Raises ``DataError`` when the
    names are missing, broken or contradictory, ``SettingsError`` when PyYAML is not installed.
    """
    usual = folder / "data.yaml"
    files = [usual] if usual.is_file() else sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    found = [(path, content) for path in files if "names" in (content := _read_yaml(path))]
    if len(found) > 1:
        listed = ", ".join(path.name for path, _ in found)
        raise DataError(f"{folder}: class names stand in {listed}; rename the right file to data.yaml")
    for path, content in found:
        names = _check_names(content["names"], path)
        if content.get("nc", str(len(names))) != str(len(names)):
            raise DataError(
                f"{path}: nc is {content['nc']!r} and names has {len(names)}; correct the wrong one"
            )
        return YoloConfig(names, "kpt_shape" in content)
    for path in (folder / name for name in _CLASS_FILES):
        if path.is_file():
            lines = [line.strip() for line in read_lines(path, "one class name")]
            while lines and not lines[-1]:
                lines.pop()
            return YoloConfig(_check_names(lines, path))
    raise DataError(
        f"{folder}: no class names; expected data.yaml with names, or classes.txt with one name a line "
        "in the order of the label files' indices"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping with every scalar as text, so that a class may be called ``no`` or ``1``."""
    try:
        import yaml
    except ImportError:
        raise SettingsError(
            f"{path}: reading it needs PyYAML, which is not installed; pip install pyyaml, or delete the "
            "file and write the class names, one a line, into classes.txt"
        ) from None
    expect_regular(path, DataError)
    try:
        content = yaml.load(path.read_bytes(), Loader=yaml.BaseLoader)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); expected YAML") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DataError(
            f"{path}: broken YAML ({one_line(error)}); expected the class names as names"
        ) from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected YAML with the class names as names, got no mapping")
    return content


def _check_names(names: Any, path: Path) -> tuple[str, ...]:
    """The class names in order, from a list or a mapping."""
    if isinstance(names, dict):
        indices = [str(index) for index in range(len(names))]
        if set(names) != set(indices):
            raise DataError(
                f"{path}: names has the indices {list_names(list(names))}; expected 0 to {len(names) - 1}"
            )
        names = [names[index] for index in indices]
    if not isinstance(names, list):
        raise DataError(f"{path}: names is {names!r}; expected a list, or a mapping from 0, 1, ... to names")
    if not names:
        raise DataError(f"{path}: holds no class names; expected at least one")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            got = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"  # perhaps endless
            raise DataError(f"{path}: the name of class {index} is {got}; expected a text")
        if names.index(name) != index:
            raise DataError(
                f"{path}: classes {names.index(name)} and {index} are both {name!r}; expected each name once"
            )
    return tuple(names)
