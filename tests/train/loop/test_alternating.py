"""4-step alternating training: what each step trains, and going on after a kill anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anchorline.data.dataset import Dataset
from anchorline.data.proposals import read_proposals
from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.train import alternating
from anchorline.train.alternating import epochs_of_steps
from anchorline.train.checkpoint import read_header
from anchorline.train.loop.train import train
from anchorline.train.predict import TorchDetector
from anchorline.train.settings import Settings, TrainingSettings

MakeSettings = Callable[..., Settings]
MakeRecorder = Callable[..., Any]
STEPS = 16  # two epochs of two steps in each of the four


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def settings(tiny: MakeSettings) -> Settings:
    return tiny(regime="alternating", epochs=8, ema=0.9, zoom=(0.8, 1.2), learning_rate=0.02)


@pytest.fixture(scope="module")
def straight(
    settings: Settings, scenes: Dataset, tmp_path_factory: pytest.TempPathFactory, recorder: MakeRecorder
) -> tuple[Path, Any]:
    """An uninterrupted run and its reports; not to be changed."""
    out, reports = tmp_path_factory.mktemp("straight"), recorder()
    train(settings, scenes, out, report=reports)
    return out, reports


def part(path: Path, prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in load_file(path).items() if name.startswith(prefix)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_each_step_trains_its_own_parts(straight: tuple[Path, Any]) -> None:
    out = straight[0]
    first, second, third = (out / f"step-{n}" / "model.safetensors" for n in (1, 2, 3))
    last = out / "model.safetensors"
    assert same(part(second, "backbone."), part(last, "backbone."))
    assert same(part(second, "backbone."), part(third, "backbone."))
    assert not same(part(first, "backbone."), part(second, "backbone."))
    assert not same(part(first, "rpn."), part(third, "rpn."))
    assert same(part(third, "rpn."), part(last, "rpn."))
    assert same(part(second, "roi_heads."), part(third, "roi_heads."))
    assert not same(part(second, "roi_heads."), part(last, "roi_heads."))
    tasks = [read_header(path)[1].task for path in (first, second, third, last)]
    assert tasks == ["proposals", "detections", "proposals", "detections"]


def test_the_losses_are_those_of_the_steps(straight: tuple[Path, Any], scenes: Dataset) -> None:
    reports = straight[1].reports
    assert [report.step for report in reports] == list(range(1, STEPS + 1))
    assert {report.steps for report in reports} == {STEPS}
    assert [report.epoch for report in reports] == [step // 2 for step in range(STEPS)]
    for number, start in enumerate(range(0, STEPS, 4), start=1):
        names = {"loss_objectness", "loss_rpn_box"} if number % 2 else {"loss_classifier", "loss_box"}
        for report in reports[start : start + 4]:
            assert set(report.losses) == {"loss", *names}
            assert report.phase == f"step {number}"
        assert reports[start].rate < reports[start + 1].rate  # each warms up
    for number in (1, 3):
        stored = read_proposals(straight[0] / f"proposals-{number}.jsonl", scenes)
        assert all(0 < len(each.boxes) <= 30 for each in stored)


def test_a_run_resumed_anywhere_equals_an_uninterrupted_one(
    settings: Settings, scenes: Dataset, straight: tuple[Path, Any], tmp_path: Path, recorder: MakeRecorder
) -> None:
    """Killed inside each step, and beside its border; each time it goes on from the time before."""
    for at in (3, 4, 5, 7, 11, 13, 15):
        with pytest.raises(Killed):
            train(settings, scenes, tmp_path, resume=at > 3, report=recorder(at=at, error=Killed))
    assert train(settings, scenes, tmp_path, resume=True).steps == STEPS
    for name in ("model.safetensors", "step-4/last/model.safetensors", "step-2/model.safetensors"):
        assert same(load_file(straight[0] / name), load_file(tmp_path / name)), name


def test_an_interruption_between_steps(
    settings: Settings,
    scenes: Dataset,
    straight: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the proposals of step 1 are written, and then those of step 3."""
    real, written = alternating.write_proposals, []

    def interrupted(path: Path, *rest: Any) -> None:
        written.append(path.name)
        if written.count(path.name) == 1:
            raise KeyboardInterrupt
        real(path, *rest)

    monkeypatch.setattr(alternating, "write_proposals", interrupted)
    assert train(settings, scenes, tmp_path).interrupted
    assert train(settings, scenes, tmp_path, resume=True).interrupted
    assert written == ["proposals-1.jsonl", "proposals-1.jsonl", "proposals-3.jsonl"]
    assert not train(settings, scenes, tmp_path, resume=True).interrupted
    assert same(load_file(straight[0] / "model.safetensors"), load_file(tmp_path / "model.safetensors"))


