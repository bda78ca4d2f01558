"""What an artefact is, from its header or manifest alone, and whether it was verified."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anchorline.doctor.conflicts import Finding
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.io.files import expect_regular, input_errors, sha256_of
from anchorline.runtime.io.protobuf import fields
from anchorline.runtime.tensorrt.library import FLAVOURS
from anchorline.runtime.tensorrt.manifest import EngineManifest, read_manifest

_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own bound
_LONGEST_LIST = 12  # class names that are shown
# Field numbers of ModelProto.
_PRODUCER, _GRAPH, _OPSET_IMPORT, _METADATA = 2, 7, 8, 14


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
        origin = {key.replace("_", " "): v for key, v in contract.source.items() if isinstance(v, str)}
        return {
            "file": f"{self.path}, {self.path.stat().st_size / 1e6:.1f} MB",
            **self.details,
            **(origin or {"made by": "not stated"}),
            "task": contract.task,
            "classes": ", ".join(names) + more,
            "canvas": f"{contract.canvas[0]}x{contract.canvas[1]} (height x width)",
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
    metadata: Mapping[str, Any]
    with input_errors(path):
        if suffix == ".onnx":
            producer, opset, metadata = read_onnx_header(path)
            kind = f"ONNX graph, opset {opset}" + (f", written by {producer}" if producer else "")
        else:
            metadata, kind = _safetensors_metadata(path), "checkpoint of PyTorch weights (safetensors)"
    text = metadata.get(CONTRACT_KEY)
    if not isinstance(text, str):
        raise ArtefactError(
            f"{path}: has no anchorline contract, so nothing says what it expects; "
            "only files written by anchorline train, import, export or build have one"
        )
    contract = Contract.from_json(text, str(path))
    return Artefact(path, "onnx" if suffix == ".onnx" else "checkpoint", contract, {"kind": kind})


def name_and_sha256(entry: Any) -> tuple[str, str]:
    """What a manifest or record says of a file; empty where it is not stated."""
    match entry:
        case {"name": str(name), "sha256": str(sha256)}:
            return name, sha256
    return "", ""


def _safetensors_metadata(path: Path) -> Mapping[str, Any]:
    """The header's ``__metadata__``: eight bytes of length, then JSON (safetensors' format)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            whole = file.read(length) if 0 < length <= _LARGEST_HEADER else b""
        header = json.loads(whole if len(whole) == length else b"")
        metadata = header.pop("__metadata__", {})
        end = max((each["data_offsets"][1] for each in header.values()), default=0)
        missing = 8 + length + end - path.stat().st_size
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ArtefactError(
            f"{path}: not a readable safetensors file; it may be cut short, copy it again"
        ) from None
    if missing > 0:
        raise ArtefactError(f"{path}: {missing} bytes are missing at its end; copy it again")
    return metadata if isinstance(metadata, dict) else {}


def read_onnx_header(path: Path) -> tuple[str, int, dict[str, str]]:
    """The producer, the opset of ONNX's own domain, and the ``metadata_props`` of an ONNX file.

    Without onnx, and without the graph: only the outermost level of ``ModelProto`` (onnx.proto3) is walked,
    which takes milliseconds at any size. Raises ``ArtefactError`` for a file that is none, empty or cut off.
    """
    producer, opset, metadata, has_graph = "", 0, {}, False
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for number, place in fields(content, "ONNX"):
                has_graph |= number == _GRAPH
                if number == _PRODUCER:
                    producer = _text(content, place)
                elif number in (_OPSET_IMPORT, _METADATA) and isinstance(place, slice):
                    # OperatorSetIdProto is a domain and a version, StringStringEntryProto a key and a value.
                    inner = dict(fields(content, "ONNX", place.start, place.stop))
                    first, second = inner.get(1, 0), inner.get(2, 0)
                    if number == _METADATA:
                        metadata[_text(content, first)] = _text(content, second)
                    elif _text(content, first) in ("", "ai.onnx") and isinstance(second, int):
                        opset = second
        if not has_graph or not opset:
            raise ValueError("it has no graph")
    except ValueError as error:
        reason = "it is empty" if path.stat().st_size == 0 else error
        raise ArtefactError(
            f"{path}: not an ONNX file, or one that was cut off ({reason}); export or copy it again"
        ) from None
    return producer, opset, metadata


def _text(content: mmap.mmap, place: int | slice) -> str:
    return content[place].decode("utf-8", "replace") if isinstance(place, slice) else ""


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
    date = date if isinstance(date, str) else "an unknown date"
    state: Literal["verified", "failed", "not executed", "stale"] = "stale"
    beside = artefact.parent / Path(reference).name
    if own_digest != sha256_of(artefact):
        text = f"not verified: it has changed since {date}"
    elif beside.is_file() and sha256_of(beside) != digest:
        text = f"not verified: {reference} has changed since {date}"
    elif reason is not None:
        state, text = "not executed", f"not verified on {date}: {reason}"
    elif passed:
        state, text = "verified", f"agrees with {reference or 'its reference'}, verified on {date}"
    else:
        state, text = "failed", f"differs from {reference or 'its reference'}, verified on {date}"
    return Verification(state, text, reference or None)
