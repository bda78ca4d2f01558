"""Steps: gradients added over batches, precision, early stopping, what a run writes before it starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import SettingsError
from anchorline.train.data.dataset import Batch, CanvasDataset, collate, groups
from anchorline.train.loop import distributed
from anchorline.train.loop.optim import build_schedule
from anchorline.train.loop.train import train
from anchorline.train.loop.trainer import NotFiniteError, PhaseConfig, Trainer
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.settings import Settings

MakeSettings = Callable[..., Settings]
CPU = torch.device("cpu")


def frozen(tiny: MakeSettings, **training: object) -> Settings:
    return tiny({"backbone_norm": "frozen", "canvas": (64, 96)}, batch=8, learning_rate=0.05, **training)


def batch_of(settings: Settings, data: Dataset, indices: list[int]) -> Batch:
    views = CanvasDataset(data, settings.model.canvas, ResizeRule(), settings.training)
    return collate([views[0, index] for index in indices])


def trainer_of(settings: Settings, data: Dataset) -> Trainer:
    made = Trainer(PhaseConfig(settings, data, CPU, Path(), Path(), epochs=10))
    made.model.train()
    return made


def after_one_step(
    settings: Settings, data: Dataset, batches: list[Batch]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    made = trainer_of(settings, data)
    losses = made.train_step(batches)
    return made.model.state_dict(), losses


def test_four_batches_of_two_make_the_step_of_one_of_eight(tiny: MakeSettings, scenes: Dataset) -> None:
    # Every anchor slot can be filled, so that each image weighs the same in both; SGD without warm-up.
    settings = frozen(tiny, warmup_steps=0, rpn_samples=32, roi_samples=8, clip_norm=0.0)
    whole, whole_losses = after_one_step(settings, scenes, [batch_of(settings, scenes, list(range(8)))])
    parts = [batch_of(settings, scenes, [start, start + 1]) for start in range(0, 8, 2)]
    added, added_losses = after_one_step(settings, scenes, parts)
    assert added_losses == pytest.approx(whole_losses, rel=1e-4)
    torch.manual_seed(0)
    start = FasterRCNN(settings.model, 5).state_dict()
    moved = [name for name in start if not torch.equal(start[name], whole[name])]
    assert len(moved) > 50
    for name in moved:
        step = (whole[name] - start[name]).abs().max()
        assert (whole[name] - added[name]).abs().max() <= 0.01 * step + 1e-7, name


def test_draws_depend_on_the_image_and_not_on_its_batch(tiny: MakeSettings, scenes: Dataset) -> None:
    settings = frozen(tiny)
    alone = batch_of(settings, scenes, [3]).targets.noise(1, 50)
    among = batch_of(settings, scenes, [1, 3, 5]).targets.noise(1, 70)
    assert alone is not None
    assert among is not None
    torch.testing.assert_close(alone[0], among[1, :50], rtol=0, atol=0)
    assert not torch.equal(among[0], among[1])


def test_groups_take_batches_in_turn_and_keep_the_rest() -> None:
    assert list(groups(iter("abcde"), 2)) == [["a", "b"], ["c", "d"], ["e"]]  # type: ignore[arg-type]


def test_accumulated_steps_are_counted(tiny: MakeSettings, scenes: Dataset, tmp_path: Path) -> None:
    result = train(tiny(epochs=2, batch=2, accumulate=3), scenes, tmp_path / "run")
    assert result.steps == 2 * 2  # four batches an epoch: one step of three, one of the fourth


def test_a_step_that_is_not_finite_changes_nothing(tiny: MakeSettings, scenes: Dataset) -> None:
    settings = frozen(tiny)
    made = trainer_of(settings, scenes)
    model = made.model
    with torch.no_grad():
        model.rpn.head.cls_logits.bias.fill_(torch.inf)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NotFiniteError, match="loss"):
        made.train_step([batch_of(settings, scenes, [0, 1])])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_one_cycle_rises_for_three_tenths_and_falls_to_zero(tiny: MakeSettings) -> None:
    settings = tiny(lr_schedule="one-cycle", learning_rate=1.0).training
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimiser, settings, 100)
    rates = []
    for _ in range(100):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.04)
    assert rates[15] == pytest.approx(0.52)
    assert int(np.argmax(rates)) == 30
    assert rates[30] == pytest.approx(1.0)
    assert rates[65] == pytest.approx(0.5)
    assert rates[99] < 0.001
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_patience_ends_a_run_that_gets_no_better(
    tiny: MakeSettings, scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([0.1, 0.3, 0.2, 0.25, 0.9])

    monkeypatch.setattr(distributed, "shared_map50", lambda *_: next(figures))
    settings = tiny(epochs=9, batch=2, validate_every=1, patience=2)
    few = dataclasses.replace(scenes, images=scenes.images[:4])
    result = train(settings, few, tmp_path / "run", validation=few)
    assert result.map50 == 0.3
    assert result.steps == 4 * 2


def test_a_run_shows_its_data_before_it_starts(finished: Path, scenes: Dataset) -> None:
    summary = json.loads((finished / "data.json").read_text(encoding="utf-8"))
    assert summary["images"] == len(scenes)
    assert summary["boxes"] == sum(len(image.boxes) for image in scenes)
    sheet = cv2.imread(str(finished / "samples.png"))
    assert sheet is not None
    assert sheet.std() > 10


def test_a_mosaic_holds_four_images_whose_boxes_follow(
    tiny: MakeSettings, labelled: Callable[..., LabelledImage]
) -> None:
    """White squares on black: after the mosaic each box still bounds white, and nothing else is white."""
    images = []
    for number in range(4):
        pixels = np.zeros((64, 96, 3), np.uint8)
        x, y = 8 + 10 * number, 4 + 8 * number
        pixels[y : y + 20, x : x + 24] = 255
        images.append(labelled(pixels, [(x, y, x + 24, y + 20)], [0], id=str(number)))
    data = Dataset("squares", ("square",), tuple(images))
    settings = tiny(mosaic=1.0, flip=0.0)
    view = CanvasDataset(data, (64, 96), ResizeRule(), settings.training)[0, 2]
    assert view["size"].tolist() == [64, 96]
    assert len(view["boxes"]) == 4
    bright = view["image"].numpy()[..., 0] > 127
    covered = np.zeros_like(bright)
    for x1, y1, x2, y2 in view["boxes"].round().int().tolist():
        assert bright[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].all()
        covered[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] = True
    assert not (bright & ~covered).any()


def test_an_iou_crop_keeps_boxes_on_their_objects(
    tiny: MakeSettings, labelled: Callable[..., LabelledImage]
) -> None:
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[20:44, 30:70] = 255
    data = Dataset("one", ("square",), (labelled(pixels, [(30, 20, 70, 44)]),))
    settings = tiny(iou_crop=1.0, flip=0.0)
    views = CanvasDataset(data, (64, 96), ResizeRule(), settings.training)
    sizes = set()
    for epoch in range(12):
        view = views[epoch, 0]
        bright = view["image"].numpy()[..., 0] > 127
        ys, xs = np.nonzero(bright)
        assert len(view["boxes"]) == 1
        found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert view["boxes"][0].numpy() == pytest.approx(found, abs=1.6)
        sizes.add((*view["size"].tolist(), int(bright.sum())))
    assert len(sizes) > 4


def test_an_iou_crop_of_an_image_without_objects_works(
    tiny: MakeSettings, labelled: Callable[..., LabelledImage]
) -> None:
    data = Dataset("none", ("square",), (labelled(np.zeros((64, 96, 3), np.uint8), []),))
    views = CanvasDataset(data, (64, 96), ResizeRule(), tiny(iou_crop=1.0).training)
    assert [len(views[epoch, 0]["boxes"]) for epoch in range(3)] == [0, 0, 0]


def test_fp16_needs_a_gpu(tiny: MakeSettings, scenes: Dataset, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"training\.precision is 'fp16' without a CUDA device"):
        train(tiny(precision="fp16"), scenes, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
