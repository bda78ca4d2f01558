"""Many callers, streams of frames, closing and forking."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from anchorline.runtime.backends import selection as opening
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import AnchorlineError, FrameError, GpuError, SettingsError
from anchorline.runtime.tensorrt import cuda as cuda_layer
from anchorline.runtime.tensorrt import library as tensorrt_library
from anchorline.runtime.tensorrt import plugins
from anchorline.runtime.tensorrt.cuda import open_cuda


def level_frame(level: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    return np.full((*size, 3), level, np.uint8)


def level_of(found: Any) -> int:
    return round(float(found.scores[0]) * 255)


@pytest.fixture(params=["engine", "onnx"])
def detector(
    request: pytest.FixtureRequest, gpu: Any, make_engine: Callable[..., Path]
) -> Iterator[Detector]:
    engine = make_engine()
    model = engine if request.param == "engine" else engine.with_suffix(".onnx")
    with Detector(model, threads=1, workers=3) as opened:
        yield opened


@pytest.mark.parametrize("flavour", ["tensorrt-rtx", "tensorrt"])
def test_nothing_is_allocated_while_tensorrt_for_rtx_may_capture(
    flavour: str, gpu: Any, make_engine: Callable[..., Path], doubles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocation of another thread ends a capture; those of full TensorRT are ours, for one thread."""
    context = doubles[1].Context
    running, go_on = threading.Event(), threading.Event()
    execute = context.execute_async_v3

    def wait(self: Any, stream: int) -> bool:
        running.set()
        assert go_on.wait(20)
        return bool(execute(self, stream))

    allocations = ("cuMemAlloc", "cuMemHostAlloc")

    def allocated() -> int:
        return sum(name in allocations for name in gpu.driver.names())

    def loaded() -> int:
        return gpu.trt[flavour].life.count("engine")

    path = make_engine(flavour)
    with Detector(path, workers=2) as detector, ThreadPoolExecutor(3) as pool:
        monkeypatch.setattr(context, "execute_async_v3", wait)
        calls = [pool.submit(detector, level_frame(1))]
        assert running.wait(20)
        before = allocated()
        calls.append(pool.submit(detector, level_frame(2)))  # with a lane of its own
        opened = pool.submit(Detector, path)  # with an engine of its own
        deadline = time.monotonic() + (0.5 if flavour == "tensorrt-rtx" else 20)
        while time.monotonic() < deadline and (allocated() == before or loaded() == 1):
            time.sleep(0.01)
        assert (allocated() == before) == (flavour == "tensorrt-rtx")
        assert (loaded() == 1) == (flavour == "tensorrt-rtx")
        go_on.set()
        assert [level_of(call.result()) for call in calls] == [1, 2]
        assert allocated() > before
        opened.result().close()
        assert loaded() == 2


def test_many_threads_get_their_own_results(detector: Detector) -> None:
    sizes = [(48, 64), (20, 30), (100, 150)]

    def call(number: int) -> bool:
        levels = [(7 * number + k) % 256 for k in range(1 + number % 3)]
        frames = [level_frame(level, sizes[(number + k) % 3]) for k, level in enumerate(levels)]
        return [level_of(found) for found in detector.batch(frames)] == levels

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(300)))


@pytest.mark.parametrize("package", ["cuda-bindings", "pycuda"])
def test_threads_that_need_a_kernel_at_once_load_it_once(
    package: str, gpu: Any, pycuda_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_layer, "load_pycuda", lambda: pycuda_module.make_pycuda(gpu.driver))
    read = cuda_layer.image

    def read_slowly(source: str, capability: int) -> bytes:
        time.sleep(0.05)  # long enough for every thread to find the kernel missing
        return read(source, capability)

    monkeypatch.setattr(cuda_layer, "image", read_slowly)
    cuda = open_cuda(package)
    started = threading.Barrier(4)

    def load_kernel(_: int) -> None:
        started.wait()
        with cuda.current():
            cuda.load_kernel("preprocess", "bgr_to_uint8")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load_kernel, range(4)))
    loads = gpu.driver.names().count("cuLibraryLoadData")
    cuda.close()
    assert loads == 1


