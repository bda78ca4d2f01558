"""Choosing what runs a model file, by what is here: TensorRT, onnxruntime or OpenVINO."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from anchorline.runtime.backends.cpu_options import CpuOptions
from anchorline.runtime.backends.execution_providers import PROVIDER_PACKAGES
from anchorline.runtime.backends.onnxruntime import PROVIDERS, OnnxRuntimeBackend, available_providers
from anchorline.runtime.backends.openvino import has_openvino
from anchorline.runtime.canvas import held_to
from anchorline.runtime.io.errors import ArtefactError, GpuError, SettingsError, shown
from anchorline.runtime.tensorrt.cuda import GpuOptions
from anchorline.runtime.tensorrt.library import FLAVOURS
from anchorline.runtime.tensorrt.manifest import CannotRunHereError, EngineManifest, onnx_of, read_manifest

if TYPE_CHECKING:
    from anchorline.runtime.backends.openvino import OpenVINOBackend
    from anchorline.runtime.tensorrt.lane import TensorRTBackend

# ``provider`` names the hardware path, ``precision`` the arithmetic.
Backend: TypeAlias = "OnnxRuntimeBackend | OpenVINOBackend | TensorRTBackend"

OPENVINO = "openvino"
_BEST_FIRST = ("cuda", OPENVINO, "cpu")  # what "auto" tries for an ONNX file

log = logging.getLogger("anchorline.runtime")
_said: set[tuple[str, str]] = set()  # what was logged once already in this process
_saying = threading.Lock()


def open_backend(path: Path, provider: str, cpu: CpuOptions, options: GpuOptions) -> Backend:
    """Load ``path``; see ``Detector`` for the arguments.

    Where an engine's ONNX file runs in its place it does so on the engine's canvas, if that has one.
    """
    if not isinstance(provider, str) or provider not in ("auto", OPENVINO, *PROVIDERS):
        raise SettingsError(f"provider is {shown(provider)}; available here: {', '.join(_offered())}")
    if path.suffix.lower() == ".safetensors":
        raise ArtefactError(
            f"{path}: checkpoints are not run directly; first anchorline export {path} --out model.onnx"
        )
    if path.suffix.lower() == ".engine":
        manifest = read_manifest(path)
        if provider == "tensorrt-rtx" and manifest.flavour != provider:
            raise SettingsError(f"provider is {provider!r}, but {path} is an engine of {manifest.flavour}")
        if provider == "auto" or provider in FLAVOURS:
            return _open_engine(path, manifest, provider, cpu, options)
        return _on_canvas_of(manifest, open_backend(onnx_of(path, manifest), provider, cpu, options))
    offered = _offered()
    if provider not in offered:
        package = PROVIDER_PACKAGES["tensorrt-rtx"].distribution
        if provider != "tensorrt-rtx":
            package = "onnxruntime-gpu; pip install 'anchorline[gpu]'"
        if provider == OPENVINO:
            package = "the package openvino; pip install 'anchorline[openvino]'"
        raise SettingsError(
            f"provider is {provider!r}, which is not to be had here (it comes with {package}); available "
            f"here: {', '.join(offered)}"
        )
    return _open_onnx(path, _BEST_FIRST if provider == "auto" else (provider,), cpu, options)


def exact_provider(provider: str) -> str:
    """What ``auto`` means where figures are compared: never bf16 without being told."""
    return "cpu" if provider == "auto" and "cuda" not in available_providers() else provider


def _open_engine(
    path: Path, manifest: EngineManifest, provider: str, cpu: CpuOptions, options: GpuOptions
) -> Backend:
    """The engine; where it cannot run and no provider was named its ONNX file on the CPU, or an error that
    names both reasons."""
    # Here, not above: who runs ONNX files need not wait for the GPU's modules.
    from anchorline.runtime.tensorrt.lane import TensorRTBackend

    try:
        return TensorRTBackend(path, manifest, options)
    except CannotRunHereError as error:
        if provider != "auto":
            raise GpuError(f"{path}: cannot run here: {error}") from None
        reason = str(error)
    try:
        onnx = onnx_of(path, manifest)
    except ArtefactError as error:
        raise GpuError(f"{path}: cannot run here: {reason}. Nor can its ONNX file instead: {error}") from None
    backend = _on_canvas_of(manifest, _open_onnx(onnx, (OPENVINO, "cpu"), cpu, options))
    _say_once(path, f"TensorRT cannot run it here ({reason}); {onnx.name} runs on the CPU instead")
    return backend


def _on_canvas_of(manifest: EngineManifest, backend: Backend) -> Backend:
    if backend.contract.canvas is None:
        backend.contract = held_to(backend.contract, manifest.contract.canvas, None)
    return backend


def _open_onnx(path: Path, names: tuple[str, ...], cpu: CpuOptions, options: GpuOptions) -> Backend:
    """On the first of the providers ``names`` that is here and starts; the last one's errors are raised."""
    refused = []
    for name in (name for name in names[:-1] if name in _offered()):
        try:
            return _open_on(path, name, cpu, options)
        except (GpuError, ArtefactError) as error:
            refused.append(f"{name} cannot run it here ({error}); it runs on the CPU instead")
    backend = _open_on(path, names[-1], cpu, options)
    for text in refused:  # now that it does run there
        _say_once(path, text)
    return backend


def _open_on(path: Path, provider: str, cpu: CpuOptions, options: GpuOptions) -> Backend:
    if provider == OPENVINO and has_openvino():
        from anchorline.runtime.backends.openvino import OpenVINOBackend

        return OpenVINOBackend(path, cpu)
    if provider == OPENVINO and cpu.precision != "auto":
        raise SettingsError(
            f"cpu_precision is {cpu.precision!r}, and OpenVINO as onnxruntime's provider chooses by itself; "
            "that takes the package openvino: pip install 'anchorline[openvino]', or use auto"
        )
    if cpu.precision == "bf16":
        raise SettingsError(
            f"cpu_precision is 'bf16', but the provider {provider} does not compute in bf16 on a processor; "
            f"that takes the provider {OPENVINO}; pip install 'anchorline[openvino]', or use auto"
        )
    return OnnxRuntimeBackend(path, provider, cpu.threads, options)


def _offered() -> list[str]:
    return list(dict.fromkeys(["auto", *available_providers(), *([OPENVINO] if has_openvino() else [])]))


def _say_once(path: Path, text: str) -> None:
    with _saying:
        if (str(path), text) in _said:
            return
        _said.add((str(path), text))
    log.warning("%s: %s", path, text)
