"""What an artefact is, from its header or manifest alone, and whether it was verified."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anchorline.doctor.conflicts import Finding
from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import ArtefactError, printable
from anchorline.runtime.io.files import expect_regular, sha256_of
from anchorline.runtime.model_file import read_onnx, read_safetensors
from anchorline.runtime.tensorrt.library import FLAVOURS
from anchorline.runtime.tensorrt.manifest import EngineManifest, name_and_sha256, read_manifest

_LONGEST_LIST = 12  # class names, or notes on the origin, that are shown
_LONGEST_TEXT = 200  # characters of such a note
_NO_DIGEST = "none: nothing tells whether it is as it was written; what this version writes has one"


@dataclass(frozen=True)
class Artefact:
    """``kind`` is ``checkpoint``, ``onnx`` or ``engine``; ``details`` are more rows to show."""

    path: Path
    kind: str
    contract: Contract
    details: dict[str, str]
    engine: EngineManifest | None = None

    def rows(self) -> dict[str, str]:
        """What it is and what made it, as lines to show."""
        contract = self.contract
        names = contract.names[:_LONGEST_LIST]
        more = f", ... ({len(contract.names)} in all)" if len(contract.names) > len(names) else ""
        # Where the model came from, without the long list of its settings.
        texts = [(key, text) for key, text in contract.source.items() if isinstance(text, str)]
        origin = {_note(key.replace("_", " ")): _note(text) for key, text in texts[:_LONGEST_LIST]}
        return {
            "file": f"{self.path}, {self.path.stat().st_size / 1e6:.1f} MB",
            **self.details,
            **(origin or {"made by": "not stated"}),
            "task": contract.task,
            "classes": ", ".join(names) + more,
            "takes": (self.engine or contract).frame_sizes,
            "precision": self.engine.precision if self.engine else contract.precision,
            "input": f"{contract.input_dtype}, numeric profile {contract.profile}",
            "largest batch": "any" if contract.max_batch is None else str(contract.max_batch),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``files.write_json``."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "contract": json.loads(self.contract.to_json()),
            "details": self.details,
            "engine": None if self.engine is None else self.engine.raw,
        }


def read_artefact(path: Path) -> Artefact:
    """Read a file by its suffix; raises ``ArtefactError`` for one that is missing, damaged or foreign."""
    suffix = path.suffix.lower()
    if path.is_dir():
        raise ArtefactError(f"{path}: is a folder; give the .safetensors, .onnx or .engine file in it")
    if suffix not in (".safetensors", ".onnx", ".engine"):
        raise ArtefactError(f"{path}: expected a file that ends in .safetensors, .onnx or .engine")
    if not path.exists():
        raise ArtefactError(f"{path}: no such file; check the name")
    if suffix == ".engine":
        manifest = read_manifest(path)
        capabilities = ", ".join(f"sm_{each}" for each in manifest.compute_capabilities)
        details = {
            "kind": f"engine of {FLAVOURS[manifest.flavour].title} {manifest.flavour_version}",
            "compute capability": capabilities or "not stated",
            "built from": name_and_sha256(manifest.raw.get("onnx"))[0] or "not stated",
        }
        return Artefact(path, "engine", manifest.contract, details, manifest)
    model = read_onnx(path) if suffix == ".onnx" else read_safetensors(path)
    model.check()
    details = {"kind": model.kind, "digest": "as it was written" if model.digest else _NO_DIGEST}
    return Artefact(path, "onnx" if suffix == ".onnx" else "checkpoint", model.contract, details)


def _note(text: str) -> str:
    return printable(text)[:_LONGEST_TEXT]


@dataclass(frozen=True)
class Verification:
    """``text`` says in one line what became of it; ``reference`` is what it was compared with, if known."""

    state: Literal["verified", "failed", "not executed", "stale", "damaged", "missing"]
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
        expect_regular(sidecar)
        record = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Verification("missing", f"not verified: there is no {sidecar.name}")
    except (OSError, ValueError, RecursionError) as error:
        return Verification("damaged", f"{sidecar.name} cannot be read ({error})")
    record = record if isinstance(record, dict) else {}
    own, own_digest = name_and_sha256(record.get("artefact"))
    reference, digest = name_and_sha256(record.get("reference"))
    reason, passed, date = (record.get(key) for key in ("not_executed", "passed", "date"))
    if not own or (reason is None and not isinstance(passed, bool)):
        return Verification("damaged", f"{sidecar.name} is damaged: it names no artefact or no verdict")
    date = _note(date) if isinstance(date, str) else "an unknown date"
    reason = _note(reason) if isinstance(reason, str) else reason and "of a reason that cannot be read"
    state: Literal["verified", "failed", "not executed", "stale"] = "stale"
    beside = artefact.parent / reference
    if own_digest != sha256_of(artefact):
        text = f"not verified: it has changed since {date}"
    elif beside.is_file() and sha256_of(beside) != digest:
        text = f"not verified: {reference} has changed since {date}"
    elif reason is not None:
        state, text = "not executed", f"not verified on {date}: {reason}"
    elif passed and isinstance(record.get("tuned"), str):  # other settings on purpose
        state, text = "verified", f"{_note(record['tuned'])}, measured on {date}"
    elif passed:
        state, text = "verified", f"agrees with {reference or 'its reference'}, verified on {date}"
    else:
        state, text = "failed", f"differs from {reference or 'its reference'}, verified on {date}"
    return Verification(state, text, reference or None)
