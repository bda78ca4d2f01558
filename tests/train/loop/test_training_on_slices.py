"""Training on slices: what the samples are, what the contract tells, how it is validated, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from anchorline import cli
from anchorline.data.dataset import Dataset, LabelledImage
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.slices import OBJECT_SIDES, Slicer
from anchorline.runtime.video.options import SliceOptions
from anchorline.train.checkpoint import read_header
from anchorline.train.loop import distributed
from anchorline.train.loop.train import train
from anchorline.train.settings import Settings, TrainingSettings, load_preset

MakeSettings = Callable[..., Settings]


@pytest.fixture(scope="module")
def wide(labelled: Callable[..., LabelledImage]) -> Dataset:
    """Four images of four slices each, in every one of which is an object."""
    rng = np.random.default_rng(0)
    boxes = [(x + 8.0, y + 8.0, x + 24.0, y + 24.0) for y in (0, 64) for x in (0, 96)]
    images = [
        labelled(rng.integers(0, 255, (128, 192, 3), dtype=np.uint8), boxes, id=f"image-{number}")
        for number in range(4)
    ]
    return Dataset("wide", ("square",), tuple(images))


def test_slices_are_the_samples_and_the_validation_looks_in_slices(
    tiny: MakeSettings, wide: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    shared_map50 = distributed.shared_map50

    def watched(detect, data, *rest):
        def told(frames):
            looked.append([frame.shape[:2] for frame in frames])
            return detect(frames)

        assert "Slicer" in repr(detect.__closure__)
        return shared_map50(told, data, *rest)

    monkeypatch.setattr(distributed, "shared_map50", watched)
    settings = tiny(epochs=1, slice=(64, 96), slice_overlap=0.0)
    result = train(settings, wide, tmp_path / "run", validation=wide)
    assert result.steps == 4  # sixteen slices in batches of four
    assert looked == [[(128, 192)] * 4]  # whole images, which the slicer cuts
    _, contract = read_header(result.checkpoint)
    assert contract.source[OBJECT_SIDES] == {"image": [16.0] * 3, "canvas": [16.0] * 3}
    assert json.loads((tmp_path / "run" / "data.json").read_text())["images"] == 16
    # So the size of the slices follows from the model, 64x96 being its canvas.
    assert Slicer(SliceOptions(overlap=0.3), contract).sides == (64, 96)


def test_whole_images_leave_their_objects_sizes_too(
    tiny: MakeSettings, wide: Dataset, tmp_path: Path
) -> None:
    result = train(tiny(epochs=1), wide, tmp_path / "run")
    assert result.steps == 1
    _, contract = read_header(result.checkpoint)
    assert contract.source[OBJECT_SIDES] == {"image": [16.0] * 3, "canvas": [8.0] * 3}
    assert Slicer(SliceOptions(overlap=0.3), contract).sides == (128, 192)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"slice": (63, 640)},
            r"training\.slice is \(63, 640\); expected a height and a width of at least 64",
        ),
        (
            {"slice": (64, 64), "slice_overlap": 0.95},
            r"slice_overlap is 0\.95; expected at most 0\.9",
        ),
        ({"min_visible": 1.5}, r"training\.min_visible is 1\.5"),
    ],
)
def test_absurd_slices_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        TrainingSettings(**values)  # type: ignore[arg-type]


def test_slices_are_whole_by_default() -> None:
    assert load_preset("mobilenet-v2-fpn-quick").training.slices is None
    chosen = load_preset("mobilenet-v2-fpn-quick", ["slice=[512,640]", "slice_overlap=0.1"]).training.slices
    assert chosen == SliceOptions(512, 640, overlap=0.1)


def test_stored_proposals_do_not_go_with_slices(tiny: MakeSettings, wide: Dataset, tmp_path: Path) -> None:
    settings = tiny(regime="fast-rcnn", slice=(64, 96))
    with pytest.raises(SettingsError, match="stored proposals, which are those of whole images"):
        train(settings, wide, tmp_path / "run", proposals=tmp_path / "proposals.jsonl")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--overlap", "0.3"], "--overlap and --min-visible need --slice HEIGHTxWIDTH"),
        (["--slice", "auto"], "--slice is 'auto', which is for detection"),
        (["--slice", "20"], "training.slice is (20, 20); expected a height and a width of at least 64"),
    ],
)
def test_the_command_refuses_in_one_line(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", "synthetic:2", "--out", str(tmp_path / "run"), *options]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
