"""One file for any frame size, built for one size, for several, and for all up to a largest."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from anchorline.data.synthetic import scenes
from anchorline.engine import build as building
from anchorline.engine.build import BuildResult, build_engine
from anchorline.engine.fp16_range import network_inputs
from anchorline.engine.graph import check_exported
from anchorline.engine.options import BuildOptions, parse_frames, parse_max_frame
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import GpuError, SettingsError
from anchorline.verify.verification import verify_subjects

# The model lays frames within 128 x 160.
WIDE, USUAL, UPRIGHT = (96, 160), (128, 160), (128, 96)
HD = (1080, 1920)


def build(model: Path, out: Path, *, samples: Any = (), **options: Any) -> BuildResult:
    asked = {"target": "tensorrt-rtx", "compute_capabilities": (86,), "batch": (1, 1, 4), **options}
    return build_engine(model, out, BuildOptions(**asked), samples=samples, verify=False)


def convolutions(result: BuildResult) -> list[list[int]]:
    return [layer["shape"] for layer in result.manifest.raw["layers"] if layer["type"] == "CONVOLUTION"]


def test_one_frame_size_is_written_into_the_graph(rtx: Any, free_file: Path, tmp_path: Path) -> None:
    """Its range was checked on frames of other sizes."""
    samples = network_inputs([np.full((90, 70, 3), 90, np.uint8)], check_exported(onnx.load(free_file)))
    result = build(free_file, tmp_path / "m.engine", frames=(HD,), samples=samples)
    assert result.manifest.contract.canvas == WIDE
    assert result.manifest.canvases == ((WIDE, WIDE, WIDE),)
    assert result.manifest.raw["precision_report"]["samples"] == 1
    assert "canvas 96x160, batch 1:1:4" in result.describe()
    assert all(batch == -1 and min(rest) > 0 for batch, *rest in convolutions(result))
    # The same engine is not built twice, one for other frames is.
    assert not build(free_file, tmp_path / "m.engine", frames=(HD,), samples=samples).built


def test_several_frame_sizes_have_a_profile_each(rtx: Any, free_file: Path, tmp_path: Path) -> None:
    """One for those of the same canvas."""
    sizes = (HD, (480, 640), (720, 1280))
    result = build(free_file, tmp_path / "m.engine", frames=sizes)
    assert result.manifest.contract.canvas is None
    assert result.manifest.canvases == tuple((each, each, each) for each in (WIDE, USUAL))
    profiles = result.manifest.raw["profiles"]
    assert [profile["batch"] for profile in profiles] == [[1, 1, 4]] * 2
    memory = [profile["activation_bytes"] for profile in profiles]
    assert memory[1] > memory[0] > 0
    assert result.manifest.raw["activation_bytes"] == memory[1]
    assert "canvases 96x160, 128x160, batch 1:1:4" in result.describe()


def test_all_frames_up_to_a_largest_share_a_profile(rtx: Any, free_file: Path, tmp_path: Path) -> None:
    """In half precision, with a fixed batch: nothing but height and width varies."""
    result = build(free_file, tmp_path / "m.engine", max_frame=HD, batch=(2, 2, 2))
    assert result.manifest.canvases == (((32, 32), WIDE, USUAL),)
    assert "canvases 32x32 to 128x160, batch 2:2:2" in result.describe()
    assert all(shape[0] == 2 and shape[2:4].count(-1) in (0, 2) for shape in convolutions(result))
    assert convolutions(result)[0][2:] == [-1, -1]


RULE = ResizeRule(800, 1333)


@pytest.mark.parametrize(
    ("asked", "rule", "canvases"),
    [
        ({}, RULE, [((800, 1088),) * 3]),
        ({"frames": ((1080, 1920), (720, 1280))}, RULE, [((768, 1344),) * 3]),
        ({"frames": ((1080, 1920), (1920, 1080))}, RULE, [((768, 1344),) * 3, ((1344, 768),) * 3]),
        ({"max_frame": (1080, 1920)}, RULE, [((32, 32), (768, 1344), (1344, 1344))]),
        ({"max_frame": (480, 640)}, RULE, [((32, 32), (800, 1088), (1088, 1088))]),
        (
            {"max_frame": (1080, 1920)},
            ResizeRule(800, 1333, padding=1),
            [((32, 32), (749, 1333), (1333, 1333))],
        ),
        ({"max_frame": (20, 50)}, ResizeRule(padding=1), [((20, 32), (20, 50), (50, 50))]),
    ],
)
def test_canvases_follow_from_the_rule(asked: Any, rule: ResizeRule, canvases: Any) -> None:
    contract = Contract("detections", ("a",), None, (0.0,) * 3, (1.0,) * 3, resize=rule)
    assert BuildOptions(**asked).resolve_canvases(contract) == tuple(canvases)


def test_what_cannot_be_asked_for() -> None:
    contract = Contract("detections", ("a",), (800, 1344), (0.0,) * 3, (1.0,) * 3)
    assert BuildOptions().resolve_canvases(contract) == (((800, 1344),) * 3,)
    for asked in ({"frames": (HD,)}, {"max_frame": HD}):
        with pytest.raises(
            SettingsError, match=r"1080, 1920.* exported for a canvas of \(800, 1344\): leave"
        ):
            BuildOptions(**asked).resolve_canvases(contract)
    # Either way up the canvas is small, and the one that holds both is not.
    free = Contract("detections", ("a",), None, (0.0,) * 3, (1.0,) * 3, resize=ResizeRule(padding=1))
    with pytest.raises(SettingsError, match=r"largest frame is 1x100000, .*100000x100000; expected at most"):
        BuildOptions(max_frame=(1, 100000)).resolve_canvases(free)
    with pytest.raises(SettingsError, match="expected one or the other"):
        BuildOptions(frames=(HD,), max_frame=HD)
    with pytest.raises(SettingsError, match=r"frames is .*a height and a width in pixels"):
        BuildOptions(frames=((0, 4),))
    assert parse_frames(["1920x1080", "640X480"]) == (HD, (480, 640))
    assert (parse_max_frame([]), parse_max_frame(["9x8", "1920x1080"])) == (None, HD)
    with pytest.raises(SettingsError, match="--frame is '1920'; expected WIDTHxHEIGHT"):
        parse_frames(["1920"])
    with pytest.raises(SettingsError, match="--max-frame is 'x8'; expected WIDTHxHEIGHT"):
        parse_max_frame(["x8"])


@pytest.mark.parametrize(
    ("asked", "canvases", "held"),
    [
        ({"frames": (HD,)}, [WIDE], False),
        ({"frames": (HD, HD[::-1])}, [WIDE, UPRIGHT], True),
        ({"max_frame": (480, 640)}, [USUAL], True),
        ({"max_frame": (500, 500)}, [(128, 128)], True),
    ],
)
def test_an_engine_is_compared_on_the_canvases_it_is_for(
    asked: Any, canvases: Any, held: bool, free_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for TensorRT: the ONNX file on the canvas that the engine has or is held to."""
    contract = check_exported(onnx.load(free_file))
    opened: list[Any] = []

    def stand_in(path: Path, provider: str, canvas: Any) -> Detector:
        opened.append(canvas)
        return Detector(free_file, "cpu", canvas=canvas or canvases[0])

    monkeypatch.setattr(building, "Detector", stand_in)
    monkeypatch.setattr(building, "scenes", partial(scenes, count=1))
    monkeypatch.setattr(building, "verify_subjects", partial(verify_subjects, which_traps=("noise",)))
    engine = tmp_path / "m.engine"
    engine.write_bytes(b"a plan")
    told = building._verify(free_file, engine, BuildOptions(**asked).resolve_canvases(contract))
    assert "1 traps hold" in told
    assert opened == (canvases if held else [None])

    def refused(path: Path, provider: str, canvas: Any) -> Detector:
        raise GpuError(f"{path}: no GPU")

    monkeypatch.setattr(building, "Detector", refused)
    assert building._verify(free_file, engine, ()) == "not verified: no GPU"
