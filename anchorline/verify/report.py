"""The verdict of a verification: shown as a table, written as JSON, and recorded beside the artefact."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorline.runtime.io.files import sha256_of, write_json
from anchorline.verify.detection_check import DetectionCheck
from anchorline.verify.stage_check import LayerResult, StageResult
from anchorline.verify.traps import TrapResult

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class VerifyReport:
    """Everything a verification found.

    ``reference`` and ``candidate`` are the subjects' identities, ``tolerance`` the limits in force.
    ``stages`` is None with the reason in ``stages_note`` where a side shows only its whole; ``layer`` is
    the result of a bisection, None when none was asked for or nothing differs.
    """

    reference: dict[str, Any]
    candidate: dict[str, Any]
    data: str
    tolerance: dict[str, Any]
    detections: DetectionCheck
    traps: tuple[TrapResult, ...] = ()
    stages: tuple[StageResult, ...] | None = None
    stages_note: str | None = None
    layer: LayerResult | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def passed(self) -> bool:
        """Whether every stage, every trap and the detections hold."""
        stages = all(stage.passed for stage in self.stages or ())
        return stages and self.detections.passed and all(trap.passed for trap in self.traps)

    @property
    def first_divergence(self) -> str | None:
        """The first stage that differs; without one, ``detections`` or the first trap that failed."""
        for stage in self.stages or ():
            if not stage.passed:
                return stage.name
        if not self.detections.passed:
            return "detections"
        return next((f"trap: {trap.name}" for trap in self.traps if not trap.passed), None)

    @property
    def reason(self) -> str | None:
        """The first divergence and what was seen there, in one line; None when all holds."""
        first = self.first_divergence
        if first is None:
            return None
        details = {f"trap: {trap.name}": trap.detail for trap in self.traps}
        details["detections"] = self.detections.detail
        details.update({stage.name: stage.detail for stage in self.stages or () if not stage.passed})
        layer = f", first in layer {self.layer.layer}" if self.layer and self.layer.layer else ""
        return f"{first}: {details[first]}{layer}"

    def describe(self) -> str:
        """The verdict in one line."""
        if not self.passed:
            return f"differs in {self.reason}"
        compared = sum(stage.compared for stage in self.stages or ())
        inside = f"{compared} stages hold, " if compared else ""
        traps = f", {len(self.traps)} traps hold" if self.traps else ""
        return f"{inside}{self.detections.summary.brief()}{traps}"

    def to_json(self) -> dict[str, Any]:
        """The plain dict that ``anchorline verify --json`` and the record beside the artefact hold."""
        return {
            "passed": self.passed,
            "first_divergence": self.first_divergence,
            "reference": self.reference,
            "artefact": self.candidate,
            "data": self.data,
            "tolerance": self.tolerance,
            "stages": None if self.stages is None else [stage.to_json() for stage in self.stages],
            "stages_note": self.stages_note,
            "bisect": self.layer and self.layer.to_json(),
            "detections": self.detections.to_json(),
            "traps": [trap.to_json() for trap in self.traps],
            "notes": list(self.notes),
        }

    def render(self) -> Table:
        """One row for each stage, the detections, and each trap."""
        from rich.markup import escape
        from rich.table import Table

        sides = [
            f"{side['name']} ({side['provider']}, {side['precision']})"
            for side in (self.reference, self.candidate)
        ]
        table = Table(
            title=escape(f"{sides[0]} and {sides[1]} on {self.data}"),
            caption=escape(self._caption()),
            caption_justify="left",
        )
        for column in ("", "", "what was found"):
            table.add_column(column)
        for stage in self.stages or ():
            mark = _mark(stage.passed) if stage.compared else "-"
            table.add_row(stage.name, mark, escape(stage.detail))
        if self.stages is None:
            table.add_row("stages", "-", escape(self.stages_note or "not compared"))
        table.add_section()
        table.add_row(
            f"{self.detections.summary.images} images",
            _mark(self.detections.passed),
            escape(self.detections.detail),
        )
        for name, each in (self.detections.accuracy or {}).items():
            ap50, recall = ("{:.4f} and {:.4f}".format(*pair) for pair in (each.ap50, each.recall))
            table.add_row(f"  {escape(name)}", "", f"AP50 {ap50}, recall {recall}")
        table.add_section()
        for trap in self.traps:
            detail = trap.comparison.brief() if trap.passed and trap.comparison else trap.detail
            table.add_row(trap.name, _mark(trap.passed), escape(detail))
        return table

    def _caption(self) -> str:
        lines = ["the numbers held" if self.passed else f"they differ; {self.reason}", *self.notes]
        return "\n".join(lines)


def _mark(passed: bool) -> str:
    return "[green]ok[/]" if passed else "[bold red]differs[/]"


# The record beside an artefact, ``<artefact>.verify.json``: what it was compared with, and the verdict.
#
# It is keyed by the SHA-256 of both files, so a record that outlives its artefact is known for stale.


def record_path(artefact: Path) -> Path:
    """Where the record of ``artefact`` lies."""
    return artefact.with_name(f"{artefact.name}.verify.json")


def write_record(artefact: Path, report: VerifyReport) -> Path:
    """Write what a verification of ``artefact`` found; returns the record's path."""
    figures = report.to_json()
    figures["artefact"] = {**figures["artefact"], "name": artefact.name, "sha256": sha256_of(artefact)}
    return _write(artefact, {**figures, "not_executed": None})


def write_not_executed(artefact: Path, reason: str, reference: Path | None = None) -> Path:
    """Record that ``artefact`` was not verified, and why: told not to, or it does not run here."""
    return _write(
        artefact,
        {
            "passed": None,
            "artefact": {"name": artefact.name, "sha256": sha256_of(artefact)},
            "reference": reference and {"name": reference.name, "sha256": sha256_of(reference)},
            "not_executed": reason,
        },
    )


def _write(artefact: Path, figures: dict[str, Any]) -> Path:
    from anchorline import __version__

    path = record_path(artefact)
    stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_json(path, {**figures, "date": stamp, "anchorline": __version__})
    return path
