"""YOLO detection data: images, and one text file each with the objects' boxes.

Label files lie in ``labels`` where the images lie in ``images`` (``images/SPLIT`` and ``labels/SPLIT`` as
Ultralytics has it, ``SPLIT/images`` and ``SPLIT/labels`` as Roboflow), else beside the images (labelImg,
CVAT). A split is such a folder, or a list of images. A line of a label file is a class index and centre x,
centre y, width and height as fractions of the image, or a class index and the corners of a polygon, which
becomes its bounding box. Fractions become continuous edges, clipped to the image.
"""

from __future__ import annotations

import functools
import os.path
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.data.dataset import Dataset, class_index, image_size, labelled_image, list_names
from anchorline.data.files import (
    SPLITS,
    ImageFile,
    as_number,
    as_whole,
    files_in_folder,
    listed_images,
    path_tails,
    read_lines,
    without_suffix,
)
from anchorline.runtime.contract import check_names
from anchorline.runtime.io.errors import DataError, SettingsError, one_line, printable, shown
from anchorline.runtime.io.files import input_errors
from anchorline.runtime.io.images import IMAGE_SUFFIXES, image_files, is_image

_CLASS_FILES = (
    *("classes.txt", "labels/classes.txt", "obj.names"),
    *(
        "{}/classes.txt",
        "{}/labels/classes.txt",
        "labels/{}/classes.txt",
        "images/{}/classes.txt",
    ),  # of a split
)
# Boxes may reach a little over the edge. Beyond this, the numbers are pixels or damage.
_FARTHEST_FRACTION = 2.0
_MOST_BRACKETS = 10_000  # PyYAML's time grows with the square of those that are open
_NULL = ("", "~", "null")  # as YAML has it
_BOX_VALUES = 4
_SMALLEST_POLYGON = 6  # values: three corners


@dataclass(frozen=True)
class YoloConfig:
    """``names`` in the order of the labels' indices; ``keypoints``: labels hold keypoints after the box;
    ``splits``: the folders and lists of images that each split names."""

    names: tuple[str, ...]
    keypoints: bool = False
    splits: dict[str, list[str]] = field(default_factory=dict)


def load_yolo(folder: Path, split: str | None, names: Sequence[str] | None = None, spec: str = "") -> Dataset:
    """Read the images of a split (None: those of a folder without splits), subfolders included, in the order
    of their names or of the split's list.

    Labels index ``names``, or the data's own in its order. An image without a label file has no
    objects and is counted as ``unlabelled``. Raises ``DataError`` for anything missing or broken, and for
    a class that is used and not in ``names``.
    """
    spec = spec or f"yolo:{folder}" + (f"@{split}" if split else "")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a YOLO data set with images and labels")
    config = read_yolo_config(folder, split)
    own_names = config.names if names is None else tuple(names)
    dropped: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    files = _find_files(folder, split, config, dropped, remarks)
    unlabelled = sum(not each.has_labels for each in files)
    if unlabelled == len(files):
        raise DataError(
            f"{spec}: none of its {len(files)} images has a label file, the first would be "
            f"{files[0].labels}; give images without objects empty label files"
        )
    images = []
    for each in files:
        classes, fractions = _read_labels(each.labels, config) if each.has_labels else ([], np.zeros((0, 4)))
        used = [config.names[index] for index in classes]
        index = class_index(own_names, used, str(each.labels))
        size = height, width = image_size(each.path)
        boxes = fractions * [width, height, width, height]
        labels = [index[name] for name in used]
        images.append(labelled_image(each.id, each.path, size, boxes, labels, dropped, remarks))
    return Dataset(spec, own_names, tuple(images), dropped=dropped, unlabelled=unlabelled, remarks=remarks)


