"""Settings: presets, overrides, and one clear line for whatever cannot be used."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from anchorline.runtime.io.errors import AnchorlineError, SettingsError
from anchorline.train.model.settings import ModelSettings, settings_from
from anchorline.train.settings import Settings, TrainingSettings, load_preset, preset_names

QUICK = "mobilenet-v2-fpn-quick"


def message_of(*overrides: str, preset: str = QUICK) -> str:
    """The one line that refuses these overrides."""
    with pytest.raises(SettingsError) as caught:
        load_preset(preset, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_every_preset_loads_and_is_no_copy_of_the_defaults() -> None:
    assert QUICK in preset_names()
    for name in preset_names():
        assert load_preset(name) != Settings()


def test_fields_a_preset_leaves_out_keep_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("[model]\nfpn_channels = 64\n[training]\nepochs = 3\n")
    found = load_preset(str(path))
    assert found == Settings(ModelSettings(fpn_channels=64), TrainingSettings(epochs=3))
    path.write_text("")
    assert load_preset(str(path)) == Settings()


@pytest.mark.parametrize(
    ("override", "table", "name", "value"),
    [
        ("training.epochs=20", "training", "epochs", 20),
        ("epochs = 20", "training", "epochs", 20),
        ("learning_rate=1", "training", "learning_rate", 1.0),
        ("training.learning_rate=1e-3", "training", "learning_rate", 1e-3),
        ("model.canvas=[320, 416]", "model", "canvas", (320, 416)),
        ("model.rpn_pre_nms=77", "model", "rpn_pre_nms", 77),
        ("training.rpn_pre_nms=78", "training", "rpn_pre_nms", 78),
        ("roi_aligned=true", "model", "roi_aligned", True),
        ("lr_schedule=step", "training", "lr_schedule", "step"),
        ("training.lr_schedule='step'", "training", "lr_schedule", "step"),
        ("model.anchor_sizes=[[8],[16,20],[32],[64],[128]]", "model", "anchor_sizes", None),
        ("zoom=[0.5, 2]", "training", "zoom", (0.5, 2.0)),
    ],
)
def test_overrides(override: str, table: str, name: str, value: object) -> None:
    if value is None:
        assert "anchor_sizes" in message_of(override)  # groups of different sizes: one head serves all levels
        return
    found = getattr(getattr(load_preset(QUICK, [override]), table), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "override", ["training.schedule=step", "schedule='step'", "training.schedule = step"]
)
def test_the_former_name_of_the_rate_s_schedule_still_counts(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_preset(QUICK, [override]).training.lr_schedule == "step"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(override)
    assert "training.lr_schedule" in line
    assert load_preset(QUICK, [override, "training.lr_schedule=cosine"]).training.lr_schedule == "cosine"


def test_a_file_with_the_former_name_still_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.toml"
    path.write_text("[training]\nepochs = 3\nschedule = 'one-cycle'\n")
    assert load_preset(str(path)).training == TrainingSettings(epochs=3, lr_schedule="one-cycle")
    (line,) = capsys.readouterr().err.splitlines()
    assert "own.toml" in line
    assert "training.lr_schedule" in line
    assert load_preset(str(path), ["lr_schedule=step"]).training.lr_schedule == "step"
    path.write_text("[training]\nlr_schedule = 'step'\nschedule = 'step'\n")
    assert "lr_schedule" in message_of(preset=str(path))


def test_the_presets_use_the_names_of_today(capsys: pytest.CaptureFixture[str]) -> None:
    for name in preset_names():
        load_preset(name)
    assert capsys.readouterr().err == ""


def test_the_last_override_wins() -> None:
    assert load_preset(QUICK, ["epochs=2", "training.epochs=5"]).training.epochs == 5


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.epoch=3", "training.epoch is not a setting"),
        ("nonsense=3", "nonsense"),
        ("rpn_pre_nms=3", "rpn_pre_nms=3"),  # both tables have it
        ("optimiser.epochs=3", "optimiser.epochs=3"),
        ("training.epochs", "training.epochs"),
        ("training.epochs=", "''"),
        ("training.epochs=three", "'three'"),
        ("training.epochs=2.5", "2.5"),
        ("training.epochs=true", "True"),
        ("training.epochs=0", "0"),
        ("training.epochs=-1", "-1"),
        ("training.batch=0", "training.batch"),
        ("training.learning_rate=0", "training.learning_rate"),
        ("training.learning_rate=nan", "training.learning_rate"),
        ("training.learning_rate=inf", "training.learning_rate"),
        ("training.learning_rate=[1]", "training.learning_rate"),
        ("training.lr_schedule=sometimes", "'sometimes'"),
        ("training.precision=fp8", "'fp8'"),
        ("training.ema=1.0", "training.ema"),
        ("training.zoom=[2.0, 1.0]", "training.zoom"),
        ("training.zoom=[1.0]", "training.zoom"),
        ("training.zoom=1.0", "training.zoom"),
        ("training.workers=-1", "training.workers"),
        ("training.flip=1.5", "training.flip"),
        ("training.rpn_positive_fraction=2.0", "training.rpn_positive_fraction"),
        ("training.roi_positive_fraction=-0.5", "training.roi_positive_fraction"),
        ("training.rpn_positive_iou=1.5", "training.rpn_positive_iou"),
        ("training.rpn_box_beta=-0.1", "training.rpn_box_beta"),
        ("training.rpn_negative_iou=0.8", "training.rpn_negative_iou"),
        ("training.momentum=1.5", "training.momentum"),
        ("training.weight_decay=-1.0", "training.weight_decay"),
        ("training.clip_norm=-1.0", "training.clip_norm"),
        ("training.seed=-1", "training.seed"),
        ("model.neck=pan", "'pan'"),
        ("model.finest_stride=16", "model.finest_stride"),
        ("model.backbone_norm=batch", "'batch'"),
        ("model.canvas=[100, 640]", "[100, 640]"),
        ("model.canvas=[0, 640]", "[0, 640]"),
        ("model.canvas=[64]", "model.canvas"),
        ("model.canvas=[64.0, 64.0]", "model.canvas"),
        ("model.canvas=640", "model.canvas"),
        ("model.anchor_sizes=[[32]]", "model.anchor_sizes"),
        ("model.anchor_sizes=[32, 64, 128, 256, 512]", "model.anchor_sizes"),
        ("model.anchor_sizes=[[],[],[],[],[]]", "model.anchor_sizes"),
        ("model.anchor_sizes=[[0],[16],[32],[64],[128]]", "model.anchor_sizes"),
        ("model.aspect_ratios=[]", "model.aspect_ratios"),
        ("model.aspect_ratios=[1.0, -2.0]", "model.aspect_ratios"),
        ("model.roi_size=0", "model.roi_size"),
        ("model.roi_sampling=-1", "model.roi_sampling"),
        ("model.max_detections=0", "model.max_detections"),
        ("model.representation=0", "model.representation"),
        ("model.rpn_convs=-1", "model.rpn_convs"),
        ("model.nms_iou=1.5", "model.nms_iou"),
        ("model.rpn_nms_iou=-0.1", "model.rpn_nms_iou"),
        ("model.score_threshold=2.0", "model.score_threshold"),
        ("model.std=[1.0, 0.0, 1.0]", "model.std"),
        ("model.mean=[1.0, 2.0]", "model.mean"),
        ("model.box_weights=[10.0, 10.0, 0.0, 5.0]", "model.box_weights"),
        ("model.canonical_size=0.0", "model.canonical_size"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(override: str, says: str) -> None:
    text = message_of(override)
    assert says in text
    assert "expected" in text


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainingSettings, {"epochs": "3"}, "training.epochs is '3'; expected a whole number of at least 1"),
        (TrainingSettings, {"ema": 1}, "training.ema is 1; expected a number from 0 to below 1"),
        (TrainingSettings, {"compile": 1}, "training.compile is 1; expected a value of type bool"),
        (TrainingSettings, {"seed": 2**32}, "training.seed is 4294967296; expected a whole number from 0 to"),
        (ModelSettings, {"neck": 3}, "model.neck is 3; expected one of fpn, fpn32, single, dc5"),
        (ModelSettings, {"finest_stride": 4.0}, "model.finest_stride is 4.0; expected one of 4, 8"),
        (ModelSettings, {"std": (1, 2)}, r"model.std is \(1, 2\); expected a list of 3, each a number above"),
        (ModelSettings, {"anchor_sizes": (8,)}, r"is \(8,\); expected a list, each a list, each a number"),
    ],
)
def test_settings_made_in_python_are_held_to_the_same_as_those_of_files(
    kind: type[ModelSettings | TrainingSettings], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        kind(**values)


def test_settings_made_in_python_may_be_lists_whole_numbers_and_numpys() -> None:
    made = TrainingSettings(learning_rate=np.float64(0.5), zoom=[1, np.float64(2)])  # type: ignore[arg-type]
    assert made == TrainingSettings(learning_rate=0.5, zoom=(1.0, 2.0))
    assert type(made.learning_rate) is type(made.zoom[0]) is type(made.zoom[1]) is float


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[model", "not a TOML file"),
        ("\x00\x01", "not a TOML file"),
        ("[network]\n", "unknown table 'network'"),
        ("model = 3\n", "model"),
        ("[[training]]\nepochs = 3\n", "training"),
        ("[model]\nbackbon = 'x'\n", "model.backbon is not a setting"),
        ("[training]\nepochs = '3'\n", "training.epochs"),
    ],
)
def test_a_damaged_preset_file_is_refused_in_one_line(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(content)
    assert says in message_of(preset=str(path))
    message_of("batch=3", preset=str(path))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(b"\xff\xfe\x00model")
    assert "not a TOML file" in message_of(preset=str(path))


@pytest.mark.parametrize("preset", ["no-such-preset", "missing.toml", "", "../presets/x"])
def test_an_unknown_preset_names_the_known_ones(preset: str) -> None:
    assert QUICK in message_of(preset=preset)


def test_model_settings_survive_json() -> None:
    for settings in (
        ModelSettings(),
        load_preset(QUICK).model,
        ModelSettings(neck="single", anchor_sizes=((8.0, 16.0),)),
    ):
        again = ModelSettings.from_json(settings.to_json())
        assert again == settings
        assert hash(again) == hash(settings), "lists instead of tuples"


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", '"model"', '{"neck": null}', '{"canvas": [64, "64"]}', '{"x": 1}']
)
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(AnchorlineError, match="expected"):
        ModelSettings.from_json(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    field=st.sampled_from([f.name for f in dataclasses.fields(ModelSettings)] + ["unknown"]),
    value=json_values,
)
def test_any_value_is_taken_or_refused_but_never_crashes(field: str, value: object) -> None:
    try:
        settings = settings_from(ModelSettings, {field: value}, "model")
    except SettingsError:
        return
    assert ModelSettings.from_json(settings.to_json()) == settings
