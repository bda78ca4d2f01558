"""The life of an engine on the double: load, warm up, capture, replay, partial batches, close."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from anchorline.runtime.detector import Detector
from anchorline.runtime.nv12 import Nv12
from anchorline.runtime.tensorrt.cuda import GpuOptions

FLAVOURS = ("tensorrt", "tensorrt-rtx")
ALLOCATIONS = {"cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate", "cuEventCreate", "cuGraphInstantiate"}


@pytest.fixture
def on_cpu(make_engine: Callable[..., Path]) -> Callable[[Path, list[Any]], list[Any]]:
    """What the engine's ONNX file finds on the CPU."""

    def run(engine: Path, frames: list[Any]) -> list[Any]:
        with Detector(engine.with_suffix(".onnx"), provider="cpu", threads=1) as detector:
            return detector.batch(frames)

    return run


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_engine_finds_what_its_onnx_file_finds(
    flavour: str, gpu: Any, make_engine: Callable, frames: list, on_cpu: Callable, check_same: Callable
) -> None:
    engine = make_engine(flavour)
    expected = on_cpu(engine, frames)
    with Detector(engine) as detector:
        assert (detector.provider, detector.precision) == (flavour, "fp16")
        check_same([detector(frame) for frame in frames], expected)
        check_same(detector.batch(frames), expected)
        check_same(detector.batch(frames[:3]), expected[:3])
        assert detector.batch([]) == []
    life = gpu.trt[flavour].life
    ends = [event for event in life if event.endswith("destroyed")]
    assert ends[-2:] == ["engine destroyed", "runtime destroyed"]
    assert gpu.trt[flavour].registered == ["BatchedNMS", "RoIPool"]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_after_the_first_frame_nothing_is_allocated(
    flavour: str, gpu: Any, make_engine: Callable, frames: list
) -> None:
    """For a host frame: one copy in, the graph (with the copy out), one wait; RTX copies out by itself."""
    with Detector(make_engine(flavour)) as detector:
        detector(frames[1])
        gpu.driver.calls.clear()
        for _ in range(20):
            detector(frames[1])
        run = ["cuGraphLaunch"] if flavour == "tensorrt" else ["execute_async_v3", "cuMemcpyDtoHAsync"]
        one_frame = ["cuCtxGetCurrent", "cuMemcpyHtoDAsync", *run, "cuStreamSynchronize"]
        assert gpu.driver.names() == one_frame * 20


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_device_frame_costs_four_driver_calls(
    flavour: str, gpu: Any, make_engine: Callable, frames: list
) -> None:
    on_gpu = gpu.frame(frames[2])
    with Detector(make_engine(flavour)) as detector:
        detector(on_gpu)
        gpu.driver.calls.clear()
        for _ in range(20):
            detector(on_gpu)
        names = gpu.driver.names()
    driver_calls = [name for name in names if name.startswith("cu")]
    assert len(driver_calls) == 4 * 20
    assert not ALLOCATIONS & set(names)
    assert ("cuGraphLaunch" in names) == (flavour == "tensorrt")
    on_gpu.free()


def test_a_large_host_frame_is_resized_on_the_gpu(gpu: Any, make_engine: Callable, frames: list) -> None:
    with Detector(make_engine()) as detector:
        detector(frames[2])
        gpu.driver.calls.clear()
        detector(frames[2])
        detector(frames[2][:90, :150])
        one = [
            "cuCtxGetCurrent",
            "cuMemcpyHtoDAsync",
            "cuLaunchKernel",
            "cuGraphLaunch",
            "cuStreamSynchronize",
        ]
        assert gpu.driver.names() == one * 2
        sizes = [arguments[2] for name, arguments in gpu.driver.calls if name == "cuMemcpyHtoDAsync"]
        assert sizes == [100 * 200 * 3, 90 * 150 * 3]  # the frame as it is, and no canvas


def test_large_frames_of_a_batch_have_a_place_each(
    gpu: Any, make_engine: Callable, on_cpu: Callable, check_same: Callable
) -> None:
    """The copies are only queued when the next frame is laid out."""
    large = [np.full((100, 100 + 10 * k, 3), 60 * k, np.uint8) for k in (4, 3, 2, 1)]
    engine = make_engine()
    expected = on_cpu(engine, large)
    with Detector(engine) as detector:
        for _ in range(2):
            check_same(detector.batch(large), expected)


