"""Who frees what, and when: closing beside a stream, forks, exceptions that are kept, detectors dropped."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as names

from anchorline.runtime.backends.base import LanePool
from anchorline.runtime.detector import Detector
from anchorline.runtime.io.errors import GpuError, SettingsError
from anchorline.runtime.tensorrt.cuda import CudaError, open_cuda

RESULT = names.CUresult
FRAME = np.full((48, 64, 3), 102, np.uint8)


@pytest.fixture
def detector(gpu: Any, make_engine: Callable[..., Path]) -> Iterator[Detector]:
    with Detector(make_engine()) as opened:
        yield opened


def test_results_outlive_the_lane_they_came_from(detector: Detector) -> None:
    """A stream holds no permit: another thread may close the detector while its results are unpacked."""
    lane = detector._backend.create_lane()
    lane.submit([FRAME])
    outputs, _, _ = lane.collect()
    kept = {name: values.copy() for name, values in outputs.items()}
    lane.close()
    for name, values in outputs.items():
        np.testing.assert_array_equal(values, kept[name])


def test_closing_a_lane_waits_for_whoever_fills_it(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = detector._backend.create_lane()
    inside, go_on, order = threading.Event(), threading.Event(), []
    fill = lane._fill

    def fill_slowly(*arguments: Any) -> None:
        inside.set()
        go_on.wait(60)
        fill(*arguments)
        order.append("filled")

    monkeypatch.setattr(lane, "_fill", fill_slowly)
    filling = threading.Thread(target=lane.submit, args=([FRAME],))
    filling.start()
    assert inside.wait(60)
    closing = threading.Thread(target=lambda: (lane.close(), order.append("closed")))
    closing.start()
    closing.join(0.2)
    go_on.set()
    for thread in (filling, closing):
        thread.join(60)
    assert order == ["filled", "closed"]
    with pytest.raises(SettingsError, match="closed"):
        lane.collect()


def test_closing_waits_for_work_on_another_stream(detector: Detector, gpu: Any) -> None:
    with detector._backend._cuda.current():
        (_, theirs) = gpu.driver.cuStreamCreate(0)
        frame = gpu.frame(FRAME, stream=theirs)
        lane = detector._backend.create_lane()
        lane.submit([frame])
        assert gpu.driver.streams[theirs].queue
        gpu.driver.calls.clear()
        lane.close()
        waits = [arguments for name, arguments in gpu.driver.calls if name == "cuStreamSynchronize"]
        assert (theirs,) in waits
        gpu.driver.cuStreamDestroy(theirs)
    frame.free()


class Passing:
    """A frame that nobody else holds: its memory goes with it."""

    def __init__(self, gpu: Any, level: int) -> None:
        self._frame = gpu.frame(np.full((48, 64, 3), level, np.uint8))
        self.__cuda_array_interface__ = self._frame.__cuda_array_interface__

    def __del__(self) -> None:
        self._frame.free()


def test_frames_live_until_their_detections_have_come(detector: Detector, gpu: Any) -> None:
    stream = detector.stream((Passing(gpu, level) for level in range(20)), in_flight=4)
    assert [round(float(found.scores[0]) * 255) for found in stream] == list(range(20))
    assert len(gpu.driver.foreign_blocks()) <= 1  # and no longer


def test_a_batch_is_filled_up_with_black(gpu: Any, make_engine: Callable) -> None:
    """Not with what was there before, which would count in the report of the fixed-point NMS."""
    frame = gpu.frame(FRAME)
    with Detector(make_engine(batch=(3, 3, 4))) as detector:
        for one in (FRAME, frame):
            detector.batch([FRAME] * 4)
            detector(one)
            (lane,) = detector._lanes._all
            canvas = lane._buffers.canvas(1, (48, 64))
            assert not gpu.driver.at(canvas.pixels, 2 * FRAME.nbytes).any()
            assert gpu.driver.at(canvas.valid_size, 16).view(np.float32).tolist() == [48, 64, 48, 64]
    frame.free()


def test_closing_in_the_middle_of_many_streams(gpu: Any, make_engine: Callable) -> None:
    """Whatever a stream yields is right; then it is told that the model is closed."""
    for _ in range(10):
        detector = Detector(make_engine(plan={"stub": True}), workers=1)
        started, told = threading.Barrier(4), []

        def consume(level: int, detector: Any = detector, started: Any = started, told: Any = told) -> None:
            frames = itertools.repeat(np.full((48, 64, 3), level, np.uint8))
            started.wait()
            try:
                for found in detector.stream(frames, batch=2):
                    assert round(float(found.scores[0]) * 255) == level
            except SettingsError as error:
                told.append(str(error))

        threads = [threading.Thread(target=consume, args=(level,), daemon=True) for level in (10, 20, 30)]
        for thread in threads:
            thread.start()
        started.wait()
        detector.close()
        for thread in threads:
            thread.join(60)
        assert len(told) == 3
        assert all("closed" in text for text in told)
        assert gpu.driver.leaks() == {}


def test_a_lane_that_failed_is_released_before_the_pool_is_closed() -> None:
    """Closing must not overtake a stream that is just dropping its lane: the GPU would go first."""
    closing, go_on, order = threading.Event(), threading.Event(), []

    class Lane:
        def close(self) -> None:
            closing.set()
            go_on.wait(60)
            order.append("lane")

    pool = LanePool(Lane, 1, "a model")  # type: ignore[arg-type]
    lane = pool.borrow()
    dropping = threading.Thread(target=pool.give_back, args=(lane, RuntimeError()))
    dropping.start()
    assert closing.wait(60)

    def close() -> None:
        pool.close()
        order.append("pool")

    end = threading.Thread(target=close)
    end.start()
    end.join(0.2)
    go_on.set()
    for thread in (dropping, end):
        thread.join(60)
    assert order == ["lane", "pool"]


def test_a_lane_that_is_being_made_is_closed_with_the_others() -> None:
    making, go_on, closed = threading.Event(), threading.Event(), []

    class Lane:
        def __init__(self) -> None:
            making.set()
            go_on.wait(60)

        def close(self) -> None:
            closed.append(self)

    pool = LanePool(Lane, 1, "a model")  # type: ignore[arg-type]
    borrowing = threading.Thread(target=pool.borrow)
    borrowing.start()
    assert making.wait(60)
    closing = threading.Thread(target=pool.close)
    closing.start()
    closing.join(0.2)
    go_on.set()
    for thread in (borrowing, closing):
        thread.join(60)
    assert len(closed) == 1


@pytest.mark.parametrize("call", ["execute", "cuStreamSynchronize", "cuStreamBeginCapture"])
def test_an_exception_that_is_kept_keeps_no_context(call: str, gpu: Any, make_engine: Callable) -> None:
    """Its traceback holds the frames' variables; the context must go before the engine all the same."""
    detector = Detector(make_engine())
    if call == "execute":
        gpu.trt["tensorrt"].refuse["execute"] = "Cask"
    else:
        gpu.driver.fail[call] = RESULT.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(GpuError) as caught:
        detector(FRAME)
    gpu.trt["tensorrt"].refuse.clear()
    detector.close()
    assert gpu.trt["tensorrt"].life[-3:] == ["context destroyed", "engine destroyed", "runtime destroyed"]
    assert caught.value is not None


