"""Whether an artefact was verified: its sidecar ``<artefact>.verify.json``, as ``verify`` writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anchorline.doctor.findings import Finding
from anchorline.runtime.files import sha256_of

State = Literal["verified", "failed", "not executed", "stale", "damaged", "missing"]


@dataclass(frozen=True)
class Verification:
    """``text`` says it in one line; ``reference`` names what it was compared with, where known."""

    state: State
    text: str
    reference: str | None = None

    def findings(self, artefact: Path) -> list[Finding]:
        """A failed verdict is a problem, an artefact that nobody has verified is worth a note."""
        if self.state == "verified":
            return []
        remedy = f"anchorline verify {self.reference or 'REFERENCE'} {artefact}"
        if self.state == "not executed":
            remedy += ", on a machine that can run it"
        level: Literal["problem", "note"] = "problem" if self.state == "failed" else "note"
        return [Finding(level, f"{artefact.name}: {self.text}", remedy)]


def read_verification(artefact: Path) -> Verification:
    """The record beside ``artefact``, held against the files as they are now; damaged ones are told of."""
    sidecar = artefact.with_name(f"{artefact.name}.verify.json")
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Verification("missing", f"not verified: there is no {sidecar.name}")
    except (OSError, ValueError, RecursionError) as error:
        return Verification("damaged", f"{sidecar.name} cannot be read ({error})")
    own, reference = _entry(record, "artefact"), _entry(record, "reference")
    if own is None or (record.get("not_executed") is None and not isinstance(record.get("passed"), bool)):
        return Verification("damaged", f"{sidecar.name} is damaged: it names no artefact or no verdict")
    against = None if reference is None else reference[0]
    if own[1] != sha256_of(artefact):
        return Verification("stale", f"not verified: it has changed since {_date(record)}", against)
    if reference is not None and _has_changed(artefact.parent / Path(reference[0]).name, reference[1]):
        text = f"not verified: {reference[0]} has changed since {_date(record)}"
        return Verification("stale", text, against)
    return _verdict(record, against)


def _verdict(record: Mapping[str, Any], against: str | None) -> Verification:
    reason, date = record.get("not_executed"), _date(record)
    if reason is not None:
        return Verification("not executed", f"not verified on {date}: {reason}", against)
    name = against or "its reference"
    if record["passed"]:
        return Verification("verified", f"agrees with {name}, verified on {date}", against)
    return Verification("failed", f"differs from {name}, verified on {date}", against)


def _entry(record: Any, name: str) -> tuple[str, str] | None:
    """Name and sha256 of one of the two files, or None where they are not there."""
    entry = record.get(name) if isinstance(record, dict) else None
    if not isinstance(entry, dict):
        return None
    values = entry.get("name"), entry.get("sha256")
    return (values[0], values[1]) if isinstance(values[0], str) and isinstance(values[1], str) else None


def _has_changed(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) != sha256


def _date(record: Mapping[str, Any]) -> str:
    date = record.get("date")
    return date if isinstance(date, str) else "an unknown date"
