"""``anchorline train`` and ``export``: one round trip by the command, Ctrl-C, and every wrong turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from anchorline import cli
from anchorline.data.synthetic import CLASS_NAMES, generate_scene

TINY = Path(__file__).with_name("tiny.toml")


@pytest.fixture(scope="module")
def preset() -> Path:
    """A preset of our own, as a file."""
    return TINY


@pytest.fixture(scope="module")
def run(preset: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, the training of test_demo.py; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["train", "--preset", str(preset), "--data", "synthetic:6@1", "--val", "synthetic:2@7"]
    arguments += ["--backbone-weights", str(tiny_weights)]
    assert cli.main([*arguments, "--out", str(out), "--seed", "5"]) == 0
    return out


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; stdout must be empty."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("anchorline: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_from_scenes_to_figures(
    run: Path,
    onnx_of: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """train, export, detect and evaluate, each on what the one before has written."""
    monkeypatch.setattr("anchorline.export.onnx_export.to_onnx", onnx_of)
    checkpoint, model = run / "model.safetensors", tmp_path / "model.onnx"
    assert json.loads((run / "settings.json").read_text())["training"]["seed"] == 5
    assert cli.main(["export", str(checkpoint), "--out", str(model), "--max-batch", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{model}: detections, any frame size, 10 stages hold, ")
    assert " 0 detections matched" not in shown

    image, lines = tmp_path / "scene.png", tmp_path / "lines.jsonl"
    assert cv2.imwrite(str(image), generate_scene(3)[0])
    drawn = tmp_path / "drawn.png"
    options = ["--jsonl", str(lines), "--save", str(drawn), "--shown-score", "0.1"]
    assert cli.main(["detect", str(image), "--model", str(model), *options]) == 0
    (line,) = map(json.loads, lines.read_text().splitlines())
    assert line["size"] == [240, 320]
    assert {each["name"] for each in line["detections"]} <= set(CLASS_NAMES)
    assert len(line["detections"]) > 0
    assert cv2.imread(str(drawn)).shape == (240, 320, 3)

    figures = []
    for name, path in (("pytorch", checkpoint), ("cpu", model)):
        report = tmp_path / f"{name}.json"
        assert cli.main(["evaluate", str(path), "--data", "synthetic:4@9", "--json", str(report)]) == 0
        figures.append(json.loads(report.read_text()))
        assert figures[-1]["provider"] == name
    assert figures[0]["images"] == figures[1]["images"] == 4
    for name in ("map50", "voc07", "map"):
        assert figures[1][name] == pytest.approx(figures[0][name], abs=0.002)


def test_train_tells_where_the_checkpoint_is(
    preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["train", "--preset", str(preset), "--data", "synthetic:3", "--out", str(out)]
    assert cli.main([*arguments, "--epochs", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out / 'model.safetensors'}: 1 steps\n"
    assert "step 1/1" in captured.err
    assert cli.main([*arguments, "--epochs", "1", "--resume"]) == 0
    assert capsys.readouterr().out == f"{out / 'model.safetensors'}: 1 steps\n"
    assert cli.main([*arguments, "--epochs", "3", "--resume"]) == 2
    assert "training.epochs = 1, not 3" in error_line(capsys)


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
def test_ctrl_c_saves_and_exits_with_130(preset: Path, tmp_path: Path) -> None:
    """As from a keyboard: the signal reaches the worker that loads images as well."""
    out = tmp_path / "run"
    arguments = ["train", "--preset", str(preset), "--data", "synthetic:9", "--out", str(out)]
    options = ["--epochs", "100000", "--set", "training.workers=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "anchorline", *arguments, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "last" / "state.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        shown, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert shown.startswith(f"{out / 'model.safetensors'}: ")
    assert errors.endswith("anchorline: interrupted\n")
    assert "Traceback" not in errors
    assert not list(out.rglob(".*")), "temporary files are left"

    from anchorline.train.checkpoint import load_checkpoint

    load_checkpoint(out / "model.safetensors")


def checkpoint_of_others(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3)}, folder / "others.safetensors")
    return folder / "others.safetensors"


def weights_of_others(folder: Path) -> Path:
    import torch

    torch.save({"layer.weight": torch.ones(3)}, folder / "others.pth")
    return folder / "others.pth"


def bad_preset(folder: Path) -> Path:
    (folder / "bad.toml").write_text("[model\n")
    return folder / "bad.toml"


def text_file(folder: Path) -> Path:
    (folder / "notes.txt").write_text("no weights\n")
    return folder / "notes.txt"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--preset", "huge"], "'huge'"),
        (["--preset", "missing.toml"], "'missing.toml'"),
        (["--preset", bad_preset], "bad.toml"),
        (["--set", "epochs"], "'epochs'"),
        (["--set", "wings=2"], "wings"),
        (["--set", "training.wings=2"], "wings"),
        (["--set", "body.wings=2"], "body.wings"),
        (["--set", "training.epochs=many"], "'many'"),
        (["--set", "training.epochs=0"], "training.epochs"),
        (["--set", "training.learning_rate=nan"], "training.learning_rate"),
        (["--set", "training.seed=99999999999999999999"], "training.seed"),
        (["--set", "training.momentum=1.0"], "training.momentum"),
        (["--set", "model.canvas=[100,96]"], "model.canvas"),
        (["--set", "model.backbone=vgg99"], "'vgg99'"),
        (["--epochs", "0"], "--epochs"),
        (["--seed", "-1"], "--seed"),
        (["--data", "voc:nowhere@train"], "nowhere"),
        (["--data", "photos"], "'photos'"),
        (["--data", "synthetic:0"], "synthetic:0"),
        (["--val", "voc:nowhere@val"], "nowhere"),
        (["--backbone-weights", "missing.pth"], "missing.pth"),
        (["--backbone-weights", weights_of_others], "others.pth"),
        (["--backbone-weights", text_file], "notes.txt"),
        (["--device", "abacus"], "'abacus'"),
        (["--device", "cuda:99"], "'cuda:99'"),
        (["--resume"], "state.pt"),
        (["--out", text_file], "notes.txt"),
    ],
)
def test_train_refuses_what_it_cannot_use(
    options: list[object], named: str, preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(option(tmp_path)) if callable(option) else str(option) for option in options]
    arguments = ["train", "--out", str(tmp_path / "run"), *given]
    if "--preset" not in given:
        arguments += ["--preset", str(preset)]
    if "--data" not in given:
        arguments += ["--data", "synthetic:3"]
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(arguments) == 2
    assert named in error_line(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def truncated(folder: Path, run: Path) -> Path:
    path = folder / "truncated.safetensors"
    path.write_bytes((run / "model.safetensors").read_bytes()[:-1000])
    return path


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (truncated, [], "truncated.safetensors"),
        (lambda folder, _: checkpoint_of_others(folder), [], "others.safetensors"),
        (lambda folder, _: text_file(folder), [], "notes.txt"),
        (lambda folder, _: folder / "missing.safetensors", [], "missing.safetensors"),
        (lambda folder, _: folder, [], "is a folder"),
        (None, ["--canvas", "0x0"], "(0, 0)"),
        (None, ["--canvas", "big"], "'big'"),
        (None, ["--canvas", "64x"], "'64x'"),
        (None, ["--canvas", "-64x96"], "'-64x96'"),
        (None, ["--task", "masks"], "'masks'"),
        (None, ["--max-batch", "0"], "--max-batch"),
        (None, ["--out", "model.engine"], "model.engine"),
    ],
)
def test_export_refuses_what_it_cannot_use(
    make: object,
    options: list[str],
    named: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make(tmp_path, run) if callable(make) else run / "model.safetensors"
    out = [] if "--out" in options else ["--out", str(tmp_path / "new" / "model.onnx")]
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert cli.main(["export", str(path), *out, *options]) == 2
    assert named in error_line(capsys)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("model.engine").exists()


def test_a_class_that_the_checkpoint_does_not_know_is_one_line(
    run: Path, preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validation data is read with the names of the training data."""
    image = tmp_path / "image.png"
    assert cv2.imwrite(str(image), np.zeros((64, 96, 3), np.uint8))
    labels = {
        "images": [{"id": 1, "file_name": image.name, "width": 96, "height": 64}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 20, 20]}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    spec = f"coco:{tmp_path},{tmp_path / 'labels.json'}"
    capsys.readouterr()
    options = ["--data", "synthetic:3", "--val", spec, "--out", str(tmp_path / "run")]
    assert cli.main(["train", "--preset", str(preset), *options]) == 2
    assert "cat" in error_line(capsys)
    assert cli.main(["evaluate", str(run / "model.safetensors"), "--data", spec]) == 2
    assert "cat" in error_line(capsys)
    assert not (tmp_path / "run").exists()
