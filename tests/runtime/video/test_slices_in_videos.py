"""A video in slices: the lines, ids, filters, copies and the live view are those of plain detection.

The model finds what is bright in blue, in green and in red, at the frame's own scale, so that whole frames
and slices have the same answers as far as their objects are whole.
"""

from __future__ import annotations

import http.client
import itertools
import json

import cv2
import numpy as np
import pytest

from anchorline import cli
from anchorline.runtime import DetectOptions, Detector, SliceOptions, Source, VideoPipeline
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.drawing import draw

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

SIZE = (180, 320)
NAMES = ("blue", "green", "red")
VIEWS = 12  # of 96x128 with an overlap of 0.4
SLICES = ["--slice", "96x128", "--overlap", "0.4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its box of a class encloses all pixels of more than 160 in that channel."""
    from onnx import TensorProto, helper, numpy_helper

    def node(kind, inputs, output, **attributes):
        return helper.make_node(kind, inputs.split(), [output], **attributes)

    nodes = [
        node("Cast", "images", "pixels", to=TensorProto.FLOAT),
        node("Greater", "pixels bright", "found"),
        node("Cast", "found", "mask", to=TensorProto.FLOAT),
        node("ReduceMax", "mask one", "columns", keepdims=0),
        node("ReduceMax", "mask two", "rows", keepdims=0),
        node("ArgMax", "columns", "x1", axis=1, keepdims=0),
        node("ArgMax", "rows", "y1", axis=1, keepdims=0),
        node("ArgMax", "columns", "last_x", axis=1, keepdims=0, select_last_index=1),
        node("ArgMax", "rows", "last_y", axis=1, keepdims=0, select_last_index=1),
        node("Add", "last_x one", "x2"),
        node("Add", "last_y one", "y2"),
        *(node("Unsqueeze", f"{name} two", f"{name}_column") for name in ("x1", "y1", "x2", "y2")),
        node("Concat", "x1_column y1_column x2_column y2_column", "corners", axis=2),
        node("Cast", "corners", "boxes", to=TensorProto.FLOAT),
        node("ReduceMax", "columns one", "present", keepdims=0),
        node("Mul", "present certainty", "scores"),
        node("Mul", "present none", "no_label"),
        node("Add", "no_label numbers", "label"),
        node("Cast", "label", "labels", to=TensorProto.INT32),
        node("Shape", "images", "batch", start=0, end=1),
        node("Expand", "three batch", "num_detections"),
    ]
    constants = {
        "bright": np.float32(160),
        "one": np.array([1]),
        "two": np.array([2]),
        "certainty": np.array([[0.9, 0.8, 0.7]], np.float32),
        "none": np.float32(0),
        "numbers": np.array([[0, 1, 2]], np.float32),
        "three": np.array([3], np.int32),
    }
    slots = {"boxes": ["B", 3, 4], "scores": ["B", 3], "labels": ["B", 3], "num_detections": ["B"]}
    types = {"labels": TensorProto.INT32, "num_detections": TensorProto.INT32}
    graph = helper.make_graph(
        nodes,
        "channels",
        [
            helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "height", "width", 3]),
            helper.make_tensor_value_info("image_sizes", TensorProto.FLOAT, ["B", 2]),
        ],
        [
            helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), shape)
            for name, shape in slots.items()
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    contract = Contract("detections", NAMES, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    helper.set_model_props(proto, {CONTRACT_KEY: contract.to_json()})
    onnx.checker.check_model(proto)
    path = tmp_path_factory.mktemp("channels") / "model.onnx"
    onnx.save(proto, path)
    return path


def frames():
    """Three things that cross all borders of the slices, on a dark texture."""
    texture = np.random.default_rng(0).integers(0, 60, (18, 32, 3), dtype=np.uint8)
    ground = cv2.resize(texture, SIZE[::-1])
    for step in range(30):
        frame = ground.copy()
        for channel, (x, y) in enumerate([(10 + 9 * step, 40), (280 - 8 * step, 100), (150, 4 + 5 * step)]):
            frame[y : y + 20, x : x + 28] = np.eye(3, dtype=np.uint8)[channel] * 250
        yield frame


@pytest.fixture(scope="module")
def video(tmp_path_factory, write_raw_video):
    return write_raw_video(tmp_path_factory.mktemp("in") / "clip.mp4", list(frames()), fps=25.0)


@pytest.fixture
def detect(model, video, tmp_path):
    """``detect(name, options...)``: the lines of a run of the command, and its figures."""

    def run(name, *options):
        lines, figures = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"
        words = ["detect", str(video), "--model", str(model), "--provider", "cpu", "--threads", "1"]
        words += ["--score-threshold", "0.5", "--jsonl", str(lines), "--json", str(figures), *options]
        assert cli.main(words) == 0
        return [json.loads(line) for line in lines.read_text().splitlines()], json.loads(figures.read_text())

    return run


@pytest.mark.parametrize("batch", ["1", "4"])
@pytest.mark.parametrize("whole", ["--full", "--no-full"])
def test_lines_and_ids_are_those_of_plain_detection(detect, whole, batch):
    pytest.importorskip("trackers", reason="needs the package trackers; pip install --no-deps trackers")
    plain, _ = detect("plain", "--track", "--batch", batch)
    sliced, figures = detect("sliced", "--track", "--batch", batch, *SLICES, whole)
    assert figures["views"] == (VIEWS + 1 if whole == "--full" else VIEWS)
    assert sliced == plain
    assert len(plain) == 30
    for line in plain[1:]:
        ids = {each["name"]: each["track_id"] for each in line["detections"]}
        assert sorted(ids) == sorted(NAMES)
        assert sorted(ids.values()) == [1, 2, 3]
        assert ids == {each["name"]: each["track_id"] for each in plain[1]["detections"]}


@pytest.mark.parametrize(
    "options",
    [
        ["--region", "0,0,0.5,1"],
        ["--region", "0,0 1,0 0,1", "--classes", "green,red"],
        ["--min-score", "0.85", "--min-score", "red=0.6"],
        ["--max-detections", "1", "--stride", "3"],
    ],
)
def test_filters_keep_what_they_keep_of_plain_detection(detect, options):
    everything, _ = detect("everything")
    plain, _ = detect("plain", *options)
    sliced, _ = detect("sliced", *options, *SLICES)
    assert sliced == plain
    kept = sum(len(line["detections"]) for line in plain)
    assert 0 < kept < sum(len(line["detections"]) for line in everything) == 90


def test_annotated_copies_are_the_same(detect, tmp_path):
    detect("plain", "--save", str(tmp_path / "plain.mp4"))
    detect("sliced", "--save", str(tmp_path / "sliced.mp4"), *SLICES)
    copies = [cv2.VideoCapture(str(tmp_path / f"{name}.mp4")) for name in ("plain", "sliced")]
    for _ in range(30):
        (came, plain), (also, sliced) = (copy.read() for copy in copies)
        assert (came, also) == (True, True)
        np.testing.assert_array_equal(plain, sliced)


def test_the_live_view_shows_the_frame_with_the_merged_boxes(model):
    for package in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    from anchorline.serving.live_view import LiveView

    frame = list(frames())[14]
    with Detector(model, "cpu", 0.5, 1) as plain:
        expected = draw(frame, plain(frame)).astype(int)
    options = DetectOptions(score_threshold=0.5, threads=1, slices=SliceOptions(96, 128, overlap=0.4))
    with options.open_detector(model) as detector, LiveView(0) as view:
        source = Source(itertools.repeat(frame), name="cam", live=True)
        with VideoPipeline(detector, [source], options, sinks=[view]) as pipeline:
            view.watch(pipeline)
            results = iter(pipeline)
            for _ in range(3):
                next(results)
            shown = picture_of(view, "/stream/cam", results)
    assert shown.shape == frame.shape
    drawn = np.abs(frame - expected).max(axis=2) > 60
    assert drawn.sum() > 300
    assert np.abs(shown - expected)[drawn].mean() < 0.3 * np.abs(frame - expected)[drawn].mean()


def picture_of(view, path, results):
    """The first picture of a stream, while the run goes on."""
    connection = http.client.HTTPConnection("127.0.0.1", view.address.port, timeout=60)
    connection.request("GET", path)
    next(results)
    answer = connection.getresponse()
    answer.readline()
    length = int(http.client.parse_headers(answer)["Content-Length"])
    picture = cv2.imdecode(np.frombuffer(answer.read(length), np.uint8), cv2.IMREAD_COLOR)
    connection.close()
    return picture.astype(int)
