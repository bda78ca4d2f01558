"""How far a run on a cluster is, and what it amounted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anchorline.runtime.video.figures import DetectSummary

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class WorkerState:
    """A worker whose detector is open, by machine and process; ``doing`` is empty while it waits."""

    node: str
    pid: int
    provider: str
    precision: str
    doing: str = ""


@dataclass(frozen=True)
class Progress:
    """How far a run is, in files; ``frames`` counts what was computed, ``failed`` the files given up."""

    files: int
    answered: int
    failed: int
    frames: int
    retries: int
    workers: tuple[WorkerState, ...]

    def describe(self) -> str:
        """What is done and who works, for people."""
        if not self.workers:
            return "waiting for workers"
        busy = sum(bool(worker.doing) for worker in self.workers)
        machines = len({worker.node for worker in self.workers})
        where = "one machine" if machines == 1 else f"{machines} machines"
        text = (
            f"{self.answered + self.failed} of {self.files} files, {self.frames} frames, "
            f"{busy} of {len(self.workers)} workers busy on {where}"
        )
        if self.retries or self.failed:
            text += f", {self.retries} retries, {self.failed} failed"
        return text


@dataclass(frozen=True)
class ClusterSummary:
    """``detect`` holds the figures of a local run: ``fps`` is over all workers, from the first ready one
    on; ``stages`` are those of every frame that was worked on.

    Of ``files`` files ``answered`` have their lines or a warning; ``failed`` has a line for each of the
    others that was given up. ``retries`` counts tries beyond the first. ``nodes`` holds each machine's
    ``{"workers", "files", "frames", "provider", "precision"}``.
    """

    detect: DetectSummary
    files: int
    answered: int
    failed: tuple[str, ...] = ()
    retries: int = 0
    nodes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was wrong with files and machines, a line each."""
        return self.detect.warnings

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``files.write_json``: those of the local run, and the cluster's."""
        return {
            **self.detect.to_json(),
            "files": self.files,
            "answered": self.answered,
            "failed": list(self.failed),
            "retries": self.retries,
            "nodes": {name: dict(figures) for name, figures in self.nodes.items()},
        }

    def render(self) -> Table:
        """The closing tables, one below the other, for ``rich``'s console."""
        from rich.table import Table

        nodes = Table(
            caption=f"{self.answered} of {self.files} files answered, {len(self.failed)} failed, "
            f"{self.retries} tried again"
        )
        nodes.add_column("machine", overflow="fold")
        columns = ("workers", "files", "frames", "provider", "precision")
        for column in columns:
            nodes.add_column(column, justify="right", no_wrap=True)
        for name, figures in self.nodes.items():
            nodes.add_row(name, *(str(figures[column]) for column in columns))
        tables = Table.grid(padding=(0, 0))
        tables.add_row(self.detect.render())
        tables.add_row(nodes)
        return tables
