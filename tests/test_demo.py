"""The demo in small: every stage runs, and everything it promises is there and can be opened."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
from rich.console import Console

from anchorline import demo as module
from anchorline.data.synthetic import CLASS_NAMES
from anchorline.data.synthetic_video import synthetic_video_dataset
from anchorline.demo import DemoReport, demo, evaluate_lines
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.io.files import sha256_of
from anchorline.runtime.video.reader import VideoReader
from anchorline.train.checkpoint import load_checkpoint

SCENES, FRAMES = 6, 14

TINY = Path(__file__).with_name("tiny.toml")


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path, onnx_of: Callable[..., Any]
) -> Iterator[DemoReport]:
    """The report of a demo on a few scenes and frames.

    Its training is that of test_cli_training.py, whose export it therefore shares.
    """
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anchorline.export.onnx_export.to_onnx", onnx_of)
        patch.setattr(module, "TRAINING_SCENES", SCENES)
        patch.setattr(module, "VIDEO_FRAMES", FRAMES)
        seed = ["training.seed=5"]
        yield demo(folder / "demo", backbone_weights=tiny_weights, preset=str(TINY), overrides=seed)


def test_nothing_is_missing_and_nothing_is_left_over(made: DemoReport) -> None:
    found = {str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file()}
    assert found >= {
        "contact_sheet.png",
        "demo.json",
        "detected.mp4",
        "detections.jsonl",
        "evaluation.json",
        "loss_curve.png",
        "model.onnx",
        "pr_curves.png",
        "report.html",
        "run/last/model.safetensors",
        "run/last/state.pt",
        "run/metrics.csv",
        "run/model.safetensors",
        "run/settings.json",
        "scene.mp4",
    }
    assert not list(made.folder.rglob(".*")), "temporary files are left"
    assert set(made.files) == {"train", "export", "video", "detect", "evaluate", "pictures", "report"}
    assert all(path.is_file() for path in made.files.values())
    assert set(made.seconds) == set(made.files)


def test_the_videos_have_every_frame(made: DemoReport) -> None:
    frames = {}
    for name in ("scene.mp4", "detected.mp4"):
        with VideoReader(made.folder / name) as reader:
            frames[name] = [frame for _, _, frame in reader]
        assert len(frames[name]) == FRAMES
        assert {frame.shape for frame in frames[name]} == {(240, 320, 3)}
    assert made.detection.frames == FRAMES


@pytest.mark.parametrize("name", ["contact_sheet.png", "loss_curve.png", "pr_curves.png"])
def test_the_pictures_show_something(made: DemoReport, name: str) -> None:
    picture = cv2.imread(str(made.folder / name))
    assert picture is not None
    assert min(picture.shape[:2]) >= 200
    assert picture.std() > 5


def test_each_frame_has_its_line(made: DemoReport) -> None:
    lines = [json.loads(line) for line in (made.folder / "detections.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(FRAMES))
    assert sum(len(line["detections"]) for line in lines) > 0
    assert {each["name"] for line in lines for each in line["detections"]} <= set(CLASS_NAMES)


def test_the_figures_are_those_of_the_lines(made: DemoReport) -> None:
    truth = synthetic_video_dataset(module.VIDEO_SEED, FRAMES)
    again = evaluate_lines(made.folder / "detections.jsonl", truth).to_json()
    again["model"] = {"name": "model.onnx", "sha256": sha256_of(made.folder / "model.onnx")}
    assert json.loads((made.folder / "evaluation.json").read_text()) == json.loads(json.dumps(again))
    assert again["images"] == FRAMES
    report = json.loads((made.folder / "demo.json").read_text())
    assert report["evaluation"] == json.loads(json.dumps(again))
    assert report["detect"]["frames"] == FRAMES
    assert set(report["seconds"]) == set(made.seconds)


def test_the_page_has_every_part_but_the_latency(made: DemoReport) -> None:
    page = (made.folder / "report.html").read_text(encoding="utf-8")
    for part in ("Precision and recall", "Confusion", "The worst images", "The numbers held", "Loss over"):
        assert part in page
    assert "Found and not shown" not in page
    assert "latency: not measured" in page


def test_the_model_was_trained_on_the_scenes_and_verified(made: DemoReport) -> None:
    _, contract = load_checkpoint(made.folder / "run" / "model.safetensors")
    assert contract.names == CLASS_NAMES
    assert contract.source["command"] == "anchorline demo"
    assert contract.source["data"] == f"synthetic:{SCENES}@{module.TRAINING_SEED}"
    with (made.folder / "run" / "metrics.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    assert made.export.verification is not None
    assert made.export.verification.passed
    assert made.export.verification.detections.summary.total.matched > 0


def test_the_table_names_each_step_and_file(made: DemoReport) -> None:
    text = io.StringIO()
    Console(file=text, width=160).print(made.render())
    shown = text.getvalue()
    for step, path in made.files.items():
        assert step in shown
        assert path.name in shown
    assert f"{FRAMES} frames" in shown
    assert "mAP50" in shown


def test_lines_become_the_detections_they_were(tmp_path: Path) -> None:
    """Perfect lines reach an accuracy of 1, with the classes matched by name."""
    truth = synthetic_video_dataset(3, 2)
    lines = []
    for image in truth:
        rows = [
            {"box": box.tolist(), "score": 0.9, "label": 99, "name": truth.names[label]}
            for box, label in zip(image.boxes, image.labels, strict=True)
        ]
        lines.append(json.dumps({"detections": rows}))
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert evaluate_lines(path, truth).map50 == 1.0
    path.write_text('{"detections": []}\n' * 2)
    assert evaluate_lines(path, truth).map50 == 0.0


def test_without_backbone_weights_it_says_where_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "mobilenet_v2_weights", lambda: None)
    with pytest.raises(SettingsError, match="--backbone-weights") as caught:
        demo(tmp_path / "demo")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "demo").exists()