def _find_files(
    folder: Path, split: str | None, config: YoloConfig, dropped: Counter[str], remarks: Counter[str]
) -> list[ImageFile]:
    """The images of what the data's own file names for the split, folders or lists; else of the split's usual
    folder, else of a list or a folder called ``split``."""
    if split is None:
        images = folder / "images"
        if any(os.path.lexists(path.with_suffix(".txt")) for path in image_files(folder.iterdir())):
            return files_in_folder(folder, folder, ".txt", dropped)
        if images.is_dir() and image_files(images.iterdir()):
            return files_in_folder(images, _label_folder(images, folder), ".txt", dropped)
        raise DataError(f"{folder}: has no images with label files beside them; {_remedy(folder, config)}")
    if Path(split).is_absolute():
        raise DataError(f"{folder}: no split {shown(split)}; {_remedy(folder, config)}")
    named = config.splits.get(split, [])
    found = [path for text in named if (path := _find(text, folder)) is not None]
    usual = (folder / "images" / split, folder / split / "images", folder / f"{split}.txt", folder / split)
    found = found or [path for path in usual if os.path.lexists(path)][:1]
    if len(found) < len(named):
        raise DataError(
            f"{folder}: its images of {split!r} are {shown(named)}, and not all of that is there; restore it"
        )
    if not found:
        raise DataError(f"{folder}: no split {shown(split)}; {_remedy(folder, config)}")
    files = []
    for path in found:
        if path.is_dir():
            base = path if len(found) == 1 else folder
            files += files_in_folder(path, _label_folder(path, folder), ".txt", dropped, base)
        else:
            files += _in_list(path, folder, remarks)
    return files


def _remedy(folder: Path, config: YoloConfig) -> str:
    """What else the folder can be opened as."""
    found = {path.name for path in folder.glob("images/*") if path.is_dir()}
    found |= {path.parent.name for path in folder.glob("*/images") if path.is_dir()}
    found |= {split for split, named in config.splits.items() if all(_find(text, folder) for text in named)}
    found |= {split for split in SPLITS if (folder / split).is_dir() or (folder / f"{split}.txt").is_file()}
    if found:
        return f"use one of {list_names([f'@{split}' for split in sorted(found)])}"
    if (folder / "images").is_dir():
        return "its images have no splits, use @. for all of them"
    return "expected its images in images/SPLIT or SPLIT/images, or beside their label files"


def _find(text: str, folder: Path, *starts: Path) -> Path | None:
    """What a file of the data set calls ``text``, below ``folder`` and from one of the ``starts``."""
    root = os.path.join(os.path.abspath(folder), "")
    for tail in path_tails(text):
        for start in starts or (folder,):
            path = os.path.abspath(start / tail)  # by its spelling; links are followed
            if path.startswith(root) and os.path.lexists(path):
                return folder / path[len(root) :]
    return None


def _label_folder(images: Path, folder: Path) -> Path:
    """``labels`` in the place of the last ``images`` on the way from ``folder``, where there is such a
    folder; else the labels lie beside the images."""
    before, found, after = f"/{images.relative_to(folder).as_posix()}/".rpartition("/images/")
    labels = folder / f"{before}/labels/{after}".strip("/")
    return labels if found and labels.is_dir() else images


def _in_list(listing: Path, folder: Path, remarks: Counter[str]) -> list[ImageFile]:
    """The images that a text file lists; an id is the path from ``folder`` without its suffix."""
    starts = (listing.parent, folder, folder / "images")
    label_folder = functools.cache(lambda parent: _label_folder(parent, folder))

    def find(text: str) -> Path | None:
        names = [text] if is_image(text) else [text + suffix for suffix in IMAGE_SUFFIXES]
        return next(filter(None, (_find(name, folder, *starts) for name in names)), None)

    return [
        ImageFile(
            without_suffix(path.relative_to(folder)),
            path,
            label_folder(path.parent) / f"{without_suffix(path.name)}.txt",
        )
        for path in listed_images(listing, folder, find, remarks)
    ]


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
            raise DataError(
                f"{where}: {shown(text)} is no fraction of the image; expected 0 to 1, not pixels"
            )
    if config.keypoints:
        values = values[:_BOX_VALUES]
    if len(values) != _BOX_VALUES and (len(values) < _SMALLEST_POLYGON or len(values) % 2):
        raise DataError(
            f"{where} has {len(fields)} values; expected class, centre x, centre y, width, height, "
            "or class and the x, y of at least 3 corners"
        )
    index, count = as_whole(fields[0]), len(config.names)
    if index is None or not 0 <= index < count:
        raise DataError(
            f"{where}: class {shown(fields[0])}; expected a whole number from 0 to {count - 1}, the names "
            f"being {list_names(config.names)}"
        )
    return index, values


