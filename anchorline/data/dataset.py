"""Labelled images, whatever file format they came from, and the one line of text that opens them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorline.data.boxes import box_areas, clip_labelled_boxes
from anchorline.runtime.contract import check_names
from anchorline.runtime.io.errors import DataError
from anchorline.runtime.io.files import input_errors
from anchorline.runtime.io.image_bytes import PNG_SIGNATURE, read_header
from anchorline.runtime.io.images import check_pixels, find_inputs, read_image, unused_bits
from anchorline.runtime.video.reader import open_file

FORMS = "voc:DIR@split, coco:IMAGES,ANNOTATIONS.json, yolo:DIR@split, voc:DIR, yolo:DIR or synthetic:N"
MOSTLY_OUTSIDE = "boxes more than half outside their image, cut at its edge"
VIDEO_FRAMES = 50  # how many of a video make a data set
_SHOWN_NAMES = 12
_HEAD = 65536  # bytes of a file in which its header is looked for
_TAIL = 16384  # bytes, in which the EXIF of a PNG may follow its pixels
_TURNABLE = (b"Exif", b"eXIf")
_HEADER_TELLS = (b"\xff\xd8", PNG_SIGNATURE)  # the size of an image that is not turned
_LOOKED_AT = 20  # images of a data set that are looked into for their depth


@dataclass(frozen=True)
class LabelledImage:
    """One image and its ground truth.

    ``boxes`` float32 [N, 4], xyxy in pixels with continuous edges (a box that covers the first
    pixel only is 0, 0, 1, 1); ``labels`` int64 [N] index the dataset's ``names``; ``difficult`` and
    ``crowd`` bool [N] mark objects that an evaluation ignores. ``size`` is (height, width).
    ``load`` returns the pixels, uint8 BGR [H, W, 3], upright (EXIF orientation applied), of the file
    ``path`` where there is one.
    """

    id: str
    size: tuple[int, int]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_]
    crowd: NDArray[np.bool_]
    load: Callable[[], NDArray[np.uint8]]
    path: Path | None = None

    @property
    def ignored(self) -> NDArray[np.bool_]:
        """Bool [N]: objects that are neither to be found nor counted against a detection."""
        return self.difficult | self.crowd


@dataclass(frozen=True)
class Dataset:
    """Labelled images in a fixed order, with the class names their labels index.

    ``spec`` is the text it was opened with. ``category_ids`` are COCO's ids of ``names`` where the
    data has them. ``dropped`` counts what was left out by reason: boxes of ``"zero area"``, reversed or
    outside the image, label files without an image. ``remarks`` counts what was read otherwise than it
    stands, by what a user should know of it. ``unlabelled`` counts the images without a label file of
    their own (YOLO, VOC without splits), which are taken as images without objects.
    """

    spec: str
    names: tuple[str, ...]
    images: tuple[LabelledImage, ...]
    category_ids: tuple[int, ...] | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    unlabelled: int = 0
    remarks: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[LabelledImage]:
        return iter(self.images)

    @property
    def has_labels(self) -> bool:
        """Whether any image has an object to be found."""
        return any(len(image.boxes) for image in self.images)

    @property
    def only_ignored(self) -> str | None:
        """What all of the objects are, such as crowds, where none is to be found; else None."""
        if not self.has_labels or not all(image.ignored.all() for image in self):
            return None
        kinds = [kind for kind in ("crowd", "difficult") if any(getattr(each, kind).any() for each in self)]
        total = sum(len(image.boxes) for image in self)
        return f"all of its objects ({total}) are marked as {' or '.join(kinds)}"

    def check_objects(self, use: str) -> None:
        """Raise ``DataError`` unless there is an object to ``use``, neither difficult nor a crowd; it tells
        what became of those that there were."""
        if self.has_labels and not self.only_ignored:
            return
        reasons = [self.only_ignored] if self.only_ignored else []
        reasons += [f"left out: {list_counts(self.dropped)}"] if self.dropped else []
        why = "".join(f"; {reason}" for reason in reasons)
        raise DataError(f"{self.spec}: holds no labelled object{why}; expected at least one box to {use}")

    def first(self, limit: int | None) -> Dataset:
        """The first ``limit`` images of the data, all of them for None."""
        if limit is None or len(self) <= limit:
            return self
        return Dataset(self.spec, self.names, self.images[:limit], self.category_ids)

    def with_names(self, names: Sequence[str]) -> Dataset:
        """The same images with labels that index ``names``, which hold all of the data's own."""
        index = class_index(names, self.names, self.spec)
        to_names = np.array([index[name] for name in self.names], dtype=np.int64)
        images = tuple(dataclasses.replace(image, labels=to_names[image.labels]) for image in self)
        return dataclasses.replace(self, names=tuple(names), images=images)