def test_there_is_one_logger_of_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the address of the first; a second one that replaces it would leave that dangling."""

    def make_slowly(trt: Any) -> Callable[[], object]:
        time.sleep(0.05)
        return object

    monkeypatch.setattr(tensorrt_library, "load_tensorrt", lambda name: None)
    monkeypatch.setattr(tensorrt_library, "_logger_class", make_slowly)
    monkeypatch.setattr(tensorrt_library, "_loggers", {})
    with ThreadPoolExecutor(4) as pool:
        loggers = set(pool.map(tensorrt_library.tensorrt_logger, ["tensorrt"] * 4))
    assert len(loggers) == 1


def test_the_plugins_load_their_kernels_once(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = plugins.image

    def read_slowly(source: str, architecture: int) -> bytes:
        time.sleep(0.05)
        return read(source, architecture)

    monkeypatch.setattr(plugins, "image", read_slowly)
    monkeypatch.setattr(plugins, "_libraries", {})
    monkeypatch.setattr("cuda.bindings.driver", gpu.driver)
    cuda = open_cuda()

    def load(_: int) -> Any:
        with cuda.current():
            return plugins._library("nms", 86)

    with ThreadPoolExecutor(4) as pool:
        (library,) = set(pool.map(load, range(4)))
    with cuda.current():
        gpu.driver.cuLibraryUnload(library)
    cuda.close()


def test_what_happens_to_many_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    class Slow(set):
        def __contains__(self, item: object) -> bool:
            there = super().__contains__(item)
            time.sleep(0.02)
            return there

    monkeypatch.setattr(opening, "_said", Slow())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: opening._say_once(Path("model.engine"), "no GPU"), range(4)))
    assert len(caplog.records) == 1


def test_workers_bound_the_memory(gpu: Any, make_engine: Callable) -> None:
    with Detector(make_engine(), workers=2) as detector, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda level: detector(level_frame(level)), range(100)))
        assert gpu.driver.names().count("cuStreamCreate") <= 2


@pytest.mark.parametrize(("batch", "in_flight"), [(1, 1), (1, 2), (3, 2), (4, 5)])
def test_a_stream_keeps_the_order(batch: int, in_flight: int, detector: Detector) -> None:
    frames = (level_frame(level) for level in range(50))
    assert [level_of(found) for found in detector.stream(frames, batch, in_flight)] == list(range(50))
    assert list(detector.stream([])) == []


def test_a_stream_reads_no_further_than_it_says(detector: Detector) -> None:
    read = []

    def frames() -> Iterator[np.ndarray]:
        for level in range(20):
            read.append(level)
            yield level_frame(level)

    for count, _ in enumerate(detector.stream(frames(), batch=2, in_flight=2)):
        assert len(read) <= 2 * 2 + count - count % 2


def test_two_batches_are_under_way_at_once(gpu: Any, make_engine: Callable) -> None:
    """The copy of the next batch is queued before the first one is waited for."""
    with Detector(make_engine()) as detector:
        list(detector.stream([level_frame(1)] * 4))
        gpu.driver.calls.clear()
        list(detector.stream([level_frame(1)] * 4))
        names = [name for name in gpu.driver.names() if name in ("cuGraphLaunch", "cuStreamSynchronize")]
        assert names[:3] == ["cuGraphLaunch", "cuGraphLaunch", "cuStreamSynchronize"]
        assert gpu.driver.names().count("cuMemAlloc") == 0


def test_a_stream_left_early_gives_its_lanes_back(detector: Detector) -> None:
    for _ in range(5):
        stream = detector.stream((level_frame(level) for level in range(50)), in_flight=3)
        assert level_of(next(stream)) == 0
        assert level_of(detector(level_frame(99))) == 99  # while the stream has batches under way
        stream.close()
    assert len(detector._lanes._all) <= 4
    assert len(detector._lanes._idle) == len(detector._lanes._all)


def test_a_bad_frame_in_a_stream(detector: Detector) -> None:
    stream = detector.stream([level_frame(1), level_frame(2), None, level_frame(3)])
    with pytest.raises(FrameError, match="got None"):
        list(stream)
    assert level_of(detector(level_frame(5))) == 5


def test_a_source_that_fails(detector: Detector) -> None:
    def frames() -> Iterator[np.ndarray]:
        yield level_frame(1)
        raise OSError("camera unplugged")

    with pytest.raises(OSError, match="camera unplugged"):
        list(detector.stream(frames()))
    assert level_of(detector(level_frame(5))) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"in_flight": 0}, "in_flight is 0"),
        ({"batch": "x"}, "batch is 'x'"),
        ({"in_flight": 1.0}, r"in_flight is 1\.0"),
    ],
)
def test_absurd_streams(arguments: dict, message: str, detector: Detector) -> None:
    with pytest.raises(SettingsError, match=message):
        detector.stream([], **arguments)


def test_a_batch_above_the_engine_s(gpu: Any, make_engine: Callable) -> None:
    with Detector(make_engine()) as detector, pytest.raises(SettingsError, match="at most 4 at a time"):
        detector.stream([], batch=5)


def test_use_after_close(detector: Detector) -> None:
    stream = detector.stream(level_frame(level) for level in range(9))
    next(stream)
    detector.close()
    detector.close()
    for use in (
        lambda: detector(level_frame(1)),
        lambda: next(stream),
        lambda: detector.stream([]),
    ):
        with pytest.raises(SettingsError, match="the model is closed; open it again"):
            use()


def test_closing_waits_for_running_calls(detector: Detector) -> None:
    errors: list[BaseException] = []
    started = threading.Barrier(5)

    def call() -> None:
        started.wait()
        try:
            for level in itertools.cycle(range(256)):
                assert level_of(detector(level_frame(level))) == level
        except SettingsError as error:
            errors.append(error)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    detector.close()
    for thread in threads:
        thread.join(60)
    assert len(errors) == 4
    assert all("closed" in str(error) for error in errors)


def test_one_caller_s_failure_is_not_another_s(gpu: Any, make_engine: Callable) -> None:
    failed = []
    with Detector(make_engine(), workers=3) as detector, ThreadPoolExecutor(4) as pool:

        def call(number: int) -> None:
            if number % 20 == 7:
                gpu.driver.fail["cuGraphLaunch"] = __import__(
                    "cuda.bindings.driver"
                ).bindings.driver.CUresult(1)
            try:
                assert level_of(detector(level_frame(number))) == number
            except GpuError:
                failed.append(number)

        list(pool.map(call, range(200)))
    assert 1 <= len(failed) <= 10


def _in_fork(detector: Detector, connection: Any) -> None:
    told = []
    for use in (
        lambda: detector(level_frame(1)),
        lambda: list(detector.stream([level_frame(1)])),
    ):
        try:
            use()
        except AnchorlineError as error:
            told.append(str(error))
    detector.close()
    connection.send(told)
    connection.close()
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_is_told(detector: Detector) -> None:
    assert level_of(detector(level_frame(3))) == 3
    here, there = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_in_fork, args=(detector, there))
    child.start()
    assert here.poll(60)
    told = here.recv()
    child.join(60)
    assert len(told) == 2
    assert all(f"was opened in process {os.getpid()} and is used in its fork" in text for text in told)
    assert level_of(detector(level_frame(4))) == 4
