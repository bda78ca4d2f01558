"""A worker: a process on some machine of the cluster that holds one detector and answers items.

It knows nothing of Ray. What it raises and yields travels back, so that an ``AnchorlineError`` of ``open``
is the worker's reason not to take part.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline import __version__
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, DataError, OutputError, SettingsError
from anchorline.runtime.io.files import atomic_path, cache_folder, output_errors, sha256_of
from anchorline.runtime.tensorrt.manifest import manifest_path, onnx_of, read_manifest
from anchorline.runtime.video.figures import Looks
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import VideoPipeline, batch_size
from anchorline.runtime.video.reader import open_file
from anchorline.runtime.video.sinks import line_of

PIECE_BYTES = 1 << 18
PIECE_SECONDS = 1.0
_KEPT_DIGITS = 40  # of the model's hash


class NotHere(DataError):
    """The worker's machine does not have a file of the item as the command sees it."""


@dataclass(frozen=True)
class WorkerState:
    """A worker whose detector is open, by machine and process; ``doing`` is empty while it waits."""

    node: str
    pid: int
    provider: str
    precision: str
    doing: str = ""


@dataclass(frozen=True)
class Job:
    """What all items of a run have in common.

    ``folder`` is where the command was called. ``model`` holds the SHA-256 of the model's files by their
    absolute paths there, the one to open first. ``copies`` is the folder of ``Outputs.copies``.
    """

    version: str
    folder: str
    model: Mapping[str, str]
    options: DetectOptions = field(default_factory=DetectOptions)
    copies: Path | None = None


@dataclass(frozen=True, order=True)
class WorkItem:
    """Files that one worker answers in one go: some images, or one video.

    ``first`` is the place of the first of them among all files of the run. ``sizes`` are in bytes as
    the command sees them, ``None`` for a file that is not there any more. ``tries`` counts the
    attempts that have failed.
    """

    first: int
    paths: tuple[str, ...]
    is_video: bool
    sizes: tuple[int | None, ...] = ()
    tries: int = 0

    def split(self) -> list[WorkItem]:
        """One item for each file."""
        places = enumerate(self.paths, self.first)
        return [WorkItem(place, (path,), self.is_video, tries=self.tries) for place, path in places]

    def measured(self) -> WorkItem:
        """The same with the sizes that the files have now."""
        return replace(self, sizes=tuple(map(_size, self.paths)))

    def folder_in(self, copies: Path) -> Path:
        """Where the copies of this try go: a worker that is lost may still be writing those of another."""
        return copies / f"{self.first}-{self.tries}"

    def describe(self) -> str:
        """What to call it in a message."""
        if len(self.paths) == 1:
            return self.paths[0]
        return f"{self.paths[0]} ... {self.paths[-1]} ({len(self.paths)} files)"


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


@dataclass
class Piece:
    """Some frames of an item's answer: JSON lines as UTF-8, and of each frame its seconds by stage.

    The last one tells what was wrong with the files (``unreadable`` is the complaint about the first of
    which there is no frame), and what the detector had to look at in all.
    """

    lines: bytearray = field(default_factory=bytearray)
    times: list[dict[str, float]] = field(default_factory=list)
    detections: int = 0
    warnings: tuple[str, ...] = ()
    unreadable: str | None = None
    looks: Looks = field(default_factory=Looks)