def load_dataset(spec: str, names: Sequence[str] | None = None) -> Dataset:
    """Open ``voc:DIR@split``, ``coco:IMAGES,ANNOTATIONS.json``, ``yolo:DIR@split`` or ``synthetic:N``.

    ``voc:DIR`` and ``yolo:DIR`` are folders without splits, images and labels side by side. With ``names``
    the labels index these names, and a class of the data that is not among them is a ``DataError``;
    without, the names are the data's own (VOC: sorted; COCO: by category id; YOLO: in its order).
    ``synthetic:N@seed`` makes other scenes; after ``coco:...,anywhere`` names of images may lead out of their
    folder. Raises ``DataError`` for an unknown form and for anything missing, empty or broken.
    """
    dataset = _read(spec, names)
    dataset.remarks.update(_repeat_remarks(dataset) + _depth_remarks(dataset))
    return dataset


def _read(spec: str, names: Sequence[str] | None) -> Dataset:
    scheme, _, rest = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if scheme not in ("voc", "coco", "yolo", "synthetic") or not rest:
        raise DataError(f"data {spec!r}: expected {FORMS}")
    if isinstance(names, str) or (names is not None and not names):
        raise DataError(f"class names {names!r}: expected a list of at least one name")
    if names is not None:
        names = check_names(names, "names", DataError)
    if scheme == "synthetic":
        from anchorline.data.synthetic import synthetic_dataset

        found = re.fullmatch("0*([1-9][0-9]{0,8})(?:@([0-9]{0,18}))?", rest)
        if found is None:
            raise DataError(
                f"data {spec!r}: expected synthetic:N or synthetic:N@seed with whole numbers, N at least 1"
            )
        dataset = synthetic_dataset(int(found[1]), int(found[2] or "0"), spec=spec)
        return dataset if names is None else dataset.with_names(names)
    with input_errors(spec, error_class=DataError):
        if scheme == "coco":
            from anchorline.data.coco import load_coco

            places = rest.removesuffix(",anywhere")
            return load_coco(*_coco_places(places, spec), names, spec, places != rest)
        split: str | None
        folder, at, split = rest.rpartition("@")
        if not at or (os.path.isdir(_at_home(rest)) and not os.path.isdir(_at_home(folder))):
            folder, split = rest, None
        elif not folder or not split:
            usual = "trainval" if scheme == "voc" else "train"
            raise DataError(
                f"data {spec!r}: expected {scheme}:DIR@split, such as {scheme}:{folder or rest}@{usual}"
            )
        if scheme == "voc":
            from anchorline.data.voc import load_voc

            return load_voc(_at_home(folder), split, names, spec)
        from anchorline.data.yolo import load_yolo

        return load_yolo(_at_home(folder), split, names, spec)


def _coco_places(text: str, spec: str) -> tuple[Path, Path]:
    """The folder of images and the file of annotations, which may have commas in their names."""
    commas = [at for at, character in enumerate(text) if character == "," and 0 < at < len(text) - 1]
    places = [(_at_home(text[:at]), _at_home(text[at + 1 :])) for at in reversed(commas)]
    if not places:
        raise DataError(f"data {spec!r}: expected coco:IMAGES,ANNOTATIONS.json")
    return next((each for each in places if os.path.isdir(each[0]) and os.path.exists(each[1])), places[0])