def test_the_shared_convolutions_run_once_an_image(straight: tuple[Path, Any], scenes: Dataset) -> None:
    detector, calls = TorchDetector.load(straight[0] / "model.safetensors"), []
    detector.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    detector(scenes.images[0].load())
    assert len(calls) == 1


def test_ctrl_c_keeps_the_weights_of_the_step(
    settings: Settings, scenes: Dataset, tmp_path: Path, recorder: MakeRecorder
) -> None:
    result = train(settings, scenes, tmp_path, report=recorder(at=6, error=KeyboardInterrupt))
    assert (result.interrupted, result.steps) == (True, 6)
    assert result.checkpoint == tmp_path / "step-2" / "model.safetensors"
    with pytest.raises(ArtefactError, match="no trained RPN"):
        TorchDetector.load(result.checkpoint)


def test_stale_files_of_another_run(
    settings: Settings, tiny: MakeSettings, scenes: Dataset, tmp_path: Path, recorder: MakeRecorder
) -> None:
    """Changed proposals are written again; other settings, and a changed model, are refused."""
    with pytest.raises(Killed):
        train(settings, scenes, tmp_path, report=recorder(at=5, error=Killed))
    proposals = tmp_path / "proposals-1.jsonl"
    sound = proposals.read_bytes()
    other = tiny(regime="alternating", epochs=8, ema=0.9, zoom=(0.8, 1.2), learning_rate=0.5)
    with pytest.raises(ArtefactError, match="learning_rate"):
        train(other, scenes, tmp_path, resume=True)
    proposals.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(Killed):
        train(settings, scenes, tmp_path, resume=True, report=recorder(at=5, error=Killed))
    assert proposals.read_bytes() == sound
    model = tmp_path / "step-1" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="step 1"):
        train(settings, scenes, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("epochs", "shares", "expected"),
    [
        (4, (1.0, 1.0, 1.0, 1.0), (1, 1, 1, 1)),
        (10, (1.0, 1.0, 1.0, 1.0), (3, 3, 2, 2)),
        (10, (2.0, 1.0, 1.0, 1.0), (4, 2, 2, 2)),
        (8, (100.0, 1.0, 1.0, 1.0), (5, 1, 1, 1)),
    ],
)
def test_epochs_are_shared(epochs: int, shares: Any, expected: tuple[int, ...]) -> None:
    assert epochs_of_steps(TrainingSettings(epochs=epochs, step_shares=shares)) == expected


def test_fewer_epochs_than_steps_are_refused() -> None:
    with pytest.raises(SettingsError, match="epochs"):
        TrainingSettings(regime="alternating", epochs=3)


@pytest.mark.parametrize(
    ("model", "rate"), [({}, 0.1), ({"backbone": "resnet10", "neck": "fpn", "fpn_channels": 16}, 0.05)]
)
def test_every_step_learns(
    model: dict[str, Any],
    rate: float,
    tiny: MakeSettings,
    squares: Dataset,
    tmp_path: Path,
    recorder: MakeRecorder,
) -> None:
    """The loss of each step falls, with a single map and live norms as with a pyramid and fixed ones."""
    if model:
        model |= {"anchor_sizes": ((16.0,), (32.0,), (64.0,), (128.0,), (256.0,)), "backbone_norm": "frozen"}
    reports = recorder()
    plain = {"flip": 0.0, "photometric": 0.0}
    settings = tiny(model, regime="alternating", epochs=12, batch=2, learning_rate=rate, **plain)
    train(settings, squares, tmp_path, report=reports)
    for number in range(1, 5):
        losses = [each.losses["loss"] for each in reports.reports if each.phase == f"step {number}"]
        assert sum(losses[-4:]) < 0.95 * sum(losses[:4]), number
