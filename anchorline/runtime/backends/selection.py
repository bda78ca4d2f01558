"""What runs a model file, by what is here: TensorRT, onnxruntime or OpenVINO."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from anchorline.runtime.backends.choice import Way, measuring, open_first, open_quickest
from anchorline.runtime.backends.cpu_options import CpuOptions
from anchorline.runtime.backends.execution_providers import PROVIDER_PACKAGES
from anchorline.runtime.backends.onnxruntime import PROVIDERS, OnnxRuntimeBackend, available_providers
from anchorline.runtime.backends.openvino import has_openvino
from anchorline.runtime.canvas import held_to
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.io.errors import ArtefactError, GpuError, SettingsError, shown
from anchorline.runtime.model_file import ModelFile, read_onnx
from anchorline.runtime.tensorrt.cuda import GpuOptions
from anchorline.runtime.tensorrt.library import FLAVOURS
from anchorline.runtime.tensorrt.manifest import CannotRunHereError, EngineManifest, onnx_of, read_manifest

if TYPE_CHECKING:
    from anchorline.runtime.backends.openvino import OpenVINOBackend
    from anchorline.runtime.tensorrt.lane import TensorRTBackend

# ``provider`` names the hardware path, ``precision`` the arithmetic.
Backend: TypeAlias = "OnnxRuntimeBackend | OpenVINOBackend | TensorRTBackend"
Held: TypeAlias = Callable[[Contract], Contract]  # the contract of a file as that of the run
_Opened = TypeVar("_Opened", bound=Backend)

OPENVINO = "openvino"
_BEST_FIRST = ("cuda", OPENVINO, "cpu")  # what "auto" assumes for an ONNX file

log = logging.getLogger("anchorline.runtime")
_said: set[tuple[str, str]] = set()  # what was logged once already in this process
_saying = threading.Lock()


def open_backend(
    path: Path,
    provider: str,
    cpu: CpuOptions,
    options: GpuOptions,
    *,
    canvas: tuple[int, int] | None = None,
    resize: ResizeRule | None = None,
    measure: bool | None = None,
) -> Backend:
    """Load ``path``; see ``Detector`` for the arguments.

    Where an engine's ONNX file runs in its place it does so on the engine's canvas, if that has one.
    """
    if not isinstance(provider, str) or provider not in ("auto", OPENVINO, *PROVIDERS):
        raise SettingsError(f"provider is {shown(provider)}; available here: {', '.join(_offered())}")
    if path.suffix.lower() == ".safetensors":
        raise ArtefactError(
            f"{path}: checkpoints are not run directly; first anchorline export {path} --out model.onnx"
        )
    measured = measuring(measure) and provider == "auto"
    held = functools.partial(held_to, canvas=canvas, resize=resize)
    if path.suffix.lower() == ".engine":
        manifest = read_manifest(path)
        if provider == "tensorrt-rtx" and manifest.flavour != provider:
            raise SettingsError(f"provider is {provider!r}, but {path} is an engine of {manifest.flavour}")
        if provider == "auto" or provider in FLAVOURS:
            return _open_engine(path, manifest, provider, cpu, options, held, measured)
        _check_offered(provider)
        return _open_onnx(
            onnx_of(path, manifest), (provider,), cpu, options, _on_canvas_of(manifest, held), False
        )
    _check_offered(provider)
    return _open_onnx(path, _BEST_FIRST if provider == "auto" else (provider,), cpu, options, held, measured)


def exact_provider(provider: str) -> str:
    """What ``auto`` means where figures are compared: never bf16 without being told."""
    return "cpu" if provider == "auto" and "cuda" not in available_providers() else provider


def _check_offered(provider: str) -> None:
    offered = _offered()
    if provider in offered:
        return
    package = PROVIDER_PACKAGES["tensorrt-rtx"].distribution
    if provider != "tensorrt-rtx":
        package = "onnxruntime-gpu; pip install 'anchorline[gpu]'"
    if provider == OPENVINO:
        package = "the package openvino; pip install 'anchorline[openvino]'"
    raise SettingsError(
        f"provider is {provider!r}, which is not to be had here (it comes with {package}); available "
        f"here: {', '.join(offered)}"
    )


def _open_engine(
    path: Path,
    manifest: EngineManifest,
    provider: str,
    cpu: CpuOptions,
    options: GpuOptions,
    held: Held,
    measured: bool,
) -> Backend:
    """The engine; where it cannot run and no provider was named its ONNX file on the CPU, or an error that
    names both reasons."""
    # Here, not above: who runs ONNX files need not wait for the GPU's modules.
    from anchorline.runtime.tensorrt.lane import TensorRTBackend

    try:
        return _as_held(TensorRTBackend(path, manifest, options), held)
    except CannotRunHereError as error:
        if provider != "auto":
            raise GpuError(f"{path}: cannot run here: {error}") from None
        reason = str(error)
    try:
        onnx = onnx_of(path, manifest)
    except ArtefactError as error:
        raise GpuError(f"{path}: cannot run here: {reason}. Nor can its ONNX file instead: {error}") from None
    backend = _open_onnx(onnx, (OPENVINO, "cpu"), cpu, options, _on_canvas_of(manifest, held), measured)
    _say_once(path, f"TensorRT cannot run it here ({reason}); {onnx.name} runs on the CPU instead")
    return backend


def _on_canvas_of(manifest: EngineManifest, held: Held) -> Held:
    def on_canvas(contract: Contract) -> Contract:
        if contract.canvas is None:
            contract = held_to(contract, manifest.contract.canvas, None)
        return held(contract)

    return on_canvas


def _as_held(backend: _Opened, held: Held) -> _Opened:
    try:
        backend.contract = held(backend.contract)
    except BaseException:
        backend.close()
        raise
    return backend


def _open_onnx(
    path: Path, names: tuple[str, ...], cpu: CpuOptions, options: GpuOptions, held: Held, measured: bool
) -> Backend:
    """On the first of the providers ``names`` that is here and starts, or of those on the CPU the quickest;
    the last one's errors are raised."""
    model = read_onnx(path)
    contract = held(model.contract)
    there = [*(name for name in names[:-1] if name in _offered()), names[-1]]
    if cpu.precision == "bf16" and OPENVINO in there:
        there = [name for name in there if name != "cpu"]  # which does not compute in it
    elif cpu.precision == "fp32" and there[-1] == "cpu" and not has_openvino():
        there = [name for name in there if name != OPENVINO]  # onnxruntime's provider chooses by itself

    def open_way(way: Way) -> Backend:
        threads = dataclasses.replace(cpu, threads=way.threads)
        return _as_held(_open_on(model, way.provider, threads, options), lambda _: contract)

    refused = {}
    if there[0] == "cuda" and len(there) > 1:
        try:
            return open_way(Way("cuda", cpu.threads))
        except (GpuError, ArtefactError) as error:
            refused[there.pop(0)] = str(error)
    if measured:
        backend, more = open_quickest(model, contract, cpu, there, open_way)
    else:
        backend, more = open_first([Way(name, cpu.threads) for name in there], open_way)
    for name, reason in {**refused, **more}.items():  # now that it does run there
        _say_once(path, f"{name} cannot run it here ({reason}); it runs on the CPU instead")
    return backend


def _open_on(model: ModelFile, provider: str, cpu: CpuOptions, options: GpuOptions) -> Backend:
    if provider == OPENVINO and has_openvino():
        from anchorline.runtime.backends.openvino import OpenVINOBackend

        return OpenVINOBackend(model.path, cpu, model)
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
    return OnnxRuntimeBackend(model.path, provider, cpu.threads, options, model)


def _offered() -> list[str]:
    return list(dict.fromkeys(["auto", *available_providers(), *([OPENVINO] if has_openvino() else [])]))


def _say_once(path: Path, text: str) -> None:
    with _saying:
        if (str(path), text) in _said:
            return
        _said.add((str(path), text))
    log.warning("%s: %s", path, text)
