"""The manifest beside an engine: ``model.engine.json``, what is in ``model.engine`` and where it runs.

An engine is a plain TensorRT plan and says nothing readable about itself; nothing is prepended to it,
so that other loaders take it as well.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorline.runtime.contract import Contract
from anchorline.runtime.io.errors import ArtefactError, GpuError
from anchorline.runtime.io.files import input_errors, sha256_of
from anchorline.runtime.tensorrt.library import FLAVOURS

_RELEASE_NUMBERS = 3  # a plan is loaded by the very release that built it
_AMPERE = 80


class CannotRunHereError(GpuError):
    """An engine that is sound but not for this machine; its ONNX file may run instead."""


@dataclass(frozen=True)
class EngineManifest:
    """What the manifest says; ``raw`` is all of it.

    ``compute_capabilities`` are numbers such as 86; ``batch`` is (smallest, best, largest); ``options`` are
    what the engine was built with, empty where the manifest does not say.
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
    options: dict[str, Any]
    raw: dict[str, Any]


def manifest_path(engine: Path) -> Path:
    """Where the manifest of ``engine`` stands."""
    return engine.with_name(f"{engine.name}.json")


def read_manifest(engine: Path, *, check_engine: bool = True) -> EngineManifest:
    """The manifest of ``engine``; with ``check_engine`` the engine must be the very file it describes.

    Raises ``ArtefactError`` when either is missing, damaged, or they do not belong together.
    """
    path = manifest_path(engine)
    missing = "an engine needs its manifest beside it: copy both, or build it again"
    with input_errors(path, missing):
        content = path.read_bytes()
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: the manifest is not JSON ({error}); build the engine again") from None
    if not isinstance(raw, dict):
        raise ArtefactError(f"{path}: holds a {type(raw).__name__}, expected a JSON object; build it again")
    try:
        low, best, high = (int(size) for size in raw["profiles"][0]["batch"])
        if not 1 <= low <= best <= high:
            raise ValueError(f"batch is {[low, best, high]}, not rising from 1")
        manifest = EngineManifest(
            path=path,
            contract=Contract.from_json(json.dumps(raw["contract"]), where=str(path)),
            flavour=str(raw["flavour"]),
            flavour_version=str(raw["flavour_version"]),
            compute_capabilities=tuple(int(number) for number in raw["compute_capabilities"]),
            precision=str(raw["precision"]),
            batch=(low, best, high),
            engine_sha256=str(raw["engine"]["sha256"]),
            options_hash=str(raw["options_hash"]),
            options=raw["options"] if isinstance(raw.get("options"), dict) else {},
            raw=raw,
        )
    except ArtefactError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ArtefactError(f"{path}: damaged manifest ({error!r}); build the engine again") from None
    if check_engine and sha256_of(engine) != manifest.engine_sha256:
        raise ArtefactError(
            f"{engine}: is not the engine that {path.name} describes (another sha256); build it again or "
            "copy both files together"
        )
    if manifest.flavour not in FLAVOURS:
        raise ArtefactError(
            f"{path}: flavour is {manifest.flavour!r}; expected one of {', '.join(FLAVOURS)}; "
            "build the engine again"
        )
    return manifest


def check_fit(manifest: EngineManifest, version: str, capability: int, gpu: str) -> None:
    """Raise ``CannotRunHereError`` where TensorRT ``version`` on a GPU of ``capability`` cannot run it."""
    title = FLAVOURS[manifest.flavour].title
    options = manifest.options
    numbers = 1 if options.get("version_compatible") else _RELEASE_NUMBERS
    here, there = (re.findall(r"\d+", text)[:numbers] for text in (version, manifest.flavour_version))
    if here != there:
        raise CannotRunHereError(
            f"it was built with {title} {manifest.flavour_version}, and {version} is installed; build it "
            "again here, or install that release"
        )
    built = manifest.compute_capabilities
    compatible = bool(options.get("hardware_compatible")) and capability >= _AMPERE
    if built and capability not in built and not compatible:
        names = ", ".join(f"sm_{number}" for number in built)
        raise CannotRunHereError(
            f"it was built for {names}, and {gpu} is sm_{capability}; build it again for this GPU"
        )


def onnx_of(engine: Path, manifest: EngineManifest) -> Path:
    """The ONNX file beside an engine that it was built from; ``ArtefactError`` unless it is the very one."""
    stated = manifest.raw.get("onnx")
    name, sha256 = (stated.get("name"), stated.get("sha256")) if isinstance(stated, dict) else (None, None)
    if not isinstance(name, str) or not name or not isinstance(sha256, str):
        raise ArtefactError(f"{manifest.path}: does not say which ONNX file the engine was built from")
    path = engine.parent / Path(name).name
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file; copy the ONNX file to where the engine is")
    if sha256_of(path) != sha256:
        raise ArtefactError(
            f"{path}: is not the ONNX file that the engine was built from (another sha256); copy that one"
        )
    return path
