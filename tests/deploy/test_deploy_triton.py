"""A model repository, read with Triton's own protobuf and served by a player (``triton_double``)."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.http
from google.protobuf import json_format
from tritonclient.utils import deserialize_bytes_tensor

from anchorline import cli
from anchorline.deploy import deploy_triton
from anchorline.runtime import Detections, Detector
from anchorline.runtime.canvas import by_canvas, fit
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, OutputError, SettingsError
from anchorline.runtime.io.images import decode_image
from anchorline.runtime.model_file import read_onnx

Exported = Callable[..., Path]
FREE = (((128, 160), (128, 160), (192, 256)), ((256, 320), (320, 320), (640, 640)))


def one(content: bytes) -> dict[str, np.ndarray]:
    return {"image": np.array([[content]], np.object_)}


def check_equal(found: dict[str, np.ndarray], row: int, expected: Detections) -> None:
    """To the bit, and zero behind the last."""
    count = len(expected)
    assert found["num_detections"][row, 0] == count
    for name in ("boxes", "scores", "labels"):
        values, wanted = found[name][row], getattr(expected, name)
        np.testing.assert_array_equal(values[:count], wanted.astype(values.dtype))
        assert not values[count:].any()


def run_batches(
    detector: Detector, frames: Sequence[np.ndarray], runs: Sequence[Sequence[int]]
) -> list[Detections]:
    """The detections of each frame, from batches made as stated."""
    found: dict[int, Detections] = {}
    for run in runs:
        found.update(zip(run, detector.batch([frames[number] for number in run]), strict=True))
    return [found[number] for number in range(len(frames))]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("free", [False, True])
def test_what_triton_answers_is_the_detector_s_to_the_bit(
    exported: Exported, pictures: list[bytes], triton: Any, tmp_path: Path, free: bool, backend: str
) -> None:
    model, out = exported(free), tmp_path / "served"
    deploy_triton(model, out, backend=backend, max_batch=4)
    server = triton.Triton(out / "models")
    (name,) = (each for each, model in server.models.items() if model.config.platform == "ensemble")
    damaged = pictures[0][:300]
    answers = server.infer(name, [one(content) for content in (*pictures, damaged)])
    assert isinstance(answers[-1], triton.TritonRefusal)
    assert "copy or download" in str(answers[-1])
    frames = [decode_image(content) for content in pictures]
    if backend == "openvino":  # whose backend joins nothing
        runs = [[number] for number in range(6)]
    else:  # equal canvases, and up to four
        runs = by_canvas(read_onnx(model).contract, frames) if free else [[0, 1, 2, 3], [4, 5]]
        assert 1 < max(map(len, runs)) <= 4
    assert server.models[f"{name}_network"].batches == [len(run) for run in runs]
    with Detector(model, "cpu") as detector:
        for answer, expected in zip(answers, run_batches(detector, frames, runs), strict=False):
            assert len(expected) > 10
            check_equal(answer, 0, expected)


def test_several_images_of_a_request_are_one_batch_of_the_detector(
    exported: Exported, pictures: list[bytes], triton: Any, tmp_path: Path
) -> None:
    deploy_triton(exported(free=True), tmp_path / "m")
    server = triton.Triton(tmp_path / "m" / "models")
    (found,) = server.infer("free_detections", [{"image": np.array([[c] for c in pictures[:3]], np.object_)}])
    with Detector(exported(free=True), "cpu") as detector:
        expected = detector.batch([decode_image(content) for content in pictures[:3]])
    for row, each in enumerate(expected):
        check_equal(found, row, each)
    with pytest.raises(triton.TritonRefusal, match="exceeds 8"):
        server.infer("free_detections", [{"image": np.array([pictures[:1]] * 9, np.object_)}])


def test_proposals_have_the_label_0(
    exported: Exported, pictures: list[bytes], triton: Any, tmp_path: Path
) -> None:
    model = exported(free=True, task="proposals")
    deploy_triton(model, tmp_path / "m")
    (found,) = triton.Triton(tmp_path / "m" / "models").infer("free_proposals", [one(pictures[0])])
    with Detector(model, "cpu") as detector:
        check_equal(found, 0, detector(decode_image(pictures[0])))


def test_pixels_may_be_floats(exported: Exported, pictures: list[bytes], triton: Any, tmp_path: Path) -> None:
    """Frames are then scaled without rounding, as ``Detector`` does."""
    model = exported(floats=True)
    deploy_triton(model, tmp_path / "m")
    (found,) = triton.Triton(tmp_path / "m" / "models").infer("fixed_detections_floats", [one(pictures[0])])
    with Detector(model, "cpu") as detector:
        check_equal(found, 0, detector(decode_image(pictures[0])))


def test_the_client_prints_what_detect_writes(
    exported: Exported,
    pictures: list[bytes],
    triton: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the real ``tritonclient`` up to the wire: its inputs are built and checked by it."""
    deploy_triton(exported(), tmp_path / "m")
    server = triton.Triton(tmp_path / "m" / "models")

    class Client:
        def __init__(self, url: str, concurrency: int) -> None:
            assert url == "localhost:8000"

        def get_model_config(self, name: str) -> dict[str, Any]:
            config = server.models[name].config
            return json.loads(json_format.MessageToJson(config, preserving_proto_field_name=True))

        def async_infer(self, name: str, inputs: list[Any]) -> Any:
            (given,) = inputs
            content = deserialize_bytes_tensor(given._get_binary_data()).reshape(given.shape())
            (answer,) = server.infer(name, [{given.name(): content}])
            result = type("Result", (), {"as_numpy": staticmethod(answer.__getitem__)})
            return type("Pending", (), {"get_result": staticmethod(lambda: result)})

    monkeypatch.setattr(tritonclient.http, "InferenceServerClient", Client)
    spec = importlib.util.spec_from_file_location("client", tmp_path / "m" / "client.py")
    assert spec is not None
    assert spec.loader is not None
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    paths = [tmp_path / "one.jpg", tmp_path / "two.png"]
    for path, content in zip(paths, pictures, strict=False):
        path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["client.py", *map(str, paths)])
    client.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with Detector(exported(), "cpu") as detector:
        for line, path, content in zip(lines, paths, pictures, strict=False):
            expected = detector(decode_image(content))
            assert line["source"] == str(path)
            assert [each["box"] for each in line["detections"]] == expected.boxes.tolist()
            assert [each["name"] for each in line["detections"]] == list(expected.names)


