"""Candidates run: files with other settings, their accuracy and time beside the parent's, and the record.

The record is written after every candidate, so that a search that was interrupted goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, sleep
from typing import Annotated, Any, Protocol

import msgspec
import numpy as np
import onnx
from msgspec import Meta
from numpy.typing import NDArray

from anchorline.data.dataset import Dataset
from anchorline.evaluation.evaluation import report_detections
from anchorline.export.functions import save_model
from anchorline.export.graph_settings import GraphSettings, contract_in, scaled, with_settings
from anchorline.export.winograd import make_winograd
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.io.files import input_errors, write_json
from anchorline.tune.search import Candidate, Figures, Way

PAIRS = 4  # frames that are timed in each round, on the candidate and on the parent
LAST_PAIRS = 16  # in the round on all images
HELD_BYTES = 1 << 29  # of frames that stay in memory; others are read again for each candidate
WARMUP = 2
REST = 0.02  # seconds before a turn: the threads of the one before may still be spinning
Times = Annotated[list[Annotated[float, Meta(gt=0)]], Meta(max_length=100_000)]


class Detecting(Protocol):
    """What is timed: a ``Detector``."""

    def __call__(self, frame: NDArray[np.uint8]) -> Detections: ...
    def close(self) -> None: ...


class Measured(msgspec.Struct):
    """What the record has of a candidate: mAP50 by number of images, and seconds a frame beside the parent's,
    frame by frame."""

    map50: dict[str, float | None] = msgspec.field(default_factory=dict)
    seconds: Times = msgspec.field(default_factory=list)
    parent: Times = msgspec.field(default_factory=list)


@dataclass
class Record:
    """What was measured so far, by ``Candidate.key``, in a file for this model, data and machine."""

    path: Path
    facts: dict[str, Any]
    measured: dict[str, Measured] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, facts: dict[str, Any], fresh: bool = False) -> Record:
        """That of ``facts`` in ``folder``; empty where there is none or a ``fresh`` one is wanted.

        Raises ``ArtefactError`` for one that is damaged.
        """
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        record = cls(folder / f"{key[:32]}.json", facts)
        if fresh or not record.path.exists():
            return record
        with input_errors(record.path):
            content = record.path.read_bytes()
        try:
            stated = msgspec.json.decode(content)
            if stated["facts"] != json.loads(json.dumps(facts)):
                raise ValueError("it is of another model, data or machine")
            record.measured = msgspec.convert(stated["measured"], dict[str, Measured])
            if any(len(each.seconds) != len(each.parent) for each in record.measured.values()):
                raise ValueError("its times are no pairs")
        except (msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ArtefactError(
                f"{record.path}: what an earlier tuning measured is damaged ({reason}); remove the file, or "
                "measure anew with --fresh"
            ) from None
        return record

    def save(self) -> None:
        write_json(self.path, {"facts": self.facts, "measured": msgspec.to_builtins(self.measured)})


def evaluated_first(dataset: Dataset) -> Dataset:
    """The images in the order in which they are taken: drawn, and the same for the same data."""
    order = np.random.default_rng(0).permutation(len(dataset))
    return dataclasses.replace(dataset, images=tuple(dataset.images[index] for index in order))


def only_classes(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """The data with the objects of ``names`` alone."""
    kept = [index for index, name in enumerate(dataset.names) if name in names]
    to_kept = {label: place for place, label in enumerate(kept)}
    images = []
    for image in dataset:
        some = np.isin(image.labels, kept)
        labels = np.array([to_kept[label] for label in image.labels[some].tolist()], np.int64)
        images.append(
            dataclasses.replace(
                image,
                boxes=image.boxes[some],
                labels=labels,
                difficult=image.difficult[some],
                crowd=image.crowd[some],
            )
        )
    return dataclasses.replace(
        dataset, names=tuple(dataset.names[each] for each in kept), images=tuple(images), category_ids=None
    )


def fingerprint(dataset: Dataset) -> str:
    """A digest of which images these are and of their labels; of files also size and date."""
    digest = hashlib.sha256(repr((dataset.spec, dataset.names)).encode())
    for image in dataset:
        digest.update(repr((image.id, image.size)).encode())
        for values in (image.boxes, image.labels, image.difficult, image.crowd):
            digest.update(np.ascontiguousarray(values).tobytes())
        if image.path is not None:
            with contextlib.suppress(OSError):
                status = os.stat(image.path)
                digest.update(repr((status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


class Workshop:
    """Makes the candidates' files in a folder that goes away with it, and opens them. A context manager.

    ``model`` is the parent, ``classes`` what is kept of its classes. An int8 parent that was made from one of
    the files takes part under the precision int8 (``quantised``).
    """

    def __init__(self, model: Path, classes: tuple[str, ...] | None = None) -> None:
        self.model = model
        self.proto = onnx.load(model)
        self.contract = contract_in(self.proto)
        self.quantised: dict[tuple[int, int], onnx.ModelProto] = {}
        self._classes = classes
        self._temporary = tempfile.TemporaryDirectory(prefix="anchorline-tune-")
        self.folder = Path(self._temporary.name)

    def make(self, candidate: Candidate) -> onnx.ModelProto:
        """The candidate as a file, its scale in the contract."""
        made = self._counted(candidate)
        rule = self.resize(candidate)
        if rule is not None:
            made = with_settings(made, GraphSettings(resize=rule))
        if self._rewrites(candidate):
            make_winograd(made)
        return made

    def open(self, candidate: Candidate) -> Detecting:
        """The candidate, run its way."""
        make, rule, kind = self._counted, self.resize(candidate), "float"
        if candidate.way.precision == "int8":
            kind = "int8"
        elif self._rewrites(candidate):  # a file of its scale, on which it depends what gains
            make, rule, kind = self.make, None, f"winograd-{candidate.scale:g}"
        path = self.folder / f"{candidate.proposals}-{candidate.pre_nms}-{kind}.onnx"
        if not path.exists():
            save_model(make(candidate), path)
        return open_way(path, candidate.way, rule)

    def resize(self, candidate: Candidate) -> ResizeRule | None:
        """The candidate's resize rule, where it is not the parent's."""
        return None if candidate.scale == 1.0 else scaled(self.contract.resize, candidate.scale)

    def _rewrites(self, candidate: Candidate) -> bool:
        """Whether convolutions are to be brought into Winograd's form; the parent's may be so already."""
        return candidate.winograd and not self.contract.winograd

    def _counted(self, candidate: Candidate) -> onnx.ModelProto:
        counts = candidate.proposals, candidate.pre_nms
        if candidate.way.precision == "int8" and counts in self.quantised:
            return self.quantised[counts]
        return with_settings(self.proto, GraphSettings(*counts, None, self._classes))

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *failure: object) -> None:
        self._temporary.cleanup()


def open_way(path: Path, way: Way, resize: ResizeRule | None = None) -> Detecting:
    """``path``, run this way; fp32 and bf16 are asked for by name, so that it is what it says."""
    wanted = way.precision if way.provider == "openvino" and way.precision != "int8" else "auto"
    return Detector(path, way.provider, threads=way.threads, cpu_precision=wanted, resize=resize, workers=1)


class Meter:
    """Measures candidates on the first so many images of ``dataset``, always beside ``parent``.

    ``open_candidate`` opens one, ``tell`` hears what is being measured.
    """

    def __init__(
        self,
        dataset: Dataset,
        parent: Candidate,
        open_candidate: Callable[[Candidate], Detecting],
        record: Record,
        tell: Callable[[Candidate, int], None] = lambda candidate, images: None,
    ) -> None:
        self.dataset, self.parent, self.record = dataset, parent, record
        self._open, self._tell = open_candidate, tell
        self._found: dict[Candidate, list[Detections]] = {}
        classes = len(dataset.names)
        counts = [np.bincount(image.labels[~image.ignored], minlength=classes) for image in dataset]
        self._objects = np.cumsum(counts, axis=0)  # [images, classes]
        self._reference: Detecting | None = None
        self._frames: dict[int, NDArray[np.uint8]] = {}
        self._room = HELD_BYTES

    def __call__(self, candidate: Candidate, images: int) -> Figures:
        """The figures of ``candidate`` on the first ``images``, from the record where it has them."""
        known = self.record.measured.setdefault(candidate.key, Measured())
        if str(images) not in known.map50:
            self._tell(candidate, images)
            own = candidate == self.parent
            detector = self.reference() if own else self._open(candidate)
            try:
                self._time(detector, known, images)
                found = self._detections(candidate, detector, images)
            finally:
                if not own:
                    detector.close()
            part = self.dataset.first(images)
            map50 = report_detections(found, part, "").map50
            known.map50[str(images)] = None if np.isnan(map50) else map50
            self.record.save()
        return self.figures(candidate, images)

    def figures(self, candidate: Candidate, images: int) -> Figures:
        """What the record has of ``candidate`` on the first ``images``."""
        known = self.record.measured[candidate.key]
        share = float(np.median(np.divide(known.seconds, known.parent)))
        frames = [each for one in self.record.measured.values() for each in one.parent]
        return Figures(
            images=images,
            objects=tuple(self._objects[images - 1].tolist()),
            map50=known.map50[str(images)] or 0.0,
            share=1.0 if candidate == self.parent else share,
            ms=1000.0 * float(np.median(frames)) * (1.0 if candidate == self.parent else share),
        )

    def share(self, candidate: Candidate) -> float:
        """Its time a frame as a share of the parent's, on few frames; its accuracy is not looked at."""
        known = self.record.measured.setdefault(candidate.key, Measured())
        if not known.seconds:
            own = candidate == self.parent
            detector = self.reference() if own else self._open(candidate)
            try:
                self._time(detector, known, PAIRS)
            finally:
                if not own:
                    detector.close()
            self.record.save()
        return float(np.median(np.divide(known.seconds, known.parent)))

    def reference(self) -> Detecting:
        """The parent, which stays open."""
        if self._reference is None:
            self._reference = self._open(self.parent)
        return self._reference

    def close(self) -> None:
        if self._reference is not None:
            self._reference.close()
            self._reference = None

    def _time(self, detector: Detecting, known: Measured, images: int) -> None:
        """Add pairs of times on frames of the images, one by one beside the parent."""
        wanted = LAST_PAIRS if images == len(self.dataset) else PAIRS
        pairs = self._interleaved([detector, self.reference()], min(wanted, images), len(known.seconds))
        known.seconds += pairs[:, 0].tolist()
        known.parent += pairs[:, 1].tolist()

    def _interleaved(
        self, detectors: Sequence[Detecting], frames: int, first: int = 0
    ) -> NDArray[np.float64]:
        """Seconds [frames, detectors] of single frames, from the image ``first`` on."""
        seconds = np.zeros((frames, len(detectors)))
        for number in range(-WARMUP, frames):
            frame = self._frame((first + max(0, number)) % len(self.dataset))
            for place, detector in enumerate(detectors):
                sleep(REST)
                detector(frame)  # the other network's weights were in the processor's cache
                start = perf_counter()
                detector(frame)
                if number >= 0:
                    seconds[number, place] = max(perf_counter() - start, 1e-9)
        return seconds

    def _detections(self, candidate: Candidate, detector: Detecting, images: int) -> list[Detections]:
        found = self._found.setdefault(candidate, [])
        for number in range(len(found), images):
            found.append(detector(self._frame(number)))
        return found[:images]

    def _frame(self, number: int) -> NDArray[np.uint8]:
        if number in self._frames:
            return self._frames[number]
        frame = self.dataset.images[number].load()
        if frame.nbytes <= self._room:
            self._room -= frame.nbytes
            self._frames[number] = frame
        return frame


@contextlib.contextmanager
def stopping(meter: Meter) -> Iterator[list[bool]]:
    """The meter closed at the end; Ctrl-C ends the block, and the list is filled."""
    stopped: list[bool] = []
    try:
        yield stopped
    except KeyboardInterrupt:
        stopped.append(True)
    finally:
        meter.close()
