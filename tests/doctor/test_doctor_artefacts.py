"""What the doctor reads from artefacts, and what it says of those that cannot run here."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from safetensors.numpy import save_file

from anchorline.doctor import runtimes
from anchorline.doctor.artefact import Artefact, read_artefact, read_verification
from anchorline.doctor.diagnosis import doctor
from anchorline.doctor.machine import GpuState, Imported, Machine, find_gpus
from anchorline.doctor.runtimes import Runtime, runtime_findings, runtimes_for
from anchorline.runtime.backends import choice as choosing
from anchorline.runtime.backends.cpu_options import CpuOptions
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, GpuError
from anchorline.runtime.io.files import sha256_of, write_json
from anchorline.runtime.model_file import read_onnx, with_digest
from anchorline.verify.verification import write_not_executed

Make = Callable[..., Machine]
SIDE = 64
NAMES = tuple(f"class {number}" for number in range(20))
CONTRACT = Contract(
    "detections",
    NAMES,
    (SIDE, SIDE),
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    max_batch=8,
    source={"command": "anchorline train --data x", "data": "voc:x@train", "settings": {"lr": 1}},
)
MANIFEST = {
    "contract": json.loads(CONTRACT.to_json()),
    "onnx": {"name": "model.onnx", "sha256": "0" * 64},
    "flavour": "tensorrt",
    "flavour_version": "10.16.1.11",
    "compute_capabilities": [86],
    "precision": "fp16",
    "profiles": [{"batch": [1, 4, 8]}],
    "engine": {"sha256": hashlib.sha256(b"plan").hexdigest()},
    "options_hash": "1" * 64,
}
DAMAGED = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write_onnx(path: Path, contract: Contract | None = CONTRACT) -> Path:
    """A graph that loads, with outputs that are constant."""
    outputs = {
        "boxes": np.zeros((1, 1, 4), np.float32),
        "scores": np.zeros((1, 1), np.float32),
        "labels": np.zeros((1, 1), np.int32),
        "num_detections": np.zeros(1, np.int32),
    }
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        for name, value in outputs.items()
    ]
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", SIDE, SIDE, 3]),
        helper.make_tensor_value_info("image_sizes", TensorProto.FLOAT, ["B", 2]),
    ]
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in outputs.items()
    ]
    imports = [helper.make_opsetid("anchorline", 1), helper.make_opsetid("", 18)]
    graph = helper.make_graph(nodes, "constant", inputs, values)
    model = helper.make_model(graph, opset_imports=imports, ir_version=10, producer_name="anchorline")
    if contract is not None:
        helper.set_model_props(model, {"other": "ü" * 300, CONTRACT_KEY: contract.to_json()})
    onnx.save(model, path)
    return path


def write_checkpoint(path: Path, metadata: dict[str, str] | None = None) -> Path:
    if metadata is None:
        metadata = {CONTRACT_KEY: CONTRACT.to_json()}
    save_file({"weight": np.arange(100, dtype=np.float32)}, path, metadata=metadata)
    return path


def write_engine(path: Path, **changes: Any) -> Path:
    """An engine file with its manifest; a change to ``...`` takes a key away."""
    manifest = {key: value for key, value in {**MANIFEST, **changes}.items() if value is not ...}
    path.write_bytes(b"plan")
    path.with_name(f"{path.name}.json").write_text(json.dumps(manifest), encoding="utf-8")
    return path


def complaint(path: Path) -> str:
    """The error that reading gives, or nothing."""
    try:
        read_artefact(path)
    except ArtefactError as error:
        return str(error)
    return ""


@pytest.fixture
def artefacts(tmp_path: Path) -> dict[str, Artefact]:
    (tmp_path / "engine").mkdir()  # of its own, since an ONNX file beside it is taken for its source
    files = (
        write_checkpoint(tmp_path / "model.safetensors"),
        write_onnx(tmp_path / "model.onnx"),
        write_engine(tmp_path / "engine" / "model.engine"),
    )
    return {each.kind: each for each in map(read_artefact, files)}


@pytest.mark.parametrize("kind", ["checkpoint", "onnx", "engine"])
def test_every_artefact_tells_what_it_is_and_what_made_it(kind: str, artefacts: dict[str, Artefact]) -> None:
    artefact = artefacts[kind]
    assert artefact.contract == CONTRACT
    rows = artefact.rows()
    assert rows["command"] == "anchorline train --data x"
    assert rows["data"] == "voc:x@train"
    assert "settings" not in rows
    assert rows["task"] == "detections"
    assert rows["classes"].endswith("class 10, class 11, ... (20 in all)")
    assert rows["takes"] == "canvas 64x64"
    assert rows["input"].startswith("uint8")
    assert rows["largest batch"] == "8"
    assert rows["precision"] == ("fp16" if kind == "engine" else "fp32")
    assert json.loads(json.dumps(artefact.to_json()))["contract"]["names"] == list(NAMES)


def test_the_kinds_are_named(artefacts: dict[str, Artefact]) -> None:
    assert artefacts["onnx"].details["kind"] == "ONNX graph, opset 18, written by anchorline"
    assert artefacts["onnx"].details["digest"].startswith("none: nothing tells whether")
    assert artefacts["engine"].details == {
        "kind": "engine of TensorRT 10.16.1.11",
        "compute capability": "sm_86",
        "built from": "model.onnx",
    }
    assert "safetensors" in artefacts["checkpoint"].details["kind"]


def test_the_onnx_header_is_what_onnx_reads(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "model.onnx")
    found, model = read_onnx(path), onnx.load(path)
    assert found.metadata == {each.key: each.value for each in model.metadata_props}
    assert found.kind == f"ONNX graph, opset 18, written by {model.producer_name}"


def test_an_artefact_without_origin_says_so(tmp_path: Path) -> None:
    plain = dataclasses.replace(CONTRACT, source={}, max_batch=None)
    rows = read_artefact(write_onnx(tmp_path / "model.onnx", plain)).rows()
    assert (rows["made by"], rows["largest batch"]) == ("not stated", "any")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing.onnx", "no such file"),
        ("missing.engine", "no such file"),
        ("missing.safetensors", "no such file"),
        ("model.pt", "expected a file that ends in .safetensors, .onnx or .engine"),
        (".", "is a folder"),
    ],
)
def test_a_wrong_path_is_one_line(name: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=expected):
        read_artefact(tmp_path / name)


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 40, b"<html>not found</html>", b"{}" * 20])
def test_a_file_of_something_else_is_told(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"not an ONNX file|not a readable safetensors file|is empty"):
        read_artefact(path)


@pytest.mark.parametrize("write", [write_onnx, write_checkpoint])
def test_every_file_cut_short_is_told(write: Callable[[Path], Path], tmp_path: Path) -> None:
    whole = write(tmp_path / ("model.onnx" if write is write_onnx else "model.safetensors"))
    content = whole.read_bytes()
    for length in range(0, len(content), 7):
        whole.write_bytes(content[:length])
        with pytest.raises(ArtefactError) as caught:
            read_artefact(whole)
        assert "\n" not in str(caught.value)


@DAMAGED
@given(data=st.data())
def test_flipped_bytes_never_break_the_readers(data: st.DataObject, tmp_path: Path) -> None:
    for write, name in ((write_onnx, "model.onnx"), (write_checkpoint, "model.safetensors")):
        path = write(tmp_path / name)
        content = bytearray(path.read_bytes())
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        assert "\n" not in complaint(path)


def test_foreign_files_are_told_from_damaged_ones(tmp_path: Path) -> None:
    for path in (
        write_onnx(tmp_path / "model.onnx", None),
        write_checkpoint(tmp_path / "model.safetensors", {"format": "pt"}),
    ):
        with pytest.raises(ArtefactError, match="has no anchorline contract"):
            read_artefact(path)


def test_an_engine_without_manifest_is_told(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "model.engine")
    path.with_name("model.engine.json").unlink()
    with pytest.raises(
        ArtefactError, match=r"model\.engine\.json: no such file; an engine needs its manifest"
    ):
        read_artefact(path)


def test_an_engine_that_is_not_the_manifest_s_is_told(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "model.engine")
    path.write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"is not the engine that model\.engine\.json describes"):
        read_artefact(path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"contract": ...}, "contract is missing"),
        (
            {"contract": None},
            "damaged contract: contract is None; expected a JSON object; export the model again",
        ),
        ({"contract": {"version": True}}, "damaged contract: .*; export the model again"),
        ({"options": [1]}, r"options is \[1\]; expected a JSON object; build the engine again"),
        ({"contract": {"version": 99}}, "newer than"),
        ({"flavour": "openvino"}, "flavour is 'openvino'"),
        ({"flavour_version": ...}, "flavour_version is missing"),
        ({"precision": ...}, "precision is missing"),
        ({"compute_capabilities": "sm_86"}, "damaged manifest"),
    ],
)
def test_a_damaged_manifest_names_the_key(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=expected) as caught:
        read_artefact(write_engine(tmp_path / "model.engine", **changes))
    assert "model.engine.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_told(text: str, tmp_path: Path) -> None:
    path = write_engine(tmp_path / "model.engine")
    path.with_name("model.engine.json").write_text(text)
    with pytest.raises(
        ArtefactError, match=r"model\.engine\.json: (the manifest is not JSON|the manifest is )"
    ):
        read_artefact(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@DAMAGED
@given(key=st.sampled_from(sorted(MANIFEST)), value=JSON)
def test_any_value_in_the_manifest_is_read_or_told(key: str, value: Any, tmp_path: Path) -> None:
    message = complaint(write_engine(tmp_path / "model.engine", **{key: value}))
    assert not message or "model.engine.json" in message


@pytest.mark.parametrize("onnx", [..., "model.onnx", {"name": "model.onnx"}, {"name": 3, "sha256": "0"}])
def test_an_engine_whose_source_is_not_stated(onnx: Any, tmp_path: Path, make_machine: Make) -> None:
    artefact = read_artefact(write_engine(tmp_path / "model.engine", onnx=onnx))
    assert artefact.details["built from"] == "not stated"
    (found,) = runtimes_for(artefact, make_machine({"tensorrt": "11.4.0"}))
    assert found.reason.endswith("build it again here from its ONNX file")
    assert len(runtime_findings(artefact, [found])) == 1


# Which runtimes run it.


def test_pytorch_runs_a_checkpoint_where_it_is_installed(
    artefacts: dict[str, Artefact], make_machine: Make
) -> None:
    packages = {"torch": "2.15.0", "torchvision": "0.29.2", "safetensors": "0.8.0"}
    (with_torch,) = runtimes_for(artefacts["checkpoint"], make_machine(packages))
    assert with_torch.runs
    assert with_torch.reason.startswith("torch 2.15.0, torchvision 0.29.2, safetensors 0.8.0")
    packages.pop("torchvision")
    (without,) = runtimes_for(artefacts["checkpoint"], make_machine(packages))
    assert not without.runs
    assert without.reason == "torchvision not installed: pip install 'anchorline[train]'"
    (finding,) = runtime_findings(artefacts["checkpoint"], [without])
    assert finding.level == "problem"
    assert "model.safetensors cannot run here" in finding.text


def test_onnxruntime_loads_the_file_itself(artefacts: dict[str, Artefact], make_machine: Make) -> None:
    (cpu,) = runtimes_for(artefacts["onnx"], make_machine())
    assert cpu == Runtime("onnxruntime, cpu", True, "onnxruntime 1.32.0 loads it")
    assert runtime_findings(artefacts["onnx"], [cpu]) == []


def test_a_file_that_onnxruntime_refuses_does_not_run(tmp_path: Path, make_machine: Make) -> None:
    model = onnx.load(write_onnx(tmp_path / "model.onnx"))
    model.graph.node[0].op_type = "NoSuchOp"
    onnx.save(model, tmp_path / "model.onnx")
    (cpu,) = runtimes_for(read_artefact(tmp_path / "model.onnx"), make_machine())
    assert not cpu.runs
    assert "NoSuchOp" in cpu.reason


def test_a_contract_at_odds_with_its_graph_is_told(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "model.onnx", dataclasses.replace(CONTRACT, canvas=(32, 32)))
    assert "its contract expects uint8 [B, 32, 32, 3]" in complaint(path)


def test_a_damaged_file_is_told_by_its_digest(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "model.onnx")
    path.write_bytes(with_digest(path.read_bytes()))
    assert read_artefact(path).details["digest"] == "as it was written"
    path.write_bytes(path.read_bytes().replace(b"constant", b"Constant"))  # the graph's name
    assert "model.onnx: is not as anchorline wrote it (another SHA-256" in complaint(path)


def test_what_is_shown_of_a_source_is_escaped_and_bounded(tmp_path: Path) -> None:
    source = {f"key {number}": "\x1b[2J\n" + "x" * 5000 for number in range(99)}
    path = write_onnx(tmp_path / "model.onnx", dataclasses.replace(CONTRACT, source=source))
    rows = read_artefact(path).rows()
    assert rows["key 0"].startswith(r"\x1b[2J\nxxx")
    assert len(rows) < 25
    assert max(map(len, rows.values())) < 400


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"onnxruntime": Imported()}, "onnxruntime is not installed: pip install 'anchorline[cpu]'"),
        (
            {"onnxruntime": Imported(error="bad ELF")},
            "onnxruntime is broken: it cannot be imported (bad ELF)",
        ),
        ({"providers": ()}, "onnxruntime has no CPUExecutionProvider: pip install onnxruntime"),
    ],
)
def test_why_onnxruntime_cannot_run_a_file(
    facts: dict[str, Any], expected: str, artefacts: dict[str, Artefact], make_machine: Make
) -> None:
    (cpu,) = runtimes_for(artefacts["onnx"], make_machine(**facts))
    assert (cpu.runs, cpu.reason) == (False, expected)


def test_the_providers_of_onnxruntime(
    artefacts: dict[str, Artefact], make_machine: Make, gpu_state: Callable[..., GpuState]
) -> None:
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    machine = make_machine(providers=providers)
    reasons = {each.name: (each.runs, each.reason) for each in runtimes_for(artefacts["onnx"], machine)}
    assert reasons["onnxruntime, cuda"] == (False, "there is no NVIDIA GPU here")
    with_gpu = make_machine(providers=providers, gpu=gpu_state())
    assert {each.name for each in runtimes_for(artefacts["onnx"], with_gpu) if each.runs} == {
        "onnxruntime, cpu",
        "onnxruntime, cuda",
    }


def test_the_tensorrt_of_onnxruntime_s_provider(
    artefacts: dict[str, Artefact], make_machine: Make, gpu_state: Callable[..., GpuState]
) -> None:
    """It is linked to one major version, and the other one that is installed is none to it."""

    def reason(**packages: str) -> tuple[bool, str]:
        machine = make_machine(
            {"onnxruntime-gpu": "1.31.1", **packages},
            providers=("TensorrtExecutionProvider", "CPUExecutionProvider"),
            onnxruntime_tensorrt=10,
            gpu=gpu_state(),
        )
        runs = {each.name: (each.runs, each.reason) for each in runtimes_for(artefacts["onnx"], machine)}
        return runs["onnxruntime, tensorrt"]

    assert reason(tensorrt="10.16.1.11")[0]
    assert reason(tensorrt="11.4.0.106") == (
        False,
        "its provider is linked to TensorRT 10, and 11.4.0.106 is installed: pip install 'tensorrt==10.*', "
        "or build an engine, which runs on the TensorRT that is here",
    )
    assert "linked to TensorRT 10, and none is installed" in reason()[1]


def test_tensorrt_for_rtx_as_a_package_of_its_own(
    artefacts: dict[str, Artefact], make_machine: Make, gpu_state: Callable[..., GpuState]
) -> None:
    def reason(**packages: str) -> tuple[bool, str]:
        machine = make_machine(packages, gpu=gpu_state())
        runs = {each.name: (each.runs, each.reason) for each in runtimes_for(artefacts["onnx"], machine)}
        return runs["onnxruntime, tensorrt-rtx"]

    assert reason(**{"onnxruntime-ep-nv-tensorrt-rtx-cu13": "0.5.0"})[0]
    runs, why = reason()
    assert not runs
    assert why.endswith("has no NvTensorRTRTXExecutionProvider: pip install onnxruntime-ep-nv-tensorrt-rtx")


@pytest.mark.parametrize("vnni", [True, False])
def test_weights_that_need_vnni_are_noted(
    vnni: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "adds_in_16_bits", lambda: not vnni)
    runs = [Runtime("onnxruntime, cpu", True, "loads it")]
    for bits, notes in ((7, 0), (8, 1), (None, 1)):
        made = {"for": "cpu", **({} if bits is None else {"weight_bits": bits})}
        contract = dataclasses.replace(CONTRACT, precision="int8", source={"quantised": made})
        artefact = read_artefact(write_onnx(tmp_path / "int8.onnx", contract))
        findings = runtime_findings(artefact, runs)
        assert len(findings) == notes
        for finding in findings:
            assert finding.level == "note"
            assert "exact on processors with VNNI only" in finding.text
            assert ("which this one has not" in finding.text) is not vnni
            assert "anchorline quantize" in finding.remedy


@pytest.mark.parametrize("bf16", [True, False])
def test_openvino(
    bf16: bool, artefacts: dict[str, Artefact], make_machine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = make_machine({"openvino": "2026.4.1"})
    monkeypatch.setattr(runtimes, "has_native_bf16", lambda: bf16)
    monkeypatch.setattr(runtimes, "open_openvino", lambda path: "bf16" if bf16 else "fp32")
    openvino = runtimes_for(artefacts["onnx"], machine)[-1]
    assert (openvino.name, openvino.runs) == ("OpenVINO", True)
    assert ("does not compute bf16" in openvino.reason) is not bf16

    def fail(path: Path) -> str:
        raise ArtefactError("it does not compile")

    monkeypatch.setattr(runtimes, "open_openvino", fail)
    assert runtimes_for(artefacts["onnx"], machine)[-1] == Runtime("OpenVINO", False, "it does not compile")


def test_what_was_measured_here_is_told(
    tmp_path: Path, make_machine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither what another processor's or version's cache holds, nor what is damaged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_onnx(tmp_path / "model.onnx", CONTRACT)
    assert doctor(path, make_machine()).choices == []
    providers = ("openvino", "cpu")
    facts = choosing.facts_of(read_onnx(path), CONTRACT, CpuOptions(threads=2), providers)
    figures = tuple(choosing.Figure(name, 2, "fp32", 9, 0.04, 0.1) for name in providers)
    choice = choosing.Choice(facts, "openvino", 2, figures, {}, False, 1.8e9, 2.0)
    folder = tmp_path / "cache" / "anchorline" / "choices"
    write_json(folder / f"{facts['model'][:16]}-1.json", choice)
    elsewhere = dataclasses.replace(choice, facts={**facts, "processor": "another"})
    write_json(folder / f"{facts['model'][:16]}-2.json", elsewhere)
    (folder / f"{facts['model'][:16]}-3.json").write_text("{")
    report = doctor(path, make_machine())
    assert report.choices == [choice]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.render())
    text = console.export_text()
    assert "openvino, fp32, 2 threads: 40 ms a frame (cpu, fp32, 2 threads: 40 ms)" in text
    assert "measured on 2027-01-15" in text
    (stated,) = report.to_json()["artefact"]["measured"]
    assert stated["facts"] == facts


def test_an_engine_runs_where_it_was_built_for(
    artefacts: dict[str, Artefact], make_machine: Make, gpu_state: Callable[..., GpuState]
) -> None:
    machine = make_machine({"tensorrt": "10.16.1.11", "tensorrt-cu13": "10.16.1.11"}, gpu=gpu_state(86))
    (found,) = runtimes_for(artefacts["engine"], machine)
    assert found.runs
    assert found.reason.startswith("TensorRT 10.16.1.11 on NVIDIA Test")
    assert runtime_findings(artefacts["engine"], [found]) == []


def test_what_is_said_of_an_engine_is_what_the_detector_does(tmp_path: Path, make_machine: Make) -> None:
    """Without a GPU its ONNX file runs, if it lies beside it and is the very one."""
    onnx = write_onnx(tmp_path / "model.onnx", CONTRACT)
    stated = {"name": "model.onnx", "sha256": hashlib.sha256(onnx.read_bytes()).hexdigest()}
    artefact = read_artefact(write_engine(tmp_path / "model.engine", onnx=stated))
    engine, instead = runtimes_for(artefact, make_machine())
    assert not engine.runs
    assert instead == Runtime("onnxruntime, cpu, with model.onnx", True, "onnxruntime 1.32.0 loads it")
    assert runtime_findings(artefact, [engine, instead]) == []
    if not find_gpus().gpus:
        with Detector(artefact.path, threads=1) as detector:
            assert detector.provider == "cpu"
        with pytest.raises(GpuError, match="cannot run here"):
            Detector(artefact.path, provider="tensorrt")


@pytest.mark.parametrize(
    ("version", "capability", "said"),
    [
        ("11.4.0.106", 90, "this machine has sm_90 and TensorRT 11.4.0.106"),
        ("10.16.0.72", 86, "this machine has sm_86 and TensorRT 10.16.0.72"),
        ("10.16.1.11", 89, "this machine has sm_89 and TensorRT 10.16.1.11"),
    ],
)
def test_an_engine_for_another_machine_says_which(
    version: str,
    capability: int,
    said: str,
    artefacts: dict[str, Artefact],
    make_machine: Make,
    gpu_state: Callable[..., GpuState],
) -> None:
    machine = make_machine({"tensorrt": version}, gpu=gpu_state(capability))
    (found,) = runtimes_for(artefacts["engine"], machine)
    assert not found.runs
    assert found.reason == (
        f"built for sm_86 with TensorRT 10.16.1.11; {said}: build it again here from model.onnx"
    )
    (finding,) = runtime_findings(artefacts["engine"], [found])
    assert (finding.level, finding.text) == ("problem", "model.engine cannot run here")
    assert found.reason in finding.remedy


def test_an_engine_on_a_bare_machine_names_all_that_is_missing(
    artefacts: dict[str, Artefact], make_machine: Make
) -> None:
    (found,) = runtimes_for(artefacts["engine"], make_machine())
    assert found.reason == (
        "TensorRT is not installed: pip install 'tensorrt==10.16.1.*'; there is no NVIDIA GPU here"
    )
    (broken,) = runtimes_for(
        artefacts["engine"], make_machine({"tensorrt": "10.16.1.11"}, gpu=GpuState(fault="cuInit 803"))
    )
    assert broken.reason == "there is no NVIDIA GPU here (cuInit 803)"


def test_the_flavours_do_not_stand_in_for_each_other(
    tmp_path: Path, make_machine: Make, gpu_state: Callable[..., GpuState]
) -> None:
    facts = {"flavour": "tensorrt-rtx", "flavour_version": "1.7.1.116", "compute_capabilities": [86, 120]}
    artefact = read_artefact(write_engine(tmp_path / "model.engine", **facts))
    (full,) = runtimes_for(artefact, make_machine({"tensorrt": "1.7.1.116"}, gpu=gpu_state(120)))
    assert full.reason == "TensorRT for RTX is not installed: pip install 'tensorrt-rtx-cu13==1.7.1.*'"
    rtx = make_machine({"tensorrt-rtx-cu13": "1.7.1.116"}, gpu=gpu_state(120))
    assert runtimes_for(artefact, rtx)[0].runs
    assert not runtimes_for(artefact, dataclasses.replace(rtx, gpu=gpu_state(90)))[0].runs


@pytest.mark.parametrize(
    ("version", "capability", "runs"),
    [
        ("10.20.0.1", 120, True),
        ("10.16.0.72", 120, False),
        ("11.4.0.106", 120, False),
        ("10.20.0.1", 75, False),
    ],
)
def test_an_engine_that_was_built_for_more_than_one_machine(
    version: str,
    capability: int,
    runs: bool,
    tmp_path: Path,
    make_machine: Make,
    gpu_state: Callable[..., GpuState],
) -> None:
    """As the detector decides it: that release or a later one of its number, and any GPU from sm_80 on."""
    options = {"version_compatible": True, "hardware_compatible": True}
    artefact = read_artefact(write_engine(tmp_path / "model.engine", options=options))
    machine = make_machine({"tensorrt": version}, gpu=gpu_state(capability))
    assert runtimes_for(artefact, machine)[0].runs is runs


def test_an_engine_that_states_no_capability_is_not_held_against_the_gpu(
    tmp_path: Path, make_machine: Make, gpu_state: Callable[..., GpuState]
) -> None:
    artefact = read_artefact(write_engine(tmp_path / "model.engine", compute_capabilities=[]))
    assert artefact.details["compute capability"] == "not stated"
    assert runtimes_for(artefact, make_machine({"tensorrt": "10.16.1.2"}, gpu=gpu_state(90)))[0].runs


def test_an_onnx_file_that_is_no_longer_the_engine_s_own(
    tmp_path: Path, make_machine: Make, gpu_state: Callable[..., GpuState]
) -> None:
    source = write_onnx(tmp_path / "model.onnx")
    machine = make_machine({"tensorrt": "10.16.1.11"}, gpu=gpu_state(86))
    own = {"name": source.name, "sha256": sha256_of(source)}
    current = read_artefact(write_engine(tmp_path / "model.engine", onnx=own))
    assert runtime_findings(current, runtimes_for(current, machine)) == []
    write_onnx(source, dataclasses.replace(CONTRACT, max_batch=4))
    (finding,) = runtime_findings(current, runtimes_for(current, machine))
    assert (finding.level, "model.onnx has changed" in finding.text) == ("note", True)
    assert finding.remedy == f"anchorline build {source} --out {current.path}"


# Whether it was verified.


def write_verified(artefact: Path, reference: Path, /, **changes: Any) -> None:
    record = {
        "artefact": {"name": artefact.name, "sha256": sha256_of(artefact)},
        "reference": {"name": reference.name, "sha256": sha256_of(reference)},
        "passed": True,
        "not_executed": None,
        "date": "2026-11-22T18:00:00+00:00",
        **changes,
    }
    artefact.with_name(f"{artefact.name}.verify.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_onnx(tmp_path / "model.onnx"), write_checkpoint(tmp_path / "model.safetensors")


def test_a_verified_artefact(pair: tuple[Path, Path]) -> None:
    write_verified(*pair)
    found = read_verification(pair[0])
    assert found.state == "verified"
    assert found.text == "agrees with model.safetensors, verified on 2026-11-22T18:00:00+00:00"
    assert found.findings(pair[0]) == []
    pair[1].unlink()  # the reference need not be on this machine
    assert read_verification(pair[0]).state == "verified"


def test_a_failed_verification_is_a_problem(pair: tuple[Path, Path]) -> None:
    write_verified(*pair, passed=False)
    found = read_verification(pair[0])
    (finding,) = found.findings(pair[0])
    assert (found.state, finding.level) == ("failed", "problem")
    assert "model.onnx: differs from model.safetensors" in finding.text
    assert finding.remedy == f"anchorline verify model.safetensors {pair[0]}"


def test_a_record_of_another_file_is_stale(pair: tuple[Path, Path]) -> None:
    write_verified(*pair)
    write_onnx(pair[0], dataclasses.replace(CONTRACT, max_batch=2))
    found = read_verification(pair[0])
    assert (found.state, "it has changed since 2026-11-22" in found.text) == ("stale", True)
    assert found.findings(pair[0])[0].level == "note"


def test_another_reference_makes_a_record_stale(pair: tuple[Path, Path]) -> None:
    write_verified(*pair)
    write_checkpoint(pair[1], {CONTRACT_KEY: CONTRACT.to_json(), "more": "1"})
    found = read_verification(pair[0])
    assert (found.state, "model.safetensors has changed" in found.text) == ("stale", True)


def test_a_file_that_was_not_executed(pair: tuple[Path, Path]) -> None:
    write_not_executed(pair[0], "there is no GPU here", pair[1])
    found = read_verification(pair[0])
    assert found.state == "not executed"
    assert "there is no GPU here" in found.text
    (finding,) = found.findings(pair[0])
    assert finding.level == "note"
    assert finding.remedy.endswith("on a machine that can run it")
    write_not_executed(pair[0], "told not to")
    assert read_verification(pair[0]).reference is None


def test_no_record_is_a_note(pair: tuple[Path, Path]) -> None:
    found = read_verification(pair[0])
    assert found.state == "missing"
    (finding,) = found.findings(pair[0])
    assert (finding.level, finding.remedy) == ("note", f"anchorline verify REFERENCE {pair[0]}")


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"artefact": 1, "passed": true}', "\0", "[" * 99_999])
def test_a_damaged_record_is_told(text: str, pair: tuple[Path, Path]) -> None:
    pair[0].with_name("model.onnx.verify.json").write_text(text)
    assert read_verification(pair[0]).state == "damaged"


@DAMAGED
@given(key=st.sampled_from(["artefact", "reference", "passed", "not_executed", "date"]), value=JSON)
def test_any_value_in_a_record_is_read_or_told(key: str, value: Any, tmp_path: Path) -> None:
    artefact, reference = tmp_path / "model.onnx", tmp_path / "model.safetensors"
    artefact.write_bytes(b"1")
    reference.write_bytes(b"2")
    write_verified(artefact, reference, **{key: value})
    found = read_verification(artefact)
    assert found.text
    assert "\n" not in found.text or isinstance(value, str)
