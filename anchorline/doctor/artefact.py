"""What an artefact is, from its header or manifest alone, and whether it was verified."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anchorline.doctor.conflicts import Finding
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.io.files import sha256_of
from anchorline.runtime.tensorrt.manifest import EngineManifest, read_manifest

# Reading what stands around the graph of an ONNX file, without onnx and without the graph itself.
#
# Only the outermost level of the protobuf message ``ModelProto`` (onnx.proto3) is walked, so that a
# file of any size takes milliseconds.


# Field numbers of ModelProto and of the messages inside it.
_IR_VERSION, _PRODUCER, _GRAPH, _OPSET_IMPORT, _METADATA = 1, 2, 7, 8, 14
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_KEY, _VALUE = 1, 2
# Wire types of protobuf.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES = 10

Buffer = bytes | mmap.mmap
Field = tuple[int, int, int, int]  # number, value of a varint, start and end of its bytes


@dataclass(frozen=True)
class OnnxHeader:
    """``opset`` is that of ONNX's own domain; ``metadata`` the file's ``metadata_props``."""

    producer: str
    opset: int
    metadata: dict[str, str]


def read_onnx_header(path: Path) -> OnnxHeader:
    """The header of an ONNX file; raises ``ArtefactError`` for one that is none, empty or cut off."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _parse(content)
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    except ValueError as error:
        reason = "it is empty" if path.stat().st_size == 0 else error
        raise ArtefactError(
            f"{path}: not an ONNX file, or one that was cut off ({reason}); export or copy it again"
        ) from None


def _parse(content: Buffer) -> OnnxHeader:
    producer, opset, metadata, has_graph = "", 0, {}, False
    for number, _, start, end in _fields(content, 0, len(content)):
        if number == _GRAPH:
            has_graph = True
        elif number == _PRODUCER:
            producer = _text(content, start, end)
        elif number == _OPSET_IMPORT:
            domain, version = _opset(content, start, end)
            opset = version if domain in ("", "ai.onnx") else opset
        elif number == _METADATA:
            key, value = _entry(content, start, end)
            metadata[key] = value
    if not has_graph or not opset:
        raise ValueError("it has no graph")
    return OnnxHeader(producer, opset, metadata)


def _opset(content: Buffer, start: int, end: int) -> tuple[str, int]:
    domain, version = "", 0
    for number, value, first, last in _fields(content, start, end):
        if number == _OPSET_DOMAIN:
            domain = _text(content, first, last)
        elif number == _OPSET_VERSION:
            version = value
    return domain, version


def _entry(content: Buffer, start: int, end: int) -> tuple[str, str]:
    texts = {
        number: _text(content, first, last)
        for number, _, first, last in _fields(content, start, end)
        if number in (_KEY, _VALUE)
    }
    return texts.get(_KEY, ""), texts.get(_VALUE, "")


def _fields(content: Buffer, position: int, end: int) -> Iterator[Field]:
    """The fields of one message; ``ValueError`` where the bytes are no such message."""
    while position < end:
        tag, position = _varint(content, position, end)
        number, wire = tag >> 3, tag & 7
        value, start = 0, position
        if wire == _VARINT:
            value, position = _varint(content, position, end)
        elif wire == _BYTES:
            length, start = _varint(content, position, end)
            position = start + length
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if number == 0 or position > end:
            raise ValueError(f"field {number} needs {position - end} bytes more than there are")
        yield number, value, start, position


