"""Which runtimes of this machine can run an artefact, and why the others cannot."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from anchorline.doctor.artefact import Artefact
from anchorline.doctor.conflicts import Finding, provider_packages, tensorrt_packages
from anchorline.doctor.machine import Machine, numbers
from anchorline.runtime.backends.cpu_options import CpuOptions, adds_in_16_bits, has_native_bf16
from anchorline.runtime.backends.execution_providers import PROVIDER_PACKAGES
from anchorline.runtime.backends.onnxruntime import PROVIDERS, OnnxRuntimeBackend
from anchorline.runtime.backends.selection import open_backend
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError
from anchorline.runtime.io.files import sha256_of
from anchorline.runtime.tensorrt.cuda import GpuOptions
from anchorline.runtime.tensorrt.library import FLAVOURS
from anchorline.runtime.tensorrt.manifest import (
    CannotRunHereError,
    EngineManifest,
    check_fit,
    name_and_sha256,
    onnx_of,
)

_TENSORRT_PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}


@dataclass(frozen=True)
class Runtime:
    """``reason`` says what would run it, or why this does not."""

    name: str
    runs: bool
    reason: str


def runtimes_for(artefact: Artefact, machine: Machine) -> list[Runtime]:
    """The runtimes for this kind of artefact."""
    if artefact.kind == "checkpoint":
        return [_pytorch(machine)]
    if artefact.engine is not None:
        found = [_tensorrt(artefact.engine, machine)]
        with contextlib.suppress(ArtefactError):  # the ONNX file beside it runs on the CPU instead
            onnx = onnx_of(artefact.path, artefact.engine)
            cpu = _onnxruntime("cpu", onnx, machine)
            found.append(replace(cpu, name=f"{cpu.name}, with {onnx.name}"))
        return found
    found = [
        _onnxruntime(name, artefact.path, machine)
        for name, provider in PROVIDERS.items()
        if provider in machine.providers or machine.gpu.gpus or name == "cpu"
    ]
    if here := machine.packages.get("openvino"):
        try:
            precision = open_openvino(artefact.path)
        except AnchorlineError as error:
            return [*found, Runtime("OpenVINO", False, str(error))]
        bf16 = "" if has_native_bf16() else "; this processor does not compute bf16 natively"
        found.append(Runtime("OpenVINO", True, f"OpenVINO {here} compiles it, in {precision}{bf16}"))
    return found


def runtime_findings(artefact: Artefact, runtimes: list[Runtime]) -> list[Finding]:
    """A problem when nothing here runs it; notes on integers that need VNNI, and on an ONNX file beside an
    engine that is not its own."""
    found = []
    if artefact.kind == "onnx" and artefact.contract.needs_vnni:
        here = ", which this one has not: onnxruntime computes it in float32" * adds_in_16_bits()
        text = f"{artefact.path.name} has 8-bit weights, which are exact on processors with VNNI only{here}"
        remedy = "quantise the float model again with anchorline quantize: new files are exact everywhere"
        found.append(Finding("note", text, remedy))
    if not any(runtime.runs for runtime in runtimes):
        reasons = "; ".join(f"{runtime.name}: {runtime.reason}" for runtime in runtimes)
        found.append(Finding("problem", f"{artefact.path.name} cannot run here", reasons))
    name, sha256 = name_and_sha256(artefact.engine and artefact.engine.raw.get("onnx"))
    onnx = artefact.path.parent / name
    if onnx.is_file() and sha256_of(onnx) != sha256:
        text = f"{onnx.name} has changed since the engine was built from it"
        found.append(Finding("note", text, f"anchorline build {onnx} --out {artefact.path}"))
    return found


def open_openvino(path: Path) -> str:
    """Load the file on OpenVINO as ``detect`` does; its precision. Raises ``AnchorlineError``."""
    backend = open_backend(path, "openvino", CpuOptions(), GpuOptions())
    backend.close()
    return backend.precision


def _pytorch(machine: Machine) -> Runtime:
    wanted = ("torch", "torchvision", "safetensors")
    missing = ", ".join(name for name in wanted if not machine.importable.get(name, False))
    if missing:
        return Runtime("PyTorch", False, f"{missing} not installed: pip install 'anchorline[train]'")
    there = ", ".join(f"{name} {machine.packages.get(name, 'of unknown version')}" for name in wanted)
    return Runtime("PyTorch", True, f"{there}; for anchorline evaluate and export, detect wants an export")


def _onnxruntime(name: str, path: Path, machine: Machine) -> Runtime:
    provider, package = PROVIDERS[name], "onnxruntime" if name == "cpu" else "onnxruntime-gpu"
    if name in PROVIDER_PACKAGES:
        package = next(iter(provider_packages(machine, name)), PROVIDER_PACKAGES[name].distribution)
    version, error = machine.onnxruntime.version, machine.onnxruntime.error
    needs_package = package == "onnxruntime" or package not in machine.packages
    fault = None
    if version is None and error is None:
        fault = "onnxruntime is not installed: pip install 'anchorline[cpu]'"
    elif version is None:
        fault = f"onnxruntime is broken: it cannot be imported ({error})"
    elif provider not in machine.providers and needs_package:
        fault = f"onnxruntime has no {provider}: pip install {package}"
    elif name != "cpu" and not machine.gpu.gpus:
        fault = _no_gpu(machine)
    elif name == "tensorrt" and (other := _other_tensorrt(machine)):
        fault = other
    else:
        try:
            OnnxRuntimeBackend(path, "cpu").close()  # as ``detect`` loads it
        except ArtefactError as refused:
            fault = str(refused)
    return Runtime(f"onnxruntime, {name}", fault is None, fault or f"onnxruntime {version} loads it")


def _other_tensorrt(machine: Machine) -> str | None:
    """What is wrong where onnxruntime's provider is linked to another TensorRT than is installed, or to one
    where none is."""
    linked = machine.onnxruntime_tensorrt
    there = [machine.packages[name] for name in tensorrt_packages(machine, "tensorrt")]
    if linked is None or linked in [numbers(version)[0] for version in there]:
        return None
    return (
        f"its provider is linked to TensorRT {linked}, and {there[0] if there else 'none'} is installed: "
        f"pip install 'tensorrt=={linked}.*', or build an engine, which runs on the TensorRT that is here"
    )


def _tensorrt(engine: EngineManifest, machine: Machine) -> Runtime:
    title, module = FLAVOURS[engine.flavour].title, FLAVOURS[engine.flavour].module
    parts = tensorrt_packages(machine, engine.flavour)
    here = machine.packages[parts[0]] if parts else None
    have = [gpu.compute_capability for gpu in machine.gpu.gpus]
    built = engine.compute_capabilities
    blockers = []
    if here is None or not machine.importable.get(module, False):
        wanted = ".".join(map(str, numbers(engine.flavour_version)[:3]))
        package = _TENSORRT_PACKAGES[engine.flavour]
        blockers.append(f"{title} is not installed: pip install '{package}=={wanted}.*'")
    if not have:
        blockers.append(_no_gpu(machine))
    fits = False
    for capability in have or built or (0,):
        with contextlib.suppress(CannotRunHereError):
            check_fit(engine, here or engine.flavour_version, capability, "")
            fits = True
    if not fits:
        target = f"{_capabilities(built)} with " if built else ""
        there = " and ".join(filter(None, (_capabilities(have), here and f"{title} {here}")))
        source = name_and_sha256(engine.raw.get("onnx"))[0] or "its ONNX file"
        blockers.append(
            f"built for {target}{title} {engine.flavour_version}; this machine has {there}: "
            f"build it again here from {source}"
        )
    names = ", ".join(gpu.name for gpu in machine.gpu.gpus)
    return Runtime(title, not blockers, "; ".join(blockers) or f"{title} {here} on {names}")


def _capabilities(numbers: list[int] | tuple[int, ...]) -> str:
    return ", ".join(f"sm_{number}" for number in dict.fromkeys(numbers))


def _no_gpu(machine: Machine) -> str:
    return f"there is no NVIDIA GPU here{f' ({machine.gpu.fault})' if machine.gpu.fault else ''}"
