"""Models with the antialiased resize on a GPU: the CPU lays their frames onto the canvas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from anchorline.runtime.canvas import place
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import FrameError, SettingsError
from anchorline.runtime.nv12 import Nv12, bgr_of
from anchorline.runtime.tensorrt.frames import DeviceCanvas, DeviceFrame, canvas_launch, resizes_as

RULE = ResizeRule(interpolation="antialiased")


@pytest.fixture
def antialiased(contract: Contract) -> Contract:
    return dataclasses.replace(contract, resize=RULE)


@pytest.fixture
def detector(gpu: Any, make_engine: Callable[..., Path], antialiased: Contract) -> Iterator[Detector]:
    with Detector(make_engine(promised=antialiased)) as opened:
        yield opened


def test_all_host_frames_are_resized_by_the_cpu(
    gpu: Any, detector: Detector, frames: list[NDArray[np.uint8]]
) -> None:
    """Large ones too, which the GPU resizes otherwise: no kernel runs, and the canvases are Pillow's."""
    nv12 = np.random.default_rng(3).integers(0, 256, (150, 120), dtype=np.uint8)
    given = [frames[2], Nv12(nv12), frames[6], frames[0]]
    inputs, _ = detector.prepare([bgr_of(frame) for frame in given])
    expected = {name: values.copy() for name, values in inputs.items()}
    lane = detector._backend.create_lane()
    gpu.driver.calls.clear()
    with lane.entered():
        lane.submit(given)
        np.testing.assert_array_equal(lane._buffers.images((48, 64))[: len(given)], expected["images"])
        np.testing.assert_array_equal(lane._buffers.sizes[: len(given)], expected["image_sizes"])
        lane.collect()
    assert "cuLaunchKernel" not in [name for name, _ in gpu.driver.calls]
    lane.close()


def test_a_device_frame_is_refused_and_the_next_host_frame_taken(gpu: Any, detector: Detector) -> None:
    frame = gpu.frame(np.zeros((60, 80, 3), np.uint8))
    with pytest.raises(FrameError, match=r"host memory.*copy it to the host first") as caught:
        detector(frame)
    assert "\n" not in str(caught.value)
    assert len(detector(np.zeros((60, 80, 3), np.uint8))) == 2
    frame.free()


def test_there_is_no_kernel_for_it(contract: Contract, antialiased: Contract) -> None:
    assert resizes_as(contract)
    assert not resizes_as(antialiased)
    frame = DeviceFrame(1, 0, 240, (60, 80), 0, None, None)
    with pytest.raises(SettingsError, match=r"resize.interpolation is 'antialiased'.*to_canvas"):
        canvas_launch(frame, place((60, 80), (48, 64), RULE), antialiased, DeviceCanvas(0, 0, (48, 64)))
