"""The folder for DeepStream: its graph in onnxruntime, its parser compiled and run, its configuration read.

nvinfer's part is played: a frame scaled bilinearly to the size of the input, in whole grey levels, as planes.
"""

from __future__ import annotations

import configparser
import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest

from anchorline import cli
from anchorline.deploy import deploy_deepstream
from anchorline.deploy.deepstream import nvinfer_graph
from anchorline.engine.graph import read_model
from anchorline.engine.options import BuildOptions
from anchorline.engine.toolkit import load_toolkit, parse, serialise
from anchorline.runtime import Detections, Detector
from anchorline.runtime.canvas import Placement, boxes_to_source
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, SettingsError
from anchorline.runtime.io.images import decode_image
from anchorline.runtime.tensorrt.library import load_tensorrt

Exported = Callable[..., Path]
HERE = Path(__file__).parent
# Keys of Gst-nvinfer's configuration that NVIDIA documents for a detector from an ONNX file.
DOCUMENTED = {
    "property": {
        *("gpu-id", "gie-unique-id", "process-mode", "network-type", "onnx-file", "model-engine-file"),
        *("network-mode", "batch-size", "infer-dims", "network-input-order", "model-color-format"),
        *("net-scale-factor", "offsets", "maintain-aspect-ratio", "symmetric-padding", "scaling-filter"),
        *("scaling-compute-hw", "labelfile-path", "num-detected-classes", "cluster-mode", "interval"),
        *("parse-bbox-func-name", "custom-lib-path", "workspace-size", "output-blob-names"),
    },
    "class-attrs-all": {"pre-cluster-threshold", "post-cluster-threshold", "nms-iou-threshold", "topk"},
}


