"""``build_engine``: an exported ONNX file to a TensorRT engine and its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from anchorline.engine.flavours import Toolkit, load_toolkit
from anchorline.engine.half_range import Sample
from anchorline.engine.layers import layer_report
from anchorline.engine.lowering import deviations, lower
from anchorline.engine.manifest import build_identity, earlier_build, manifest_json
from anchorline.engine.model_file import DOMAIN, check_exported, read_model
from anchorline.engine.options import Batch, BuildOptions, options_hash
from anchorline.engine.parsing import parse
from anchorline.engine.precision import PrecisionReport, to_precision
from anchorline.engine.serialising import Plan, Progress, serialise
from anchorline.runtime.contract import Contract
from anchorline.runtime.engine_manifest import EngineManifest, manifest_path, read_manifest, sha256_of
from anchorline.runtime.errors import SettingsError
from anchorline.runtime.files import atomic_path, write_json


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