def test_each_batch_size_is_captured_once(gpu: Any, make_engine: Callable, frames: list) -> None:
    with Detector(make_engine()) as detector:
        for count in (1, 3, 1, 4, 3, 7):
            detector.batch((frames * 2)[:count])
        names = gpu.driver.names()
        assert names.count("cuStreamBeginCapture") == names.count("cuGraphInstantiate") == 3
        assert names.count("cuGraphLaunch") == 7
        assert names.count("execute_async_v3") == 6  # a warm-up and a capture each


def test_the_copy_in_holds_only_the_images_there_are(gpu: Any, make_engine: Callable, frames: list) -> None:
    with Detector(make_engine()) as detector:
        detector.batch(frames[:2][::-1])
        size = next(a[2] for n, a in reversed(gpu.driver.calls) if n == "cuMemcpyHtoDAsync")
        assert size == 256 + 2 * 48 * 64 * 3


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_batch_below_the_smallest_is_filled_up(
    flavour: str, gpu: Any, make_engine: Callable, frames: list, on_cpu: Callable, check_same: Callable
) -> None:
    engine = make_engine(flavour, batch=(3, 3, 4))
    on_gpu = [gpu.frame(frame) for frame in frames]
    with Detector(engine) as detector:
        check_same(detector.batch(frames[:7]), on_cpu(engine, frames[:7]))  # 4, then 3
        check_same([detector(frames[3])], on_cpu(engine, frames[3:4]))
        check_same(detector.batch(on_gpu[:2]), on_cpu(engine, frames[:2]))
    for frame in on_gpu:
        frame.free()


def test_the_float_input(
    gpu: Any, make_engine: Callable, contract: Any, frames: list, on_cpu: Callable
) -> None:
    engine = make_engine(promised=dataclasses.replace(contract, input_dtype="float32"))
    with Detector(engine) as detector:
        for found, expected in zip(detector.batch(frames), on_cpu(engine, frames), strict=True):
            np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_proposals_engine(
    gpu: Any, make_engine: Callable, contract: Any, write_model: Callable, frames: list, on_cpu: Callable
) -> None:
    def write(path: Path, promised: Any) -> Path:
        model = onnx.load(write_model(path, promised))
        for output in list(model.graph.output):
            if output.name not in promised.outputs:
                model.graph.output.remove(output)
        onnx.save(model, path)
        return path

    outputs = ("boxes", "scores", "num_detections")
    promised = dataclasses.replace(contract, task="proposals", outputs=outputs)
    engine = make_engine(promised=promised, write=write)
    with Detector(engine, score_threshold=0.01) as detector:
        (found,) = detector.batch(frames[:1])
    np.testing.assert_allclose(found.boxes, on_cpu(engine, frames[:1])[0].boxes)
    assert found.names == ["object", "object"]


def test_nv12_frames_of_host_and_gpu(
    gpu: Any, make_engine: Callable, on_cpu: Callable, check_same: Callable
) -> None:
    pixels = np.random.default_rng(3).integers(16, 236, (90, 80), dtype=np.uint8)
    engine = make_engine()
    expected = on_cpu(engine, [Nv12(pixels)])
    on_gpu = gpu.frame(pixels)
    with Detector(engine) as detector:
        check_same([detector(Nv12(pixels))], expected)
        check_same([detector(Nv12(on_gpu))], expected)
    on_gpu.free()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_without_graphs_it_is_executed_each_time(
    flavour: str, gpu: Any, make_engine: Callable, frames: list
) -> None:
    with Detector(make_engine(flavour), gpu=GpuOptions(graph=False)) as detector:
        detector(frames[0])
        detector(frames[0])
        assert gpu.trt[flavour].executions == 3
        assert "cuStreamBeginCapture" not in gpu.driver.names()
    assert ("graphs: DISABLED" in gpu.trt[flavour].life) == (flavour == "tensorrt-rtx")


