"""What an artefact is: a checkpoint, an ONNX file or an engine, from its header or manifest alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorline.doctor.onnx_header import read_onnx_header
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.engine_manifest import EngineManifest, read_manifest
from anchorline.runtime.errors import ArtefactError

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
