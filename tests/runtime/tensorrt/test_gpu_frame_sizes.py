"""Engines for several frame sizes: which optimisation profile a batch takes, and what a lane keeps of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.runtime.nv12 import Nv12
from anchorline.runtime.tensorrt.manifest import read_manifest

FIXED = [[canvas] * 3 for canvas in ((48, 80), (48, 64), (96, 48))]
RANGE = [[(16, 16), (48, 80), (96, 96)]]
Sized = Callable[..., Path]


@pytest.fixture
def free(contract: Contract) -> Contract:
    return dataclasses.replace(contract, canvas=None, resize=ResizeRule(48, 96, padding=16))


@pytest.fixture
def sized(make_engine: Callable[..., Path], free: Contract) -> Sized:
    """``sized(canvases)``: an engine of the model of any size, with these profiles."""

    def make(canvases: Any, batch: tuple[int, int, int] = (1, 1, 4), **options: Any) -> Path:
        told = options.pop("told", canvases)
        plan = {"canvases": canvases, **options.pop("plan", {})}
        profiles = {"profiles": [{"batch": list(batch), "canvas": each} for each in told]}
        return make_engine(batch=batch, promised=free, plan=plan, manifest=profiles, **options)

    return make


def frame_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def profiles_of(gpu: Any) -> list[int]:
    """The profiles that contexts were given, in order."""
    return [arguments[0] for name, arguments in gpu.driver.calls if name == "set_optimization_profile_async"]


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_each_frame_size_has_its_profile(
    flavour: str, gpu: Any, sized: Sized, check_same: Callable[..., None]
) -> None:
    """And gives what the ONNX file gives, frames on the GPU as well."""
    engine = sized(FIXED, flavour=flavour)
    with Detector(engine) as detector, Detector(engine, "cpu") as reference:
        assert detector.provider == flavour
        for size in ((48, 80), (48, 64), (100, 50), (480, 800)):
            frame = frame_of(*size)
            there = gpu.frame(frame)
            check_same([detector(frame)], [reference(frame)])
            check_same([detector(there)], [detector(frame)])
            there.free()
        assert profiles_of(gpu) == [0, 1, 2]
        check_same(
            detector.batch([frame_of(48, 80), frame_of(45, 70)]),
            reference.batch([frame_of(48, 80), frame_of(45, 70)]),
        )


def test_what_fits_no_profile_is_scaled_to_where_it_keeps_most(gpu: Any, sized: Sized) -> None:
    with Detector(sized(FIXED)) as detector:
        tall, wide = detector.batch([frame_of(60, 20)])[0], detector.batch([frame_of(20, 60)])[0]
    assert profiles_of(gpu) == [2, 0]
    # 96 x 32 fits on 96 x 48; 32 x 96 becomes 26 x 80 on 48 x 80. Boxes are in the frame's own pixels.
    assert tall.boxes[0].tolist() == [0, 0, 20, 60]
    assert wide.boxes[0].tolist() == [0, 0, 60, 20]


def test_a_batch_is_filled_up_with_black_canvases_of_its_size(gpu: Any, sized: Sized) -> None:
    with Detector(sized(FIXED, batch=(3, 3, 4))) as detector:
        detector.batch([frame_of(48, 80)] * 4)
        detector(frame_of(48, 64))
        (lane,) = detector._lanes._all
        second = lane._buffers.canvas(1, (48, 64))
        assert not gpu.driver.at(second.pixels, 2 * 48 * 64 * 3).any()
        assert gpu.driver.at(second.valid_size, 16).view(np.float32).tolist() == [48, 64] * 2


def test_a_range_takes_any_canvas_and_a_lane_keeps_a_few(
    gpu: Any, sized: Sized, check_same: Callable[..., None]
) -> None:
    sizes = [(48, 96), (48, 80), (48, 64), (48, 48), (64, 48)]
    life = gpu.trt["tensorrt"].life
    engine = sized(RANGE)
    with Detector(engine) as detector, Detector(engine, "cpu") as reference:
        for size in sizes[:4]:
            check_same([detector(frame_of(*size))], [reference(frame_of(*size))])
        detector(frame_of(*sizes[0]))
        assert (life.count("context"), life.count("context destroyed")) == (4, 0)
        detector(frame_of(*sizes[4]))  # the second goes, which was used longest ago
        assert (life.count("context"), life.count("context destroyed")) == (5, 1)
        for size in (sizes[0], *sizes[2:]):
            check_same([detector(frame_of(*size))], [reference(frame_of(*size))])
        assert life.count("context") == 5
        check_same([detector(frame_of(*sizes[1]))], [reference(frame_of(*sizes[1]))])
        assert life.count("context") == 6
        # The largest batch on the largest canvas, and mixed sizes on the largest of each side.
        for frames in ([frame_of(96, 96)] * 4, [frame_of(48, 80), frame_of(96, 48), frame_of(20, 20)]):
            check_same(detector.batch(frames), reference.batch(frames))
    assert profiles_of(gpu) == []


def test_large_frames_and_nv12_on_a_canvas_of_their_own(gpu: Any, sized: Sized) -> None:
    """They are resized on the GPU; the scores are the mean grey."""
    grey = np.full((300, 500, 3), 51, np.uint8)
    nv12 = Nv12(np.full((450, 500), 128, np.uint8))
    with Detector(sized(RANGE)) as detector:
        assert detector(grey).scores[0] == pytest.approx(0.2)
        assert detector(nv12).boxes[0].tolist() == [0, 0, 500, 300]
    assert [name for name, _ in gpu.driver.calls].count("cuLaunchKernel") == 2


def test_a_detector_held_to_a_canvas(gpu: Any, sized: Sized, check_same: Callable[..., None]) -> None:
    engine, frame = sized(FIXED), frame_of(48, 80)
    with Detector(engine, canvas=(48, 64)) as held, Detector(engine, "cpu", canvas=(48, 64)) as reference:
        check_same([held(frame)], [reference(frame)])
    assert profiles_of(gpu) == [1]
    with (
        Detector(engine, canvas=(64, 80)) as refused,
        pytest.raises(SettingsError, match=r"canvas is \(64, 80\).*from \(48, 80\) to \(48, 80\), or from"),
    ):
        refused(frame)
    with (
        Detector(sized(RANGE), canvas=(64, 80)) as held,
        Detector(engine, "cpu", canvas=(64, 80)) as reference,
    ):
        check_same([held(frame)], [reference(frame)])


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (FIXED[:1], None),  # one that is not told is not used
        ([FIXED[1], FIXED[0]], r"canvases of its profile 0 are \[\(48, 80\).*manifest says \[\(48, 64\)"),
        ([[(48, 80), (48, 80), (32, 80)]], r"canvas is .*expected sides that do not fall"),
        ([[(48, 80)]], "damaged manifest: canvases is"),
        ([None], "damaged manifest: canvases is"),
        ([], "damaged manifest: profiles.0.batch is missing"),
    ],
)
def test_profiles_are_those_of_the_manifest(told: Any, message: str | None, gpu: Any, sized: Sized) -> None:
    engine = sized(FIXED, told=told)
    if message is None:
        assert read_manifest(engine).canvases == (((48, 80),) * 3,)
        return
    with pytest.raises(ArtefactError, match=message) as caught:
        Detector(engine)
    assert "\n" not in str(caught.value)


def test_a_manifest_without_canvases_has_the_contract_s(
    gpu: Any, make_engine: Callable, free: Contract
) -> None:
    assert read_manifest(make_engine()).canvases == (((48, 64),) * 3,)
    with pytest.raises(ArtefactError, match=r"canvases are \(\) and the contract's is None; expected"):
        read_manifest(make_engine(promised=free))


@pytest.mark.parametrize("provider", ["cpu", "auto"])
def test_the_onnx_file_in_an_engine_s_place_runs_on_its_canvas(
    provider: str, gpu: Any, make_engine: Callable, free: Contract, write_model: Callable[..., Path]
) -> None:
    """As the engine would, though the file takes any frame size."""
    elsewhere = {"compute_capabilities": [120]}
    engine = make_engine(manifest=elsewhere, write=lambda path, _: write_model(path, free))
    with Detector(engine, provider) as detector:
        assert detector.provider in ("cpu", "openvino")
        assert detector.contract.canvas == (48, 64)
        assert detector(frame_of(96, 96)).boxes[0].tolist() == [0, 0, 96, 96]
    with pytest.raises(SettingsError, match="was made for one canvas"):
        Detector(engine, provider, canvas=(48, 80))
