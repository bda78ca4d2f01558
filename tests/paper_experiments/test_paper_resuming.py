"""A study that is killed goes on: markers, rows without repetition, the budget of all sittings."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paper_experiments.costs import Costs
from paper_experiments.measuring import Sitting
from paper_experiments.runs import Run
from paper_experiments.state import Result, State, publish, read_rows

Command = Callable[..., list[str]]
RUNS = ["joint-seed0", "joint-seed1", "joint-seed2"]


class Executed:
    """Stands for ``execute``: gives one row a run; the run called ``kill`` raises what it is told."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.kill: str | None = None
        self.error: type[BaseException] = KeyboardInterrupt
        self.seconds = 0.0

    def __call__(self, sitting: Sitting, run: Run) -> Result:
        self.names.append(run.name)
        if run.name == self.kill:
            raise self.error
        sitting.clock.budget -= self.seconds  # as if they had passed
        row = {"experiment": run.experiment, "variant": "", "seed": run.seed, "proposals": 300, "voc07": 0.5}
        return Result([row], {"RPN": {"50": {"0.5": 0.25}}})


@pytest.fixture
def executed(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Executed:
    double = Executed()
    monkeypatch.setattr(program, "execute", double)
    monkeypatch.setattr(program, "measure_costs", lambda study: Costs(0.1, 0.01, 0.02, 24))
    return double


@pytest.fixture
def joint(command: Command) -> list[str]:
    return command("--only", "joint", "--budget", "10")


def rows_of(results: Path) -> list[dict[str, str]]:
    with (results / "paper.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_plan_is_there_before_anything_runs(
    program: ModuleType, executed: Executed, joint: list[str], tmp_path: Path, results: Path
) -> None:
    assert program.main([*joint, "--plan-only"]) == 0
    plan = json.loads((tmp_path / "state" / "plan.json").read_text())
    assert [each["experiment"] for each in plan["runs"]] == ["joint"] * 3
    assert plan["epochs"] > 4
    assert executed.names == []
    assert not (results / "paper.csv").exists()


def test_a_killed_study_goes_on_where_it_was(
    program: ModuleType,
    executed: Executed,
    joint: list[str],
    results: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    executed.kill = RUNS[1]
    assert program.main(joint) == 130
    assert json.loads((results / "paper.json").read_text())["missing_runs"] == RUNS[1:]
    executed.kill = None
    assert program.main(joint) == 0
    assert executed.names == [RUNS[0], RUNS[1], RUNS[1], RUNS[2]]
    assert program.main(joint) == 0  # nothing is left
    assert len(executed.names) == 4
    rows = rows_of(results)
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    assert len({row["study"] for row in rows}) == 1
    assert rows[0]["data"] == "tiny trainval, test"
    assert rows[0]["images"] == "8 + 4"
    assert str(Path.home()) not in rows[0]["command"]
    assert "--data voc:tiny" in rows[0]["command"]
    summary = json.loads((results / "paper.json").read_text())
    assert summary["missing_runs"] == []
    assert summary["curves"]["RPN"] == [{"50": {"0.5": 0.25}}] * 3
    assert "interrupted" in capsys.readouterr().err


def test_a_kill_between_marker_and_row_loses_nothing(
    program: ModuleType, executed: Executed, joint: list[str], results: Path
) -> None:
    assert program.main(joint) == 0
    path = results / "paper.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert program.main(joint) == 0
    assert executed.names == RUNS
    assert [row["seed"] for row in rows_of(results)] == ["0", "1", "2"]


def test_the_budget_ends_before_the_next_run(
    program: ModuleType, executed: Executed, joint: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    executed.seconds = 301.0  # of 600
    assert program.main(joint) == 0
    assert executed.names == RUNS[:2]
    assert "the budget of 10 minutes is spent, 1 runs are left" in capsys.readouterr().out
    executed.seconds = 0.0
    assert program.main([*joint[:-1], "30"]) == 0  # another budget is no other study
    assert executed.names == RUNS


def test_other_options_are_another_study(
    program: ModuleType, executed: Executed, joint: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(joint) == 0
    capsys.readouterr()
    for more, expected in (
        (["--set", "training.learning_rate=0.5"], "training.learning_rate"),
        (["--seeds", "7"], "seeds = [0, 1, 2], now [7]"),
        (["--scales", "10", "20", "30"], "anchor_sizes"),
    ):
        assert program.main([*joint, *more]) == 2
        line = capsys.readouterr().err
        assert expected in line
        assert "another --state" in line
        assert line.count("\n") == 1
    assert executed.names == RUNS


def test_a_marker_of_something_else_does_not_count(tmp_path: Path) -> None:
    state, run = State(tmp_path), Run("joint", 0)
    folder = state.begin(run, "a")
    (folder / "step-1" / "last").mkdir(parents=True)
    state.finish(run, "a", Result([{"seed": 0}]))
    assert not (folder / "step-1" / "last").exists()
    assert state.finished(run, "a") == Result([{"seed": 0}])
    assert state.finished(run, "b") is None
    (folder / "model.safetensors").write_bytes(b"")
    assert state.begin(run, "a") == folder
    assert (folder / "model.safetensors").is_file()  # the same run goes on in its folder
    state.begin(run, "b")
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"study": {}}', '{"study": {}, "runs": [{"x": 1}]}'])
def test_a_damaged_plan_is_one_line(
    program: ModuleType,
    executed: Executed,
    joint: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    assert program.main([*joint, "--plan-only"]) == 0
    (tmp_path / "state" / "plan.json").write_text(damage)
    capsys.readouterr()
    assert program.main(joint) == 2
    line = capsys.readouterr().err
    assert "another --state" in line
    assert line.count("\n") == 1


def test_rows_of_another_study_are_left_alone(results: Path) -> None:
    row: dict[str, Any] = {"experiment": "joint", "seed": 0, "voc07": 0.5}
    publish("one", {"data": "x"}, "command", [row | {"variant": "", "proposals": ""}])
    publish("two", {"data": "x"}, "command", [row | {"variant": "", "proposals": ""}] * 1)
    publish("two", {"data": "x"}, "command", [row | {"variant": "", "proposals": ""}] * 1)
    assert [each["study"] for each in read_rows()] == ["one", "two"]
    with pytest.raises(ValueError, match="mAP"):
        publish("two", {}, "command", [row | {"variant": "", "proposals": "", "mAP": 1}])
