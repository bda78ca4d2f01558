"""The schedules by the command: an RPN alone, its stored proposals, a head on them, and all four steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anchorline import cli

TINY = Path(__file__).with_name("tiny.toml")
DATA = ("--data", "synthetic:6")


def train(out: Path, *options: str) -> int:
    return cli.main(["train", "--preset", str(TINY), *DATA, "--out", str(out), *options])


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The proposals of an RPN trained alone; not to be changed."""
    folder = tmp_path_factory.mktemp("rpn")
    assert train(folder, "--schedule", "rpn-only") == 0
    out = folder / "proposals.jsonl"
    assert (
        cli.main(["proposals", *DATA, "--model", str(folder / "model.safetensors"), "--out", str(out)]) == 0
    )
    return out


def test_an_rpn_then_a_head_on_its_proposals(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recall = tmp_path / "recall.json"
    assert cli.main(["evaluate", str(stored), *DATA, "--json", str(recall)]) == 0
    figures = json.loads(recall.read_text())
    assert figures["images"] == 6
    assert 0.0 < figures["recall"]["100"]["0.5"] <= 1.0

    run = tmp_path / "head"
    assert train(run, "--schedule", "fast-rcnn", "--proposals", str(stored)) == 0
    model, on_stored = run / "model.safetensors", tmp_path / "map.json"
    options = ["--proposals", str(stored), "--json", str(on_stored)]
    assert cli.main(["evaluate", str(model), *DATA, *options]) == 0
    assert 0.0 <= json.loads(on_stored.read_text())["map50"] <= 1.0

    capsys.readouterr()
    assert cli.main(["evaluate", str(model), *DATA]) == 2  # its RPN was never trained
    line = capsys.readouterr().err
    assert "no trained RPN" in line
    assert line.count("\n") == 1


def test_the_best_n_are_kept(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, model = tmp_path / "few.jsonl", stored.with_name("model.safetensors")
    assert cli.main(["proposals", *DATA, "--model", str(model), "--out", str(out), "--count", "3"]) == 0
    assert capsys.readouterr().out == f"{out}: 18 proposals\n"


def test_four_steps_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(run, "--schedule", "alternating", "--epochs", "4", "--val", "synthetic:2@7") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{run / 'model.safetensors'}: 8 steps, mAP50 ")
    assert {"step-1", "step-2", "step-3", "step-4", "proposals-1.jsonl", "proposals-3.jsonl"} <= {
        path.name for path in run.iterdir()
    }
    assert cli.main(["evaluate", str(run / "proposals-3.jsonl"), *DATA]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--schedule", "fast-rcnn"], "--proposals"),
        (["train", "--schedule", "fast-rcnn", "--proposals", "nowhere.jsonl"], "nowhere.jsonl"),
        (["train", "--schedule", "joint", "--proposals", "nowhere.jsonl"], "proposals"),
        (["train", "--schedule", "alternating", "--epochs", "3"], "epochs"),
        (["proposals"], "expected one: --model MODEL or --method"),
        (["proposals", "--model", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_what_does_not_fit_is_one_line(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *options = arguments
    out = tmp_path / ("run" if verb == "train" else "out.jsonl")
    preset = ["--preset", str(TINY)] if verb == "train" else []
    assert cli.main([verb, *preset, *DATA, "--out", str(out), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()