def planes_of(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What nvinfer hands over for a frame: float planes [3, h, w] in BGR."""
    scaled = cv2.resize(frame, size[::-1], interpolation=cv2.INTER_LINEAR)
    return scaled.transpose(2, 0, 1).astype(np.float32)


def run(graph: onnx.ModelProto, planes: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # as the detector here: sums have one order, and nothing spins
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    assert [value.name for value in session.get_inputs()] == ["input"]
    assert [value.name for value in session.get_outputs()] == ["detections"]
    (rows,) = session.run(None, {"input": planes})
    return rows


def with_function(graph: onnx.ModelProto, exported: Path) -> onnx.ModelProto:
    """The graph whose NMS is a plugin in TensorRT with the file's own function for it, for onnxruntime."""
    found = [each for each in onnx.load(exported).functions if each.name == "BatchedNMS"]
    assert {node.op_type for node in graph.graph.node if node.domain} == {"BatchedNMS"}
    graph.functions.extend(found)
    return graph


def check_rows(rows: np.ndarray, placement: Placement, expected: Detections) -> None:
    """To the bit: the network sees the same numbers."""
    count = len(expected)
    assert count > 10
    np.testing.assert_array_equal(boxes_to_source(rows[:count, :4], placement), expected.boxes)
    np.testing.assert_array_equal(rows[:count, 4], expected.scores)
    if rows.shape[1] == 6:
        np.testing.assert_array_equal(rows[:count, 5], expected.labels)
    assert not rows[count:].any()


@pytest.mark.parametrize("nms", ["plugin", "fixed-point"])
@pytest.mark.parametrize("free", [False, True])
def test_the_graph_gives_the_detector_s_boxes(
    exported: Exported, pictures: list[bytes], free: bool, nms: str
) -> None:
    """For frames that fill the canvas, and for those that leave a margin at the right or below."""
    model = exported(free)
    with Detector(model, "cpu") as detector:
        for content in (pictures[0], pictures[1], pictures[4]):
            frame = decode_image(content)
            graph, placement = nvinfer_graph(read_model(model), frame.shape[:2], nms=nms)
            if nms == "plugin":
                graph = with_function(graph, model)
            rows = run(graph, planes_of(frame, placement.valid)[None])
            assert rows.shape == (1, 100, 6)
            check_rows(rows[0], placement, detector(frame))


def test_a_model_with_float_pixels_is_told_of_in_the_readme(
    exported: Exported, pictures: list[bytes], tmp_path: Path
) -> None:
    """A frame that is not scaled has the same boxes; what scaling does otherwise is said."""
    model, frame = exported(floats=True), decode_image(pictures[4])
    deploy_deepstream(model, tmp_path / "out", frame.shape[:2], nms="fixed-point")
    graph = onnx.load(tmp_path / "out" / "fixed_detections_floats.onnx")
    with Detector(model, "cpu") as detector:
        check_rows(
            run(graph, planes_of(frame, (128, 160))[None])[0],
            Placement((128, 160), (128, 160)),
            detector(frame),
        )
    assert "whole grey levels" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_batch_gives_each_frame_s_boxes(exported: Exported, pictures: list[bytes]) -> None:
    frames = [decode_image(pictures[number]) for number in (0, 2, 5)]
    graph, placement = nvinfer_graph(read_model(exported()), frames[0].shape[:2])
    planes = np.stack([planes_of(frame, placement.valid) for frame in frames])
    rows = run(with_function(graph, exported()), planes)
    with Detector(exported(), "cpu") as detector:
        for found, expected in zip(rows, detector.batch(frames), strict=True):
            check_rows(found, placement, expected)


def test_proposals_have_five_columns(exported: Exported, pictures: list[bytes]) -> None:
    model, frame = exported(free=True, task="proposals"), decode_image(pictures[0])
    graph, placement = nvinfer_graph(read_model(model), frame.shape[:2], nms="fixed-point")
    rows = run(graph, planes_of(frame, placement.valid)[None])
    with Detector(model, "cpu") as detector:
        check_rows(rows[0], placement, detector(frame))


@pytest.fixture(scope="module")
def folder(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For frames of 120x90, by the command, with its library made against the stub of NVIDIA's header."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    out = tmp_path_factory.mktemp("deepstream") / "out"
    arguments = ["deploy", str(exported()), "--for", "deepstream", "--out", str(out), "--frame", "120x90"]
    assert cli.main([*arguments, "--max-batch", "2"]) == 0
    stub = out.parent / "sdk" / "sources" / "includes"
    stub.mkdir(parents=True)
    shutil.copy(HERE / "nvdsinfer_custom_impl.h", stub)
    made = subprocess.run(
        ["make", f"DEEPSTREAM={out.parent / 'sdk'}", "CXXFLAGS=-O1 -Werror"],
        cwd=out,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    return out


def test_the_configuration_says_what_the_graph_is(folder: Path, exported: Exported) -> None:
    config = configparser.ConfigParser(interpolation=None)
    config.read(folder / "config_infer_primary.txt", encoding="utf-8")
    for section in config.sections():
        assert set(config[section]) <= DOCUMENTED[section]
    stated = config["property"]
    graph = onnx.load(folder / stated["onnx-file"]).graph
    shape = [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert stated["infer-dims"] == ";".join(map(str, shape[1:])) == "3;120;160"
    assert (stated["batch-size"], stated["network-mode"]) == ("2", "0")
    # BGR in grey levels: mean and std are in the graph.
    assert (stated["model-color-format"], stated["net-scale-factor"]) == ("1", "1.0")
    assert "offsets" not in stated
    names = (folder / "labels.txt").read_text(encoding="utf-8").splitlines()
    with Detector(exported(), "cpu") as detector:
        assert names == list(detector.contract.names)
        assert float(config["class-attrs-all"]["pre-cluster-threshold"]) == detector.contract.thresholds.score
    assert stated["num-detected-classes"] == "3"
    assert (folder / stated["custom-lib-path"]).is_file()


class Parser:
    """The library of the folder, called as nvinfer calls it."""

    def __init__(self, folder: Path, name: str) -> None:
        driver = folder.parent / "driver.so"
        command = ["c++", "-std=c++17", "-shared", "-fPIC", f"-I{HERE}", str(HERE / "nvinfer_driver.cpp")]
        subprocess.run([*command, "-o", str(driver)], check=True, timeout=120)
        self._driver = ctypes.CDLL(str(driver))
        self._library = ctypes.CDLL(str(folder / "libnvdsinfer_anchorline.so"))
        self._parser = ctypes.cast(self._library[name], ctypes.c_void_p)

    def __call__(
        self, rows: np.ndarray, thresholds: list[float], layer: bytes = b"detections", kind: int = 0
    ) -> np.ndarray | None:
        """Rows of class, left, top, width, height, confidence; None where the parser refused."""
        rows = np.ascontiguousarray(rows, np.float32)
        found = np.zeros((len(rows), 6), np.float32)
        least = np.array(thresholds, np.float32)
        pointer = ctypes.POINTER(ctypes.c_float)
        count = self._driver.parse(
            *(self._parser, layer, kind, rows.ctypes.data_as(pointer), *rows.shape, 160, 120),
            *(least.ctypes.data_as(pointer), len(least), found.ctypes.data_as(pointer), len(found)),
        )
        return None if count < 0 else found[:count]


@pytest.fixture(scope="module")
def parser(folder: Path) -> Parser:
    config = configparser.ConfigParser(interpolation=None)
    config.read(folder / "config_infer_primary.txt", encoding="utf-8")
    return Parser(folder, config["property"]["parse-bbox-func-name"])


def test_the_parser_finds_the_detector_s_boxes(
    folder: Path, parser: Parser, exported: Exported, pictures: list[bytes]
) -> None:
    """On what the folder's graph gives for a frame; nvinfer then scales boxes to the frame."""
    frame = decode_image(pictures[0])
    graph = with_function(onnx.load(folder / "fixed_detections.onnx"), exported())
    (rows,) = run(graph, planes_of(frame, (120, 160))[None])
    found = parser(rows, [0.05] * 3)
    assert found is not None
    with Detector(exported(), "cpu") as detector:
        expected = detector(frame)
    assert found[:, 0].tolist() == expected.labels.tolist()
    np.testing.assert_array_equal(found[:, 5], expected.scores)
    corners = np.concatenate([found[:, 1:3], found[:, 1:3] + found[:, 3:5]], axis=1)
    np.testing.assert_allclose(corners * 0.75, expected.boxes, atol=1e-3)


def test_the_parser_keeps_to_the_thresholds_and_classes_and_leaves_out_what_is_no_detection(
    parser: Parser,
) -> None:
    box = [1.0, 2.0, 11.0, 22.0]
    rows = np.array(
        [
            [*box, 0.9, 0],
            [*box, 0.5, 1],
            [*box, 0.3, 1],
            [*box, 0.8, 2],
            [*box, 0.8, -1],
            [*box, np.nan, 0],
            [1.0, np.nan, 11.0, 22.0, 0.9, 0],
            [1.0, 2.0, np.inf, 22.0, 0.9, 0],
            [0] * 6,
        ]
    )
    found = parser(rows, [0.1, 0.5])
    assert found is not None
    np.testing.assert_allclose(found, [[0, 1, 2, 10, 20, 0.9], [1, 1, 2, 10, 20, 0.5]], rtol=1e-6)
    without_labels = parser(rows[:3, :5], [0.4])
    assert without_labels is not None
    assert without_labels[:, 0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("columns", "layer", "kind"), [(4, b"detections", 0), (6, b"boxes", 0), (6, b"detections", 1)]
)
def test_the_parser_refuses_the_output_of_another_graph(
    parser: Parser, columns: int, layer: bytes, kind: int
) -> None:
    assert parser(np.ones((2, columns)), [0.1], layer, kind) is None


def test_the_plugins_come_with_the_parser_s_library(folder: Path) -> None:
    """nvinfer opens the one before it builds the engine; the other registers itself when it is loaded."""
    linked = subprocess.run(
        ["readelf", "-d", "libnvdsinfer_anchorline.so"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "[libanchorline_plugins.so]" in linked
    assert "[$ORIGIN]" in linked
    assert (folder / "libanchorline_plugins.so").is_file()


def test_the_folder_says_where_it_comes_from_and_what_is_in_it(folder: Path, exported: Exported) -> None:
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(exported().read_bytes()).hexdigest() in readme
    assert not re.search(r"@[A-Z]+@", readme + (folder / "Makefile").read_text(encoding="utf-8"))
    stated = dict(re.findall(r"\| `([^`]+)` \| `([0-9a-f]{64})` \|", readme))
    files = {path.name for path in folder.iterdir()}
    assert files - set(stated) == {"README.md", "libnvdsinfer_anchorline.so"}
    for name, sha256 in stated.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256


def test_without_a_plugin_no_library_is_needed(exported: Exported, tmp_path: Path) -> None:
    deploy_deepstream(exported(free=True), tmp_path / "out", (1080, 1920), nms="fixed-point")
    assert not (tmp_path / "out" / "libanchorline_plugins.so").exists()
    assert "anchorline_plugins" not in (tmp_path / "out" / "Makefile").read_text(encoding="utf-8")
    assert {node.domain for node in onnx.load(tmp_path / "out" / "free_detections.onnx").graph.node} == {""}


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TensorRT for RTX, which parses and builds without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        try:
            load_tensorrt("tensorrt-rtx")
        except SettingsError as error:
            pytest.skip(str(error))
        yield load_toolkit(BuildOptions(target="tensorrt-rtx", compute_capabilities=(89,)))


@pytest.mark.parametrize("nms", ["plugin", pytest.param("fixed-point", marks=pytest.mark.slow)])
def test_tensorrt_builds_the_graph(toolkit: Any, exported: Exported, nms: str) -> None:
    """In the form of TensorRT for RTX, whose RoIAlign alone is another than full TensorRT's."""
    graph, _ = nvinfer_graph(read_model(exported(free=True)), (90, 120), "tensorrt-rtx", nms)
    options = BuildOptions(target="tensorrt-rtx", compute_capabilities=(89,))
    builder = toolkit.create_builder()
    network, libraries = parse(toolkit, builder, graph, (1, 1, 2))
    assert [network.get_input(number).name for number in range(network.num_inputs)] == ["input"]
    assert tuple(network.get_output(0).shape) == (-1, 100, 6)
    plan = serialise(toolkit, builder, network, options, (1, 1, 2), libraries=libraries)
    assert len(plan.content) > 100_000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--frame 1920x1080"),
        (["--frame", "120x0"], "at least 1 pixel"),
        (["--frame", "wide"], "WIDTHxHEIGHT"),
        (["--frame", "120x90", "--backend", "openvino"], "for --for triton"),
    ],
)
def test_wrong_usage_is_one_line(
    exported: Exported,
    tmp_path: Path,
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["deploy", str(exported(free=True)), "--for", "deepstream", "--out", str(tmp_path / "out")]
    assert cli.main([*given, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert not list(tmp_path.iterdir())


def test_triton_takes_no_frame_size(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["deploy", str(exported()), "--for", "triton", "--out", str(tmp_path / "out")]
    assert cli.main([*given, "--frame", "120x90"]) == 2
    assert "for --for deepstream" in capsys.readouterr().err


def test_what_nvinfer_cannot_run_is_refused(exported: Exported, tmp_path: Path) -> None:
    def refused(error: type[AnchorlineError], expected: str, model: Path, **options: Any) -> None:
        with pytest.raises(error, match=expected):
            deploy_deepstream(model, tmp_path / "out", (90, 120), **options)

    refused(ArtefactError, "export it first", tmp_path / "m.safetensors")
    refused(SettingsError, "'plugin' or 'fixed-point'", exported(), nms="none")
    refused(SettingsError, "no such program", exported(), compiler="no-such-compiler")
    assert not list(tmp_path.iterdir())