def _repeat_remarks(dataset: Dataset) -> Counter[str]:
    """How many of the data's images are files that stand in it before."""
    paths = [image.path for image in dataset if image.path is not None]
    repeats = len(paths) - len(set(paths))
    return Counter({"images listed again, which count each time": repeats} if repeats else {})


def _depth_remarks(dataset: Dataset) -> Counter[str]:
    """What is to be said of images that use few of their 16 bits, by a sample of the data's."""
    paths = [image.path for image in dataset if image.path is not None]
    sample = paths[:: max(1, len(paths) // _LOOKED_AT)]
    deep = [path for path in sample if (header := read_header(_ends(path)[0])) and header.bits > 8]
    unused = [bits for bits in map(unused_bits, deep) if bits]
    if not unused:
        return Counter()
    bits = min(unused)
    text = (
        f"images with 16-bit samples use only {16 - bits} of the bits, and are read almost black: multiply "
        f"the samples by {2**bits} (about {_LOOKED_AT} images are looked at)"
    )
    return Counter({text: len(unused)})


def load_datasets(specs: Sequence[str], names: Sequence[str] | None = None) -> Dataset:
    """Open several specs as one data set: images one after another, the union of the names in order."""
    if not specs or isinstance(specs, str):
        raise DataError(f"data {specs!r}: expected a list of {FORMS}")
    datasets = [load_dataset(spec, names) for spec in specs]
    return datasets[0] if len(datasets) == 1 else concatenate(datasets)


def concatenate(datasets: Sequence[Dataset]) -> Dataset:
    """Data sets one after another; labels are moved to the union of the names.

    COCO category ids are kept where all sets have them and agree.
    """
    names = tuple(dict.fromkeys(name for dataset in datasets for name in dataset.names))
    pairs = {pair for each in datasets for pair in zip(each.names, each.category_ids or (), strict=False)}
    id_of = dict(pairs)
    unique = len(pairs) == len(id_of) == len(set(id_of.values()))
    agree = unique and all(dataset.category_ids is not None for dataset in datasets)
    return Dataset(
        spec=" ".join(dataset.spec for dataset in datasets),
        names=names,
        images=tuple(image for dataset in datasets for image in dataset.with_names(names)),
        category_ids=tuple(id_of[name] for name in names) if agree else None,
        dropped=sum((dataset.dropped for dataset in datasets), Counter()),
        unlabelled=sum(dataset.unlabelled for dataset in datasets),
        remarks=sum((dataset.remarks for dataset in datasets), Counter()),
    )


def _at_home(text: str) -> Path:
    """The path with ``~`` as the home folder, which a shell leaves in the middle of a word."""
    return Path(os.path.expanduser(text))


def from_frames(spec: str, names: tuple[str, ...], frames: Sequence[NDArray[np.uint8]]) -> Dataset:
    """Frames (uint8 BGR [H, W, 3]) in memory as images without labels, named by their number."""
    images = [_frame_image(f"image {number}", frame) for number, frame in enumerate(frames, start=1)]
    return Dataset(spec, names, tuple(images))


def images_or_video(sources: Sequence[str | Path], names: tuple[str, ...]) -> Dataset:
    """Image files, folders of images, or videos, of which up to ``VIDEO_FRAMES`` frames are taken.

    They carry no labels. Raises ``DataError`` for what is missing or unreadable.
    """
    images: list[LabelledImage] = []
    for path, is_video in itertools.chain.from_iterable(map(find_inputs, sources)):
        if is_video:
            images += _video_frames(path)
        else:
            images.append(labelled_image(path.name, path, image_size(path), np.zeros((0, 4)), []))
    spec = ", ".join(map(str, sources))
    if not images:
        raise DataError(f"{spec}: holds no image; expected at least one")
    return Dataset(spec, names, tuple(images))


def _video_frames(path: Path) -> list[LabelledImage]:
    """Frames at even distances over the whole video."""
    kept: list[LabelledImage] = []
    step = 1
    with open_file(path, is_video=True) as reader:
        for index, _, frame in reader:
            if index % step:
                continue
            kept.append(_frame_image(f"{path.name} frame {index}", frame))
            if len(kept) > VIDEO_FRAMES:  # longer than thought: keep every other frame from here on
                kept, step = kept[::2], step * 2
    return kept[:VIDEO_FRAMES]


def _frame_image(name: str, frame: NDArray[np.uint8]) -> LabelledImage:
    none = np.zeros(0, np.bool_)
    boxes, labels = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    return LabelledImage(name, frame.shape[:2], boxes, labels, none, none, partial(np.copy, frame))


def list_names(names: Sequence[str]) -> str:
    """The names separated by commas, cut after a dozen."""
    shown = ", ".join(names[:_SHOWN_NAMES])
    return f"{shown} and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else shown


def list_counts(counts: Mapping[str, int]) -> str:
    """What was counted, each after its number, separated by semicolons."""
    return "; ".join(f"{count} {what}" for what, count in sorted(counts.items()))


def class_index(names: Sequence[str], used: Iterable[str], where: str) -> dict[str, int]:
    """The label of each name; raises ``DataError`` for a class that is used ``where`` and not among them."""
    index = {name: label for label, name in enumerate(names)}
    for name in used:
        if name not in index:
            raise DataError(f"{where}: unknown class {name!r}; expected one of {list_names(names)}")
    return index


def labelled_image(
    id: str,
    path: Path,
    size: tuple[int, int],
    boxes: NDArray[np.float64],
    labels: Sequence[int],
    dropped: Counter[str] | None = None,
    remarks: Counter[str] | None = None,
    *,
    difficult: Sequence[bool] = (),
    crowd: Sequence[bool] = (),
    empty_side: float = 0.0,
) -> LabelledImage:
    """The image at ``path`` with its usable boxes; the others are counted in ``dropped``, by reason, and
    those that lie outside it for the most part in ``remarks``.

    ``boxes`` [N, 4] are as annotated, with ``empty_side`` as in ``clip_labelled_boxes``; no flags are
    given where none is set.
    """
    check_pixels(path, size)
    clipped, kept, reasons = clip_labelled_boxes(boxes, size, empty_side)
    if dropped is not None:
        dropped.update(reasons)
    cut = int((box_areas(clipped) < box_areas(boxes[kept]) / 2).sum())
    if remarks is not None and cut:
        remarks[MOSTLY_OUTSIDE] += cut
    own = np.array(labels, dtype=np.int64)[kept]
    flags = [np.array(each or [False] * len(boxes), dtype=np.bool_)[kept] for each in (difficult, crowd)]
    return LabelledImage(id, size, clipped, own, flags[0], flags[1], partial(load_image, path, size), path)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) in pixels of the upright image, from the file's header where that is enough.

    An image that carries EXIF (it may be turned) or is neither JPEG nor PNG is decoded. Raises
    ``DataError`` when it cannot be read.
    """
    head, tail = _ends(path)
    plain = head.startswith(_HEADER_TELLS) and not any(mark in head + tail for mark in _TURNABLE)
    header = read_header(head) if plain else None
    if header is None or min(header.size) < 1:
        height, width = read_image(path).shape[:2]
        return height, width
    return header.size


def _ends(path: Path) -> tuple[bytes, bytes]:
    """What a file begins with, and what a PNG ends with."""
    with input_errors(path, "expected an image", DataError), path.open("rb") as file:
        head = file.read(_HEAD)
        if not head.startswith(PNG_SIGNATURE):
            return head, b""
        file.seek(max(len(head), os.fstat(file.fileno()).st_size - _TAIL))
        return head, file.read()


def load_image(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The upright pixels, uint8 BGR [H, W, 3]; ``DataError`` when they are not of ``size`` (h, w)."""
    image = read_image(path)
    if image.shape[:2] != size:
        height, width = image.shape[:2]
        remedy = "annotate the image again or put the annotated one back"
        stored = read_header(_ends(path)[0])
        if stored is not None and stored.size == size:  # as tools see it that know no EXIF
            remedy = "its EXIF turns it upright, which its annotations have to follow"
        raise DataError(
            f"{path}: the image is {width}x{height}, its annotations were made for {size[1]}x{size[0]}; "
            + remedy
        )
    return image