def test_rtx_captures_by_itself(gpu: Any, make_engine: Callable, frames: list) -> None:
    with Detector(make_engine("tensorrt-rtx")) as detector:
        detector(frames[0])
        assert "cuStreamBeginCapture" not in gpu.driver.names()
    assert "graphs: WHOLE_GRAPH_CAPTURE" in gpu.trt["tensorrt-rtx"].life


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_timings_by_cuda_events(flavour: str, gpu: Any, make_engine: Callable, frames: list) -> None:
    with Detector(make_engine(flavour), gpu=GpuOptions(timings=True)) as detector:
        detector(frames[2])
        gpu.driver.calls.clear()
        found = detector(frames[2])
        assert gpu.driver.names().count("cuEventRecord") == 6
        assert list(detector.timings) == ["preprocess", "upload", "network", "download", "postprocess"]
        assert all(seconds > 0 for seconds in detector.timings.values())
    with Detector(make_engine(flavour)) as plain:
        again = plain(frames[2])
        np.testing.assert_array_equal(found.scores, again.scores)
        assert plain.timings["network"] > 0
        assert plain.timings["download"] == 0


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_inferences(count: int, gpu: Any, make_engine: Callable, frames: list) -> None:
    """Alternating batch sizes, host and device frames; nothing grows."""
    on_gpu = gpu.frame(np.full((48, 64, 3), 51, np.uint8))
    with Detector(make_engine(plan={"stub": True})) as detector:
        detector.batch([on_gpu] * 3)
        detector(frames[1])
        tables = (gpu.driver.device, gpu.driver.pinned, gpu.driver.executables, gpu.driver.functions)
        held = [len(table) for table in tables]
        objects = 0
        for number in range(count):
            gpu.driver.calls.clear()
            if number == 1000:
                objects = len(gc.get_objects())
            if number % 100 == 0:
                assert [len(found) for found in detector.batch([on_gpu] * 3)] == [1, 1, 1]
            else:
                found = detector(on_gpu)
                assert abs(found.scores[0] - 0.2) < 1e-6
                assert len(gpu.driver.calls) == 4
            assert not ALLOCATIONS & set(gpu.driver.names())
        assert held == [len(table) for table in tables]
        assert len(gc.get_objects()) < objects + 100
    on_gpu.free()


def test_the_kernels_of_rtx_are_kept_between_starts(gpu: Any, make_engine: Callable, frames: list) -> None:
    engine = make_engine("tensorrt-rtx")
    for _ in range(2):
        with Detector(engine) as detector:
            detector(frames[0])
    assert gpu.trt["tensorrt-rtx"].life.count("cache read") == 1
    gpu.driver.name = "Another of sm_86"  # for which TensorRT compiles anew
    with Detector(engine) as detector:
        detector(frames[0])
    assert gpu.trt["tensorrt-rtx"].life.count("cache read") == 1


def test_another_context_is_given_back(gpu: Any, make_engine: Callable, frames: list) -> None:
    """As beside a pycuda context of its own."""
    driver = gpu.driver
    driver.do_cuCtxPushCurrent(5)
    with Detector(make_engine()) as detector:
        detector(frames[0])
        assert driver.do_cuCtxGetCurrent() == 5
    assert driver.do_cuCtxPopCurrent() == 5


def with_convergence(path: Path, converged: bool) -> Path:
    """A copy of an ONNX file with the output that reports the fixed-point NMS."""
    model = onnx.load(path)
    value = onnx.numpy_helper.from_array(np.array([converged]), "converged")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["nms_converged"], value=value))
    model.graph.output.append(onnx.helper.make_tensor_value_info("nms_converged", onnx.TensorProto.BOOL, [1]))
    changed = path.with_name("fixed-point.onnx")
    onnx.save(model, changed)
    return changed


@pytest.mark.parametrize("converged", [True, False])
def test_a_fixed_point_nms_that_is_not_finished_is_told_once(
    converged: bool,
    gpu: Any,
    make_engine: Callable,
    frames: list,
    on_cpu: Callable,
    check_same: Callable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine()
    fixed_point = with_convergence(engine.with_suffix(".onnx"), converged)
    engine = make_engine(plan={"onnx": str(fixed_point)})
    expected = on_cpu(engine, frames)
    with Detector(engine, workers=1) as detector:
        check_same(detector.batch(frames), expected)
        check_same([detector(frame) for frame in frames], expected)
    told = [record for record in caplog.records if "duplicates may be left" in record.getMessage()]
    assert len(told) == (0 if converged else 1)
