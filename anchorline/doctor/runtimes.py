"""Which runtimes of this machine can run an artefact, and why the others cannot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from anchorline.doctor.artefact import FLAVOURS, Artefact, source_of
from anchorline.doctor.conflicts import Finding, tensorrt_packages
from anchorline.doctor.machine import Machine, numbers
from anchorline.runtime.backends.cpu_options import CpuOptions, adds_in_16_bits, has_native_bf16
from anchorline.runtime.backends.onnxruntime import OnnxRuntimeBackend
from anchorline.runtime.backends.selection import open_backend
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError
from anchorline.runtime.io.files import sha256_of
from anchorline.runtime.tensorrt.manifest import EngineManifest
from anchorline.runtime.tensorrt.options import GpuOptions

# The providers of onnxruntime that run ONNX files, by their name on the command line: onnxruntime's
# own name, the package that brings it, and whether it needs an NVIDIA GPU.
_KNOWN_PROVIDERS = {
    "cpu": ("CPUExecutionProvider", "onnxruntime", False),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu", True),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu", True),
    "tensorrt-rtx": ("NvTensorRTRTXExecutionProvider", "onnxruntime-gpu", True),
}
# By flavour of TensorRT: the module, and the package that brings it.
_MODULES = {"tensorrt": ("tensorrt", "tensorrt"), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx-cu13")}
_VERSION_NUMBERS = 3  # an engine wants the very release it was built with


@dataclass(frozen=True)
class Runtime:
    """``reason`` says what would run it, or why this does not."""

    name: str
    runs: bool
    reason: str

    def to_json(self) -> dict[str, str | bool]:
        """Plain values for ``files.write_json``."""
        return asdict(self)


def runtimes_for(artefact: Artefact, machine: Machine) -> list[Runtime]:
    """The runtimes for this kind of artefact."""
    if artefact.kind == "checkpoint":
        return [_pytorch(machine)]
    if artefact.engine is not None:
        return [_tensorrt(artefact.engine, machine), *_instead_of_tensorrt(artefact, machine)]
    found = [
        _provider(name, artefact.path, machine)
        for name, (provider, _, needs_gpu) in _KNOWN_PROVIDERS.items()
        if provider in machine.providers or machine.gpu.gpus or not needs_gpu
    ]
    return [*found, *_openvino(artefact.path, machine)]


def _instead_of_tensorrt(artefact: Artefact, machine: Machine) -> list[Runtime]:
    """The CPU with the very ONNX file that an engine was built from, where that lies beside it."""
    assert artefact.engine is not None
    name, sha256 = source_of(artefact.engine)
    onnx = artefact.path.parent / Path(name).name
    if not onnx.is_file() or sha256_of(onnx) != sha256:
        return []
    found = _provider("cpu", onnx, machine)
    return [Runtime(f"{found.name}, with {onnx.name}", found.runs, found.reason)]


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
    if artefact.engine is not None:
        name, sha256 = source_of(artefact.engine)
        onnx = artefact.path.parent / Path(name).name
        if onnx.is_file() and sha256_of(onnx) != sha256:
            text = f"{onnx.name} has changed since the engine was built from it"
            found.append(Finding("note", text, f"anchorline build {onnx} --out {artefact.path}"))
    return found


def open_onnx(path: Path) -> None:
    """Load the file as ``detect`` does; raises ``ArtefactError``."""
    OnnxRuntimeBackend(path, "cpu").close()


def open_openvino(path: Path) -> str:
    """Load the file on OpenVINO as ``detect`` does; its precision. Raises ``AnchorlineError``."""
    backend = open_backend(path, "openvino", CpuOptions(), GpuOptions())
    backend.close()
    return backend.precision


def _pytorch(machine: Machine) -> Runtime:
    wanted = ("torch", "torchvision", "safetensors")
    missing = [name for name in wanted if not machine.importable.get(name, False)]
    if missing:
        return Runtime(
            "PyTorch", False, f"{', '.join(missing)} not installed: pip install 'anchorline[train]'"
        )
    versions = ", ".join(f"{name} {machine.version(name) or 'of unknown version'}" for name in wanted)
    return Runtime("PyTorch", True, f"{versions}; for anchorline evaluate and export, detect wants an export")


def _provider(name: str, path: Path, machine: Machine) -> Runtime:
    provider, package, needs_gpu = _KNOWN_PROVIDERS[name]
    shown = f"onnxruntime, {name}"
    if machine.onnxruntime.version is None:
        reason = machine.onnxruntime.error
        hint = "pip install 'anchorline[cpu]'" if reason is None else f"it cannot be imported ({reason})"
        return Runtime(
            shown, False, f"onnxruntime {'is not installed' if reason is None else 'is broken'}: {hint}"
        )
    if provider not in machine.providers and (package == "onnxruntime" or package not in machine.packages):
        return Runtime(shown, False, f"onnxruntime has no {provider}: pip install {package}")
    if needs_gpu and not machine.gpu.gpus:
        return Runtime(shown, False, _no_gpu(machine))
    try:
        open_onnx(path)
    except ArtefactError as error:
        return Runtime(shown, False, str(error))
    return Runtime(shown, True, f"onnxruntime {machine.onnxruntime.version} loads it")


def _openvino(path: Path, machine: Machine) -> list[Runtime]:
    """OpenVINO, where it is installed."""
    here = machine.version("openvino")
    if here is None:
        return []
    try:
        precision = open_openvino(path)
    except AnchorlineError as error:
        return [Runtime("OpenVINO", False, str(error))]
    bf16 = "" if has_native_bf16() else "; this processor does not compute bf16 natively"
    return [Runtime("OpenVINO", True, f"OpenVINO {here} compiles it, in {precision}{bf16}")]


def _tensorrt(engine: EngineManifest, machine: Machine) -> Runtime:
    """An engine runs on the release and the compute capability it was built for, and on no other."""
    title = FLAVOURS[engine.flavour]
    module, package = _MODULES[engine.flavour]
    parts = tensorrt_packages(machine, engine.flavour)
    here = machine.packages[parts[0]] if parts else None
    blockers = []
    if here is None or not machine.importable.get(module, False):
        wanted = ".".join(map(str, numbers(engine.flavour_version)[:_VERSION_NUMBERS]))
        blockers.append(f"{title} is not installed: pip install '{package}=={wanted}.*'")
    if not machine.gpu.gpus:
        blockers.append(_no_gpu(machine))
    mismatch = _mismatch(engine, machine, here)
    if mismatch is not None:
        blockers.append(mismatch)
    if blockers:
        return Runtime(title, False, "; ".join(blockers))
    names = ", ".join(gpu.name for gpu in machine.gpu.gpus)
    return Runtime(title, True, f"{title} {here} on {names}")


def _mismatch(engine: EngineManifest, machine: Machine, here: str | None) -> str | None:
    """How the machine is not the one that the engine was built for."""
    built = engine.compute_capabilities
    have = [gpu.compute_capability for gpu in machine.gpu.gpus]
    other_gpu = bool(have and built) and not set(have) & set(built)
    release = numbers(engine.flavour_version)[:_VERSION_NUMBERS]
    other_release = here is not None and numbers(here)[:_VERSION_NUMBERS] != release
    if not other_gpu and not other_release:
        return None
    title = FLAVOURS[engine.flavour]
    target = f"{_capabilities(built)} with " if built else ""
    machine_has = " and ".join(
        part for part in (_capabilities(have) if have else "", f"{title} {here}" if here else "") if part
    )
    return (
        f"built for {target}{title} {engine.flavour_version}; this machine has {machine_has}: "
        f"build it again here from {source_of(engine)[0] or 'its ONNX file'}"
    )


def _capabilities(numbers: list[int] | tuple[int, ...]) -> str:
    return ", ".join(f"sm_{number}" for number in dict.fromkeys(numbers))


def _no_gpu(machine: Machine) -> str:
    return f"there is no NVIDIA GPU here{f' ({machine.gpu.fault})' if machine.gpu.fault else ''}"
