"""Choosing what runs a model file: TensorRT for an engine, onnxruntime for an ONNX file, by what is here."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from anchorline.runtime.backend import Backend
from anchorline.runtime.engine_manifest import EngineManifest, read_manifest
from anchorline.runtime.errors import ArtefactError, GpuError, SettingsError
from anchorline.runtime.gpu.engine_fit import CannotRunHereError, check_flavour, onnx_of
from anchorline.runtime.gpu.options import GpuOptions
from anchorline.runtime.onnxruntime_backend import PROVIDERS, OnnxRuntimeBackend, available_providers

_ENGINE_PROVIDERS = ("tensorrt", "tensorrt-rtx")
_BEST_FIRST = ("cuda",)  # what "auto" tries for an ONNX file before the CPU

log = logging.getLogger("anchorline.runtime")
_said: set[tuple[str, str]] = set()  # what was logged once already in this process
_saying = threading.Lock()


def open_backend(path: Path, provider: str, threads: int | None, options: GpuOptions) -> Backend:
    """Load ``path``; see ``Detector`` for the arguments."""
    options.check()
    if provider != "auto" and provider not in PROVIDERS:
        raise SettingsError(f"provider is {provider!r}; available here: {', '.join(_offered())}")
    if path.suffix.lower() == ".safetensors":
        raise ArtefactError(
            f"{path}: checkpoints are not run directly; first anchorline export {path} --out model.onnx"
        )
    if path.suffix.lower() == ".engine":
        return _open_engine(path, provider, threads, options)
    return _open_onnx(path, provider, threads, options)


def _open_engine(path: Path, provider: str, threads: int | None, options: GpuOptions) -> Backend:
    manifest = read_manifest(path)
    check_flavour(manifest)
    if provider == "tensorrt-rtx" and manifest.flavour != provider:
        raise SettingsError(f"provider is {provider!r}, but {path} is an engine of {manifest.flavour}")
    if provider != "auto" and provider not in _ENGINE_PROVIDERS:
        return _open_onnx(onnx_of(path, manifest), provider, threads, options)
    # Here, not above: who runs ONNX files need not wait for the GPU's modules.
    from anchorline.runtime.gpu.tensorrt_backend import TensorRTBackend

    try:
        return TensorRTBackend(path, manifest, options)
    except CannotRunHereError as error:
        if provider != "auto":
            raise GpuError(f"{path}: cannot run here: {error}") from None
        return _instead_of(path, manifest, error, threads, options)


def _instead_of(
    path: Path, manifest: EngineManifest, reason: GpuError, threads: int | None, options: GpuOptions
) -> Backend:
    """The engine's ONNX file on the CPU; an error that names both reasons where that cannot be had."""
    try:
        onnx = onnx_of(path, manifest)
    except ArtefactError as error:
        raise GpuError(f"{path}: cannot run here: {reason}. Nor can its ONNX file instead: {error}") from None
    backend = OnnxRuntimeBackend(onnx, "cpu", threads, options)
    _say_once(path, f"TensorRT cannot run it here ({reason}); {onnx.name} runs on the CPU instead")
    return backend


def _open_onnx(path: Path, provider: str, threads: int | None, options: GpuOptions) -> Backend:
    if provider != "auto":
        if provider not in _offered():
            raise SettingsError(
                f"provider is {provider!r}, which this onnxruntime does not have (it comes with "
                f"onnxruntime-gpu); available here: {', '.join(_offered())}"
            )
        return OnnxRuntimeBackend(path, provider, threads, options)
    refused = []
    for name in _BEST_FIRST:
        if name in available_providers():
            try:
                return OnnxRuntimeBackend(path, name, threads, options)
            except GpuError as error:
                refused.append(f"{name} cannot run it here ({error}); it runs on the CPU instead")
    backend = OnnxRuntimeBackend(path, "cpu", threads, options)
    for text in refused:  # now that it does run there
        _say_once(path, text)
    return backend


def _offered() -> list[str]:
    return ["auto", *available_providers()]


def _say_once(path: Path, text: str) -> None:
    with _saying:
        if (str(path), text) in _said:
            return
        _said.add((str(path), text))
    log.warning("%s: %s", path, text)
