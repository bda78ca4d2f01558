"""TensorBoard's event files, read back by its own reader, hold what ``metrics.csv`` holds."""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anchorline.data.dataset import Dataset
from anchorline.runtime.io.errors import SettingsError
from anchorline.train.loop.metrics import COLUMNS, MetricsFile
from anchorline.train.loop.train import train
from anchorline.train.settings import Settings

MakeSettings = Callable[..., Settings]
FIGURES = COLUMNS[2:]
Series = dict[str, list[tuple[int, float]]]


def read_events(folder: Path) -> Series:
    """By name, the steps and values that TensorBoard shows."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def read_metrics(path: Path) -> Series:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in FIGURES}


def check_same(shown: Series, written: Series) -> None:
    assert set(shown) == set(FIGURES)
    for name in FIGURES:
        assert [step for step, _ in shown[name]] == [step for step, _ in written[name]], name
        values = [value for _, value in written[name]]
        assert [value for _, value in shown[name]] == pytest.approx(values, rel=1e-5, abs=1e-5), name


def test_events_hold_every_step_and_validation_of_the_metrics(
    tiny: MakeSettings, scenes: Dataset, tmp_path: Path
) -> None:
    few = dataclasses.replace(scenes, images=scenes.images[:4])
    train(tiny(tensorboard=True, batch=2, validate_every=1), few, tmp_path, validation=few)
    shown = read_events(tmp_path / "tensorboard")
    assert [step for step, _ in shown["loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in shown["map50"]] == [2, 4]
    check_same(shown, read_metrics(tmp_path / "metrics.csv"))


def test_a_resumed_run_hides_the_steps_it_takes_again(
    tiny: MakeSettings, scenes: Dataset, tmp_path: Path, recorder: Callable[..., Any]
) -> None:
    """Killed in the second epoch: the third step was taken, shown, and is taken anew."""
    settings = tiny(tensorboard=True, batch=2, validate_every=1)
    few = dataclasses.replace(scenes, images=scenes.images[:4])
    with pytest.raises(RuntimeError):
        train(settings, few, tmp_path, validation=few, report=recorder(at=3, error=RuntimeError))
    assert [step for step, _ in read_events(tmp_path / "tensorboard")["loss"]] == [1, 2, 3]
    train(settings, few, tmp_path, validation=few, resume=True)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    check_same(read_events(tmp_path / "tensorboard"), read_metrics(tmp_path / "metrics.csv"))


def test_a_new_run_in_the_same_folder_hides_the_old_one(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        metrics = MetricsFile(tmp_path / "metrics.csv")
        metrics.open_board()
        metrics.add(1, 1, {"map50": value}, ".5f")
        metrics.close()
    assert read_events(tmp_path / "tensorboard") == {"map50": [(1, 2.0)]}


def test_without_the_package_the_error_names_the_extra(
    tiny: MakeSettings, scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SettingsError, match=r"pip install 'anchorline\[tensorboard\]'") as caught:
        train(tiny(tensorboard=True), scenes, tmp_path / "run")
    assert "\n" not in str(caught.value)
