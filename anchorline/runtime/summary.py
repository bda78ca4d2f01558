"""What a detection run amounted to: frames, speed, and the time of each stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class DetectSummary:
    """``stages`` holds milliseconds, ``{stage: {"p50", "p95", "p99"}}``; ``fps`` is frames over the
    wall time of the whole run, reading and writing included."""

    frames: int
    fps: float
    stages: dict[str, dict[str, float]]
    detections: int
    provider: str
    precision: str
    dropped: int = 0
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``files.write_json``."""
        return {
            "frames": self.frames,
            "fps": self.fps,
            "stages": self.stages,
            "dropped": self.dropped,
            "detections": self.detections,
            "provider": self.provider,
            "precision": self.precision,
            "warnings": list(self.warnings),
        }

    def render(self) -> Table:
        """The closing table, for ``rich``'s console."""
        from rich.table import Table

        title = f"{self.frames} frames, {self.detections} detections, {self.fps:.1f} frames/s"
        table = Table(title=title, caption=f"provider {self.provider}, {self.precision}", min_width=48)
        table.add_column("stage")
        for column in ("p50 ms", "p95 ms", "p99 ms"):
            table.add_column(column, justify="right")
        for stage, times in self.stages.items():
            table.add_row(stage, *(f"{times[p]:.2f}" for p in ("p50", "p95", "p99")))
        if self.dropped:
            table.add_row("dropped frames", str(self.dropped), "", "")
        return table
