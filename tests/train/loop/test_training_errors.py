"""What stops a training: each is one line, and nothing half-written or worse than before is left."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import (
    AnchorlineError,
    ArtefactError,
    DataError,
    OutputError,
    SettingsError,
    TrainingError,
)
from anchorline.train.checkpoint import load_checkpoint
from anchorline.train.data.dataset import CanvasDataset, EpochSampler
from anchorline.train.loop.metrics import StepReport
from anchorline.train.loop.train import train
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.settings import Settings

MakeSettings = Callable[..., Settings]
Labelled = Callable[..., LabelledImage]
Files = Callable[[], set[str]]
Losses = dict[str, Tensor]
CHECKPOINTS = {"model.safetensors", "last/model.safetensors", "last/state.pt"}


def ids_of_step(data: Dataset, settings: Settings, step: int) -> list[str]:
    """The images of a step, counted from 1."""
    sampler = EpochSampler(len(data), settings.training.batch, settings.training.seed)
    sampler.epoch, place = divmod(step - 1, len(sampler))
    return [data.images[index].id for _, index in list(sampler)[place]]


def spoil_losses(
    monkeypatch: pytest.MonkeyPatch, step: int, spoil: Callable[[FasterRCNN, Losses], Losses]
) -> None:
    """From ``step`` on, counted from 1, the model's losses are what ``spoil`` makes of them."""
    sound, calls = FasterRCNN.losses, Counter[str]()

    def losses(self: FasterRCNN, *arguments: object) -> Losses:
        calls["step"] += 1
        found = sound(self, *arguments)  # type: ignore[arg-type]
        return spoil(self, found) if calls["step"] >= step else found

    monkeypatch.setattr(FasterRCNN, "losses", losses)


def nan_loss(_: FasterRCNN, losses: Losses) -> Losses:
    return {**losses, "loss_box": losses["loss_box"] * torch.nan}


def sound_loss_nan_gradient(model: FasterRCNN, losses: Losses) -> Losses:
    weight = model.roi_heads.box_predictor.cls_score.weight
    return {**losses, "loss_box": losses["loss_box"] + (weight * 0).sum().sqrt()}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(nan_loss, "loss_box nan"), (sound_loss_nan_gradient, "norm of the gradient nan")],
)
@pytest.mark.parametrize("step", [3, 4], ids=["in the middle of epoch 2", "last step of epoch 2"])
def test_a_loss_that_is_not_finite_names_its_images_and_spares_the_checkpoint(
    tiny: MakeSettings,
    scenes: Dataset,
    tmp_path: Path,
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[FasterRCNN, Losses], Losses],
    named: str,
    step: int,
) -> None:
    settings = tiny(clip_norm=0.0 if step == 3 else 10.0)
    spoil_losses(monkeypatch, step, spoil)
    kept: dict[str, bytes] = {}

    def report(done: StepReport) -> None:
        if done.step == 3:  # the first epoch is finished
            kept.update({name: (tmp_path / name).read_bytes() for name in files()})

    with pytest.raises(TrainingError) as caught:
        train(settings, scenes, tmp_path, report=report)
    message = str(caught.value)
    assert "\n" not in message
    assert named in message
    assert f"at step {step}, " in message
    assert f"images {', '.join(ids_of_step(scenes, settings, step))};" in message
    assert f"the last good weights are in {tmp_path}" in message
    assert "learning_rate" in message

    assert set(kept) <= files()
    load_checkpoint(tmp_path / "model.safetensors")  # which refuses weights that are not finite
    for name, content in kept.items():
        assert name == "metrics.csv" or (tmp_path / name).read_bytes() == content, name
    assert (tmp_path / "metrics.csv").read_text().count("\n") == step  # a header, and the steps before it


