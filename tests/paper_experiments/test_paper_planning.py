"""The plan: which runs, how many epochs, and when the budget ends."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from paper_experiments.clock import BudgetSpent, Clock
from paper_experiments.costs import Costs, plan_epochs
from paper_experiments.runs import EXPERIMENTS, Run, runs_of
from paper_experiments.study import Study, fitted_scales, open_study

from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.runtime.io.errors import AnchorlineError, SettingsError
from anchorline.train.model.settings import ModelSettings

Command = Callable[..., list[str]]
COSTS = Costs(step_s=1.0, image_s=0.1, dense_s=0.5, anchors=1300)


@pytest.fixture
def study(program: ModuleType, command: Command) -> Study:
    options: Namespace = program._parser().parse_args(command("--scales", "16", "32", "64"))
    return open_study(options)


def test_the_runs_of_three_seeds_and_of_sweeps_on_one() -> None:
    runs = runs_of((0, 1, 2), (0,))
    counts = {name: sum(run.experiment == name for run in runs) for name in EXPERIMENTS}
    of_each_seed = dict.fromkeys(("joint", "alternating", "one-stage", "selective-search", "proposals"), 3)
    assert counts == {**of_each_seed, "anchors": 3, "lambda": 3, "timing": 1}
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    place = {run.name: index for index, run in enumerate(runs)}
    assert len(place) == len(runs)
    for run in runs:
        assert all(place[needed] < place[run.name] for needed in run.needs)


def test_a_chosen_experiment_brings_what_it_builds_on() -> None:
    names = [run.name for run in runs_of((5,), (5,), ("proposals",))]
    assert names == ["joint-seed5", "alternating-seed5", "selective-search-seed5", "proposals-seed5"]
    assert [run.name for run in runs_of((5,), (5,), ("timing",))] == ["joint-seed5", "timing-seed5"]


def test_detecting_costs_more_with_more_proposals() -> None:
    assert COSTS.detecting(300) == COSTS.detecting(50) == pytest.approx(0.1)
    assert COSTS.detecting(800) == pytest.approx(0.3)  # half way from 300 to all 1300
    assert COSTS.detecting(6000) == pytest.approx(0.5)


def test_the_budget_is_shared_among_the_trainings(study: Study) -> None:
    # 8 images in batches of 3 are 2 steps an epoch; a joint run measures 2 passes over 4 test images.
    schedule = plan_epochs(study, COSTS, 100.0, (0, 1, 2), ("joint",), wanted=12)
    assert schedule.epochs == 14  # (90 - 3 * 0.8) / (3 * 2) = 14.6
    assert schedule.training_s == pytest.approx(84.0)
    assert schedule.evaluation_s == pytest.approx(2.4)


def test_anchors_lose_seeds_before_all_lose_epochs(study: Study) -> None:
    schedule = plan_epochs(study, COSTS, 120.0, (0, 1, 2), ("anchors",), wanted=12)
    assert schedule.sweep_seeds == (0,)
    assert schedule.epochs == 17  # (108 - 3 * 0.8) / (3 * 2) = 17.6
    with_all = plan_epochs(study, COSTS, 120.0, (0, 1, 2), ("anchors",), wanted=5)
    assert with_all.sweep_seeds == (0, 1, 2)
    assert with_all.epochs == 5  # (108 - 9 * 0.8) / (9 * 2) = 5.6


def test_a_budget_below_four_epochs_is_refused(study: Study) -> None:
    with pytest.raises(SettingsError, match=r"expected 0\.6 minutes"):  # (28.8 + 2.4) / 0.9 s
        plan_epochs(study, Costs(1.2, 0.1, 0.5, 1300), 20.0, (0, 1, 2), ("joint",), wanted=12)


def test_every_run_s_settings(study: Study) -> None:
    joint = study.settings(Run("joint", 3), 9)
    assert joint.model.anchor_sizes == ((16.0, 32.0, 64.0),)
    assert joint.model.aspect_ratios == (0.5, 1.0, 2.0)
    assert (joint.training.rpn_normalisation, joint.training.rpn_samples) == ("paper", 256)
    assert (joint.training.rpn_box_loss_weight, joint.training.seed, joint.training.epochs) == (10, 3, 9)
    single = study.settings(Run("anchors", 0, "1 scale, 1 ratio"), 9).model
    assert (single.anchor_sizes, single.aspect_ratios) == (((32.0,),), (1.0,))
    assert study.settings(Run("anchors", 0, "3 scales, 1 ratio"), 9).model.anchors_per_place == 3
    weighed = study.settings(Run("lambda", 0, "0.1"), 9)
    assert weighed.training.rpn_box_loss_weight == 0.1
    assert weighed.model == joint.model
    assert study.settings(Run("alternating", 0), 9).training.regime == "alternating"


def test_what_decides_a_run_decides_its_hash(study: Study) -> None:
    run = Run("joint", 0)
    keys = {
        study.key(run, 4, []),
        study.key(run, 5, []),
        study.key(Run("joint", 1), 4, []),
        study.key(Run("lambda", 0, "1"), 4, []),
        study.key(run, 4, ["another model below it"]),
    }
    assert len(keys) == 5
    assert study.key(run, 4, []) in keys


def test_scales_follow_the_objects_on_the_canvas() -> None:
    sides = np.linspace(20, 120, 101)  # 5 % and 95 % of them are 25 and 115
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1).astype(np.float32)
    flags = np.zeros(len(boxes), bool)
    image = LabelledImage("a", (200, 400), boxes, np.zeros(101, np.int64), flags, flags, lambda: np.zeros(0))
    model = ModelSettings(neck="single", canvas=(416, 800), anchor_sizes=((64.0,),))
    assert fitted_scales(Dataset("", ("x",), (image,)), model) == (50.0, 107.0, 230.0)  # twice as large there


class Hands:
    """A clock's hands that the test moves."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_the_clock_counts_all_sittings(tmp_path: Path) -> None:
    hands, path = Hands(), tmp_path / "spent.json"
    clock = Clock(path, 60.0, hands)
    hands.time += 5.0
    clock.count()
    for _ in range(3):
        hands.time += 10.0
        clock.tick("joint-seed0")
    assert clock.of_run("joint-seed0") == 30.0
    later = Clock(path, 60.0, hands)
    assert later.spent == 35.0
    assert later.of_run("joint-seed0") == 30.0
    later.check()
    hands.time += 25.0
    with pytest.raises(BudgetSpent):
        later.tick("joint-seed0")
    assert json.loads(path.read_text())["spent_s"] == 60.0
    assert not Clock(path, 61.0, hands).is_spent