def test_the_folder_says_where_it_comes_from_and_what_is_in_it(exported: Exported, tmp_path: Path) -> None:
    model, out = exported(), tmp_path / "new" / "m"
    deploy_triton(model, out)
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(model.read_bytes()).hexdigest() in readme
    assert "@" not in re.sub(r"\S+@\S+", "", readme)
    stated = dict(re.findall(r"\| `([^`]+)` \| `([0-9a-f]{64})` \|", readme))
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files - set(stated) == {"README.md", "models/fixed_detections/1/.keep"}
    for name, sha256 in stated.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == sha256
    # Byte for byte the file that was verified, and so is the contract.
    network = out / "models" / "fixed_detections_network" / "1" / "model.onnx"
    assert network.read_bytes() == model.read_bytes()
    check = ["-m", "ruff", "check", "-q", "--isolated", "--select", "E9,F,B,I", "--ignore", "B905", "."]
    subprocess.run([sys.executable, *check], cwd=out, check=True, capture_output=True, timeout=60)


def write_engine(path: Path, contract: Contract, **changes: Any) -> Path:
    """A manifest as ``build`` writes it, beside an engine that is none."""
    path.write_bytes(b"plan")
    canvases = changes.pop("canvases", [[contract.canvas] * 3])
    raw = {
        "contract": json.loads(contract.to_json()),
        "flavour": "tensorrt",
        "flavour_version": "10.14.1.48",
        "compute_capabilities": [89],
        "precision": "fp16",
        "profiles": [{"batch": [1, 4, 8], "canvas": canvas} for canvas in canvases],
        "engine": {"sha256": hashlib.sha256(b"plan").hexdigest()},
        "options_hash": "0",
        "options": {"nms": "plugin"},
        "plugins": {"BatchedNMS": {}},
    }
    path.with_name(f"{path.name}.json").write_text(json.dumps({**raw, **changes}))
    return path


