"""Open labelled data from one line of text, as in ``--data voc:DIR@split``."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from anchorline.data.dataset import Dataset, LabelledImage, unknown_class
from anchorline.data.voc import load_voc
from anchorline.runtime.io.errors import DataError

Names = Sequence[str] | None

FORMS = "voc:DIR@split, coco:IMAGES,ANNOTATIONS.json, yolo:DIR@split or synthetic:N"


def load_dataset(spec: str, names: Names = None) -> Dataset:
    """Open ``voc:DIR@split``, ``coco:IMAGES,ANNOTATIONS.json``, ``yolo:DIR@split`` or ``synthetic:N``.

    With ``names`` the labels index these names, and a class of the data that is not among them is a
    ``DataError``; without, the names are the data's own (VOC: sorted; COCO: by category id; YOLO: in
    its order). ``synthetic:N@seed`` makes other scenes. Raises ``DataError`` for an unknown form and
    for anything missing, empty or broken.
    """
    scheme, colon, rest = spec.partition(":")
    loader = _LOADERS.get(scheme)
    if loader is None or not colon or not rest:
        raise DataError(f"data {spec!r}: expected {FORMS}")
    if names is not None and (not names or len(set(names)) != len(names)):
        raise DataError(f"class names {list(names)!r}: expected at least one name, and each once")
    return loader(spec, rest, names)


def load_datasets(specs: Sequence[str], names: Names = None) -> Dataset:
    """Open several specs as one data set: images one after another, the union of the names in order."""
    if not specs:
        raise DataError(f"no data given; expected {FORMS}")
    datasets = [load_dataset(spec, names) for spec in specs]
    return datasets[0] if len(datasets) == 1 else concatenate(datasets)


def concatenate(datasets: Sequence[Dataset]) -> Dataset:
    """Data sets one after another; labels are moved to the union of the names.

    COCO category ids are kept where all sets have them and agree.
    """
    names = tuple(dict.fromkeys(name for dataset in datasets for name in dataset.names))
    index = {name: label for label, name in enumerate(names)}
    images: list[LabelledImage] = []
    dropped: Counter[str] = Counter()
    for dataset in datasets:
        to_union = np.array([index[name] for name in dataset.names], dtype=np.int64)
        images += [dataclasses.replace(image, labels=to_union[image.labels]) for image in dataset]
        dropped.update(dataset.dropped)
    spec = " ".join(dataset.spec for dataset in datasets)
    unlabelled = sum(dataset.unlabelled for dataset in datasets)
    return Dataset(spec, names, tuple(images), _common_category_ids(datasets, names), dropped, unlabelled)


def _common_category_ids(datasets: Sequence[Dataset], names: tuple[str, ...]) -> tuple[int, ...] | None:
    id_of: dict[str, int] = {}
    for dataset in datasets:
        if dataset.category_ids is None:
            return None
        for name, category_id in zip(dataset.names, dataset.category_ids, strict=True):
            if id_of.setdefault(name, category_id) != category_id:
                return None
    ids = tuple(id_of[name] for name in names)
    return ids if len(set(ids)) == len(ids) else None


def _load_voc(spec: str, rest: str, names: Names) -> Dataset:
    folder, split = _folder_and_split(spec, rest, "trainval")
    return load_voc(folder, split, names, spec)


def _load_yolo(spec: str, rest: str, names: Names) -> Dataset:
    from anchorline.data.yolo import load_yolo

    folder, split = _folder_and_split(spec, rest, "train")
    return load_yolo(folder, split, names, spec)


def _folder_and_split(spec: str, rest: str, usual: str) -> tuple[Path, str]:
    folder, at, split = rest.rpartition("@")
    if not at or not folder or not split:
        scheme = spec.partition(":")[0]
        raise DataError(
            f"data {spec!r}: expected {scheme}:DIR@split, such as {scheme}:{folder or rest}@{usual}"
        )
    return _path(folder), split


def _path(text: str) -> Path:
    """The path with ``~`` as the home folder, which a shell leaves in the middle of a word."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        return Path(text)


def _load_coco(spec: str, rest: str, names: Names) -> Dataset:
    from anchorline.data.coco import load_coco

    folder, comma, annotations = rest.rpartition(",")
    if not comma or not folder or not annotations:
        raise DataError(f"data {spec!r}: expected coco:IMAGES,ANNOTATIONS.json")
    return load_coco(_path(folder), _path(annotations), names, spec)


def _load_synthetic(spec: str, rest: str, names: Names) -> Dataset:
    from anchorline.data.synthetic import CLASS_NAMES, synthetic_dataset

    count, _, seed = rest.partition("@")
    if not count.isdecimal() or int(count) < 1 or not (seed or "0").isdecimal():
        raise DataError(
            f"data {spec!r}: expected synthetic:N or synthetic:N@seed with whole numbers, N at least 1"
        )
    dataset = synthetic_dataset(int(count), int(seed or "0"), spec=spec)
    return dataset if names is None else _relabel(dataset, names, CLASS_NAMES)


def _relabel(dataset: Dataset, names: Sequence[str], own_names: Sequence[str]) -> Dataset:
    """The same images with labels that index ``names``."""
    for name in own_names:
        if name not in names:
            raise unknown_class(dataset.spec, name, names)
    to_names = np.array([list(names).index(name) for name in own_names], dtype=np.int64)
    images = tuple(dataclasses.replace(image, labels=to_names[image.labels]) for image in dataset)
    return dataclasses.replace(dataset, names=tuple(names), images=images)


_LOADERS: dict[str, Callable[[str, str, Names], Dataset]] = {
    "voc": _load_voc,
    "coco": _load_coco,
    "yolo": _load_yolo,
    "synthetic": _load_synthetic,
}