def test_a_context_that_cannot_be_bound_is_not_kept(gpu: Any, make_engine: Callable) -> None:
    detector = Detector(make_engine())
    lane = detector._backend.create_lane()
    buffers = lane._buffers
    with (
        detector._backend._cuda.current(),
        pytest.raises(
            GpuError, match=r"cannot prepare batches of 9 .*not in the profile.*build it again"
        ) as caught,
    ):
        detector._backend._engine.create_slot(9, buffers.addresses, buffers.activations)
    lane.close()
    detector.close()
    assert gpu.trt["tensorrt"].life[-3:] == ["context destroyed", "engine destroyed", "runtime destroyed"]
    assert caught.value is not None


def test_a_detector_that_is_dropped_gives_everything_back(gpu: Any, make_engine: Callable) -> None:
    """Without close: a program that changes its model must not fill the GPU."""
    for _ in range(3):
        detector = Detector(make_engine())
        detector(FRAME)
        stream = detector.stream([FRAME] * 9)
        next(stream)
        del stream, detector
        gc.collect()
        assert gpu.driver.leaks() == {}


def test_closing_leaves_no_dead_context_current(gpu: Any, make_engine: Callable) -> None:
    """A library of the CUDA runtime would go on with it, and fail."""
    with Detector(make_engine()) as detector:
        detector(FRAME)
        assert gpu.driver.do_cuCtxGetCurrent() == 77
    assert gpu.driver.do_cuCtxGetCurrent() == 0
    gpu.driver.do_cuCtxPushCurrent(77)  # as PyTorch has it, on the same primary context
    with Detector(make_engine()) as detector:
        detector(FRAME)
    assert gpu.driver.do_cuCtxPopCurrent() == 77


def test_an_error_of_the_caller_costs_no_lane(detector: Detector, gpu: Any) -> None:
    detector(FRAME)
    for _ in range(3):
        with pytest.raises(SettingsError, match="stream is 'fast'"):
            detector(FRAME, stream="fast")
    detector(FRAME)
    assert gpu.driver.names().count("cuStreamCreate") == 1


@pytest.mark.parametrize("call", ["cuGraphLaunch", "cuMemcpyHtoDAsync"])
def test_a_lane_that_failed_in_a_stream_is_not_used_again(call: str, detector: Detector, gpu: Any) -> None:
    """What it had queued by then is not known."""
    detector(FRAME)
    (lane,) = detector._lanes._all
    gpu.driver.fail[call] = RESULT.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(CudaError):
        list(detector.stream([FRAME] * 3))
    assert lane not in detector._lanes._all
    with pytest.raises(SettingsError, match="closed"):
        lane.submit([FRAME])
    assert len(detector(FRAME)) == 2


# Forks


def _end_in_fork(connection: Any, stream: Any, detector: Any, driver: Any) -> None:
    """Drop and close what was inherited; how many calls of the driver that made."""
    before = len(driver.calls)
    told = ""
    try:
        next(stream)
    except SettingsError as error:
        told = str(error)
    stream.close()
    detector.close()
    connection.send((told, len(driver.calls) - before))
    connection.close()
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("held", [False, True])
def test_a_fork_touches_nothing(held: bool, gpu: Any, detector: Detector) -> None:
    """Not even where a thread of the parent held the pool's lock when it forked."""
    stream = detector.stream([FRAME] * 9)
    next(stream)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_end_in_fork, args=(there, stream, detector, gpu.driver))
    lock = detector._lanes._lock
    if held:
        lock.acquire()
    child.start()
    if held:
        lock.release()
    answered = here.poll(60)
    if not answered:
        child.kill()
    assert answered
    told, calls = here.recv()
    child.join(60)
    assert "is used in its fork" in told
    assert calls == 0
    assert len(list(stream)) == 8


# Starting


def test_the_current_context_is_the_caller_s_own_business(gpu: Any) -> None:
    """Two GPUs' layers, or a layer twice, in one thread."""
    first, second = open_cuda(), open_cuda()
    with first.current(), second.current():
        stream = second.create_stream()
        second.destroy_stream(stream)
    first.close()
    with second.current():
        second.destroy_stream(second.create_stream())
    second.close()
