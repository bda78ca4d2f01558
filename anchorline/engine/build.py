"""``build_engine``: an exported ONNX file to a TensorRT engine and its manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from anchorline import __version__
from anchorline.data.synthetic import scenes
from anchorline.engine.fp16_range import Sample
from anchorline.engine.graph import check_exported, read_model
from anchorline.engine.lowering import deviations, fix_canvas, lower
from anchorline.engine.mixed_precision import to_precision
from anchorline.engine.options import Batch, BuildOptions
from anchorline.engine.toolkit import Progress, Toolkit, layer_report, load_toolkit, parse, serialise
from anchorline.runtime.canvas import CanvasRange, lies_within
from anchorline.runtime.contract import DOMAIN
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, GpuError, SettingsError
from anchorline.runtime.io.files import atomic_path, plain, sha256_of, write_json
from anchorline.runtime.tensorrt.kernels import source_hash
from anchorline.runtime.tensorrt.manifest import (
    DIGEST,
    EngineManifest,
    manifest_digest,
    manifest_path,
    read_manifest,
)
from anchorline.runtime.tensorrt.plugins import PLUGIN_NAMESPACE, PLUGIN_VERSION, PLUGINS
from anchorline.verify.stages import Subject, onnx_subject
from anchorline.verify.verification import settle, verify_subjects, write_not_executed


@dataclass(frozen=True)
class BuildResult:
    """The engine at ``path`` and its manifest. ``built`` is false when an earlier build was the same.

    ``reason`` says why it was built or not; ``warnings`` are TensorRT's own and what this target computes
    otherwise than the ONNX file, ``notes`` are on precision. ``verification`` is how it compared with the
    ONNX file, or why it was not compared; empty when that was not asked for, or nothing was built.
    """

    path: Path
    manifest: EngineManifest
    built: bool
    reason: str
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    verification: str = ""

    def describe(self) -> str:
        """One line: what it is, for what, how large."""
        raw, manifest = self.manifest.raw, self.manifest
        capabilities = ", ".join(f"sm_{number}" for number in manifest.compute_capabilities)
        activation = raw.get("activation_bytes")
        memory = "" if activation is None else f", {activation / 1e6:.0f} MB of activation memory"
        return (
            f"{manifest.flavour} {manifest.flavour_version}, {manifest.precision}, {manifest.frame_sizes}, "
            f"batch {':'.join(map(str, manifest.batch))}, {capabilities}, "
            f"{raw['engine']['bytes'] / 1e6:.1f} MB{memory}; {self.reason}"
            f"{self.verification and '; '}{self.verification}"
        )


def build_engine(
    onnx_path: str | Path,
    out: str | Path,
    options: BuildOptions | None = None,
    *,
    samples: Sequence[Sample] = (),
    timing_cache: Path | None = None,
    force: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    warn: Callable[[Sequence[str]], None] = lambda lines: None,
) -> BuildResult:
    """Build ``out`` (``.engine``) and its manifest (``.engine.json``) from an exported ONNX file.

    ``samples`` are network inputs on which half precision's range is checked (``fp16_range.sample_inputs``);
    ``timing_cache`` is a folder; ``progress(done, total)`` is called from another thread. The same build
    is not done twice, unless ``force``. With ``verify`` the engine must give what the ONNX file gives before
    it is published, or ``ParityError`` is raised; where this machine cannot run it, that is recorded, and no
    failure. ``warn`` is told the result's ``warnings`` before. Engine, manifest and record are written whole
    or not at all. Raises ``ArtefactError``, ``SettingsError``, ``OutputError`` or ``AnchorlineError``; a
    Ctrl-C ends the build and leaves nothing behind.
    """
    onnx_path, out, options = Path(onnx_path), Path(out), options or BuildOptions()
    if out.suffix.lower() != ".engine":
        raise SettingsError(f"output is {str(out)!r}; expected a file name that ends in .engine")
    model = read_model(onnx_path)
    contract = check_exported(model, str(onnx_path))
    batch, canvases = options.resolve_batch(contract), options.resolve_canvases(contract)
    toolkit = load_toolkit(options)
    identity = build_identity(sha256_of(onnx_path), options, batch, canvases, toolkit, samples)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    with contextlib.suppress(ArtefactError):  # no earlier engine, or none that is whole
        earlier = read_manifest(out)
        if earlier.options_hash == key and not force:
            return BuildResult(out, earlier, False, "not built again: the same model, options and versions")

    verification = ""
    with atomic_path(out) as draft:
        plan, facts, notes = _compile(
            model, options, batch, canvases, toolkit, samples, timing_cache, progress
        )
        warn(facts["warnings"])
        draft.write_bytes(plan)
        manifest = {
            "onnx": {"name": onnx_path.name, "sha256": identity["onnx_sha256"]},
            **facts,
            # What a loader must have, with the sha256 of the kernels' source.
            "plugins": {
                name: {
                    "namespace": PLUGIN_NAMESPACE,
                    "version": PLUGIN_VERSION,
                    "kernels_sha256": identity["kernels"][name],
                }
                for name in facts["plugins"]
            },
            "options": identity["options"],
            "options_hash": key,
            "anchorline": __version__,
        }
        manifest = plain(manifest)
        write_json(manifest_path(draft), {**manifest, DIGEST: manifest_digest(manifest)})
        if verify:
            verification = _verify(onnx_path, draft, canvases if contract.canvas is None else ())
        else:
            write_not_executed(draft, "built with --no-verify", onnx_path)
    reason = f"built in {facts['build_seconds']:.1f} s"
    return BuildResult(out, read_manifest(out), True, reason, tuple(facts["warnings"]), notes, verification)


def _compile(
    model: onnx.ModelProto,
    options: BuildOptions,
    batch: Batch,
    canvases: Sequence[CanvasRange],
    toolkit: Toolkit,
    samples: Sequence[Sample],
    timing_cache: Path | None,
    progress: Progress | None,
) -> tuple[bytes, dict[str, Any], tuple[str, ...]]:
    """The plan, what the manifest says of it, and lines on its precision; the builder ends here."""
    started = time.perf_counter()
    mixed, precision = to_precision(model, options.precision, samples)
    free = check_exported(mixed).canvas is None
    if free and len(canvases) == 1 and canvases[0][0] == canvases[0][2]:
        fix_canvas(mixed, canvases[0][1])
        free = False
    lowered = lower(mixed, options.target, options.nms, options.roi_align)
    plugins = sorted({node.op_type for node in lowered.graph.node if node.domain == DOMAIN})
    if plugins and options.version_compatible:
        raise SettingsError(
            f"version compatible is set, and {', '.join(plugins)} of this model is a plugin in Python, which "
            "such an engine cannot take along; "
            + ("build with --nms fixed-point" if plugins == ["BatchedNMS"] else "leave it out")
        )
    builder = toolkit.create_builder()
    network, libraries = parse(toolkit, builder, lowered, batch)
    layers = layer_report(network)
    bounds = canvases if free else ()
    plan = serialise(toolkit, builder, network, options, batch, timing_cache, progress, libraries, bounds)
    contract = dataclasses.replace(check_exported(lowered), max_batch=batch[2])
    facts = {
        "contract": json.loads(contract.to_json()),
        "engine": {"sha256": hashlib.sha256(plan.content).hexdigest(), "bytes": len(plan.content)},
        "flavour": toolkit.name,
        "flavour_version": toolkit.version,
        "compute_capabilities": list(toolkit.capabilities),
        "gpu": toolkit.gpu,
        "precision": precision.precision,
        "precision_report": {
            "half_nodes": len(precision.half),
            "kept_fp32": [str(layer) for layer in precision.kept],
            "samples": precision.samples,
            "largest": None if precision.largest is None else list(precision.largest),
        },
        "profiles": [
            {"batch": list(batch), "canvas": [*map(list, sides)], "activation_bytes": memory}
            for sides, memory in zip(canvases, plan.activation_bytes, strict=True)
        ],
        "activation_bytes": max(filter(None, plan.activation_bytes), default=None),
        "plugins": plugins,
        "build_seconds": round(time.perf_counter() - started, 3),
        "warnings": [*deviations(model, options.target), *plan.warnings],
        "layers": layers,
    }
    return plan.content, facts, tuple(precision.lines())


def _verify(model: Path, engine: Path, canvases: Sequence[CanvasRange]) -> str:
    """Compare a new ``engine`` with the ONNX ``model`` it was built from, and record it; says how it went.

    The engine runs itself or not at all, never the ONNX file in its place. Of a model for any frame size both
    are held to the best canvas of each profile and, where it is within, to the same one upright. Raises
    ``ParityError``.
    """
    tried = [canvas for each in canvases for canvas in (each[1], each[1][::-1]) if lies_within(canvas, each)]
    told: list[str] = []
    for canvas in dict.fromkeys(tried) or [None]:
        held = None if len(canvases) == 1 and canvases[0][0] == canvases[0][2] else canvas
        try:
            candidate = Subject(engine, Detector(engine, "tensorrt", canvas=held))
        except GpuError as error:
            reason = str(error).removeprefix(f"{engine}: ")
            write_not_executed(engine, reason, model)
            return f"not verified: {reason}"
        with candidate, onnx_subject(model, canvas=canvas) as reference:
            report = verify_subjects(reference, candidate, scenes(reference.detector.contract.names))
        on = "" if held is None else " on a canvas of {}x{}".format(*held)
        report = dataclasses.replace(report, notes=(*report.notes, *told))
        settle(engine, report, f"the engine and {model.name}{on}")
        told.append(f"compared before{on}: {report.describe()}")
    return report.describe()


def build_identity(
    onnx_sha256: str,
    options: BuildOptions,
    batch: Batch,
    canvases: Sequence[CanvasRange],
    toolkit: Toolkit,
    samples: Sequence[Sample],
) -> dict[str, Any]:
    """Everything that decides what a build gives; its hash is the manifest's ``options_hash``."""
    digest = hashlib.sha256()
    for sample in samples:
        for name, values in sorted(sample.items()):
            digest.update(f"{name} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    asked = dataclasses.asdict(options)
    return {
        "onnx_sha256": onnx_sha256,
        "options": {**asked, "batch": batch, "compute_capabilities": toolkit.capabilities},
        "canvases": canvases,
        "flavour_version": toolkit.version,
        "gpu": toolkit.gpu,
        "anchorline": __version__,
        "onnx_package": onnx.__version__,
        "kernels": {op.name: source_hash(op.source) for op in PLUGINS},
        "samples_sha256": digest.hexdigest() if samples else None,
    }
