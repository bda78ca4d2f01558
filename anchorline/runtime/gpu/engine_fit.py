"""Whether an engine can run here: TensorRT's release, and the GPU it was built for."""

from __future__ import annotations

import re
from pathlib import Path

from anchorline.runtime.engine_manifest import EngineManifest, sha256_of
from anchorline.runtime.errors import ArtefactError, GpuError
from anchorline.runtime.tensorrt_library import FLAVOURS

_RELEASE_NUMBERS = 3  # a plan is loaded by the very release that built it
_AMPERE = 80


class CannotRunHereError(GpuError):
    """An engine that is sound but not for this machine; its ONNX file may run instead."""


def check_flavour(manifest: EngineManifest) -> None:
    """Raise ``ArtefactError`` for a flavour of TensorRT that is not known."""
    if manifest.flavour not in FLAVOURS:
        raise ArtefactError(
            f"{manifest.path}: flavour is {manifest.flavour!r}; expected one of {', '.join(FLAVOURS)}; "
            "build the engine again"
        )


def check_fit(manifest: EngineManifest, version: str, capability: int, gpu: str) -> None:
    """Raise ``CannotRunHereError`` where TensorRT ``version`` on a GPU of ``capability`` cannot run it."""
    title = FLAVOURS[manifest.flavour].title
    options = manifest.options
    numbers = 1 if options.get("version_compatible") else _RELEASE_NUMBERS
    if _release(version, numbers) != _release(manifest.flavour_version, numbers):
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


def _release(version: str, numbers: int) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:numbers]]
