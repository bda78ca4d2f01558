"""The preprocessing kernel's source, run on the CPU, against the CPU path of the runtime."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from anchorline.runtime.canvas import place, to_canvas
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.nv12 import COLOURS, Nv12, bgr_of
from anchorline.runtime.tensorrt import kernels as images
from anchorline.runtime.tensorrt.frames import DeviceCanvas, DeviceFrame, canvas_launch
from anchorline.runtime.tensorrt.kernels import Launch, compile

CANVAS = (40, 300)  # wider than the threads of a block
FLOAT_STEP = 0.02  # grey levels: the weights of OpenCV's float resize
SIZES = [(40, 300), (1, 1), (7, 500), (97, 31), (80, 600), (33, 33), (123, 457), (2, 2)]


def contract(dtype: str, resize: ResizeRule) -> Contract:
    return Contract(
        task="detections",
        names=("thing",),
        canvas=CANVAS,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        input_dtype=dtype,
        resize=resize,
    )


@pytest.fixture
def run(run_on_host: Callable[[Launch, int], None]) -> Callable[..., tuple[NDArray, NDArray]]:
    """``run(pixels, colours, dtype, rule)``: canvas and image size by the kernel, over canvases full of 77;
    ``colours`` are NV12's, empty for BGR."""

    def on_host(
        pixels: NDArray[np.uint8], colours: str, dtype: str, rule: ResizeRule
    ) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
        height, width = pixels.shape[0] * 2 // 3 if colours else pixels.shape[0], pixels.shape[1]
        pitch = pixels.strides[0]
        chroma = pixels.ctypes.data + height * pitch if colours else 0
        frame = DeviceFrame(pixels.ctypes.data, chroma, pitch, (height, width), None, None, pixels, colours)
        promised = contract(dtype, rule)
        canvas = np.full((*CANVAS, 3), 77, dtype)
        size = np.full(2, 77, np.float32)
        placement = place(frame.size, CANVAS, rule)
        there = DeviceCanvas(canvas.ctypes.data, size.ctypes.data, CANVAS)
        launch = canvas_launch(frame, placement, promised, there)
        run_on_host(launch, 0)
        return canvas, size

    return on_host


def on_cpu(frame: NDArray[np.uint8], dtype: str, rule: ResizeRule) -> NDArray[np.generic]:
    canvas = np.full((*CANVAS, 3), 33, dtype)
    to_canvas(frame, place((frame.shape[0], frame.shape[1]), CANVAS, rule), canvas)
    return canvas


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_bgr_is_within_a_grey_level_of_opencv(size: tuple[int, int], run: Callable) -> None:
    for rule in (ResizeRule(), ResizeRule(shorter_side=20)):
        frame = noise(*size, 3)
        canvas, image_size = run(frame, "", "uint8", rule)
        expected = on_cpu(frame, "uint8", rule)
        assert np.abs(canvas.astype(int) - expected.astype(int)).max() <= 1
        assert tuple(image_size) == place(size, CANVAS, rule).valid


@pytest.mark.parametrize("size", SIZES)
def test_float_canvases_are_the_cpu_s(size: tuple[int, int], run: Callable) -> None:
    frame = noise(*size, 3)
    canvas, _ = run(frame, "", "float32", ResizeRule(shorter_side=33))
    expected = on_cpu(frame, "float32", ResizeRule(shorter_side=33))
    np.testing.assert_allclose(canvas, expected, rtol=0, atol=FLOAT_STEP)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("size", [(40, 300), (2, 2), (98, 32), (80, 600), (124, 458)])
@pytest.mark.parametrize("colours", COLOURS)
def test_nv12_is_the_cpu_s_conversion(colours: str, size: tuple[int, int], dtype: str, run: Callable) -> None:
    pixels = noise(size[0] * 3 // 2, size[1])
    canvas, _ = run(pixels, colours, dtype, ResizeRule())
    matrix, _, full = colours.partition("_")
    frame = bgr_of(Nv12(pixels, matrix, bool(full)))
    if colours == "bt601":
        np.testing.assert_array_equal(frame, cv2.cvtColor(pixels, cv2.COLOR_YUV2BGR_NV12))
    difference = np.abs(canvas.astype(float) - on_cpu(frame, dtype, ResizeRule()).astype(float)).max()
    assert difference <= (1 if dtype == "uint8" else FLOAT_STEP)


def test_rows_may_lie_apart(run: Callable) -> None:
    wide = noise(48, 200, 3)
    canvas, _ = run(wide[:, :90], "", "uint8", ResizeRule())
    again, _ = run(np.ascontiguousarray(wide[:, :90]), "", "uint8", ResizeRule())
    np.testing.assert_array_equal(canvas, again)


@pytest.mark.parametrize("architecture", compile.ARCHITECTURES)
def test_the_kernels_are_compiled_for_each_gpu(architecture: int) -> None:
    code = images.image("preprocess", architecture)
    frames = ("bgr", *(f"nv12_{colours}" for colours in COLOURS))
    assert all(f"{frame}_to_{dtype}".encode() in code for frame in frames for dtype in ("uint8", "float32"))