def test_all_images_of_a_mosaic_are_named(
    tiny: MakeSettings, scenes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(mosaic=1.0, batch=2)
    spoil_losses(monkeypatch, 2, nan_loss)
    with pytest.raises(TrainingError) as caught:
        train(settings, scenes, tmp_path)
    views = CanvasDataset(scenes, settings.model.canvas, ResizeRule(), settings.training)
    keys = list(EpochSampler(len(scenes), 2, settings.training.seed))[1]
    samples = [views[key]["id"].split(" + ") for key in keys]
    assert [sample[0] for sample in samples] == ids_of_step(scenes, settings, 2)
    assert all(len(sample) > 1 for sample in samples)
    named = ", ".join(" + ".join(sample) for sample in samples)
    assert f"at step 2, images {named}; " in str(caught.value)


def test_weights_that_run_away_in_the_last_step_of_an_epoch_are_not_saved(
    tiny: MakeSettings, scenes: Dataset, tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients are finite still, the step itself goes beyond what float32 holds."""
    spoil_losses(monkeypatch, 1, lambda _, losses: {name: loss * 1e15 for name, loss in losses.items()})
    settings = tiny(batch=8, learning_rate=1e29, warmup_steps=0, clip_norm=0.0)
    with pytest.raises(TrainingError, match="is not finite at step 1, images scene-") as caught:
        train(settings, scenes, tmp_path)
    assert "no epoch was finished before it" in str(caught.value)
    assert not CHECKPOINTS & files()


def without_objects(data: Dataset) -> Dataset:
    boxes, labels, none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_)
    images = [dataclasses.replace(i, boxes=boxes, labels=labels, difficult=none, crowd=none) for i in data]
    return dataclasses.replace(data, images=tuple(images))


def only_difficult(data: Dataset) -> Dataset:
    images = [dataclasses.replace(i, difficult=np.ones(len(i.boxes), np.bool_)) for i in data]
    return dataclasses.replace(data, images=tuple(images))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (without_objects, "; left out: 3 reversed; 1 zero area;"),
        (only_difficult, r"; all of its objects \(\d+\) are marked as difficult; left out: 3 reversed"),
    ],
)
def test_data_without_objects_is_refused_with_what_became_of_them(
    tiny: MakeSettings,
    scenes: Dataset,
    tmp_path: Path,
    files: Files,
    spoil: Callable[[Dataset], Dataset],
    why: str,
) -> None:
    dropped = Counter({"zero area": 1, "reversed": 3})
    nothing = dataclasses.replace(spoil(scenes), spec="voc:empty@train", dropped=dropped)
    for data, validation in ((nothing, None), (scenes, nothing)):
        with pytest.raises(DataError, match=rf"^voc:empty@train: holds no labelled object{why}"):
            train(tiny(), data, tmp_path, validation=validation)
    assert files() == set()


def test_validation_with_other_classes_is_refused(
    tiny: MakeSettings, scenes: Dataset, tmp_path: Path, files: Files
) -> None:
    other = dataclasses.replace(scenes, spec="other", names=("arrow", "cat", "heart", "ring", "star"))
    with pytest.raises(DataError, match=r"^other: has the class 'cat'"):
        train(tiny(), scenes, tmp_path, validation=other)
    assert files() == set()


def test_images_without_objects_among_others_are_learnt_from(
    tiny: MakeSettings, scenes: Dataset, labelled: Labelled, tmp_path: Path
) -> None:
    """Also as a whole batch: a loss without any positive is a sound loss."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    empty = tuple(labelled(noise, [], id=f"empty-{number}") for number in range(3))
    data = dataclasses.replace(scenes, images=(scenes.images[0], *empty))
    boxes = []
    train(tiny(batch=1), data, tmp_path, report=lambda done: boxes.append(done.losses["loss_rpn_box"]))
    assert len(boxes) == 8
    assert boxes.count(0.0) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_stops_with_one_line(
    tiny: MakeSettings, scenes: Dataset, tmp_path: Path, workers: int
) -> None:
    def load() -> np.ndarray:
        raise DataError("broken.jpg: truncated; copy it again")

    data = dataclasses.replace(
        scenes, images=tuple(dataclasses.replace(image, load=load) for image in scenes)
    )
    with pytest.raises(DataError) as caught:
        train(tiny(workers=workers), data, tmp_path)
    assert str(caught.value) == "broken.jpg: truncated; copy it again"


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes; more fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("spare", "at", "unwritten"),
    [
        (None, 0, ".json"),
        (-1000, 0, "model.safetensors"),
        (5000, 0, "state.pt"),
        (-1000, 3, "model.safetensors"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_whole_files(
    tiny: MakeSettings,
    scenes: Dataset,
    finished: Path,
    tmp_path: Path,
    files: Files,
    spare: int | None,
    at: int,
    unwritten: str,
) -> None:
    """From step ``at`` on no file may be larger than the model and ``spare`` bytes; the state would be."""
    size = 0 if spare is None else (finished / "model.safetensors").stat().st_size + spare
    kept: dict[str, bytes] = {}
    with contextlib.ExitStack() as stack:

        def report(done: StepReport) -> None:
            if done.step == at:
                kept.update({name: (tmp_path / name).read_bytes() for name in files()})
                stack.enter_context(room_for(size))

        if not at:
            stack.enter_context(room_for(size))
        with pytest.raises(OutputError) as caught:
            train(tiny(), scenes, tmp_path, report=report)
    message = str(caught.value)
    assert "\n" not in message
    assert unwritten in message
    assert "cannot be written" in message
    assert set(kept) <= files()
    assert ("last/state.pt" in kept) == (at == 3)
    for name, content in kept.items():
        assert name == "metrics.csv" or (tmp_path / name).read_bytes() == content, name
    for path in tmp_path.rglob("*.safetensors"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"device": "abacus"}, SettingsError),
        ({"backbone_weights": Path("missing.pth")}, ArtefactError),
    ],
)
def test_options_that_cannot_be_used_write_nothing(
    tiny: MakeSettings,
    scenes: Dataset,
    tmp_path: Path,
    files: Files,
    options: dict[str, object],
    kind: type[AnchorlineError],
) -> None:
    with pytest.raises(kind):
        train(tiny(), scenes, tmp_path, **options)  # type: ignore[arg-type]
    assert files() == set()
