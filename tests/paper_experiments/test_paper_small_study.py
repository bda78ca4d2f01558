"""The whole program on a tiny model and a dozen scenes, stopped twice on its way."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from paper_experiments.runs import ANCHORS, COUNTS, LAMBDAS, WITHOUT_NMS
from paper_experiments.study import open_study
from paper_experiments.training import train_run

from anchorline.data.dataset import concatenate, load_dataset
from anchorline.data.proposals import write_proposals
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.images import read_image

Command = Callable[..., list[str]]
CURVES = 6  # numbers of proposals in a recall curve


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Interrupting:
    """Interrupts a study at its ``at``-th training step."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def __call__(self, clock: object, name: str) -> None:
        self.steps += 1
        if self.steps == self.at:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_small_study(
    program: ModuleType,
    command: Command,
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = command("--seeds", "0", "--epochs", "4", "--budget", "60")
    for at in (3, 13):  # in the second epoch of joint training; then in alternating's third step
        with monkeypatch.context() as patch:
            counter = Interrupting(at)
            patch.setattr(program.Clock, "tick", lambda self, name, counter=counter: counter(self, name))
            assert program.main(arguments) == 130
    assert program.main(arguments) == 0
    assert program.main(arguments) == 0

    with (results / "paper.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    counts = Counter(row["experiment"] for row in rows)
    search = 1  # OpenCV's contrib build may be there or not
    assert counts["joint"] == counts["one-stage"] == counts["timing"] == 1
    assert counts["selective-search"] == search
    assert counts["alternating"] == 2
    assert counts["anchors"] == len(ANCHORS)
    assert counts["lambda"] == len(LAMBDAS)
    assert counts["proposals"] == 4 * len(COUNTS) + 1
    assert counts["recall"] >= 3 * CURVES
    for row in rows:
        if row["experiment"] not in ("recall", "timing", "selective-search"):
            assert 0.0 <= float(row["voc07"]) <= 1.0, row
            assert "failed" not in row["note"]
    (whole,) = (row for row in rows if (row["variant"], row["proposals"]) == ("no NMS", str(WITHOUT_NMS)))
    assert float(whole["found"]) <= 4 * 6 * 9  # the anchors of a 64 x 96 canvas
    (times,) = (row for row in rows if row["experiment"] == "timing")
    assert all(float(times[f"{part}_ms"]) > 0 for part in ("conv", "rpn", "selection", "region"))

    summary = json.loads((results / "paper.json").read_text())
    assert summary["missing_runs"] == []
    assert {"RPN, joint training", "RPN, shared", "RPN, unshared"} <= set(summary["curves"])
    capsys.readouterr()
    assert program.main(["--report", "--plots", str(tmp_path / "plots")]) == 0
    assert "### One stage against two (table 10)" in capsys.readouterr().out
    for name in ("paper-recall.png", "paper-proposals.png"):
        assert read_image(tmp_path / "plots" / name).std() > 5


@pytest.mark.slow
def test_stored_selective_search_is_trained_and_tested_on(
    program: ModuleType, command: Command, tiny_voc: Path, results: Path, tmp_path: Path
) -> None:
    parts = [load_dataset(f"voc:{tiny_voc}@{split}") for split in ("trainval", "test")]
    everything, stored = concatenate(parts), tmp_path / "stored.jsonl"
    given = [  # the objects themselves
        Detections(image.boxes, np.ones(len(image.boxes)), np.zeros(len(image.boxes)), ("object",))
        for image in everything
    ]
    write_proposals(stored, everything, given)
    options = ["--seeds", "0", "--epochs", "4", "--selective-search", str(stored)]
    assert program.main([*command(*options), "--only", "selective-search"]) == 0
    with (results / "paper.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (run,) = (row for row in rows if row["experiment"] == "selective-search")
    assert run["note"] == ""
    assert 0.0 <= float(run["voc07"]) <= 1.0
    assert 1 <= float(run["found"]) <= 10
    recall = [float(row["recall70"]) for row in rows if row["experiment"] == "recall"]
    assert recall == [1.0] * CURVES


@pytest.mark.slow
def test_an_interrupted_one_stage_training_ends_as_an_uninterrupted_one(
    program: ModuleType, command: Command, tmp_path: Path
) -> None:
    from paper_experiments.clock import Clock
    from paper_experiments.runs import Run
    from safetensors.torch import load_file

    study, run = open_study(program._parser().parse_args(command())), Run("one-stage", 0)

    class Stopping(Clock):
        steps = 0

        def tick(self, name: str) -> None:
            self.steps += 1
            if self.steps == 5:  # the first of the third epoch
                raise KeyboardInterrupt

    whole = train_run(study, run, 4, tmp_path / "whole", Clock(tmp_path / "a.json", 1e6))
    with pytest.raises(KeyboardInterrupt):
        train_run(study, run, 4, tmp_path / "parts", Stopping(tmp_path / "b.json", 1e6))
    parts = train_run(study, run, 4, tmp_path / "parts", Clock(tmp_path / "b.json", 1e6))
    first, second = load_file(whole.model), load_file(parts.model)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
