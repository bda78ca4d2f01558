"""Detection over images, folders and videos: one frame after the other, results to files."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import Detections
from anchorline.runtime.detector import Detector
from anchorline.runtime.drawing import draw
from anchorline.runtime.errors import DataError
from anchorline.runtime.files import atomic_path
from anchorline.runtime.images import read_image, write_image
from anchorline.runtime.sources import Item, plan_items
from anchorline.runtime.summary import DetectSummary
from anchorline.runtime.timing import StageTimes
from anchorline.runtime.video import VideoReader, VideoWriter

Frame = tuple[int, float, NDArray[np.uint8]]  # index, time in seconds, pixels


def detect(
    sources: Sequence[str | Path],
    detector: Detector,
    save: str | Path | None = None,
    jsonl: str | Path | None = None,
    progress: bool = True,
    shown_score: float = 0.5,
) -> DetectSummary:
    """Detect in every frame of ``sources``: images, folders of images, videos.

    ``save`` receives annotated copies (see ``sources.plan_items``), ``jsonl`` one line per frame:
    ``{"source", "frame", "time_s", "size": [h, w], "detections": [...]}``. Copies show
    detections with a score of at least ``shown_score``, lines hold all. ``progress`` shows a bar on
    stderr. A source that cannot be read is a warning in the summary while others can; with none left
    its ``DataError`` is raised. On Ctrl-C the files are finished with the frames so far, and
    ``KeyboardInterrupt`` goes on.
    """
    run = _Run(detector, shown_score)
    items = plan_items(sources, save)
    interrupted = False
    with _lines_to(jsonl) as run.lines, _progress_bar(items, progress) as run.advance:
        start = time.perf_counter()
        try:
            for item in items:
                run.item(item)
        except KeyboardInterrupt:
            interrupted = True  # leave the block in peace first, so that the lines are published
        if run.first_error is not None and run.frames == 0 and not interrupted:
            raise run.first_error
    seconds = time.perf_counter() - start
    if interrupted:
        raise KeyboardInterrupt
    return run.summary(seconds)


@dataclass
class _Run:
    """The state of one call of ``detect``."""

    detector: Detector
    shown_score: float
    lines: IO[str] | None = None
    advance: Callable[[int], None] = lambda frames: None
    times: StageTimes = field(default_factory=StageTimes)
    warnings: list[str] = field(default_factory=list)
    frames: int = 0
    detections: int = 0
    first_error: DataError | None = None

    def item(self, item: Item) -> None:
        """Work through one file; a file that cannot be read is noted, not fatal."""
        try:
            if item.is_video:
                self.video(item)
            else:
                self.image(item)
        except DataError as error:
            self.first_error = self.first_error or error
            self.warnings.append(str(error))

    def image(self, item: Item) -> None:
        """Read, detect, and write the annotated copy."""
        with self.times.measure("decode"):
            frame = read_image(item.path)
        found = self.detect(item, (0, 0.0, frame))
        if item.target is not None:
            with self.times.measure("draw"):
                annotated = self.draw(frame, found)
            with self.times.measure("write"):
                write_image(item.target, annotated)
        self.advance(1)

    def video(self, item: Item) -> None:
        """Detect frame by frame; an interrupt finishes the file with the frames so far."""
        interrupted = False
        with VideoReader(item.path) as reader, contextlib.ExitStack() as stack:
            writer = None
            if item.target is not None:
                writer = stack.enter_context(VideoWriter(item.target, reader.size, reader.fps))
            try:
                for frame in self.decoded(reader):
                    self.video_frame(item, frame, writer)
            except KeyboardInterrupt:
                interrupted = True
                if writer is not None and not writer.frames:
                    raise  # nothing to finish
            self.warnings += reader.warnings
        if interrupted:
            raise KeyboardInterrupt

    def video_frame(self, item: Item, frame: Frame, writer: VideoWriter | None) -> None:
        """Detect in one frame and append its annotated copy."""
        found = self.detect(item, frame)
        if writer is not None:
            with self.times.measure("draw"):
                annotated = self.draw(frame[2], found)
            with self.times.measure("write"):
                writer.write(annotated)
        self.advance(1)

    def decoded(self, reader: VideoReader) -> Iterator[Frame]:
        """The reader's frames, with the time that each took to decode noted."""
        frames = iter(reader)
        while True:
            start = time.perf_counter()
            frame = next(frames, None)
            if frame is None:
                return
            self.times.add("decode", time.perf_counter() - start)
            yield frame

    def detect(self, item: Item, frame: Frame) -> Detections:
        """Run the detector and write the frame's line."""
        found = self.detector(frame[2])
        self.times.add_all(self.detector.timings)
        self.frames += 1
        self.detections += len(found)
        if self.lines is not None:
            self.lines.write(_line(item.path, frame, found))
        return found

    def draw(self, frame: NDArray[np.uint8], found: Detections) -> NDArray[np.uint8]:
        """A copy of the frame with the detections that are worth showing."""
        return draw(frame, found[found.scores >= self.shown_score])

    def summary(self, seconds: float) -> DetectSummary:
        """What the run amounted to."""
        return DetectSummary(
            frames=self.frames,
            fps=self.frames / seconds if seconds > 0 else 0.0,
            stages=self.times.percentiles(),
            detections=self.detections,
            provider=self.detector.provider,
            precision=self.detector.precision,
            warnings=tuple(self.warnings),
        )


def _line(source: Path, frame: Frame, found: Detections) -> str:
    index, time_s, pixels = frame
    record = {
        "source": str(source),
        "frame": index,
        "time_s": round(time_s, 6),
        "size": [pixels.shape[0], pixels.shape[1]],
        "detections": found.to_records(),
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _lines_to(path: str | Path | None) -> Iterator[IO[str] | None]:
    if path is None:
        yield None
        return
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def _progress_bar(items: Sequence[Item], shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar with the time left on stderr; yields the function that moves it on by some frames."""
    if not shown:
        yield lambda frames: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("detect"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("detect", total=_count_frames(items))
        yield lambda frames: bar.advance(task, frames)


def _count_frames(items: Sequence[Item]) -> int | None:
    """The frames of all items by the videos' headers, or ``None`` where one does not say."""
    total = 0
    for item in items:
        if not item.is_video:
            total += 1
            continue
        try:
            with VideoReader(item.path) as reader:
                count = reader.frame_count
        except DataError:
            count = 0  # reported when its turn comes
        if count is None:
            return None
        total += count
    return total
