"""On a real GPU: both CUDA layers, the preprocessing kernel, NMS in a graph, the CUDA provider.

Engines are in tests/engine/builder/test_engines_on_gpu.py, beside what builds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorline.doctor.machine import find_gpus
from anchorline.runtime.backends.onnxruntime import available_providers
from anchorline.runtime.canvas import place, to_canvas
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.detector import Detector
from anchorline.runtime.tensorrt import plugins
from anchorline.runtime.tensorrt.cuda import (
    CUDA_PACKAGES,
    BindingsCuda,
    Cuda,
    CudaError,
    NoGpuError,
    open_cuda,
)
from anchorline.runtime.tensorrt.frames import DeviceCanvas, DeviceFrame, FrameIntake, read_device_frame
from anchorline.runtime.tensorrt.plugins import BatchedNMS, Call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not find_gpus().gpus, reason="needs an NVIDIA GPU"),
]


@pytest.fixture(params=CUDA_PACKAGES)
def cuda(request: pytest.FixtureRequest) -> Iterator[Cuda]:
    try:
        opened = open_cuda(request.param)
    except NoGpuError as error:
        pytest.skip(str(error))
    with opened.current():
        yield opened
    opened.close()


class Blocks:
    """Device memory for a test, with arrays copied in and out."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.stream = cuda, cuda.create_stream()
        self.held: list[tuple[int, Any]] = []

    def put(self, values: np.ndarray) -> int:
        address = self.cuda.allocate(values.nbytes, "a test's array", "nothing")
        pinned = self.cuda.allocate_pinned(values.nbytes)
        pinned.array[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.cuda.copy_in(address, pinned, values.nbytes, self.stream)
        self.cuda.synchronize(self.stream)
        self.held.append((address, pinned))
        return address

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        pinned = next(pinned for held, pinned in self.held if held == address)
        self.cuda.copy_out(pinned, address, like.nbytes, self.stream)
        self.cuda.synchronize(self.stream)
        return pinned.array.view(like.dtype).reshape(like.shape).copy()

    def close(self) -> None:
        for address, pinned in self.held:
            self.cuda.free(address)
            self.cuda.free_pinned(pinned)
        self.cuda.destroy_stream(self.stream)


@pytest.fixture
def blocks(cuda: Cuda) -> Iterator[Blocks]:
    made = Blocks(cuda)
    yield made
    made.close()


def test_copies_there_and_back(blocks: Blocks) -> None:
    values = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    np.testing.assert_array_equal(blocks.get(blocks.put(values), values), values)


def test_events_measure_and_order(cuda: Cuda, blocks: Blocks) -> None:
    start, end = cuda.create_event(timing=True), cuda.create_event(timing=True)
    cuda.record(start, blocks.stream)
    blocks.put(np.zeros(1 << 22, np.uint8))
    cuda.record(end, blocks.stream)
    cuda.wait(blocks.stream, start)
    cuda.synchronize(blocks.stream)
    assert 0 < cuda.seconds_between(start, end) < 10
    for event in (start, end):
        cuda.destroy_event(event)


def test_memory_that_is_not_there(cuda: Cuda) -> None:
    _, total = cuda.memory_info()
    with pytest.raises(CudaError, match=r"CUDA_ERROR_OUT_OF_MEMORY: everything needs .* are free"):
        cuda.allocate(2 * total, "everything", "less")


def test_the_device_of_an_address(cuda: Cuda, blocks: Blocks) -> None:
    host = np.zeros(10, np.uint8)
    assert cuda.device_of(blocks.put(host)) == 0
    assert cuda.device_of(host.ctypes.data) is None


@pytest.mark.parametrize("size", [(1080, 1920), (2160, 3840), (600, 800), (37, 91)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_the_preprocessing_kernel_is_the_cpu_s(
    size: tuple[int, int], dtype: str, cuda: Cuda, blocks: Blocks
) -> None:
    shape = (800, 1088)
    contract = Contract(
        "detections", ("a",), shape, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), input_dtype=dtype, resize=ResizeRule()
    )
    frame = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    placement = place(size, shape, contract.resize)
    expected = np.empty((*shape, 3), dtype)
    to_canvas(frame, placement, expected)
    source, canvas = blocks.put(frame), blocks.put(np.full_like(expected, 7))
    image_size = blocks.put(np.zeros(2, np.float32))
    on_gpu = DeviceFrame(source, 0, 3 * size[1], size, 0, None, None)
    FrameIntake(cuda, contract).to_canvas(
        on_gpu, placement, DeviceCanvas(canvas, image_size, shape), blocks.stream
    )
    found = blocks.get(canvas, expected)
    assert np.abs(found.astype(float) - expected.astype(float)).max() <= (1 if dtype == "uint8" else 0)
    assert tuple(blocks.get(image_size, np.zeros(2, np.float32))) == placement.valid


def test_the_nms_kernel_in_a_captured_graph(cuda: Cuda, blocks: Blocks) -> None:
    if not isinstance(cuda, BindingsCuda):
        pytest.skip("pycuda has no CUDA graphs")
    corner = np.random.default_rng(2).uniform(0, 500, (4, 800, 2))
    boxes = np.concatenate([corner, corner + 80], axis=2).astype(np.float32)
    scores = -np.sort(-np.random.default_rng(3).random((4, 800), np.float32), axis=1)
    op = BatchedNMS(iou_threshold=0.5, score_threshold=0.05)
    shapes = (boxes.shape, scores.shape)
    inputs, kept = (blocks.put(boxes), blocks.put(scores)), blocks.put(np.zeros_like(scores))
    scratch = blocks.put(np.zeros(op.workspace_bytes(shapes), np.uint8))
    call = Call(shapes, ("float32", "float32"), inputs, kept, scratch)
    plugins.launch(op.launches(call), blocks.stream)
    plain = blocks.get(kept, scores)
    graph = cuda.capture(blocks.stream, lambda: plugins.launch(op.launches(call), blocks.stream))
    for _ in range(3):
        cuda.launch_graph(graph, blocks.stream)
        np.testing.assert_array_equal(blocks.get(kept, scores), plain)
    cuda.destroy_graph(graph)
    assert 0 < (plain > 0).sum() < plain.size


def test_a_capture_that_fails_leaves_the_stream_usable(cuda: Cuda, blocks: Blocks) -> None:
    if not isinstance(cuda, BindingsCuda):
        pytest.skip("pycuda has no CUDA graphs")
    with pytest.raises(CudaError):
        cuda.capture(blocks.stream, lambda: cuda.synchronize(blocks.stream))
    values = np.arange(10, dtype=np.uint8)
    np.testing.assert_array_equal(blocks.get(blocks.put(values), values), values)


def test_the_cuda_provider(model_path: Path, picture: np.ndarray) -> None:
    if "cuda" not in available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    with Detector(model_path, provider="cpu") as on_cpu, Detector(model_path, provider="cuda") as on_gpu:
        for frame in (picture, picture[:20]):
            np.testing.assert_allclose(on_gpu(frame).scores, on_cpu(frame).scores, atol=1e-5)


def test_frames_of_pytorch(cuda: Cuda, picture: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs PyTorch with CUDA")
    tensor = torch.from_numpy(picture.copy()).cuda()
    stream = cuda.create_stream()
    found = read_device_frame(tensor, stream)
    cuda.destroy_stream(stream)
    assert (found.address, found.size, found.device) == (tensor.data_ptr(), picture.shape[:2], 0)
    assert cuda.device_of(found.address) == 0
