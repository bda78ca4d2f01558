"""Run by test_gpu_bindings.py in a process whose libcuda is libcuda_stub.c: every call of the CUDA layer."""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from anchorline.runtime.canvas import place
from anchorline.runtime.contract import Contract
from anchorline.runtime.tensorrt.cuda import CudaError, NoGpuError, OutOfDeviceMemoryError, open_cuda
from anchorline.runtime.tensorrt.frames import DeviceCanvas, DeviceFrame, FrameIntake

stub = ctypes.CDLL(sys.argv[1])


class Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_int64 * 3),
        ("block", ctypes.c_int64 * 3),
        ("stream", ctypes.c_int64),
        ("ints", ctypes.c_int64 * 12),
        ("doubles", ctypes.c_double * 12),
    )


def raised(work: object, kind: type[Exception]) -> Exception:
    try:
        work()  # type: ignore[operator]
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


assert "INVALID_DEVICE" in str(raised(lambda: open_cuda(device=1), NoGpuError))
cuda = open_cuda()
assert (cuda.device_name, cuda.compute_capability) == ("Stub", 86)
with cuda.current(), cuda.current():
    assert cuda.memory_info() == (3 << 20, 1 << 30)
    stream = cuda.create_stream()
    device = cuda.allocate(1000, "a block", "nothing")
    error = raised(lambda: cuda.allocate(1 << 31, "a model", "less"), OutOfDeviceMemoryError)
    assert "a model needs 2048.0 MiB, 3.0 MiB are free); less" in str(error), error
    there, back = cuda.allocate_pinned(1000), cuda.allocate_pinned(1000)
    there.array[:] = np.arange(1000) % 251
    back.array[:] = 0
    cuda.copy_in(device, there, 1000, stream)
    cuda.copy_out(back, device, 900, stream)
    cuda.synchronize(stream)
    assert (back.array[:900] == there.array[:900]).all()
    assert not back.array[900:].any()
    assert [cuda.device_of(address) for address in (device, 54321, 54322, 12345)] == [0, 3, 0, None]

    start, end = cuda.create_event(timing=True), cuda.create_event()
    cuda.record(start, stream)
    cuda.wait(stream, start)
    cuda.wait(1, start)
    assert cuda.seconds_between(start, end) == 0.0025
    failed = raised(lambda: cuda.record(0, stream), CudaError)
    assert "CUDA_ERROR_INVALID_VALUE: a text of the stub" in str(failed), failed

    graph = cuda.capture(stream, lambda: cuda.copy_in(device, there, 10, stream))
    cuda.launch_graph(graph, stream)
    failed = raised(lambda: cuda.capture(stream, lambda: cuda.synchronize(stream)), CudaError)
    assert failed.name == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", failed
    cuda.synchronize(stream)

    contract = Contract("detections", ("a",), (40, 300), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    intake = FrameIntake(cuda, contract)
    frame = DeviceFrame(2**40 + 5, 0, 1234, (80, 400), 0, None, None)
    canvas = DeviceCanvas(device, device + 8, (40, 300))
    intake.to_canvas(frame, place((80, 400), (40, 300), contract.resize), canvas, stream)
    stub.stub_last_launch.restype = ctypes.POINTER(Launch)
    last = stub.stub_last_launch().contents
    assert (list(last.grid), list(last.block), last.stream) == ([2, 40, 1], [256, 1, 1], stream)
    assert list(last.ints)[:10] == [2**40 + 5, 0, 1234, 80, 400, device, 300, device + 8, 40, 200]
    assert list(last.doubles)[10:] == [2.0, 2.0]
    raised(lambda: cuda.load_kernel("preprocess", "no_such_kernel"), CudaError)

    cuda.destroy_graph(graph)
    for event in (start, end):
        cuda.destroy_event(event)
    for buffer in (there, back):
        cuda.free_pinned(buffer)
    cuda.free(device)
    cuda.destroy_stream(stream)
cuda.close()
cuda.close()
assert stub.stub_alive() == 0, stub.stub_alive()
print("all calls accepted")