def _varint(content: Buffer, position: int, end: int) -> tuple[int, int]:
    value = 0
    for index in range(_VARINT_BYTES):
        if position + index >= end:
            raise ValueError("it stops inside a number")
        byte = content[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError(f"no number at byte {position}")


def _text(content: Buffer, start: int, end: int) -> str:
    return content[start:end].decode("utf-8", "replace")


FLAVOURS = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own bound
_LONGEST_LIST = 12  # class names that are shown


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
        return {
            "file": f"{self.path}, {self.path.stat().st_size / 1e6:.1f} MB",
            **self.details,
            **_origin(contract.source),
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
    if path.is_dir():
        raise ArtefactError(f"{path}: is a folder; give the .safetensors, .onnx or .engine file in it")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ArtefactError(f"{path}: expected a file that ends in .safetensors, .onnx or .engine")
    if not path.exists():
        raise ArtefactError(f"{path}: no such file; check the name")
    return reader(path)


def _read_checkpoint(path: Path) -> Artefact:
    metadata = _safetensors_metadata(path)
    contract = _contract(path, metadata)
    return Artefact(path, "checkpoint", contract, {"kind": "checkpoint of PyTorch weights (safetensors)"})


def _safetensors_metadata(path: Path) -> Mapping[str, Any]:
    """The header's ``__metadata__``: eight bytes of length, then JSON (safetensors' format)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            whole = file.read(length) if 0 < length <= _LARGEST_HEADER else b""
            header = json.loads(whole) if whole and len(whole) == length else None
            ends = [
                each["data_offsets"][1] for name, each in (header or {}).items() if name != "__metadata__"
            ]
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        header, ends = None, []
    if not isinstance(header, dict):
        raise ArtefactError(f"{path}: not a readable safetensors file; it may be cut short, copy it again")
    missing = 8 + length + max(ends, default=0) - path.stat().st_size
    if missing > 0:
        raise ArtefactError(f"{path}: {missing} bytes are missing at its end; copy it again")
    metadata = header.get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _read_onnx(path: Path) -> Artefact:
    header = read_onnx_header(path)
    contract = _contract(path, header.metadata)
    written_by = f", written by {header.producer}" if header.producer else ""
    return Artefact(path, "onnx", contract, {"kind": f"ONNX graph, opset {header.opset}{written_by}"})


def _contract(path: Path, metadata: Mapping[str, Any]) -> Contract:
    text = metadata.get(CONTRACT_KEY)
    if not isinstance(text, str):
        raise ArtefactError(
            f"{path}: has no anchorline contract, so nothing says what it expects; "
            "only files written by anchorline train, import, export or build have one"
        )
    return Contract.from_json(text, str(path))


def _read_engine(path: Path) -> Artefact:
    manifest = read_manifest(path)
    if manifest.flavour not in FLAVOURS:
        raise ArtefactError(
            f"{manifest.path}: flavour is {manifest.flavour!r}; expected one of {', '.join(FLAVOURS)}; "
            "build the engine again"
        )
    capabilities = ", ".join(f"sm_{each}" for each in manifest.compute_capabilities)
    details = {
        "kind": f"engine of {FLAVOURS[manifest.flavour]} {manifest.flavour_version}",
        "compute capability": capabilities or "not stated",
        "built from": source_of(manifest)[0] or "not stated",
    }
    return Artefact(path, "engine", manifest.contract, details, manifest)


def source_of(manifest: EngineManifest) -> tuple[str, str]:
    """Name and sha256 of the ONNX file that an engine was built from; empty where it is not stated."""
    onnx = manifest.raw.get("onnx")
    name, sha256 = (onnx.get("name"), onnx.get("sha256")) if isinstance(onnx, dict) else ("", "")
    return (name, sha256) if isinstance(name, str) and isinstance(sha256, str) else ("", "")


def _origin(source: Mapping[str, Any]) -> dict[str, str]:
    """Where a model came from, without the long list of its settings."""
    known = {key.replace("_", " "): value for key, value in source.items() if isinstance(value, str)}
    return known or {"made by": "not stated"}


_READERS = {".safetensors": _read_checkpoint, ".onnx": _read_onnx, ".engine": _read_engine}


# Whether an artefact was verified: its sidecar ``<artefact>.verify.json``, as ``verify`` writes it.


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
    own, reference = _recorded(record, "artefact"), _recorded(record, "reference")
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


def _recorded(record: Any, name: str) -> tuple[str, str] | None:
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
