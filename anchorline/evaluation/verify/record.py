"""The record beside an artefact, ``<artefact>.verify.json``: what it was compared with, and the verdict.

It is keyed by the SHA-256 of both files, so a record that outlives its artefact is known for stale.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from anchorline.evaluation.verify.report import VerifyReport
from anchorline.runtime.files import sha256_of, write_json


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
