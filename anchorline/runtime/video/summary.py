"""What a detection run amounted to: frames, speed, losses, ages, and the time of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_PERCENTILES = ("p50", "p95", "p99")


@dataclass(frozen=True)
class DetectSummary:
    """``stages`` holds milliseconds, ``{stage: {"p50", "p95", "p99"}}``; ``fps`` is frames over the
    wall time of the whole run, reading and writing included. ``age`` is the same percentiles of the
    time from capture to result. ``sources`` holds each source's own figures by name."""

    frames: int
    fps: float
    stages: dict[str, dict[str, float]]
    detections: int
    provider: str
    precision: str
    dropped: int = 0
    reconnects: int = 0
    age: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``files.write_json``."""
        return {
            "frames": self.frames,
            "fps": self.fps,
            "stages": self.stages,
            "dropped": self.dropped,
            "reconnects": self.reconnects,
            "age": dict(self.age),
            "sources": {name: dict(figures) for name, figures in self.sources.items()},
            "detections": self.detections,
            "provider": self.provider,
            "precision": self.precision,
            "warnings": list(self.warnings),
        }

    def render(self) -> Table:
        """The closing tables, one below the other, for ``rich``'s console."""
        from rich.table import Table

        tables = Table.grid(padding=(0, 0))
        tables.add_row(self._stage_table())
        if self.sources:
            tables.add_row(self._source_table())
        return tables

    def _stage_table(self) -> Table:
        from rich.table import Table

        title = f"{self.frames} frames, {self.detections} detections, {self.fps:.1f} frames/s"
        table = Table(title=title, caption=f"provider {self.provider}, {self.precision}", min_width=48)
        table.add_column("stage")
        for column in _PERCENTILES:
            table.add_column(f"{column} ms", justify="right")
        for stage, times in self.stages.items():
            table.add_row(stage, *(f"{times[p]:.2f}" for p in _PERCENTILES))
        if self.age:
            table.add_section()
            table.add_row("capture to result", *(f"{self.age[p]:.2f}" for p in _PERCENTILES))
        return table

    def _source_table(self) -> Table:
        from rich.table import Table

        table = Table(caption="age: capture to result, in ms")
        table.add_column("source", overflow="fold")
        for column in ("frames", "in/s", "out/s", "drops", "reconnects", "age p50", "p95"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, each in self.sources.items():
            ages = [f"{each['age'][p]:.1f}" if each["age"] else "" for p in _PERCENTILES[:2]]
            rates = [f"{each[rate]:.1f}" for rate in ("fps_in", "fps_out")]
            counts = [str(each[count]) for count in ("dropped", "reconnects")]
            table.add_row(name, str(each["frames"]), *rates, *counts, *ages)
        return table