def test_an_engine_goes_with_its_plugins_and_all_of_its_profiles(
    exported: Exported, pictures: list[bytes], triton: Any, tmp_path: Path
) -> None:
    model = exported(free=True)
    contract = read_onnx(model).contract
    engine = write_engine(tmp_path / "m.engine", contract, canvases=FREE)
    assert cli.main(["deploy", str(engine), "--for", "triton", "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    library = out / "plugins" / "libanchorline_plugins.so"
    assert library.read_bytes()[:4] == b"\x7fELF"
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert "--backend-config=tensorrt,plugins=/deploy/plugins/libanchorline_plugins.so" in readme
    assert "TensorRT is 10.14.1.48" in readme
    server = triton.Triton(out / "models", triton.session_of(model))
    network = server.models["m_network"]
    assert list(network.config.instance_group[0].profile) == ["0", "1"]
    assert network.config.max_batch_size == 8
    frames = [decode_image(content) for content in pictures]
    given = server.models["m_preprocess"].run([one(content) for content in pictures])
    for frame, inputs in zip(frames, given, strict=True):
        _, canvas, (placement,) = fit([frame.shape[:2]], FREE, contract)
        assert inputs["images"].shape == (1, *canvas, 3)
        assert inputs["image_sizes"].tolist() == [list(placement.valid)]
    answers = server.infer("m", [one(content) for content in pictures])
    for frame, answer in zip(frames, answers, strict=True):
        count = answer["num_detections"][0, 0]
        assert count > 10
        assert (answer["boxes"][0, :count] <= np.tile(frame.shape[1::-1], 2)).all()


def test_an_engine_that_tells_whether_its_nms_converged_runs_each_request_by_itself(
    exported: Exported, pictures: list[bytes], triton: Any, tmp_path: Path
) -> None:
    """Its output ``nms_converged`` has no batch, which Triton could not take apart."""
    model = exported()
    engine = write_engine(
        tmp_path / "m.engine", read_onnx(model).contract, plugins={}, options={"nms": "fixed-point"}
    )
    deploy_triton(engine, tmp_path / "out")
    assert not (tmp_path / "out" / "plugins").exists()

    class Session:
        own = triton.session_of(model)

        def run(self, names: list[str], inputs: Any) -> list[np.ndarray]:
            assert names[-1] == "nms_converged"
            return [*self.own.run(names[:-1], inputs), np.array([True])]

    server = triton.Triton(tmp_path / "out" / "models", Session())
    answers = server.infer("m", [one(content) for content in pictures])
    assert server.models["m_network"].batches == [1] * 6
    with Detector(model, "cpu") as detector:
        for content, answer in zip(pictures, answers, strict=True):
            check_equal(answer, 0, detector(decode_image(content)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"flavour": "tensorrt-rtx"}, "which Triton does not load"),
        ({"profiles": [{"batch": [4, 4, 8]}]}, "--batch 1:N:N"),
    ],
)
def test_an_engine_that_triton_cannot_serve_is_refused(
    exported: Exported, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    engine = write_engine(tmp_path / "m.engine", read_onnx(exported()).contract, **changes)
    with pytest.raises(ArtefactError, match=expected):
        deploy_triton(engine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_handed_over_is_refused_and_leaves_nothing(exported: Exported, tmp_path: Path) -> None:
    model, out = exported(), tmp_path / "out"
    cases: list[tuple[str, dict[str, Any], type[AnchorlineError], str]] = [
        ("m.safetensors", {}, ArtefactError, "export it first"),
        ("m.pt", {}, ArtefactError, r"\.onnx file of anchorline export"),
        (str(model), {"backend": "tensorrt"}, SettingsError, "'onnxruntime' or 'openvino'"),
    ]
    for given, options, error, expected in cases:
        with pytest.raises(error, match=expected):
            deploy_triton(given, out, **options)
    fast, contract = tmp_path / "fast.onnx", read_onnx(model).contract
    proto = onnx.load(model)
    onnx.helper.set_model_props(
        proto, {CONTRACT_KEY: dataclasses.replace(contract, source={"winograd": 1}).to_json()}
    )
    onnx.save(proto, fast)
    with pytest.raises(SettingsError, match=r"bf16.*Winograd's form.*without --winograd"):
        deploy_triton(fast, out, backend="openvino")
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(ArtefactError):
        deploy_triton(changed, out)
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(OutputError, match="is there already"):
        deploy_triton(model, out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".anchorline")]


def test_a_failure_on_the_way_leaves_nothing(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("anchorline.deploy.triton._readme", fail)
    with pytest.raises(OutputError, match="No space left"):
        deploy_triton(exported(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_contract_is_in_the_configuration_word_for_word(
    exported: Exported, triton: Any, tmp_path: Path
) -> None:
    """Its names hold quotes, backslashes and letters that are not ASCII."""
    deploy_triton(exported(), tmp_path / "m")
    config = triton.read_config(tmp_path / "m" / "models" / "fixed_detections")
    stated = Contract.from_json(config.parameters[CONTRACT_KEY].string_value)
    assert stated == read_onnx(exported()).contract
