"""A worker: a process on some machine of the cluster that holds one detector and answers items.

It knows nothing of Ray, and answers every call with a value of ``replies``.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from anchorline import __version__
from anchorline.cluster.job import Job, WorkItem
from anchorline.cluster.model_files import find_model, receive_model
from anchorline.cluster.replies import Absent, Broken, Chunk, Copy, Done, NeedsModel, Ready, Refused, Reply
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import AnchorlineError, DataError, OutputError, SettingsError
from anchorline.runtime.io.files import output_errors
from anchorline.runtime.video.frames import Result
from anchorline.runtime.video.paths import Item
from anchorline.runtime.video.pipeline import VideoPipeline, batch_size
from anchorline.runtime.video.readers import open_file
from anchorline.runtime.video.sinks import line_of

CHUNK_BYTES = 1 << 18
CHUNK_SECONDS = 1.0
TOKEN_FILE = "token"


class DetectionWorker:
    """``open``, then for each item ``begin`` and ``more`` until the answer is no ``Chunk``.

    The lines and warnings are those of the local run by construction: each item goes through
    ``VideoPipeline`` under the names that the command was given, in the folder it was called in. The
    next piece is computed only when it is asked for, but for what the pipeline reads ahead.
    """

    def __init__(self, version: str, job: Job) -> None:
        self._version, self._job = version, job
        self._detector: Detector | None = None
        self._answers: Iterator[Reply] = iter(())

    def open(self, numbers: Sequence[int] = (), *contents: NDArray[np.uint8]) -> Reply:
        """Open the detector, with the contents of these files of the model where they had to be sent."""
        try:
            return self._open(dict(zip(numbers, contents, strict=True)))
        except AnchorlineError as error:
            return Refused(platform.node(), type(error).__name__, str(error))

    def begin(self, item: WorkItem) -> Reply:
        """The first piece of an item's answer."""
        self._answers = self._answer(item)
        return self.more()

    def more(self) -> Reply:
        """The next piece."""
        try:
            return next(self._answers)
        except Exception as error:
            text = str(error) if isinstance(error, AnchorlineError) else f"{type(error).__name__}: {error}"
            return Broken(" ".join(text.split()))

    def _open(self, contents: dict[int, NDArray[np.uint8]]) -> Reply:
        job = self._job
        if self._version != __version__:
            raise SettingsError(
                f"anchorline {__version__} is installed there, and the command is {self._version}; install "
                "the same version on all machines"
            )
        with contextlib.suppress(OSError):  # then no relative name is found, and that is told
            os.chdir(job.folder)
        if job.copies is not None:
            check_copies_folder(Path(job.copies), job.token)
        if contents:
            model = receive_model(job.model, contents)
        else:
            found, missing = find_model(job.model)
            if found is None:
                return NeedsModel(tuple(missing))
            model = found
        if job.options.threads is not None:
            cv2.setNumThreads(job.options.threads)
        detector = job.options.open_detector(model)
        job.options.filters.check_names(detector.contract.names)
        batch_size(job.options, detector, 1)
        self._detector = detector
        return Ready(platform.node(), os.getpid(), detector.provider, detector.precision)

    def _answer(self, item: WorkItem) -> Iterator[Reply]:
        measured = zip(item.paths, item.sizes, strict=True)
        absent = next((path for path, size in measured if not _is_here(path, size)), None)
        if absent is not None:
            yield Absent(
                f"{absent}: not on {platform.node()}, or another file; all machines of the cluster must see "
                "the files under the same names"
            )
            return
        gone = self._complaint(item)
        if gone is not None:
            yield Done(warnings=(gone,), unreadable=gone)
            return
        folder = self._copies_folder(item)
        options = replace(self._job.options, save=folder, jsonl=None)
        assert self._detector is not None
        pipeline = VideoPipeline(
            self._detector,
            [Path(path) for path in item.paths],
            options,
        )
        yield from self._pieces(pipeline, item, folder)

    def _pieces(self, pipeline: VideoPipeline, item: WorkItem, folder: Path | None) -> Iterator[Reply]:
        gathered = _Gathered(self._job.options.jsonl is not None)
        try:
            for result in pipeline:
                gathered.add(result)
                if gathered.is_due:
                    yield gathered.chunk()
        except DataError as error:
            if all(error is not each.first_error for each in pipeline.figures.sources.values()):
                raise  # of the detections, not of a file
        (figures,) = pipeline.figures.sources.values()
        yield Done(
            last=gathered.chunk(),
            warnings=tuple(figures.warnings),
            unreadable=None if figures.first_error is None else str(figures.first_error),
            copies=_copies(pipeline, item, folder),
        )

    def _complaint(self, item: WorkItem) -> str | None:
        """What the local run says of a file that has gone since the run was planned."""
        if None not in item.sizes:
            return None
        try:
            open_file(Item(Path(item.paths[0]), item.is_video, None), self._job.options.decoder).close()
        except DataError as error:
            return str(error)
        return None

    def _copies_folder(self, item: WorkItem) -> Path | None:
        if self._job.copies is None:
            return None
        folder = Path(self._job.copies) / f"{item.first}-{item.tries}"
        with output_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder


class _Gathered:
    """Results on their way into a chunk, which bounds the memory of all who hold it."""

    def __init__(self, with_lines: bool) -> None:
        self._with_lines = with_lines
        self._begin()

    def _begin(self) -> None:
        self._lines: list[bytes] = []
        self._times: dict[str, list[float]] = {}
        self._frames = self._detections = self._size = 0
        self._since = time.monotonic()

    def add(self, result: Result) -> None:
        self._frames += 1
        self._detections += len(result.detections)
        for stage, seconds in result.times.items():
            self._times.setdefault(stage, []).append(seconds)
        if self._with_lines:
            self._lines.append(line_of(result).encode("utf-8"))
            self._size += len(self._lines[-1])

    @property
    def is_due(self) -> bool:
        return self._size >= CHUNK_BYTES or time.monotonic() - self._since >= CHUNK_SECONDS

    def chunk(self) -> Chunk:
        found = Chunk(b"".join(self._lines), self._frames, self._detections, self._times)
        self._begin()
        return found


def check_copies_folder(folder: Path, token: str) -> None:
    """Raise ``OutputError`` unless this is the folder that the command has made, and can be written to."""
    try:
        seen = (folder / TOKEN_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        seen = ""
    if seen != token or not os.access(folder, os.W_OK):
        raise OutputError(
            f"{folder.parent}: copies are saved in a folder that all machines of the cluster share and may "
            f"write to, and {platform.node()} does not; choose one, or leave out --save"
        )


def _is_here(path: str, size: int | None) -> bool:
    """Whether this machine has the file as the command sees it."""
    if size is None:
        return True
    try:
        return os.stat(path).st_size == size
    except OSError:
        return False


def _copies(pipeline: VideoPipeline, item: WorkItem, folder: Path | None) -> tuple[Copy, ...]:
    """What the pipeline has written into ``folder``."""
    if folder is None:
        return ()
    targets = [each.target for source in pipeline.sources for each in source.items]
    found = [
        Copy(index, 1, f"{folder.name}/{target.name}")
        for index, target in enumerate(targets)
        if target is not None and target.exists()
    ]
    if item.is_video and found:
        name = Path(found[0].name)
        part = 2
        while (folder / f"{name.stem}-{part}{name.suffix}").exists():
            found.append(Copy(0, part, f"{folder.name}/{name.stem}-{part}{name.suffix}"))
            part += 1
    return tuple(found)
