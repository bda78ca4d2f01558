"""Writing the manifest of an engine, and knowing a build that has been done before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from anchorline import __version__
from anchorline.engine.flavours import Toolkit
from anchorline.engine.options import Batch, BuildOptions
from anchorline.engine.precision import PrecisionReport
from anchorline.engine.serialising import Plan
from anchorline.runtime.contract import Contract
from anchorline.runtime.engine_manifest import EngineManifest, manifest_path, read_manifest
from anchorline.runtime.errors import ArtefactError
from anchorline.runtime.plugins import PLUGIN_NAMESPACE, PLUGIN_VERSION, PLUGINS
from anchorline.runtime.plugins.images import source_hash


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
