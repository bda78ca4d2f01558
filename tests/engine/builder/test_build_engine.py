"""Engines built for TensorRT for RTX, which needs no GPU for it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from anchorline.data.synthetic import scenes
from anchorline.doctor.artefact import read_artefact
from anchorline.engine import build as building
from anchorline.engine.build import BuildResult, build_engine
from anchorline.engine.options import BuildOptions
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, GpuError, ParityError
from anchorline.runtime.io.files import sha256_of
from anchorline.runtime.tensorrt.kernels import source_hash
from anchorline.runtime.tensorrt.manifest import manifest_path, read_manifest
from anchorline.runtime.tensorrt.plugins import register_plugins
from anchorline.verify.verification import record_path, verify_subjects

RTX = "tensorrt-rtx"
CAPABILITIES = (86, 89, 120)
ModelFile = Callable[[str], Path]


def plugin_layers(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the layers that are plugins."""
    return [row for row in layers if row["type"] == "PLUGIN_V3"]


def build(model: Path, out: Path, **options: Any) -> BuildResult:
    how = {key: options.pop(key) for key in ("samples", "force", "progress") if key in options}
    asked = BuildOptions(**{"target": RTX, "compute_capabilities": (86,), **options})
    return build_engine(model, out, asked, **how)


def test_fp16_for_three_gpus_and_a_free_batch_has_two_plugin_layers(built: BuildResult) -> None:
    raw = built.manifest.raw
    plugins = plugin_layers(raw["layers"])
    assert len(plugins) == 2
    assert all(layer["precision"] == "fp32" for layer in plugins)
    assert raw["compute_capabilities"] == [86, 89, 120]
    assert built.manifest.batch == (1, 1, 8)
    convolutions = [layer for layer in raw["layers"] if layer["type"] == "CONVOLUTION"]
    assert len(convolutions) > 50
    # A few stay float32: biases of random weights lie among half precision's subnormals.
    kept = raw["precision_report"]["kept_fp32"]
    assert sum(layer["precision"] == "fp16" for layer in convolutions) >= len(convolutions) - len(kept)
    assert len(kept) < len(convolutions) / 2
    assert convolutions[0]["shape"][0] == -1


@pytest.mark.parametrize("task", ["proposals", pytest.param("detections", marks=pytest.mark.slow)])
def test_the_fixed_point_body_needs_no_plugin_though_one_is_registered(
    task: str, rtx: Any, built: BuildResult, model_file: ModelFile, tmp_path: Path
) -> None:
    """In the same process: a registered plugin must not take the node."""
    register_plugins(rtx)
    result = build(model_file(task), tmp_path / "m.engine", batch=(1, 1, 8), nms="fixed-point")
    assert plugin_layers(result.manifest.raw["layers"]) == []
    assert result.manifest.raw["plugins"] == {}
    # Its output that tells whether the rounds sufficed; the plugin needs none.
    assert b"nms_converged" in result.path.read_bytes()
    assert b"nms_converged" not in built.path.read_bytes()


@pytest.mark.slow
def test_roi_align_as_gather_builds_into_no_more_memory(
    rtx: Any, built: BuildResult, model_file: ModelFile, tmp_path: Path
) -> None:
    """Its sums are one kernel, as those of GridSample are."""
    options = {"batch": (1, 1, 8), "compute_capabilities": CAPABILITIES}
    result = build(model_file("detections"), tmp_path / "m.engine", roi_align="gather", **options)
    types = {layer["type"] for layer in result.manifest.raw["layers"]}
    assert "GATHER" in types
    assert "GRID_SAMPLE" not in types
    assert "GRID_SAMPLE" in {layer["type"] for layer in built.manifest.raw["layers"]}
    assert result.manifest.raw["activation_bytes"] <= built.manifest.raw["activation_bytes"] + 1e6
    assert result.manifest.raw["options"]["roi_align"] == "gather"


@pytest.mark.parametrize(("task", "batch"), [("proposals", (2, 2, 2))])
def test_float32_and_a_fixed_batch(
    rtx: Any, model_file: ModelFile, tmp_path: Path, task: str, batch: tuple[int, int, int]
) -> None:
    result = build(model_file(task), tmp_path / "m.engine", precision="fp32", batch=batch)
    raw = result.manifest.raw
    assert {layer["precision"] for layer in raw["layers"]} <= {"fp32", "int64", "int32", "bool", "uint8"}
    assert len(plugin_layers(raw["layers"])) == 1
    assert all(-1 not in (layer["shape"] or ()) for layer in raw["layers"])
    assert result.manifest.contract.task == task
    assert result.manifest.contract.max_batch == 2