class DetectionWorker:
    """``open``, then ``answer`` for each item, with the lines and warnings of the local run: each goes
    through ``VideoPipeline`` under the names that the command was given, in the folder it was called in.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._detector: Detector | None = None

    def open(self, *contents: NDArray[np.uint8]) -> WorkerState | None:
        """Open the detector; None where this machine lacks the model and needs the ``contents`` of its files.

        Raises ``AnchorlineError`` where this machine cannot take part.
        """
        job, options, node = self._job, self._job.options, platform.node()
        try:
            if job.version != __version__:
                raise SettingsError(
                    f"anchorline {__version__} is installed there, and the command is {job.version}; install "
                    "the same version on all machines"
                )
            with contextlib.suppress(OSError):  # then no relative name is found, and that is told
                os.chdir(job.folder)
            # The folder's name is random: where there is one, it is the one that the command has made.
            if job.copies is not None and not (job.copies.is_dir() and os.access(job.copies, os.W_OK)):
                raise OutputError(
                    f"{job.copies.parent}: copies are saved in a folder that all machines of the cluster "
                    f"share and may write to, and {node} does not; choose one, or leave out --save"
                )
            model = find_model(job.model, contents)
            if model is None:
                return None
            if options.threads is not None:
                cv2.setNumThreads(options.threads)
            self._detector = detector = options.open_detector(model)
            options.filters.check_names(detector.contract.names)
            batch_size(options, detector, 1)
        except AnchorlineError as error:
            raise type(error)(f"{node}: {error}") from None
        return WorkerState(node, os.getpid(), detector.provider, detector.precision)

    def answer(self, item: WorkItem) -> Iterator[Piece]:
        """The item's answer in pieces, which bound the memory of all who hold them; raises ``NotHere``."""
        for path, size in zip(item.paths, item.sizes, strict=True):
            if size is not None and _size(path) != size:
                raise NotHere(
                    f"{path}: not on {platform.node()}, or another file; all machines of the cluster must "
                    "see the files under the same names"
                )
        job = self._job
        if None in item.sizes:  # gone since the run was planned, and alone in its item
            try:
                open_file(item.paths[0], item.is_video, job.options.decoder).close()
            except DataError as error:  # as the local run says it
                yield Piece(warnings=(str(error),), unreadable=str(error))
                return
        folder = None if job.copies is None else item.folder_in(job.copies)
        if folder is not None:
            with output_errors(folder):
                folder.mkdir(exist_ok=True)
        assert self._detector is not None
        options = replace(job.options, save=folder, jsonl=None)
        pipeline = VideoPipeline(self._detector, [Path(path) for path in item.paths], options)
        (figures,) = pipeline.figures.sources.values()
        piece, begun = Piece(), time.monotonic()
        try:
            for result in pipeline:
                if job.options.jsonl is not None:
                    piece.lines += line_of(result).encode("utf-8")
                piece.times.append(result.times)
                piece.detections += len(result.detections)
                if len(piece.lines) >= PIECE_BYTES or time.monotonic() - begun >= PIECE_SECONDS:
                    yield piece
                    piece, begun = Piece(), time.monotonic()
        except DataError as error:
            if error is not figures.first_error:
                raise  # of the detections, not of a file
        piece.warnings, piece.looks = tuple(figures.warnings), pipeline.figures.looks
        piece.unreadable = None if figures.first_error is None else str(figures.first_error)
        yield piece


def model_files(model: str | Path) -> dict[str, str]:
    """The files that ``Detector(model)`` may open, as in ``Job.model``; raises ``ArtefactError``.

    An engine has its manifest and, where it lies beside it, its ONNX file, which stands in for it.
    """
    path = Path(model)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        raise ArtefactError(
            f"{path}: checkpoints are not run directly; first anchorline export {path} --out model.onnx"
        )
    paths = [path]
    if suffix == ".engine":
        manifest = read_manifest(path)
        paths.append(manifest_path(path))
        with contextlib.suppress(ArtefactError):  # it is needed only where the engine cannot run
            paths.append(onnx_of(path, manifest))
    return {str(each.absolute()): sha256_of(each) for each in paths}


def find_model(files: Mapping[str, str], contents: Sequence[NDArray[np.uint8]] = ()) -> Path | None:
    """Where the model can be opened on this machine, or None where its files' ``contents`` are needed.

    All files lie in one folder, since an engine looks for the others beside it: the model's own, or one in
    the cache, which gets the contents. Raises ``OutputError``, and ``ArtefactError`` for other contents.
    """
    own, wanted = [Path(path) for path in files], list(files.values())

    def has_hash(path: Path, sha256: str) -> bool:
        with contextlib.suppress(ArtefactError):
            return sha256_of(path) == sha256
        return False

    folder = cache_folder() / "models" / wanted[0][:_KEPT_DIGITS]
    cached = [folder / path.name for path in own]
    for place in (own, cached):
        if all(map(has_hash, place, wanted)):
            return place[0]
    if not contents:
        return None
    for path, kept, sha256, content in zip(own, cached, wanted, contents, strict=True):
        with atomic_path(kept) as temporary:
            content.tofile(temporary)
        if not has_hash(kept, sha256):
            raise ArtefactError(f"{path}: changed while the run began; start it again when it is complete")
    return cached[0]