def read_yolo_config(folder: Path, split: str | None = None) -> YoloConfig:
    """Read ``data.yaml``, else the one other YAML file in ``folder`` with ``names``, else the class names,
    one a line, in the file that CVAT's ``obj.data`` names, or in ``classes.txt``, be it with the ``split``.

    ``names`` may be a list or a mapping from 0, 1, ... to the names. Raises ``DataError`` when the
    names are missing, broken or contradictory, ``SettingsError`` when PyYAML is not installed.
    """
    usual, darknet = folder / "data.yaml", folder / "obj.data"
    files = [usual] if usual.exists() else sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    found = [(path, content) for path in files if "names" in (content := _read_yaml(path))]
    if len(found) > 1:
        listed = ", ".join(path.name for path, _ in found)
        raise DataError(f"{folder}: class names stand in {listed}; rename the right file to data.yaml")
    for path, content in found:
        names = _check_names(content["names"], path)
        _check_count(content, "nc", names, path)
        return YoloConfig(names, "kpt_shape" in content, _named_splits(content))
    lines = read_lines(darknet, "a setting") if darknet.exists() else []
    settings = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    for name in (settings.get("names", ""), *(each.format(split or ".") for each in _CLASS_FILES)):
        class_file = _find(name, folder)
        if class_file is not None:
            lines = [line.strip() for line in read_lines(class_file, "one class name")]
            while lines and not lines[-1]:
                lines.pop()
            names = _check_names(lines, class_file)
            _check_count(settings, "classes", names, darknet)
            return YoloConfig(names, splits=_named_splits(settings))
    raise DataError(
        f"{folder}: no class names; expected data.yaml with names, or classes.txt with one name a line "
        "in the order of the label files' indices"
    )


def _named_splits(content: dict[str, Any]) -> dict[str, list[str]]:
    """What a data set's own file names for each split, below its ``path``."""
    start = content.get("path")
    start = start if isinstance(start, str) else ""
    named = {}
    for split in SPLITS:
        value = content.get(split)
        texts = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
        texts = [text for text in texts if text not in _NULL]
        if texts:
            named[split] = [str(PurePosixPath(start, text)) for text in texts]
    return named


def _check_count(content: dict[str, Any], key: str, names: tuple[str, ...], path: Path) -> None:
    count = content.get(key) or str(len(names))
    if as_whole(count) != len(names):
        raise DataError(f"{path}: {key} is {shown(count)} and names has {len(names)}; correct the wrong one")


def _read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping with every scalar as text, so that a class may be called ``no`` or ``1``."""
    try:
        import yaml
    except ImportError:
        raise SettingsError(
            f"{path}: reading it needs PyYAML, which is not installed; pip install pyyaml, or delete the "
            "file and write the class names, one a line, into classes.txt"
        ) from None
    with input_errors(path, "it is a link to nothing", DataError):
        text = path.read_bytes()
    if text.count(b"[") + text.count(b"{") > _MOST_BRACKETS:
        raise DataError(f"{path}: holds over {_MOST_BRACKETS} brackets; expected the class names as names")
    try:
        content = yaml.load(text, Loader=yaml.BaseLoader)
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
            given = printable(list_names(list(names)))[:200]
            raise DataError(f"{path}: names has the indices {given}; expected 0 to {len(names) - 1}")
        names = [names[index] for index in indices]
    if not isinstance(names, list):
        raise DataError(
            f"{path}: names is {shown(names)}; expected a list, or a mapping from 0, 1, ... to names"
        )
    if not names:
        raise DataError(f"{path}: holds no class names; expected at least one")
    return check_names(names, str(path), DataError)