def test_the_manifest_says_what_the_engine_is(built: BuildResult, model_file: ModelFile, rtx: Any) -> None:
    raw = json.loads(manifest_path(built.path).read_text(encoding="utf-8"))
    source = model_file("detections")
    assert raw["onnx"] == {"name": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    content = built.path.read_bytes()
    assert raw["engine"] == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert (raw["flavour"], raw["flavour_version"]) == (RTX, rtx.__version__)
    assert raw["precision"] == raw["contract"]["precision"] == "fp16"
    assert raw["precision_report"]["half_nodes"] > 50
    assert raw["contract"]["names"] == ["cat", "dog", "bird"]
    assert raw["activation_bytes"] > 1e6
    assert raw["profiles"] == [
        {"batch": [1, 1, 8], "canvas": [[128, 160]] * 3, "activation_bytes": raw["activation_bytes"]}
    ]
    assert raw["plugins"] == {
        "BatchedNMS": {"namespace": "anchorline", "version": "1", "kernels_sha256": source_hash("nms")}
    }
    assert raw["options"]["nms"] == "plugin"


def test_the_engine_is_a_plain_plan(built: BuildResult) -> None:
    """Nothing is prepended, so that other loaders take it: TensorRT for RTX begins its plans like this."""
    assert built.path.read_bytes()[:4] == b"vtrt"


def test_doctor_reads_the_manifest(built: BuildResult) -> None:
    artefact = read_artefact(built.path)
    assert artefact.engine is not None
    assert artefact.engine.compute_capabilities == CAPABILITIES


def test_a_build_is_not_done_twice(built: BuildResult, model_file: ModelFile) -> None:
    before = built.path.stat().st_mtime_ns
    options = {"batch": (1, 1, 8), "compute_capabilities": CAPABILITIES}
    again = build(model_file("detections"), built.path, **options)
    assert not again.built
    assert "the same model, options and versions" in again.describe()
    assert built.path.stat().st_mtime_ns == before
    assert again.manifest.raw == built.manifest.raw


@pytest.fixture(scope="module")
def small(rtx: Any, model_file: ModelFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with m.onnx and the engine of it that takes least time."""
    folder = tmp_path_factory.mktemp("small")
    source = folder / "m.onnx"
    source.write_bytes(model_file("proposals").read_bytes())
    build(source, folder / "m.engine", precision="fp32")
    return folder


@pytest.mark.parametrize("change", ["options", "model", "engine", "manifest", "force"])
def test_what_makes_a_build_be_done_again(change: str, small: Path, tmp_path: Path) -> None:
    for name in ("m.onnx", "m.engine", "m.engine.json"):
        shutil.copyfile(small / name, tmp_path / name)
    source, out, options = tmp_path / "m.onnx", tmp_path / "m.engine", {"precision": "fp32"}
    if change == "options":
        options["optimization_level"] = 0
    elif change == "model":
        model = onnx.load(source)
        model.doc_string = "changed"
        onnx.save(model, source)
    elif change == "engine":
        out.write_bytes(out.read_bytes()[:-1])
    elif change == "manifest":
        manifest_path(out).write_text("{", encoding="utf-8")
    else:
        options["force"] = True
    assert build(source, out, **options).built
    assert sha256_of(out) == read_manifest(out).engine_sha256


def test_an_engine_that_cannot_run_here_is_published_with_a_record_that_says_so(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, provider: str, **options: Any) -> None:
        raise GpuError(f"{path}: cannot run here: there is no NVIDIA GPU")

    monkeypatch.setattr(building, "Detector", refused)
    out = tmp_path / "m.engine"
    result = build(small / "m.onnx", out, precision="fp32")
    assert result.verification == "not verified: cannot run here: there is no NVIDIA GPU"
    record = json.loads(record_path(out).read_text(encoding="utf-8"))
    assert (record["passed"], record["not_executed"]) == (None, "cannot run here: there is no NVIDIA GPU")
    assert record["artefact"] == {"name": "m.engine", "sha256": sha256_of(out)}
    assert record["reference"] == {"name": "m.onnx", "sha256": sha256_of(small / "m.onnx")}


def test_an_engine_that_differs_leaves_the_earlier_one(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for TensorRT: an ONNX file under the engine's name, with a fault or without."""
    model = onnx.load(small / "m.onnx")
    (weight,) = [t for t in model.graph.initializer if t.name.endswith("cls_logits.weight")]
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(model, tmp_path / "faulty.onnx")
    out = tmp_path / "made" / "m.engine"
    out.parent.mkdir()
    for name in ("m.engine", "m.engine.json", "m.engine.verify.json"):
        shutil.copyfile(small / name, out.with_name(name))
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    monkeypatch.setattr(building, "scenes", partial(scenes, count=1))
    monkeypatch.setattr(building, "verify_subjects", partial(verify_subjects, which_traps=("noise",)))

    monkeypatch.setattr(building, "Detector", lambda *_, **__: Detector(tmp_path / "faulty.onnx", "cpu"))
    with pytest.raises(
        ParityError, match=r"the engine and m\.onnx disagree in .*was not published"
    ) as caught:
        build(small / "m.onnx", out, precision="fp32", force=True)
    assert str(caught.value).startswith(f"{out}: ")
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before

    monkeypatch.setattr(building, "Detector", lambda *_, **__: Detector(small / "m.onnx", "cpu"))
    assert "1 traps hold" in build(small / "m.onnx", out, precision="fp32", force=True).describe()
    record = json.loads(record_path(out).read_text(encoding="utf-8"))
    assert record["passed"] is True
    assert record["artefact"]["sha256"] == sha256_of(out) == read_manifest(out).engine_sha256


def test_progress_rises_to_the_end(rtx: Any, model_file: ModelFile, tmp_path: Path) -> None:
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        assert total == 1000
        seen.append(done)

    build(model_file("proposals"), tmp_path / "m.engine", progress=progress)
    assert seen == sorted(seen)
    assert len(set(seen)) > 20
    assert seen[-1] >= 800


CANCEL = """
import os, signal
from pathlib import Path
from anchorline.engine.build import build_engine
from anchorline.engine.options import BuildOptions
def interrupted_at(call):
    calls = 0
    def progress(done, total):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGINT)
    try:
        options = BuildOptions(target="tensorrt-rtx", compute_capabilities=(86,))
        build_engine(Path({model!r}), Path({out!r}), options, progress=progress)
    except KeyboardInterrupt:
        print("interrupted at call", calls, os.listdir(Path({out!r}).parent))
interrupted_at(3)
interrupted_at(700)
"""


def test_ctrl_c_ends_the_build_and_leaves_nothing(rtx: Any, model_file: ModelFile, tmp_path: Path) -> None:
    """At its beginning and later on. In a process of its own, since cancelling has made TensorRT for RTX
    abort before."""
    out = tmp_path / "made" / "m.engine"
    code = CANCEL.format(model=str(model_file("detections")), out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.rpartition(" ")[2] for line in done.stdout.splitlines()] == ["[]", "[]"], done.stdout
    assert os.listdir(out.parent) == []


def test_an_error_of_the_progress_bar_ends_the_build(rtx: Any, model_file: ModelFile, tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(model_file("proposals"), tmp_path / "m.engine", progress=progress)
    assert os.listdir(tmp_path) == []


def test_the_exported_file_is_not_touched(built: BuildResult, model_file: ModelFile) -> None:
    assert built.manifest.raw["onnx"]["sha256"] == sha256_of(model_file("detections"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[1]", r"the manifest is \[1\]"),
        ("{}", "damaged manifest"),
        ('{"contract": {}, "profiles": [{"batch": [1]}]}', "contract version is missing"),
    ],
)
def test_damaged_manifests_are_named(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "m.engine.json").write_text(content, encoding="utf-8")
    with pytest.raises(ArtefactError, match=rf"m\.engine\.json: .*{message}"):
        read_manifest(tmp_path / "m.engine")


def test_an_engine_that_is_not_the_manifest_s_is_refused(built: BuildResult, tmp_path: Path) -> None:
    engine = tmp_path / "m.engine"
    engine.write_bytes(b"another")
    manifest_path(engine).write_bytes(manifest_path(built.path).read_bytes())
    with pytest.raises(ArtefactError, match="another sha256"):
        read_manifest(engine)
    assert read_manifest(engine, check_engine=False).precision == "fp16"
