"""The small parts of a training: its metrics file, its progress lines, its precision, its device."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.train.loop.distributed import choose_device
from anchorline.train.loop.metrics import COLUMNS, MetricsFile, StepReport, training_progress
from anchorline.train.loop.optim import autocast, computes_bf16
from anchorline.train.loop.trainer import NotFiniteError, check_finite

LOSSES = {
    "loss": 4.25,
    "loss_objectness": 1.0,
    "loss_rpn_box": 0.25,
    "loss_classifier": 2.0,
    "loss_box": 1.0,
}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_metrics_have_a_row_a_step_and_a_row_a_validation(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.add(1, 0, {"lr": 0.001, **LOSSES})
    metrics.add(1, 1, {"map50": 0.5}, ".5f")
    metrics.flush()
    step, validation = rows(metrics.path)
    assert tuple(step) == COLUMNS
    assert {name: float(step[name]) for name in LOSSES} == LOSSES
    assert (step["step"], step["epoch"], float(step["lr"]), step["map50"]) == ("1", "0", 0.001, "")
    assert (validation["step"], validation["loss"], float(validation["map50"])) == ("1", "", 0.5)


def test_resumed_metrics_end_at_the_step_and_go_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path)
    for step in range(1, 6):
        first.add(step, 0, {"lr": 0.1, **LOSSES, "loss": float(step)})
        if step == 3:
            first.add(3, 1, {"map50": 0.25}, ".5f")
    first.flush()
    second = MetricsFile(path)
    second.resume(3)
    second.add(4, 1, {"lr": 0.1, **LOSSES, "loss": 40.0})
    second.flush()
    assert [(row["step"], row["loss"]) for row in rows(path)] == [
        ("1", "1"),
        ("2", "2"),
        ("3", "3"),
        ("3", ""),
        ("4", "40"),
    ]


def test_resuming_without_a_metrics_file_starts_one(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.resume(10)
    metrics.flush()
    assert rows(metrics.path) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a,b\n1,2\n",
        b"step,epoch\none,two\n",
        b"\xff\xfe\x00",
        ",".join(COLUMNS).encode() + b"\n1,0,0.1,1,1,1,1,1,,too,many\n",
        b"step\n\x00\n",
    ],
)
def test_metrics_of_something_else_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"metrics\.csv: not the metrics") as caught:
        MetricsFile(path).resume(5)
    assert "\n" not in str(caught.value)


def test_progress_elsewhere_than_on_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with training_progress() as show:
        for step in range(11, 21):  # a resumed run
            show(StepReport(step, 20, 1, 0.01, {**LOSSES, "loss": 2.0}))
    captured = capsys.readouterr()
    assert captured.out == ""
    first, last = captured.err.splitlines()
    assert first.startswith("step 11/20 epoch 2 loss 2.000 objectness 1.000 ")
    assert last.startswith("step 20/20 ")
    assert last.endswith("left 0 s")


def test_precision_chooses_the_type_of_the_heavy_layers() -> None:
    cpu = torch.device("cpu")
    one = torch.ones(2, 2)
    for precision, expected in (
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("auto", torch.bfloat16 if computes_bf16(cpu) else torch.float32),
    ):
        with autocast(cpu, precision):
            assert (one @ one).dtype == expected


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["", "abacus", "meta", "cuda:99", "cpu cpu"])
def test_a_device_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(SettingsError, match="expected auto, cpu or cuda") as caught:
        choose_device(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_named() -> None:
    with pytest.raises(NotFiniteError, match=r"^b nan, c -inf$"):
        check_finite({"a": 1.0, "b": float("nan"), "c": float("-inf")})
    check_finite({"a": 1.0})
