"""The verbs on real files, with a network so small that its answer is known: one box on every image."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from anchorline import cli
from anchorline.data.synthetic import CLASS_NAMES
from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.io.files import sha256_of
from anchorline.runtime.slices import slice_views
from anchorline.runtime.video.pipeline import VideoPipeline

CANVAS = 64  # pixels, both sides
CONTRACT = Contract("detections", CLASS_NAMES, (CANVAS, CANVAS), mean=(0.0,) * 3, std=(1.0,) * 3)
BOX = (8.0, 4.0, 24.0, 20.0)


def constant_network(contract: Contract = CONTRACT) -> onnx.ModelProto:
    """For each image one slot: ``BOX``, score 0.75, label 1."""
    answers = {
        "boxes": np.array([[BOX]], np.float32),
        "scores": np.array([[0.75]], np.float32),
        "labels": np.array([[1]], np.int32),
        "num_detections": np.array([1], np.int32),
    }
    nodes = [
        helper.make_node("Shape", ["image_sizes"], ["batch"], start=0, end=1),
    ]
    for name, value in answers.items():
        ones = numpy_helper.from_array(np.ones(value.ndim - 1, np.int64))
        nodes += [
            helper.make_node("Constant", [], [f"{name}_one"], value=numpy_helper.from_array(value)),
            helper.make_node("Constant", [], [f"{name}_ones"], value=ones),
            helper.make_node("Concat", ["batch", f"{name}_ones"], [f"{name}_shape"], axis=0),
            helper.make_node("Expand", [f"{name}_one", f"{name}_shape"], [name]),
        ]
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", CANVAS, CANVAS, 3]),
        helper.make_tensor_value_info("image_sizes", TensorProto.FLOAT, ["B", 2]),
    ]
    outputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), ["B", *value.shape[1:]]
        )
        for name, value in answers.items()
    ]
    graph = helper.make_graph(nodes, "constant", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {CONTRACT_KEY: contract.to_json()})
    return model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(constant_network(), path)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    assert cv2.imwrite(str(path), np.full((CANVAS, 2 * CANVAS, 3), 90, np.uint8))
    return path


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that was written to stderr."""
    captured = capsys.readouterr()
    assert captured.err.startswith("anchorline: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_detect_writes_picture_lines_and_figures(
    model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save, lines, figures = tmp_path / "out" / "drawn.png", tmp_path / "out.jsonl", tmp_path / "out.json"
    options = ["--save", str(save), "--jsonl", str(lines), "--json", str(figures), "--threads", "1"]
    assert cli.main(["detect", str(image), "--model", str(model), "--provider", "cpu", *options]) == 0

    (line,) = map(json.loads, lines.read_text(encoding="utf-8").splitlines())
    assert line["source"] == str(image)
    assert line["size"] == [CANVAS, 2 * CANVAS]
    (found,) = line["detections"]
    assert found["box"] == pytest.approx([2 * side for side in BOX])  # the canvas halves this image
    assert (found["score"], found["label"], found["name"]) == (0.75, 1, CLASS_NAMES[1])

    report = json.loads(figures.read_text(encoding="utf-8"))
    assert report["frames"] == 1
    assert {"decode", "preprocess", "network", "draw", "write"} <= set(report["stages"])
    drawn = cv2.imread(str(save))
    assert drawn.shape == (CANVAS, 2 * CANVAS, 3)
    assert np.any(drawn != 90)
    assert "network" in capsys.readouterr().out


def test_detect_leaves_out_scores_below_the_threshold(model: Path, image: Path, tmp_path: Path) -> None:
    lines = tmp_path / "out.jsonl"
    options = ["--score-threshold", "0.8", "--jsonl", str(lines)]
    assert cli.main(["detect", str(image), "--model", str(model), *options]) == 0
    assert json.loads(lines.read_text(encoding="utf-8"))["detections"] == []


def test_detect_warns_of_a_source_it_had_to_skip(
    model: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = image.with_name("broken.png")
    broken.write_bytes(image.read_bytes()[:40])
    assert cli.main(["detect", str(image), str(broken), "--model", str(model)]) == 0
    assert f"anchorline: warning: {broken}" in capsys.readouterr().err


def test_detect_takes_videos_filters_and_a_policy(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, lines, figures = tmp_path / "clip.mp4", tmp_path / "out.jsonl", tmp_path / "out.json"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 20.0, (2 * CANVAS, CANVAS))
    for _ in range(9):
        writer.write(np.full((CANVAS, 2 * CANVAS, 3), 90, np.uint8))
    writer.release()
    outputs = ["--jsonl", str(lines), "--json", str(figures), "--pictures", str(tmp_path / "drawn")]
    kept = ["--classes", CLASS_NAMES[1], "--min-score", f"{CLASS_NAMES[1]}=0.5", "--max-detections", "3"]
    options = [
        "--stride",
        "2",
        "--policy",
        "wait",
        "--batch",
        "2",
        "--max-wait",
        "0.5",
        "--region",
        "0,0,1,1",
    ]
    assert cli.main(["detect", f"door={video}", "--model", str(model), *outputs, *kept, *options]) == 0
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [(row["source"], row["frame"], len(row["detections"])) for row in rows] == [
        ("door", index, 1) for index in range(0, 9, 2)
    ]
    report = json.loads(figures.read_text(encoding="utf-8"))
    assert (report["frames"], report["dropped"], report["reconnects"]) == (5, 0, 0)
    assert report["sources"]["door"]["frames_in"] == 9
    assert set(report["age"]) == {"p50", "p95", "p99"}
    assert cv2.imread(str(tmp_path / "drawn" / "latency.png")) is not None
    assert "door" in capsys.readouterr().out

    nothing = ["--min-score", "0.8", "--policy", "latest"]
    assert cli.main(["detect", str(video), "--model", str(model), "--jsonl", str(lines), *nothing]) == 0
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert rows
    assert not any(row["detections"] for row in rows)


def test_ctrl_c_ends_detect_with_its_figures_and_files(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file played at its own rate stands for a camera, whose run always ends like this."""
    leave, left = VideoPipeline._leave, []

    def leave_and_interrupt(self: VideoPipeline, result: Any) -> None:
        leave(self, result)
        left.append(result)
        if len(left) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(VideoPipeline, "_leave", leave_and_interrupt)
    video, lines, figures = tmp_path / "clip.mp4", tmp_path / "out.jsonl", tmp_path / "out.json"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (2 * CANVAS, CANVAS))
    for _ in range(100):
        writer.write(np.full((CANVAS, 2 * CANVAS, 3), 90, np.uint8))
    writer.release()
    options = ["--policy", "latest", "--jsonl", str(lines), "--json", str(figures)]
    assert cli.main(["detect", f"door={video}", "--model", str(model), *options]) == 130
    count = len(lines.read_text(encoding="utf-8").splitlines())
    assert 3 <= count < 100
    assert json.loads(figures.read_text(encoding="utf-8"))["frames"] == count
    captured = capsys.readouterr()
    assert "door" in captured.out
    assert "interrupted" in captured.err


@pytest.mark.parametrize("batch", ["1", "3"])
def test_evaluate_reports_the_accuracy(
    batch: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    options = ["--batch", batch, "--json", str(figures)]
    assert cli.main(["evaluate", str(model), "--data", "synthetic:4", *options]) == 0
    report = json.loads(figures.read_text(encoding="utf-8"))
    assert report["images"] == 4
    assert report["provider"] == "cpu"
    assert report["precision"] == "fp32"
    assert 0.0 <= report["map50"] < 0.5  # one fixed box finds next to nothing
    assert set(report["per_class"]) == set(CLASS_NAMES)
    assert "AP50" in capsys.readouterr().out


def test_evaluate_tells_of_boxes_left_out(
    model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = {
        "images": [{"id": 1, "file_name": image.name, "width": 2 * CANVAS, "height": CANVAS}],
        "categories": [{"id": 1, "name": CLASS_NAMES[0]}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 20, 20]},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [5, 5, 0, 9]},
        ],
    }
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(annotations), encoding="utf-8")
    assert cli.main(["evaluate", str(model), "--data", f"coco:{tmp_path},{path}"]) == 0
    assert "1 images; left out: 1 " in capsys.readouterr().err


def test_evaluate_writes_its_pictures(model: Path, tmp_path: Path) -> None:
    options = ["--pictures", str(tmp_path / "plots"), "--shown-score", "0.25"]
    assert cli.main(["evaluate", str(model), "--data", "synthetic:2", *options]) == 0
    names = {"per_class.png", "pr_curves.png", "confusion.png", "worst_images.jpg"}
    assert names <= {path.name for path in (tmp_path / "plots").iterdir()}
    assert json.loads((tmp_path / "plots/confusion.json").read_text())["min_score"] == 0.25
    for name in ("per_class", "pr_curves", "confusion", "worst_images"):  # each says what it is of
        found = json.loads((tmp_path / f"plots/{name}.json").read_text())
        assert found["model"] == {"name": "model.onnx", "sha256": sha256_of(model)}
        assert found["data"] == "synthetic:2"


def test_evaluate_on_yolo_data_tells_of_images_without_labels(
    model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("images/test", "labels/test"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / f"data/images/test/{name}.png").write_bytes(image.read_bytes())
    (tmp_path / "data/labels/test/a.txt").write_text("0 0.25 0.375 0.25 0.5")  # the box that is detected
    (tmp_path / "data/classes.txt").write_text(CLASS_NAMES[1])
    figures = tmp_path / "figures.json"
    spec = f"yolo:{tmp_path / 'data'}@test"
    assert cli.main(["evaluate", str(model), "--data", spec, "--json", str(figures)]) == 0
    assert "1 of 2 images have no label file" in capsys.readouterr().err
    # Found on one image, and as certainly on the other, where nothing is.
    assert json.loads(figures.read_text())["map50"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.onnx", None),
        ("empty.onnx", b""),
        ("text.onnx", b"this is no network\n"),
        ("model.engine", b"a plan"),
        ("truncated.onnx", constant_network().SerializeToString()[:200]),
        ("newer.onnx", constant_network(dataclasses.replace(CONTRACT, version=99)).SerializeToString()),
        ("missing.safetensors", None),
        ("text.safetensors", b"this is no checkpoint\n"),
    ],
)
@pytest.mark.parametrize("verb", ["detect", "evaluate"])
def test_a_model_that_cannot_be_used_is_one_line(
    verb: str,
    name: str,
    content: bytes | None,
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = tmp_path / name, tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    detect = ["detect", str(image), "--model", str(path), "--jsonl", str(out)]
    evaluate = ["evaluate", str(path), "--data", "synthetic:1", "--json", str(out)]
    assert cli.main(detect if verb == "detect" else evaluate) == 2
    assert name in error_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize("source", ["missing.png", "notes.txt", "empty", "broken.png", "broken.mp4"])
def test_a_source_that_cannot_be_used_is_one_line(
    source: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("no picture", encoding="utf-8")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out.jsonl"
    assert cli.main(["detect", str(tmp_path / source), "--model", str(model), "--jsonl", str(out)]) == 2
    assert source in error_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("", "data ''"),
        ("photos", "'photos'"),
        ("voc:nowhere@test", "nowhere"),
        ("coco:nowhere", "coco:nowhere"),
        ("synthetic:0", "synthetic:0"),
        ("synthetic:x", "synthetic:x"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(
    spec: str, named: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(model), "--data", spec]) == 2
    assert named in error_line(capsys)


def test_a_class_that_the_model_does_not_know_is_one_line(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cats.onnx"
    onnx.save(constant_network(dataclasses.replace(CONTRACT, names=("background noise", "cat"))), path)
    assert cli.main(["evaluate", str(path), "--data", "synthetic:2"]) == 2
    assert "cat" in error_line(capsys)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--score-threshold", "1.5"),
        ("--score-threshold", "nan"),
        ("--save", "out.txt"),
        ("--classes", "unicorn"),
        ("--min-score", "much"),
        ("--min-score", "2.0"),
        ("--region", "0,0,1"),
        ("--pictures", "latency.txt"),
        ("--policy", "newest"),
    ],
)
def test_an_option_out_of_range_is_one_line(
    option: str, value: str, model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = str(tmp_path / value) if option == "--save" else value
    before = sorted(tmp_path.iterdir())
    assert cli.main(["detect", str(image), "--model", str(model), option, value]) == 2
    assert value in error_line(capsys)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("sources", "policy", "tuning"),
    [
        (["clip.mp4", "photos"], None, "throughput"),
        (["clip.mp4"], "latest", "latency"),
        (["clip.mp4", "0"], None, "latency"),
        (["rtsp://127.0.0.1/live"], None, "latency"),
        (["rtsp://127.0.0.1/live"], "wait", "latency"),
    ],
)
def test_files_are_detected_for_throughput(sources: list[str], policy: Any, tuning: str) -> None:
    from anchorline.runtime.video.source import waits

    assert waits(sources, policy) == (tuning == "throughput")


def test_slices_reach_detect_and_evaluate(
    model: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    sliced = ["--slice", "64", "--overlap", "0.5", "--no-full", "--batch", "1", "--json", str(figures)]
    assert cli.main(["detect", str(image), "--model", str(model), *sliced]) == 0
    written = json.loads(figures.read_text(encoding="utf-8"))
    views = len(slice_views((CANVAS, 2 * CANVAS), (64, 64), 0.5, full=False))
    assert written["views"] == views
    assert (f"each frame in {views} views" in capsys.readouterr().out) == (views > 1)
    assert cli.main(["evaluate", str(model), "--data", "synthetic:1", "--slice", "200x300"]) == 0
    assert "AP50" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["detect", "evaluate", "bench"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--slice", "30"], "height is 30; expected a whole number of at least 64"),
        (["--slice", "640by640"], "--slice is '640by640'; expected HEIGHTxWIDTH in pixels"),
        (["--slice", "640", "--overlap", "0.95"], "overlap is 0.95; expected a number from 0 to 0.9"),
        (["--overlap", "0.3"], "overlap is 0.3, which needs --slice HEIGHTxWIDTH|auto"),
        (["--no-full"], "full is False, which needs --slice HEIGHTxWIDTH|auto"),
        (["--slice", "auto"], "does not tell how large the objects were that it was trained on"),
    ],
)
def test_slices_are_refused_in_one_line(
    verb: str, options: list[str], words: str, model: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = {
        "detect": ["detect", str(image), "--model", str(model)],
        "evaluate": ["evaluate", str(model), "--data", "synthetic:1"],
        "bench": ["bench", str(model), "--images", str(image), "--batches", "1"],
    }[verb]
    assert cli.main([*command, *options]) == 2
    assert words in error_line(capsys)
