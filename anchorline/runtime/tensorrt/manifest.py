"""The manifest beside an engine: ``model.engine.json``, what is in ``model.engine`` and where it runs.

An engine is a plain TensorRT plan and says nothing readable about itself; nothing is prepended to it,
so that other loaders take it as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.io.files import sha256_of


@dataclass(frozen=True)
class EngineManifest:
    """What the manifest says; ``raw`` is all of it.

    ``compute_capabilities`` are numbers such as 86; ``batch`` is (smallest, best, largest).
    """

    path: Path
    contract: Contract
    flavour: str
    flavour_version: str
    compute_capabilities: tuple[int, ...]
    precision: str
    batch: tuple[int, int, int]
    engine_sha256: str
    options_hash: str
    raw: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """What the engine was built with; empty where the manifest does not say."""
        told = self.raw.get("options")
        return told if isinstance(told, dict) else {}


def manifest_path(engine: Path) -> Path:
    """Where the manifest of ``engine`` stands."""
    return engine.with_name(f"{engine.name}.json")


def read_manifest(engine: Path, *, check_engine: bool = True) -> EngineManifest:
    """The manifest of ``engine``; with ``check_engine`` the engine must be the very file it describes.

    Raises ``ArtefactError`` when either is missing, damaged, or they do not belong together.
    """
    path = manifest_path(engine)
    raw = _read_json(path)
    try:
        contract = raw["contract"]
        low, best, high = (int(size) for size in raw["profiles"][0]["batch"])
        if not 1 <= low <= best <= high:
            raise ValueError(f"batch is {[low, best, high]}, not rising from 1")
        manifest = EngineManifest(
            path=path,
            contract=Contract.from_json(json.dumps(contract), where=str(path)),
            flavour=str(raw["flavour"]),
            flavour_version=str(raw["flavour_version"]),
            compute_capabilities=tuple(int(number) for number in raw["compute_capabilities"]),
            precision=str(raw["precision"]),
            batch=(low, best, high),
            engine_sha256=str(raw["engine"]["sha256"]),
            options_hash=str(raw["options_hash"]),
            raw=raw,
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{path}: damaged manifest ({error!r}); build the engine again") from None
    if check_engine and sha256_of(engine) != manifest.engine_sha256:
        raise ArtefactError(
            f"{engine}: is not the engine that {path.name} describes (another sha256); build it again or "
            "copy both files together"
        )
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(
            f"{path}: no such file; an engine needs its manifest beside it: copy both, or build it again"
        ) from None
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: the manifest is not JSON ({error}); build the engine again") from None
    if not isinstance(raw, dict):
        raise ArtefactError(f"{path}: holds a {type(raw).__name__}, expected a JSON object; build it again")
    return raw
