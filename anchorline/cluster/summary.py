"""What a run on a cluster amounted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anchorline.runtime.video.summary import DetectSummary

if TYPE_CHECKING:
    from rich.table import Table


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
        for column in ("workers", "files", "frames", "provider", "precision"):
            nodes.add_column(column, justify="right", no_wrap=True)
        for name, each in self.nodes.items():
            values = (each[key] for key in ("workers", "files", "frames", "provider", "precision"))
            nodes.add_row(name, *map(str, values))
        tables = Table.grid(padding=(0, 0))
        tables.add_row(self.detect.render())
        tables.add_row(nodes)
        return tables
