"""What a frame costs around the network on a GPU: copies, the preprocessing kernel, Python.

    python benchmarks/gpu_frames.py [model.engine] [--cuda pycuda]

For frames of 1080p and 4K onto a canvas of 800x1088: medians of CUDA-event times of the copy of the frame, of
the copy of the canvas and of the kernel, beside OpenCV's letterbox on the CPU. With an engine also the time
of a call with a frame on the GPU by the host's clock, and how much of it is not the GPU's own
(``overhead_us``). One row a size goes to ``results/gpu_frames.csv``. Needs a GPU; the times of the NMS
kernel are in ``nms_kernel.py``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from record import append_row

from anchorline.runtime import Detector, GpuError, GpuOptions
from anchorline.runtime.canvas import place, to_canvas
from anchorline.runtime.contract import Contract
from anchorline.runtime.tensorrt.cuda import CUDA_PACKAGES, Cuda, open_cuda
from anchorline.runtime.tensorrt.frames import DeviceCanvas, DeviceFrame, FrameIntake

SIZES = {"1080p": (1080, 1920), "4K": (2160, 3840)}
CANVAS = (800, 1088)
WARM_UP, REPEATS = 20, 200


class Frame:
    """A frame in device memory, as another library would show it."""

    def __init__(self, address: int, size: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {
            "shape": (*size, 3),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }


def main() -> None:
    """Measure each size, print it and append its row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", nargs="?")
    parser.add_argument("--cuda", choices=CUDA_PACKAGES, default="cuda-bindings")
    asked = parser.parse_args()
    try:
        cuda = open_cuda(asked.cuda)
    except GpuError as error:
        sys.exit(f"gpu_frames.py: {error}")
    with cuda.current():
        for name, size in SIZES.items():
            figures = {"gpu": cuda.device_name, "cuda": cuda.package, "frame": name, **measure(cuda, size)}
            figures |= {"call_us": "", "overhead_us": ""}
            if asked.engine:
                figures |= measure_calls(cuda, asked.engine, size)
            print(figures)
            append_row("gpu_frames", " ".join(["python benchmarks/gpu_frames.py", *sys.argv[1:]]), figures)
    cuda.close()


def measure(cuda: Cuda, size: tuple[int, int]) -> dict[str, float]:
    """Microseconds of copies and kernel on the GPU, and of the letterbox on the CPU."""
    contract = Contract("detections", ("any",), CANVAS, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    placement = place(size, CANVAS, contract.resize)
    canvas = np.empty((*CANVAS, 3), np.uint8)
    stream, intake = cuda.create_stream(), FrameIntake(cuda, contract)
    pinned = cuda.allocate_pinned(frame.nbytes)
    source = cuda.allocate(frame.nbytes, "a frame", "")
    target = cuda.allocate(canvas.nbytes + 8, "a canvas", "")
    on_gpu = DeviceFrame(source, 0, 3 * size[1], size, cuda.device, None, None)
    there = DeviceCanvas(target, target + canvas.nbytes, CANVAS)
    figures = {
        "frame_copy_us": on_events(cuda, stream, lambda: cuda.copy_in(source, pinned, frame.nbytes, stream)),
        "canvas_copy_us": on_events(
            cuda, stream, lambda: cuda.copy_in(target, pinned, canvas.nbytes, stream)
        ),
        "kernel_us": on_events(cuda, stream, lambda: intake.to_canvas(on_gpu, placement, there, stream)),
        "cpu_letterbox_us": on_clock(lambda: to_canvas(frame, placement, canvas)),
    }
    cuda.free(source)
    cuda.free(target)
    cuda.free_pinned(pinned)
    cuda.destroy_stream(stream)
    return figures


def measure_calls(cuda: Cuda, engine: str, size: tuple[int, int]) -> dict[str, float]:
    """Microseconds of a call with a device frame, and of those that are not the GPU's."""
    frame = Frame(cuda.allocate(size[0] * size[1] * 3, "a frame", ""), size)
    with Detector(engine, "tensorrt", gpu=GpuOptions(cuda=cuda.package)) as detector:
        call = on_clock(lambda: detector(frame))
    with Detector(engine, "tensorrt", gpu=GpuOptions(cuda=cuda.package, timings=True)) as detector:
        stages = []
        for _ in range(WARM_UP + REPEATS):
            detector(frame)
            stages.append(sum(detector.timings[stage] for stage in ("preprocess", "network", "download")))
    cuda.free(frame.__cuda_array_interface__["data"][0])
    on_gpu = 1e6 * statistics.median(stages[WARM_UP:])
    return {"call_us": call, "overhead_us": round(call - on_gpu, 1)}


def on_events(cuda: Cuda, stream: int, work: Callable[[], None]) -> float:
    """Median microseconds between two events around ``work``."""
    start, end = cuda.create_event(timing=True), cuda.create_event(timing=True)
    times = []
    for _ in range(WARM_UP + REPEATS):
        cuda.record(start, stream)
        work()
        cuda.record(end, stream)
        cuda.synchronize(stream)
        times.append(cuda.seconds_between(start, end))
    cuda.destroy_event(start)
    cuda.destroy_event(end)
    return round(1e6 * statistics.median(times[WARM_UP:]), 2)


def on_clock(work: Callable[[], object]) -> float:
    """Median microseconds of ``work`` by the host's clock."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return round(1e6 * statistics.median(times[WARM_UP:]), 1)


if __name__ == "__main__":
    main()
