"""``build_engine``: an exported ONNX file to a TensorRT engine and its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from anchorline import __version__
from anchorline.engine.fp16_range import Sample
from anchorline.engine.lowering import deviations, lower
from anchorline.engine.mixed_precision import PrecisionReport, to_precision
from anchorline.engine.model_file import check_exported, read_model
from anchorline.engine.options import Batch, BuildOptions, options_hash
from anchorline.engine.toolkit import Plan, Progress, Toolkit, layer_report, load_toolkit, parse, serialise
from anchorline.runtime.contract import DOMAIN, Contract
from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.runtime.io.files import atomic_path, sha256_of, write_json
from anchorline.runtime.tensorrt.manifest import EngineManifest, manifest_path, read_manifest
from anchorline.runtime.tensorrt.plugins import PLUGIN_NAMESPACE, PLUGIN_VERSION, PLUGINS
from anchorline.runtime.tensorrt.plugins.images import source_hash


def build_identity(
    onnx_sha256: str, options: BuildOptions, batch: Batch, toolkit: Toolkit, samples_sha256: str | None
) -> dict[str, Any]:
    """Everything that decides what a build gives; its hash is the manifest's ``options_hash``."""
    return {
        "onnx_sha256": onnx_sha256,
        "options": {**options.to_json(), "batch": batch, "compute_capabilities": toolkit.capabilities},
        "flavour_version": toolkit.version,
        "gpu": toolkit.gpu,
        "anchorline": __version__,
        "onnx_package": onnx.__version__,
        "kernels": {op.name: source_hash(op.source) for op in PLUGINS},
        "samples_sha256": samples_sha256,
    }


def earlier_build(out: Path, options_hash: str) -> EngineManifest | None:
    """The manifest at ``out`` when engine and manifest are whole and come from the same build."""
    if not out.is_file() or not manifest_path(out).is_file():
        return None
    try:
        manifest = read_manifest(out)
    except ArtefactError:
        return None
    return manifest if manifest.options_hash == options_hash else None


def manifest_json(
    *,
    contract: Contract,
    onnx_path: Path,
    identity: dict[str, Any],
    options_hash: str,
    toolkit: Toolkit,
    batch: Batch,
    precision: PrecisionReport,
    layers: list[dict[str, Any]],
    plugin_ops: Sequence[str],
    plan: Plan,
    engine_sha256: str,
    seconds: float,
) -> dict[str, Any]:
    """The manifest as JSON values; the design's section 2 says what it is for."""
    stated = contract.precision if contract.precision == "int8" else precision.precision
    contract = dataclasses.replace(contract, precision=stated, max_batch=batch[2])
    return {
        "contract": json.loads(contract.to_json()),
        "onnx": {"name": onnx_path.name, "sha256": identity["onnx_sha256"]},
        "engine": {"sha256": engine_sha256, "bytes": len(plan.content)},
        "flavour": toolkit.name,
        "flavour_version": toolkit.version,
        "compute_capabilities": list(toolkit.capabilities),
        "gpu": toolkit.gpu,
        "precision": precision.precision,
        "precision_report": _precision_json(precision),
        "profiles": [{"batch": list(batch), "activation_bytes": plan.activation_bytes}],
        "activation_bytes": plan.activation_bytes,
        "plugins": _plugins(plugin_ops, identity),
        "options": identity["options"],
        "options_hash": options_hash,
        "build_seconds": round(seconds, 3),
        "anchorline": __version__,
        "warnings": list(plan.warnings),
        "layers": layers,
    }


def _precision_json(report: PrecisionReport) -> dict[str, Any]:
    return {
        "half_nodes": len(report.half),
        "kept_fp32": [str(layer) for layer in report.kept],
        "samples": report.samples,
        "largest": None if report.largest is None else list(report.largest),
    }


def _plugins(plugin_ops: Sequence[str], identity: dict[str, Any]) -> dict[str, Any]:
    """The plugins an engine needs, with the sha256 of their kernels' source."""
    return {
        name: {
            "namespace": PLUGIN_NAMESPACE,
            "version": PLUGIN_VERSION,
            "kernels_sha256": identity["kernels"][name],
        }
        for name in plugin_ops
    }


# ``build_engine``: an exported ONNX file to a TensorRT engine and its manifest.


