"""Counting what comes in: frames, times, complaints, and who did the work."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from anchorline.cluster.job import WorkItem
from anchorline.cluster.replies import Chunk, Done, Ready
from anchorline.cluster.summary import ClusterSummary
from anchorline.runtime.timing import StageTimes
from anchorline.runtime.video.summary import DetectSummary

Line = TypeVar("Line")


@dataclass
class NodeFigures:
    """What one machine has done: ``workers`` were ready there at some time."""

    workers: int = 0
    files: int = 0
    frames: int = 0
    provider: str = ""
    precision: str = ""


class Tally:
    """The figures of a run over ``files`` files."""

    def __init__(self, files: int) -> None:
        self.files = files
        self.answered = self.frames = self.detections = self.retries = 0
        self.failed: dict[int, str] = {}  # by the file's place
        self._unreadable: dict[int, str] = {}
        self._warnings: dict[int, tuple[str, ...]] = {}
        self._of_machines: dict[str, None] = {}  # in order, each once
        self._nodes: dict[str, NodeFigures] = {}
        self._stages = StageTimes()
        self._begun: float | None = None
        self._seconds = 0.0

    def ready(self, reply: Ready) -> None:
        """A worker can begin."""
        if self._begun is None:
            self._begun = time.monotonic()
        node = self._nodes.setdefault(reply.node, NodeFigures())
        node.workers += 1
        node.provider, node.precision = reply.provider, reply.precision

    def times(self, chunk: Chunk) -> None:
        """A piece came, of a try that may still fail."""
        for stage, durations in chunk.times.items():
            for seconds in durations:
                self._stages.add(stage, seconds)

    def done(self, item: WorkItem, reply: Done, node: str, frames: int, detections: int) -> None:
        """An item is answered, with so many frames and detections in all its pieces."""
        self.answered += len(item.paths)
        self.frames += frames
        self.detections += detections
        self._nodes[node].files += len(item.paths)
        self._nodes[node].frames += frames
        if reply.warnings:
            self._warnings[item.first] = tuple(reply.warnings)
        if reply.unreadable is not None:
            self._unreadable[item.first] = reply.unreadable

    def gave_up(self, item: WorkItem, reason: str) -> None:
        """An item gets no answer."""
        for index, path in enumerate(item.paths):
            self.failed[item.first + index] = f"{path}: {reason}"

    def warn(self, line: str) -> None:
        """Something is wrong with a machine."""
        self._of_machines[line] = None

    def end(self) -> None:
        """The work is over."""
        self._seconds = 0.0 if self._begun is None else time.monotonic() - self._begun

    @property
    def nothing_read(self) -> str | None:
        """The first file's complaint, where all files were answered and none gave a single frame."""
        if self.frames or self.failed or not self._unreadable:
            return None
        return _in_order(self._unreadable)[0]

    def summary(self) -> ClusterSummary:
        """All of it."""
        nodes = dict(sorted(self._nodes.items()))
        of_files = [line for lines in _in_order(self._warnings) for line in lines]
        detect = DetectSummary(
            frames=self.frames,
            fps=self.frames / self._seconds if self._seconds > 0 else 0.0,
            stages=self._stages.percentiles(),
            detections=self.detections,
            provider=_joined([each.provider for each in nodes.values()]),
            precision=_joined([each.precision for each in nodes.values()]),
            warnings=(*of_files, *self._of_machines, *_differing(nodes)),
        )
        return ClusterSummary(
            detect=detect,
            files=self.files,
            answered=self.answered,
            failed=tuple(_in_order(self.failed)),
            retries=self.retries,
            nodes={name: dict(vars(each)) for name, each in nodes.items()},
        )


def _in_order(lines: Mapping[int, Line]) -> list[Line]:
    return [lines[place] for place in sorted(lines)]


def _joined(values: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(values)) or "none"


def _differing(nodes: Mapping[str, NodeFigures]) -> list[str]:
    """A warning where it depends on the machine how a file was answered."""
    kinds = {(each.provider, each.precision) for each in nodes.values()}
    if len(kinds) < 2:
        return []
    named = ", ".join(f"{name}: {each.provider} {each.precision}" for name, each in nodes.items())
    return [
        f"the machines compute differently ({named}); figures may differ in the last digits: set --provider"
    ]
