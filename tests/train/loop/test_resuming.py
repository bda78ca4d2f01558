"""Going on where a training stopped, and keeping the best: interrupted, killed, validated."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anchorline.data.dataset import Dataset
from anchorline.runtime.io.errors import ArtefactError
from anchorline.train.checkpoint import load_checkpoint
from anchorline.train.loop import distributed, trainer
from anchorline.train.loop.train import train
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.predict import TorchDetector
from anchorline.train.settings import Settings

MakeSettings = Callable[..., Settings]
MakeRecorder = Callable[..., Any]
LAST = Path("last") / "model.safetensors"


class Killed(Exception):
    """Stands for the end of the process."""


def check_same_weights(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


@pytest.mark.parametrize(
    "changes",
    [{"ema": 0.9}, {"optimiser": "adamw", "learning_rate": 1e-3}, {"precision": "bf16", "workers": 1}],
    ids=["ema", "adamw", "bf16"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny: MakeSettings, scenes: Dataset, tmp_path: Path, changes: dict[str, Any], recorder: MakeRecorder
) -> None:
    settings = tiny(epochs=3, batch=2, zoom=(0.8, 1.2), **changes)
    few, straight = dataclasses.replace(scenes, images=scenes.images[:4]), recorder()
    train(settings, few, tmp_path / "straight", report=straight)

    killed, resumed = recorder(at=3, error=Killed), recorder()
    with pytest.raises(Killed):  # in the second of three epochs
        train(settings, few, tmp_path / "resumed", report=killed)
    settings = dataclasses.replace(settings, training=dataclasses.replace(settings.training, workers=0))
    result = train(settings, few, tmp_path / "resumed", resume=True, report=resumed)

    assert killed.losses[:2] + resumed.losses == straight.losses
    assert [report.rate for report in resumed.reports] == [r.rate for r in straight.reports[2:]]
    assert (result.steps, resumed.reports[0].epoch) == (6, 1)
    for name in (LAST, Path("model.safetensors")):
        check_same_weights(tmp_path / "straight" / name, tmp_path / "resumed" / name)
    metrics = [(tmp_path / run / "metrics.csv").read_text() for run in ("straight", "resumed")]
    assert metrics[0] == metrics[1]


def test_resuming_a_finished_run_changes_nothing(
    tiny: MakeSettings, scenes: Dataset, tmp_path: Path, recorder: MakeRecorder
) -> None:
    settings = tiny(epochs=1)
    train(settings, scenes, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    record = recorder()
    result = train(settings, scenes, tmp_path, resume=True, report=record)
    assert record.reports == []
    assert result.steps == 2
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_an_interrupted_run_saves_its_weights(
    tiny: MakeSettings, scenes: Dataset, tmp_path: Path, recorder: MakeRecorder
) -> None:
    record = recorder(at=1, error=KeyboardInterrupt)
    result = train(tiny(), scenes, tmp_path, report=record)
    assert (result.interrupted, result.steps) == (True, 1)
    model, _ = load_checkpoint(result.checkpoint)
    assert isinstance(model, FasterRCNN)
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 2  # the header and one step
    assert not (tmp_path / "last").exists()


def test_an_interruption_leaves_the_best_checkpoint(
    tiny: MakeSettings,
    scenes: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorder: MakeRecorder,
) -> None:
    scripted_accuracy(monkeypatch, [0.5])
    record = recorder(at=3, error=KeyboardInterrupt)
    result = train(tiny(validate_every=1), scenes, tmp_path, validation=scenes, report=record)
    assert (result.interrupted, result.map50) == (True, 0.5)
    check_same_weights(tmp_path / "model.safetensors", tmp_path / LAST)  # both of the first epoch


def scripted_accuracy(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> list[dict[str, Tensor]]:
    """Validations report ``values``; returns the list of the weights that they will have seen."""
    seen: list[dict[str, Tensor]] = []
    opened: list[TorchDetector] = []

    def detector(*arguments: Any) -> TorchDetector:
        opened.append(TorchDetector(*arguments))
        return opened[-1]

    def map50(detect: Any, data: Dataset, batch: int, provider: str) -> float:
        seen.append({name: tensor.clone() for name, tensor in opened[-1].model.state_dict().items()})
        return values[len(seen) - 1]

    monkeypatch.setattr(trainer, "TorchDetector", detector)
    monkeypatch.setattr(distributed, "shared_map50", map50)
    return seen


def test_the_best_by_validation_is_kept(
    tiny: MakeSettings, scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scripted_accuracy(monkeypatch, [0.2, 0.6, 0.4, 0.6])
    few = dataclasses.replace(scenes, images=scenes.images[:4])
    result = train(tiny(epochs=4, validate_every=1), few, tmp_path, validation=few)
    assert result.map50 == 0.6
    best, last = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / LAST)
    assert all(torch.equal(best[name], seen[1][name]) for name in best)
    assert all(torch.equal(last[name], seen[3][name]) for name in last)
    assert not all(torch.equal(best[name], last[name]) for name in best)


def test_a_resumed_run_knows_the_best_so_far(
    tiny: MakeSettings,
    scenes: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorder: MakeRecorder,
) -> None:
    scripted_accuracy(monkeypatch, [0.7, 0.3])
    settings = tiny(validate_every=1)
    with pytest.raises(Killed):
        train(settings, scenes, tmp_path, validation=scenes, report=recorder(at=3, error=Killed))
    best = (tmp_path / "model.safetensors").read_bytes()
    assert train(settings, scenes, tmp_path, validation=scenes, resume=True).map50 == 0.7
    assert (tmp_path / "model.safetensors").read_bytes() == best


@pytest.mark.parametrize(("every", "validated"), [(0, [4]), (2, [2, 4]), (3, [3, 4])])
def test_validations_come_when_asked_and_at_the_end(
    tiny: MakeSettings,
    scenes: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    validated: list[int],
) -> None:
    scripted_accuracy(monkeypatch, [0.0] * 4)
    few = dataclasses.replace(scenes, images=scenes.images[:2])
    train(tiny(epochs=4, validate_every=every), few, tmp_path, validation=few)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file) if row["map50"]] == validated
    assert (tmp_path / "model.safetensors").is_file(), "an accuracy of 0 is an accuracy"


def copy_of(folder: Path, to: Path) -> Path:
    for path in folder.rglob("*"):
        if path.is_file():
            copy = to / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return to


def check_resume_fails(settings: Settings, data: Dataset, out: Path, *parts: str) -> None:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ArtefactError) as caught:
        train(settings, data, out, resume=True)
    assert "\n" not in str(caught.value)
    for part in (*parts, "without --resume"):
        assert part in str(caught.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_resuming_with_nothing_there(tiny: MakeSettings, scenes: Dataset, tmp_path: Path) -> None:
    check_resume_fails(tiny(), scenes, tmp_path / "none", "state.pt: no such file")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.5}, "training.learning_rate = 0.01, not 0.5"),
        ({"epochs": 9}, "training.epochs = 1, not 9"),
        ({"zoom": (0.5, 1.0)}, "training.zoom"),
        ({"model": {"representation": 16}}, "model.representation = 32, not 16"),
    ],
)
def test_resuming_with_other_settings(
    tiny: MakeSettings, scenes: Dataset, finished: Path, changes: dict[str, object], named: str
) -> None:
    check_resume_fails(tiny(**{"epochs": 1, **changes}), scenes, finished, named)


def test_a_state_with_a_setting_s_former_name_goes_on_in_silence(
    tiny: MakeSettings,
    scenes: Dataset,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = copy_of(finished, tmp_path)
    state = out / "last" / "state.pt"
    saved = torch.load(state, weights_only=True)
    saved["progress"] = saved["progress"].replace('"lr_schedule": "cosine"', '"schedule": "cosine"')
    torch.save(saved, state)
    train(tiny(epochs=1), scenes, out, resume=True)
    assert capsys.readouterr().err == ""
    check_resume_fails(tiny(epochs=1, lr_schedule="step"), scenes, out, "training.lr_schedule = 'cosine'")


def test_a_state_of_before_a_setting_goes_on_with_its_default(
    tiny: MakeSettings, scenes: Dataset, finished: Path, tmp_path: Path
) -> None:
    out = copy_of(finished, tmp_path)
    state = out / "last" / "state.pt"
    saved = torch.load(state, weights_only=True)
    progress = json.loads(saved["progress"])
    for name in ("slice", "slice_overlap", "min_visible", "empty_slices"):
        del progress["settings"]["training"][name]
    torch.save({**saved, "progress": json.dumps(progress)}, state)
    train(tiny(epochs=1), scenes, out, resume=True)
    check_resume_fails(tiny(epochs=1, min_visible=0.5), scenes, out, "training.min_visible = 0.3")


def test_resuming_with_other_data(tiny: MakeSettings, scenes: Dataset, finished: Path) -> None:
    fewer = dataclasses.replace(scenes, images=scenes.images[:5])
    check_resume_fails(tiny(epochs=1), fewer, finished, "other data", "5")
    renamed = dataclasses.replace(scenes, names=("cat", *scenes.names[1:]))
    check_resume_fails(tiny(epochs=1), renamed, finished, "other data", "cat")
    more = dataclasses.replace(scenes, names=(*scenes.names, "cat"))
    check_resume_fails(tiny(epochs=1), more, finished, "other data", "cat")


def test_resuming_from_a_damaged_state(
    tiny: MakeSettings, scenes: Dataset, finished: Path, tmp_path: Path
) -> None:
    out = copy_of(finished, tmp_path)
    state = out / "last" / "state.pt"
    sound = state.read_bytes()
    for content in (sound[:-1000], sound[: len(sound) // 2], b"", b"no state\n", sound[1000:]):
        state.write_bytes(content)
        check_resume_fails(tiny(epochs=1), scenes, out, str(state))
    saved = torch.load(finished / "last" / "state.pt", weights_only=True)
    foreign: list[object] = [
        {"weights": torch.ones(3)},
        torch.ones(3),
        {"progress": "{}", "state": {}},
        {"progress": "[]", "state": saved["state"]},
        {**saved, "state": {}},
        {**saved, "state": {**saved["state"], "model": {}}},
        {**saved, "state": {**saved["state"], "optimiser": {"state": {}, "param_groups": []}}},
    ]
    for content in foreign:
        torch.save(content, state)
        check_resume_fails(tiny(epochs=1), scenes, out, str(out / "last"))
    save_file({"a": torch.ones(3)}, state)
    check_resume_fails(tiny(epochs=1), scenes, out, str(state))