@dataclass(frozen=True)
class BuildResult:
    """The engine at ``path`` and its manifest. ``built`` is false when an earlier build was the same.

    ``reason`` says why it was built or not; ``warnings`` are TensorRT's own and what this target computes
    otherwise than the ONNX file, ``notes`` are on precision.
    """

    path: Path
    manifest: EngineManifest
    built: bool
    reason: str
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line: what it is, for what, how large."""
        raw, manifest = self.manifest.raw, self.manifest
        capabilities = ", ".join(f"sm_{number}" for number in manifest.compute_capabilities)
        activation = raw.get("activation_bytes")
        memory = "" if activation is None else f", {activation / 1e6:.0f} MB of activation memory"
        return (
            f"{manifest.flavour} {manifest.flavour_version}, {manifest.precision}, batch "
            f"{':'.join(map(str, manifest.batch))}, {capabilities}, {raw['engine']['bytes'] / 1e6:.1f} MB"
            f"{memory}; {self.reason}"
        )


def build_engine(
    onnx_path: Path,
    out: Path,
    *,
    target: str = "tensorrt",
    precision: str = "fp16",
    batch: Batch | None = None,
    compute_capabilities: Sequence[int] = (),
    nms: str = "plugin",
    workspace: int | None = None,
    optimization_level: int | None = None,
    timing_cache: Path | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    samples: Sequence[Sample] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Build ``out`` (``.engine``) and ``out``'s manifest (``.engine.json``) from an exported ONNX file.

    ``target`` "tensorrt" builds for the GPU at hand, "tensorrt-rtx" without one for
    ``compute_capabilities`` (86 for 8.6; all from 80 on when empty). ``batch`` is (smallest, best, largest)
    within the exported batch; by default 1, 1 and the exported ``max_batch`` (1 where that is free).
    ``nms`` "plugin" needs our plugins wherever the engine runs, "fixed-point" runs in any loader.
    ``workspace`` is in MiB; ``timing_cache`` a folder; ``samples`` are network inputs on which half
    precision's range is checked. ``progress(done, total)`` is called from another thread.

    The same build is not done twice, unless ``force``. Both files are written whole or not at all.
    Raises ``ArtefactError``, ``SettingsError``, ``OutputError`` or ``AnchorlineError``; a Ctrl-C ends
    the build and leaves nothing behind.
    """
    options = BuildOptions(
        target=target,
        precision=precision,
        batch=batch,
        compute_capabilities=tuple(compute_capabilities),
        nms=nms,
        workspace=workspace,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    if out.suffix.lower() != ".engine":
        raise SettingsError(f"output is {str(out)!r}; expected a file name that ends in .engine")
    job = _prepare(onnx_path, options, samples)
    earlier = earlier_build(out, job.key)
    if earlier is not None and not force:
        return BuildResult(out, earlier, False, "not built again: the same model, options and versions")
    return _build_and_publish(job, out, timing_cache, progress)


@dataclass(frozen=True)
class _Job:
    """A build about to be done; ``key`` is the hash of ``identity``, all that decides what comes out."""

    path: Path
    model: onnx.ModelProto
    options: BuildOptions
    batch: Batch
    toolkit: Toolkit
    samples: Sequence[Sample]
    identity: dict[str, Any]
    key: str


@dataclass(frozen=True)
class _Made:
    """What a build gave, before it is written."""

    plan: Plan
    contract: Contract
    precision: PrecisionReport
    layers: list[dict[str, Any]]
    plugin_ops: list[str]


def _prepare(path: Path, options: BuildOptions, samples: Sequence[Sample]) -> _Job:
    """Read and check everything that a build needs."""
    model = read_model(path)
    batch = options.resolve_batch(check_exported(model, str(path)))
    toolkit = load_toolkit(options)
    identity = build_identity(sha256_of(path), options, batch, toolkit, _samples_hash(samples))
    return _Job(path, model, options, batch, toolkit, samples, identity, options_hash(identity))


def _build_and_publish(
    job: _Job, out: Path, timing_cache: Path | None, progress: Progress | None
) -> BuildResult:
    """Build, then write engine and manifest under temporary names and rename both."""
    with atomic_path(manifest_path(out)) as manifest_file, atomic_path(out) as engine_file:
        started = time.perf_counter()
        made = _build(job, timing_cache, progress)
        seconds = time.perf_counter() - started
        engine_file.write_bytes(made.plan.content)
        raw = manifest_json(
            contract=made.contract,
            onnx_path=job.path,
            identity=job.identity,
            options_hash=job.key,
            toolkit=job.toolkit,
            batch=job.batch,
            precision=made.precision,
            layers=made.layers,
            plugin_ops=made.plugin_ops,
            plan=made.plan,
            engine_sha256=hashlib.sha256(made.plan.content).hexdigest(),
            seconds=seconds,
        )
        write_json(manifest_file, raw)
    reason, notes = f"built in {seconds:.1f} s", tuple(made.precision.lines())
    return BuildResult(out, read_manifest(out), True, reason, made.plan.warnings, notes)


def _build(job: _Job, timing_cache: Path | None, progress: Progress | None) -> _Made:
    """Precision, lowering, TensorRT's parser and its builder, in this order."""
    mixed, report = to_precision(job.model, job.options.precision, job.samples)
    report_convergence = job.options.nms == "fixed-point"
    lowered = lower(mixed, job.options.target, job.options.nms, report_convergence=report_convergence)
    builder = job.toolkit.create_builder()
    network = parse(job.toolkit, builder, lowered, job.batch)
    layers = layer_report(network)
    plan = serialise(job.toolkit, builder, network, job.options, job.batch, timing_cache, progress)
    warnings = (*deviations(job.model, job.options.target), *plan.warnings)
    plan = dataclasses.replace(plan, warnings=warnings)
    plugin_ops = sorted({node.op_type for node in lowered.graph.node if node.domain == DOMAIN})
    return _Made(plan, check_exported(lowered), report, layers, plugin_ops)


def _samples_hash(samples: Sequence[Sample]) -> str | None:
    """The sha256 of the samples, which decide what stays float32; None without any."""
    digest = hashlib.sha256()
    for sample in samples:
        for name, values in sorted(sample.items()):
            digest.update(f"{name} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest() if samples else None
