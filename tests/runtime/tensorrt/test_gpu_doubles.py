"""The doubles themselves: what they are there to refuse, they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

PIXELS = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture
def opened(gpu: Any) -> Any:
    """The driver with a context, a stream, and a block on each side; all given back afterwards."""
    driver = gpu.driver
    driver.cuDevicePrimaryCtxRetain(0)
    driver.cuCtxPushCurrent(77)
    gpu.stream, gpu.device = driver.cuStreamCreate(1)[1], driver.cuMemAlloc(100)[1]
    gpu.host = driver.cuMemHostAlloc(100, 0)[1]
    yield gpu
    driver.misuse.clear()
    driver.cuMemFree(gpu.device)
    driver.cuMemFreeHost(gpu.host)
    driver.cuStreamDestroy(gpu.stream)
    driver.cuCtxPopCurrent()
    driver.cuDevicePrimaryCtxRelease(0)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda g, d: d.cuNoSuchCall(), "cuda-bindings has no cuNoSuchCall"),
        (lambda g, d: d.cuMemAlloc(), "cuMemAlloc takes 1 arguments, got 0"),
        (lambda g, d: d.cuMemFree(g.device, 1), "cuMemFree takes 1 arguments, got 2"),
        (lambda g, d: d.cuMemcpyHtoDAsync(g.host, g.host, 10, g.stream), "is pinned host memory"),
        (lambda g, d: d.cuMemcpyHtoDAsync(g.device, g.device, 10, g.stream), "is not pinned memory"),
        (lambda g, d: d.cuMemcpyDtoHAsync(PIXELS.ctypes.data, g.device, 10, g.stream), "not pinned memory"),
        (lambda g, d: d.cuMemcpyHtoDAsync(g.device + 91, g.host, 10, g.stream), "is no device memory"),
        (lambda g, d: d.cuMemFree(g.device + 4), "device memory .* does not exist"),
        (lambda g, d: d.cuStreamSynchronize(4321), "stream 4321 does not exist"),
        (lambda g, d: d.cuGraphLaunch(4321, g.stream), "an executable graph that does not exist"),
        (lambda g, d: d.cuEventRecord(4321, g.stream), "event 4321 does not exist"),
        (lambda g, d: d.cuStreamDestroy(0), "or is the default one"),
        (lambda g, d: d.cuLibraryLoadData(b"text", [], [], 0, [], [], 0), "no cubin"),
    ],
)
def test_misuse_of_cuda(use: Callable, message: str, opened: Any) -> None:
    with pytest.raises(opened.misuse, match=message):
        use(opened, opened.driver)


def test_memory_freed_before_the_work_is_done(opened: Any) -> None:
    driver = opened.driver
    other = driver.cuMemHostAlloc(100, 0)[1]
    driver.cuMemcpyHtoDAsync(opened.device, other, 100, opened.stream)
    driver.cuMemFreeHost(other)
    with pytest.raises(opened.misuse, match="is not pinned memory"):
        driver.cuStreamSynchronize(opened.stream)


def test_a_call_without_a_context(gpu: Any) -> None:
    with pytest.raises(gpu.misuse, match="cuMemAlloc without a current context"):
        gpu.driver.cuMemAlloc(100)
    gpu.driver.misuse.clear()


def test_a_call_in_another_context_or_after_ours(opened: Any) -> None:
    driver = opened.driver
    driver.cuCtxPushCurrent(5)
    with pytest.raises(opened.misuse, match="cuMemAlloc in somebody else's context"):
        driver.cuMemAlloc(100)
    driver.cuCtxPopCurrent()
    driver.cuDevicePrimaryCtxRelease(0)
    with pytest.raises(opened.misuse, match="after the primary context was released"):
        driver.cuMemFree(opened.device)
    driver.cuDevicePrimaryCtxRetain(0)


def test_pinned_memory_that_was_freed_is_nonsense(opened: Any) -> None:
    driver = opened.driver
    other = driver.cuMemHostAlloc(100, 0)[1]
    seen = driver.pinned[other]
    seen[:] = 7
    driver.cuMemFreeHost(other)
    assert not (seen == 7).any()


def test_work_is_done_when_it_is_waited_for(opened: Any) -> None:
    """What reads results earlier gets nonsense."""
    driver = opened.driver
    driver.at(opened.device, 100)[:] = 9
    driver.cuMemcpyDtoHAsync(opened.host, opened.device, 100, opened.stream)
    assert not (driver.pinned[opened.host] == 9).any()
    driver.cuStreamSynchronize(opened.stream)
    assert (driver.pinned[opened.host] == 9).all()


def test_names_that_tensorrt_does_not_have(gpu: Any) -> None:
    for flavour, name in (("tensorrt-rtx", "NoSuchClass"), ("tensorrt", "CudaGraphStrategy")):
        with pytest.raises(AttributeError):
            getattr(gpu.trt[flavour], name)

    class Wrong:
        def no_such_method(self) -> None: ...

    trt = gpu.trt["tensorrt"]
    with pytest.raises(AssertionError, match="ICudaEngine has no no_such_method"):
        trt.check_names(Wrong, trt.real.ICudaEngine)


def test_an_engine_whose_plugins_nobody_registered(gpu: Any) -> None:
    runtime = gpu.trt["tensorrt"].Runtime(None)
    assert runtime.deserialize_cuda_engine(b'{"plugins": ["BatchedNMS"]}') is None