def test_a_damaged_clock_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "spent.json").write_text('{"spent_s": null}')
    with pytest.raises(AnchorlineError, match="remove the file to count from zero"):
        Clock(tmp_path / "spent.json", 60.0)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--budget", "0"], "--budget is 0"),
        (["--epochs", "3"], "--epochs is 3; expected at least 4"),
        (["--scales", "64", "32", "128"], "expected auto, or three rising sizes"),
        (["--seeds", "1", "1"], "--seeds is [1, 1]"),
        (["--scales", "small"], "expected auto, or three rising sizes"),
        (["--backbone-weights", "nowhere.pth"], "nowhere.pth: no such file"),
        (["--selective-search", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--train-split", "nosplit"], "nosplit"),
        (["--preset", "nopreset"], "preset 'nopreset' is not known"),
        (["--set", "training.batch=0"], "training.batch"),
        (["--data", "voc:nowhere"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line(
    program: ModuleType, command: Command, capsys: pytest.CaptureFixture[str], more: list[str], expected: str
) -> None:
    assert program.main(command(*more)) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_without_data_and_shared_folder_it_says_so(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("ANCHORLINE_SHARED", raising=False)
    assert program.main(["--state", str(tmp_path)]) == 2
    assert "--data voc:DIR" in capsys.readouterr().err
    assert program.main([]) == 2
    assert "no --state given" in capsys.readouterr().err
