"""The manifest beside an engine: ``model.engine.json``, what is in ``model.engine`` and where it runs.

An engine is a plain TensorRT plan and says nothing readable about itself; nothing is prepended to it,
so that other loaders take it as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from anchorline.runtime.contract import Contract, Pixels
from anchorline.runtime.io.errors import UNPRINTABLE, ArtefactError, GpuError, printable, shown
from anchorline.runtime.io.files import input_errors, sha256_of
from anchorline.runtime.io.schema import Name, check_fields, choice, read_object
from anchorline.runtime.tensorrt.library import FLAVOURS

_RELEASE_NUMBERS = 3  # a plan is loaded by the very release that built it
_AMPERE = 80
_LONGEST_FILE_NAME = 255  # bytes
DIGEST = "digest"  # in the manifest: the SHA-256 of all the rest of it

Release = Annotated[
    str, Meta(pattern=r"\A\d{1,9}(\.\w{1,20}){0,5}\Z", description="a release such as 10.16.1.11")
]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z", description="64 hexadecimal digits")]
Size = Annotated[int, Meta(ge=1, le=1_000_000)]
Sizes = Annotated[tuple[Size, Size, Size], Meta(description="three sizes of at least 1")]
Canvas = tuple[Pixels, Pixels]
Canvases = Annotated[
    tuple[tuple[Canvas, Canvas, Canvas], ...],
    Meta(description="a list of three canvases, each a height and a width"),
]
Capability = Annotated[int, Meta(ge=10, le=999)]


class CannotRunHereError(GpuError):
    """An engine that is sound but not for this machine; its ONNX file may run instead."""


@dataclass(frozen=True)
class EngineManifest:
    """What the manifest says; ``raw`` is all of it. Raises ``ArtefactError``.

    ``compute_capabilities`` are numbers such as 86; ``batch`` is (smallest, best, largest); ``options`` are
    what the engine was built with, empty where the manifest does not say. ``canvases`` are those of each
    optimisation profile, smallest, best and largest; without any it has the contract's alone.
    """

    path: Path
    contract: Contract
    flavour: Annotated[str, choice(*FLAVOURS)]
    flavour_version: Release
    compute_capabilities: Annotated[tuple[Capability, ...], Meta(description="a list of numbers such as 86")]
    precision: Name
    batch: Sizes
    engine_sha256: Sha256
    options_hash: Name
    options: Annotated[dict[str, Any], Meta(description="a JSON object")]
    raw: dict[str, Any]
    canvases: Canvases = ()

    def __post_init__(self) -> None:
        check_fields(self, "")
        fixed = self.contract.canvas
        if not self.canvases and fixed is not None:
            object.__setattr__(self, "canvases", ((fixed, fixed, fixed),))
        for canvases in self.canvases:
            if any(list(sides) != sorted(sides) for sides in zip(*canvases, strict=True)):
                raise ArtefactError(f"canvas is {shown(canvases)}; expected sides that do not fall")
        if not self.canvases or (fixed is not None and self.canvases != ((fixed, fixed, fixed),)):
            raise ArtefactError(
                f"canvases are {shown(self.canvases)} and the contract's is {shown(fixed)}; expected the "
                "contract's alone or, where that is free, those of each profile"
            )
        if list(self.batch) != sorted(self.batch):
            raise ArtefactError(f"batch is {list(self.batch)}; expected sizes that do not fall")

    @property
    def frame_sizes(self) -> str:
        """In words: its canvas, or those of each profile."""
        each = []
        for least, _, most in self.canvases:
            sides = "{}x{}".format(*least), "{}x{}".format(*most)
            each.append(sides[0] if least == most else " to ".join(sides))
        only = len(each) == 1 and " " not in each[0]
        return f"canvas {each[0]}" if only else f"canvases {', '.join(each)}"


def manifest_path(engine: Path) -> Path:
    """Where the manifest of ``engine`` stands."""
    return engine.with_name(f"{engine.name}.json")


def read_manifest(engine: Path, *, check_engine: bool = True) -> EngineManifest:
    """The manifest of ``engine``; with ``check_engine`` the engine must be the very file it describes.

    Raises ``ArtefactError`` when either is missing, damaged, or they do not belong together.
    """
    path = manifest_path(engine)
    with input_errors(path, "an engine needs its manifest beside it: copy both, or build it again"):
        content = path.read_bytes()
    raw = read_object(content, f"{path}: the manifest", "build the engine again")
    if DIGEST in raw and raw[DIGEST] != manifest_digest(raw):
        raise ArtefactError(
            f"{path}: damaged manifest: it has another SHA-256 than its {DIGEST}; build the engine again, or "
            f"take {DIGEST} out where it was changed on purpose"
        )
    try:
        manifest = EngineManifest(
            path=path,
            contract=Contract.from_values(_stated(raw, "contract"), where=str(path)),
            flavour=_stated(raw, "flavour"),
            flavour_version=_stated(raw, "flavour_version"),
            compute_capabilities=_stated(raw, "compute_capabilities"),
            precision=_stated(raw, "precision"),
            batch=_stated(raw, "profiles", 0, "batch"),
            engine_sha256=_stated(raw, "engine", "sha256"),
            options_hash=_stated(raw, "options_hash"),
            options=raw.get("options", {}),
            raw=raw,
            canvases=_canvases(raw),
        )
    except ArtefactError as error:
        if str(error).startswith(f"{path}: "):  # the contract's
            raise
        raise ArtefactError(f"{path}: damaged manifest: {error}; build the engine again") from None
    if check_engine and sha256_of(engine) != manifest.engine_sha256:
        raise ArtefactError(
            f"{engine}: is not the engine that {path.name} describes (another sha256); build it again or "
            "copy both files together"
        )
    return manifest


def _canvases(raw: dict[str, Any]) -> Any:
    """Those of each profile; none in manifests from before engines had several."""
    profiles = raw["profiles"]
    if not any(isinstance(profile, dict) and "canvas" in profile for profile in profiles):
        return ()
    batches = [_stated(raw, "profiles", number, "batch") for number in range(len(profiles))]
    if any(batch != batches[0] for batch in batches):
        raise ArtefactError(f"batches are {shown(batches)}; expected the same in every profile")
    return tuple(_stated(raw, "profiles", number, "canvas") for number in range(len(profiles)))


def manifest_digest(raw: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest without its own ``DIGEST``."""
    rest = {key: value for key, value in raw.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _stated(raw: Any, *keys: str | int) -> Any:
    for key in keys:
        try:
            raw = raw[key]
        except (KeyError, IndexError, TypeError):
            raise ArtefactError(f"{'.'.join(map(str, keys))} is missing") from None
    return raw


def check_fit(manifest: EngineManifest, version: str, capability: int, gpu: str) -> None:
    """Raise ``CannotRunHereError`` where TensorRT ``version`` on a GPU of ``capability`` cannot run it."""
    title = FLAVOURS[manifest.flavour].title
    options = manifest.options
    here, there = (
        tuple(map(int, re.findall(r"\d+", text)[:_RELEASE_NUMBERS]))
        for text in (version, manifest.flavour_version)
    )
    later = bool(options.get("version_compatible")) and here[0] == there[0] and here >= there
    if here != there and not later:
        or_later = " or a later one of its major version" * bool(options.get("version_compatible"))
        raise CannotRunHereError(
            f"it was built with {title} {manifest.flavour_version}, and {version} is installed; build it "
            f"again here, or install that release{or_later}"
        )
    built = manifest.compute_capabilities
    compatible = bool(options.get("hardware_compatible")) and capability >= _AMPERE
    if built and capability not in built and not compatible:
        names = ", ".join(f"sm_{number}" for number in built)
        raise CannotRunHereError(
            f"it was built for {names}, and {gpu} is sm_{capability}; build it again for this GPU"
        )


def name_and_sha256(entry: Any) -> tuple[str, str]:
    """What a manifest or record says of a file beside it; empty where that can be no file's name."""
    match entry:
        case {"name": str(name), "sha256": str(sha256)}:
            name = Path(name).name
            if len(os.fsencode(printable(name))) <= _LONGEST_FILE_NAME and not UNPRINTABLE.search(name):
                return name, sha256
    return "", ""


def onnx_of(engine: Path, manifest: EngineManifest) -> Path:
    """The ONNX file beside an engine that it was built from; ``ArtefactError`` unless it is the very one."""
    name, sha256 = name_and_sha256(manifest.raw.get("onnx"))
    if not name:
        raise ArtefactError(f"{manifest.path}: does not say which ONNX file the engine was built from")
    path = engine.parent / name
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file; copy the ONNX file to where the engine is")
    if sha256_of(path) != sha256:
        raise ArtefactError(
            f"{path}: is not the ONNX file that the engine was built from (another sha256); copy that one"
        )
    return path
