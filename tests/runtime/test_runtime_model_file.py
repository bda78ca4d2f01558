"""Model files: what is damaged or hostile is refused in one line, before anything loads it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from anchorline.export.functions import save_model
from anchorline.runtime.contract import Contract
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.model_file import DIGEST_KEY, read_onnx
from anchorline.runtime.tensorrt.manifest import manifest_path

FRAME = np.full((48, 64, 3), 200, np.uint8)


@pytest.fixture
def model(model_path: Path) -> onnx.ModelProto:
    return onnx.load(model_path)


@pytest.fixture
def written(model: onnx.ModelProto, tmp_path: Path) -> Path:
    """The tiny model as anchorline writes it, with its digest."""
    save_model(model, tmp_path / "written.onnx")
    return tmp_path / "written.onnx"


def refusal(path: Path) -> str:
    with pytest.raises(ArtefactError) as caught:
        Detector(path, "cpu")
    message = str(caught.value)
    assert message.isprintable()
    assert len(message.replace(str(path), "")) < 500
    return message


def answer(path: Path) -> tuple[list[list[float]], list[float]]:
    with Detector(path, "cpu") as detector:
        found = detector(FRAME)
    return found.boxes.tolist(), found.scores.tolist()


def test_a_damaged_model_is_told_or_gives_the_same(written: Path, tmp_path: Path) -> None:
    """A flipped bit in a weight or in a node gave other boxes without a word."""
    content, expected = written.read_bytes(), answer(written)
    generator = np.random.default_rng(0)
    damaged = tmp_path / "damaged.onnx"
    told = 0
    for place in generator.integers(0, len(content), 200).tolist():
        changed = bytearray(content)
        changed[place] ^= 1 << int(generator.integers(8))
        damaged.write_bytes(changed)
        try:
            assert answer(damaged) == expected  # the key of the digest, or what no parser reads
        except ArtefactError:
            told += 1
    assert told > 180


def test_the_digest_is_refreshed_by_whatever_writes_a_model(model: onnx.ModelProto, tmp_path: Path) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    save_model(model, first)
    changed = onnx.load(first)
    changed.graph.initializer[2].raw_data = np.array(2 * 255, np.float32).tobytes()
    save_model(changed, second)
    assert answer(first) != answer(second)
    assert len([each for each in onnx.load(second).metadata_props if each.key == DIGEST_KEY]) == 1


def test_other_tools_may_load_and_save_it_and_add_metadata(written: Path, tmp_path: Path) -> None:
    expected, model = answer(written), onnx.load(written)
    onnx.save(model, tmp_path / "saved.onnx")
    assert answer(tmp_path / "saved.onnx") == expected
    model.metadata_props.add(key="note", value="mine")
    onnx.save(model, tmp_path / "noted.onnx")
    assert answer(tmp_path / "noted.onnx") == expected


def test_a_change_of_another_tool_is_told_until_the_digest_is_taken_out(written: Path) -> None:
    model = onnx.load(written)
    model.graph.node[0].name = "renamed"
    onnx.save(model, written)
    message = refusal(written)
    assert "another SHA-256 than its anchorline.digest" in message
    assert "take that entry out of its metadata" in message
    (entry,) = (each for each in model.metadata_props if each.key == DIGEST_KEY)
    model.metadata_props.remove(entry)
    onnx.save(model, written)
    assert read_onnx(written).digest is None
    answer(written)


OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("evil", 1)]


def function(name: str, *called: str) -> onnx.FunctionProto:
    """A function that puts its argument through others, one after the other."""
    values = ["x", *(f"v{number}" for number in range(1, len(called))), "y"]
    nodes = [
        helper.make_node(each, [source], [result], domain="evil" if each.startswith("F") else "")
        for each, source, result in zip(called, values, values[1:], strict=False)
    ]
    return helper.make_function("evil", name, ["x"], ["y"], nodes, OPSETS)


@pytest.mark.parametrize(
    ("functions", "expected"),
    [
        ([function("F0", "F0")], "its function 'F0' calls itself"),
        ([function("F0", "F1"), function("F1", "Neg", "F0")], "calls itself"),
        (
            [function("F0", "Neg"), *(function(f"F{n}", *[f"F{n - 1}"] * 6) for n in range(1, 12))],
            r"functions may unfold to \d+ nodes",
        ),
    ],
)
def test_functions_that_never_end_are_refused(
    functions: list[onnx.FunctionProto], expected: str, model: onnx.ModelProto, tmp_path: Path
) -> None:
    for node in model.graph.node:
        if node.output[0] == "boxes":
            node.output[0] = "inner"
    model.graph.node.append(helper.make_node(functions[-1].name, ["inner"], ["boxes"], domain="evil"))
    model.functions.extend(functions)
    model.opset_import.append(OPSETS[1])
    path = tmp_path / "endless.onnx"
    path.write_bytes(model.SerializeToString())
    assert re.search(expected, refusal(path))


@pytest.mark.parametrize("location", ["missing.bin", "../../etc/passwd", "/etc/passwd", "pipe"])
@pytest.mark.parametrize("held_by", ["initializer", "constant"])
def test_tensors_in_other_files_are_refused_unopened(
    location: str, held_by: str, model: onnx.ModelProto, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tensor,) = (each for each in model.graph.initializer if each.name == "box_factors")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    if held_by == "constant":
        constant = helper.make_node("Constant", [], ["box_factors"])
        attribute = constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
        attribute.t.CopyFrom(tensor)
        model.graph.node.insert(0, constant)
        model.graph.initializer.remove(tensor)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert "its tensor 'box_factors' lies in another file" in refusal(path)


def test_metadata_that_is_no_text(model_path: Path, tmp_path: Path) -> None:
    path, stated = tmp_path / "model.onnx", b'"task": "detections"'
    path.write_bytes(model_path.read_bytes().replace(stated, stated.replace(b"de", b"\xff\xfe")))
    assert "contract task is" in refusal(path)


def test_a_pipe_named_like_a_model_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.engine.json"):
        os.mkfifo(tmp_path / name)
    assert "is a pipe" in refusal(tmp_path / "model.onnx")
    (tmp_path / "model.engine").write_bytes(b"plan")
    assert "is a pipe" in refusal(tmp_path / "model.engine")


# Damaged files by the thousand, in a process of their own: one that dies is a failure as a traceback is.

FUZZ = r"""
import json, random, resource, sys
from pathlib import Path
from anchorline.doctor.artefact import read_artefact, read_verification
from anchorline.doctor.machine import examine_machine
from anchorline.doctor.runtimes import runtime_findings, runtimes_for
from anchorline.runtime.contract import CONTRACT_KEY
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import AnchorlineError
from anchorline.runtime.io.protobuf import bytes_field

folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
names = ("model.onnx", "plain.onnx", "graph", "model.engine.json")
sources = {name: (folder / name).read_bytes() for name in names}
machine = examine_machine()
PIECES = (b"\x1b[2J", b"\\ud800", b"NaN", b"1" * 400, b"-1", b"Infinity", b"null", b"[" * 3000, b"\xff",
          b"{}", b"")
ODD = (None, True, -1, 0, 0.5, 10**400, 10**9, 2**63, float("nan"), float("inf"), "", "\ud800", "\x1b]0;x",
       "x" * 10**5, [], [[]], {}, {"a": {}}, [1, 2], [None] * 3, ["a", "a"], [1.5, "x", 3])

def mutated(content, dice):
    content = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 5))):
        at = dice.randrange(len(content))
        kind = dice.randrange(4)
        if kind == 0: content[at] = dice.randrange(256)
        elif kind == 1: content[at] ^= 1 << dice.randrange(8)
        elif kind == 2: content[at:at + dice.choice((1, 2, 9))] = dice.choice(PIECES)
        else: del content[at:at + dice.choice((1, 3, 30))]
        content = content or bytearray(b"0")
    return bytes(content)

def changed(text, dice):
    value = json.loads(text)
    inner, key = value, dice.choice(list(value))
    while isinstance(inner[key], (dict, list)) and inner[key] and dice.random() < 0.7:
        inner = inner[key]
        key = dice.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    inner[key] = dice.choice(ODD)
    return json.dumps(value).encode()

def said(what):
    try:
        return what(), None
    except AnchorlineError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 1500, text
        return None, text

contract = json.dumps(json.loads(sources["model.engine.json"])["contract"]).encode()
for seed in range(first, first + count):
    print(seed, flush=True)
    dice = random.Random(seed)
    kind, change = seed % 5, dice.choice((changed, changed, mutated))
    path = folder / ("fuzzed.onnx" if kind < 3 else "fuzzed.engine")
    if kind < 2:  # a model with its digest, or without one
        path.write_bytes(mutated(sources[names[kind]], dice))
    elif kind == 2:
        entry = bytes_field(1, CONTRACT_KEY.encode()) + bytes_field(2, change(contract, dice))
        path.write_bytes(sources["graph"] + bytes_field(14, entry))
    else:
        path.write_bytes(b"plan")
        (folder / "fuzzed.engine.json").write_bytes(change(sources["model.engine.json"], dice))
    detector, refused = said(lambda: Detector(path, "cpu" if kind < 3 else "auto"))
    if detector is not None:
        detector.close()
    artefact, fault = said(lambda: read_artefact(path))
    if artefact is None:
        assert refused, f"doctor refuses what opens: {fault}"
        continue
    shown = [text for row in artefact.rows().items() for text in row]
    assert all(text.isprintable() and len(text) < 4000 for text in shown), shown
    json.dumps(artefact.to_json())
    runtimes = runtimes_for(artefact, machine)
    runtime_findings(artefact, runtimes)
    read_verification(path)
    for each in runtimes:
        if each.name == "onnxruntime, cpu":
            assert each.runs == (refused is None), (each, refused)
"""


@pytest.mark.parametrize("count", [80, pytest.param(6000, marks=pytest.mark.slow)])
def test_no_damaged_file_ends_a_process(
    count: int, written: Path, model: onnx.ModelProto, contract: Contract, tmp_path: Path
) -> None:
    folder = tmp_path / "fuzz"
    folder.mkdir()
    written.rename(folder / "model.onnx")
    onnx.save(model, folder / "plain.onnx")
    del model.metadata_props[:]
    onnx.save(model, folder / "graph")
    manifest = {
        "contract": json.loads(contract.to_json()),
        "onnx": {"name": "model.onnx", "sha256": "0" * 64},
        "engine": {"sha256": hashlib.sha256(b"plan").hexdigest(), "bytes": 4},
        "flavour": "tensorrt",
        "flavour_version": "10.16.1.11",
        "compute_capabilities": [86, 89],
        "precision": "fp16",
        "profiles": [{"batch": [1, 4, 8]}],
        "options": {"version_compatible": False},
        "options_hash": "1" * 64,
    }
    manifest_path(folder / "model.engine").write_text(json.dumps(manifest), encoding="utf-8")
    command = [sys.executable, "-c", FUZZ, str(folder), "0", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    seeds = done.stdout.split()
    assert done.returncode == 0, f"seed {seeds[-1:]}: {done.stderr[-2000:]}"
    assert len(seeds) == count
