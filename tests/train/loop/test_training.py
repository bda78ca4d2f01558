"""The training loop on a few small images: it learns, it repeats, it changes what it should."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anchorline.data.boxes import iou_matrix
from anchorline.data.dataset import Dataset
from anchorline.train.checkpoint import read_header
from anchorline.train.loop.metrics import StepReport
from anchorline.train.loop.train import train
from anchorline.train.loop.trainer import TrainResult
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.predict import TorchDetector
from anchorline.train.settings import Settings

MakeSettings = Callable[..., Settings]
LAST = Path("last") / "model.safetensors"
EPOCHS, STEPS = 7, 14  # of the overfitted run


def losses_of(settings: Settings, data: Dataset, out: Path) -> list[dict[str, float]]:
    reports: list[StepReport] = []
    train(settings, data, out, report=reports.append)
    return [dict(report.losses) for report in reports]


@pytest.fixture(scope="module")
def overfitted(
    tiny: MakeSettings, squares: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Settings, TrainResult, list[StepReport]]:
    """A run long enough to learn its images by heart, which are its validation data as well."""
    out = tmp_path_factory.mktemp("overfitted") / "new" / "run"
    settings = tiny(
        {"backbone": "resnet10", "anchor_sizes": ((32.0,),), "aspect_ratios": (1.0,), "representation": 64},
        epochs=EPOCHS,
        batch=4,
        optimiser="adamw",
        learning_rate=1e-3,
        warmup_steps=5,
        rpn_samples=16,
        flip=0.0,
        validate_every=EPOCHS - 1,
    )
    reports: list[StepReport] = []
    source = {"command": "test"}
    result = train(settings, squares, out, validation=squares, source=source, report=reports.append)
    return out, settings, result, reports


Overfitted = tuple[Path, Settings, TrainResult, list[StepReport]]


def test_the_loss_falls(overfitted: Overfitted) -> None:
    totals = [report.losses["loss"] for report in overfitted[3]]
    assert sum(totals[-3:]) < 0.5 * sum(totals[:3])


def test_what_was_learnt_is_detected(overfitted: Overfitted, squares: Dataset) -> None:
    """From labels to detections: classes and boxes come out where they went in."""
    result = overfitted[2]
    assert result.map50 is not None
    assert result.map50 > 0.6
    detector = TorchDetector.load(result.checkpoint)
    right = 0
    for image in squares:
        best = detector(image.load())
        overlap = iou_matrix(best.boxes[:1], image.boxes)
        right += bool(len(best) and best.labels[0] == image.labels[0] and overlap[0, 0] > 0.5)
    assert right >= 6


def test_reports_count_steps_and_epochs(overfitted: Overfitted) -> None:
    reports = overfitted[3]
    assert [report.step for report in reports] == list(range(1, STEPS + 1))
    assert {report.steps for report in reports} == {STEPS}
    assert [report.epoch for report in reports] == [step // 2 for step in range(STEPS)]
    for report in reports:
        parts = {name: value for name, value in report.losses.items() if name != "loss"}
        assert set(parts) == {"loss_objectness", "loss_rpn_box", "loss_classifier", "loss_box"}
        assert sum(parts.values()) == pytest.approx(report.losses["loss"], rel=1e-5)


def test_the_rate_reported_is_the_one_the_step_was_taken_with(overfitted: Overfitted) -> None:
    rates = [report.rate for report in overfitted[3]]
    assert rates[0] == pytest.approx(0.01 * 1e-3)  # the warm-up factor times the learning rate
    assert rates[-1] > 0
    assert max(rates) <= 1e-3


def test_the_run_folder_holds_what_it_promises(overfitted: Overfitted, squares: Dataset) -> None:
    out, settings, result, _ = overfitted
    for name in ("model.safetensors", str(LAST), "last/state.pt", "metrics.csv", "settings.json"):
        assert (out / name).is_file(), name
    assert not list(out.rglob(".*")), "temporary files are left"
    assert result.checkpoint == out / "model.safetensors"
    assert (result.steps, result.interrupted) == (STEPS, False)

    assert json.loads((out / "settings.json").read_text()) == json.loads(json.dumps(settings.to_dict()))
    model_settings, contract = read_header(result.checkpoint)
    assert model_settings == settings.model
    assert contract.names == squares.names
    assert (contract.canvas, contract.resize.within) == (None, settings.model.canvas)
    assert contract.source["command"] == "test"
    assert contract.source["data"] == squares.spec
    assert contract.source["settings"]["training"]["epochs"] == EPOCHS


def test_metrics_hold_every_step_and_validation(overfitted: Overfitted) -> None:
    out, _, result, reports = overfitted
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["loss"]]
    assert [int(row["step"]) for row in steps] == list(range(1, STEPS + 1))
    assert [float(row["loss"]) for row in steps] == pytest.approx(
        [report.losses["loss"] for report in reports], rel=1e-4
    )
    validations = [(int(row["step"]), float(row["map50"])) for row in rows if row["map50"]]
    assert [step for step, _ in validations] == [STEPS - 2, STEPS]
    assert result.map50 == pytest.approx(max(value for _, value in validations), abs=1e-5)


def test_same_seed_same_losses_other_seed_others(tiny: MakeSettings, scenes: Dataset, tmp_path: Path) -> None:
    first = losses_of(tiny(seed=1, epochs=1), scenes, tmp_path / "1")
    torch.rand(5)  # whatever was drawn before
    assert losses_of(tiny(seed=1, epochs=1), scenes, tmp_path / "again") == first
    one, other = load_file(tmp_path / "1" / LAST), load_file(tmp_path / "again" / LAST)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses_of(tiny(seed=2, epochs=1), scenes, tmp_path / "2") != first


def test_workers_change_no_loss(tiny: MakeSettings, scenes: Dataset, tmp_path: Path) -> None:
    varied = {"zoom": (0.8, 1.2), "photometric": 0.5}
    alone = losses_of(tiny(workers=0, **varied), scenes, tmp_path / "0")
    assert losses_of(tiny(workers=1, **varied), scenes, tmp_path / "1") == alone


def test_bf16_losses_are_near_fp32(tiny: MakeSettings, scenes: Dataset, tmp_path: Path) -> None:
    """All 144 proposals are kept and drawn: of a few, rounding would choose others on each processor.

    A rounding to 8 bits is off by 0.4 % at most; half a hundred layers add to a few times that.
    """
    every = {"rpn_pre_nms": 144, "rpn_post_nms": 144}
    model, training = {"rpn_nms_iou": 1.0, **every}, {"rpn_samples": 2000, "roi_samples": 2000, **every}
    exact, half = (
        losses_of(tiny(model, precision=precision, epochs=1, **training), scenes, tmp_path / precision)
        for precision in ("fp32", "bf16")
    )
    assert half != exact
    for name, value in exact[0].items():
        assert half[0][name] == pytest.approx(value, rel=0.03, abs=2e-3), name
    assert {tensor.dtype for tensor in load_file(tmp_path / "bf16" / LAST).values()} <= {
        torch.float32,
        torch.int64,
    }


def changed_tensors(settings: Settings, data: Dataset, out: Path) -> dict[str, bool]:
    """By name: whether one epoch changed a tensor of the model (its start depends on the seed alone)."""
    torch.manual_seed(settings.training.seed)
    start = FasterRCNN(settings.model, len(data.names)).state_dict()
    train(settings, data, out)
    end = load_file(out / LAST)
    return {name: not torch.equal(start[name], end[name]) for name in end}


def test_a_live_norm_learns(tiny: MakeSettings, scenes: Dataset, tmp_path: Path) -> None:
    changed = changed_tensors(tiny({"backbone_norm": "live"}, epochs=1), scenes, tmp_path)
    assert [name for name in changed if not changed[name]] == []
    assert any(name.endswith("running_var") for name in changed)


def test_a_frozen_norm_keeps_statistics_and_scales(
    tiny: MakeSettings, scenes: Dataset, tmp_path: Path
) -> None:
    changed = changed_tensors(tiny({"backbone_norm": "frozen"}, epochs=1, ema=0.9), scenes, tmp_path)
    prefixes = {name.removesuffix(".running_mean") for name in changed if name.endswith(".running_mean")}
    assert prefixes
    for name, has_changed in changed.items():
        assert has_changed != (name.rpartition(".")[0] in prefixes), name


def test_frozen_stages_keep_their_weights(tiny: MakeSettings, scenes: Dataset, tmp_path: Path) -> None:
    settings = tiny(frozen_stages=2, epochs=1, weight_decay=0.1)
    changed = changed_tensors(settings, scenes, tmp_path)
    body = FasterRCNN(settings.model, 1).backbone.body
    frozen = []
    for name, _ in body.named_children():
        frozen.append(name)
        if name == body.stage_ends[1]:
            break
    assert 0 < len(frozen) < len(list(body.children()))
    parameters = {name for name, _ in body.named_parameters()}
    for name in parameters:
        assert changed[f"backbone.body.{name}"] != (name.split(".")[0] in frozen), name


def test_backbone_weights_are_the_start(tiny: MakeSettings, scenes: Dataset, tmp_path: Path) -> None:
    settings = tiny({"backbone_norm": "frozen"}, epochs=1, frozen_stages=5, ema=0.9)
    torch.manual_seed(77)
    given = FasterRCNN(settings.model, 1).backbone.body.state_dict()
    torch.save(given, tmp_path / "weights.pth")
    train(settings, scenes, tmp_path / "run", backbone_weights=tmp_path / "weights.pth")
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(found[f"backbone.body.{name}"], tensor) for name, tensor in given.items())
