"""A lane of a TensorRT engine: pinned and device buffers, a stream, and a CUDA graph for each batch size.

The life of a batch, all of it queued on one stream and waited for once:

    frames -> pinned canvases ---one copy---> device canvases -> graph [network, copy out] -> pinned outputs
    large frames -> pinned, as they are -> device -> kernel ->^
    device frames ---------------------------------- kernel ->^

Two lanes at work give the double buffering: while one computes, the other's frames are copied.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.backends.base import LaneResult
from anchorline.runtime.canvas import Placement, place, to_canvas
from anchorline.runtime.contract import NMS_CONVERGED
from anchorline.runtime.io.errors import FrameError, GpuError, SettingsError
from anchorline.runtime.tensorrt.cuda.interface import LEGACY_STREAM, Cuda, CudaError
from anchorline.runtime.tensorrt.engine import REMEDY, Execution, Tensor, TensorRTEngine
from anchorline.runtime.tensorrt.frame_intake import FrameIntake
from anchorline.runtime.tensorrt.frames import Nv12, host_bgr
from anchorline.runtime.tensorrt.preprocess import GpuPreprocessor, resizes_as

# How long a lane's batch spends in each stage: by the host's clock, or by CUDA events.


STAGES = ("preprocess", "upload", "network", "download")
_MARKS = 6  # the most of a batch: preprocess, upload, preprocess, network, download, end


class LaneClock:
    """A context manager; ``mark`` begins a stage, ``finish`` gives the seconds of each.

    By the host's clock ``network`` is all the time until the results are there, and ``download`` 0: the
    work is only queued meanwhile. CUDA events tell them apart, at the cost of a few calls a batch.
    """

    def __init__(self, cuda: Cuda, by_events: bool) -> None:
        self._cuda = cuda
        self._marks: list[tuple[str, float | int]] = []
        self._events: list[int] = []
        with contextlib.ExitStack() as stack:
            for _ in range(_MARKS if by_events else 0):
                self._events.append(cuda.create_event(timing=True))
                stack.callback(cuda.destroy_event, self._events[-1])
            self._stack = stack.pop_all()

    def start(self) -> None:
        """Forget the marks of the batch before."""
        self._marks.clear()

    def mark(self, stream: int, stage: str) -> None:
        """The stage that begins where ``stream`` is now; ``end`` ends the last."""
        if self._events:
            event = self._events[len(self._marks)]
            self._cuda.record(event, stream)
            self._marks.append((stage, event))
        elif stage not in ("download", "end"):
            self._marks.append((stage, time.perf_counter()))

    def finish(self) -> dict[str, float]:
        """Seconds by stage, once the work is done."""
        if not self._events:
            self._marks.append(("end", time.perf_counter()))
        seconds = dict.fromkeys(STAGES, 0.0)
        for (stage, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            by_events = bool(self._events)
            spent = self._cuda.seconds_between(int(start), int(end)) if by_events else end - start
            seconds[stage] += spent
        return seconds

    def __enter__(self) -> LaneClock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


# The memory of a lane, allocated once: inputs and outputs on both sides, and the network's scratch.


_ALIGNMENT = 256  # bytes; what TensorRT asks of a tensor's address


class LaneBuffers:
    """A context manager around device and pinned memory for the engine's largest batch.

    ``images``, ``sizes`` and ``outputs`` are views of pinned memory [largest batch, ...]; ``addresses`` are
    the tensors' places on the device. Inputs lie one after the other, the sizes first, so that the first
    images of a batch and all sizes are one copy; the outputs are one copy as well.
    """

    def __init__(self, engine: TensorRTEngine, cuda: Cuda) -> None:
        self._cuda = cuda
        self._images, self._sizes = engine.inputs
        self._most = engine.manifest.batch[2]
        with contextlib.ExitStack() as stack:
            inputs, input_bytes = _layout([self._sizes, self._images], self._most)
            outputs, output_bytes = _layout(engine.outputs, self._most)
            self._images_at = inputs[self._images.name]
            name = engine.path.name
            self.activations = self._device(stack, engine.activation_bytes, f"{name}: one batch in work")
            self._inputs = self._device(stack, input_bytes, f"{name}: its inputs")
            self._outputs = self._device(stack, output_bytes, f"{name}: its outputs")
            self._output_bytes = output_bytes
            self._pinned_in = cuda.allocate_pinned(input_bytes)
            stack.callback(cuda.free_pinned, self._pinned_in)
            self._pinned_out = cuda.allocate_pinned(output_bytes)
            stack.callback(cuda.free_pinned, self._pinned_out)
            self._stack = stack.pop_all()
        self.addresses = {name: self._inputs + offset for name, offset in inputs.items()}
        self.addresses |= {name: self._outputs + offset for name, offset in outputs.items()}
        self.images = self._view(self._images, self._pinned_in.array, self._images_at)
        self.sizes = self._view(self._sizes, self._pinned_in.array, inputs[self._sizes.name])
        self.outputs = {
            tensor.name: self._view(tensor, self._pinned_out.array, outputs[tensor.name])
            for tensor in engine.outputs
        }

    def input_addresses(self, index: int) -> tuple[int, int]:
        """Where image ``index`` and its size lie on the device."""
        image = self.addresses[self._images.name] + index * self._images.image_bytes
        return image, self.addresses[self._sizes.name] + index * self._sizes.image_bytes

    def copy_in(self, batch: int, stream: int) -> None:
        """Queue the copy of all sizes and the first ``batch`` images to the device."""
        size = self._images_at + batch * self._images.image_bytes
        self._cuda.copy_in(self._inputs, self._pinned_in, size, stream)

    def copy_out(self, stream: int) -> None:
        """Queue the copy of the outputs to the host."""
        self._cuda.copy_out(self._pinned_out, self._outputs, self._output_bytes, stream)

    def _device(self, stack: contextlib.ExitStack, size: int, what: str) -> int:
        if size == 0:
            return 0
        address = self._cuda.allocate(size, what, REMEDY)
        stack.callback(self._cuda.free, address)
        return address

    def _view(self, tensor: Tensor, memory: NDArray[np.uint8], offset: int) -> NDArray[Any]:
        size = self._most * tensor.image_bytes
        return memory[offset : offset + size].view(tensor.dtype).reshape(self._most, *tensor.shape)

    def __enter__(self) -> LaneBuffers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _layout(tensors: list[Tensor], batch: int) -> tuple[dict[str, int], int]:
    """Offsets of tensors laid one after the other, and the bytes of all."""
    offsets, end = {}, 0
    for tensor in tensors:
        offsets[tensor.name] = end
        end += -(-batch * tensor.image_bytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


log = logging.getLogger("anchorline.runtime")


@dataclass(frozen=True)
class LaneOptions:
    """``graph``: capture CUDA graphs; ``timings``: measure by CUDA events."""

    graph: bool = True
    timings: bool = False


@dataclass(frozen=True)
class _Running:
    """What was submitted and not yet collected; ``frames`` keeps device frames alive meanwhile."""

    placements: list[Placement]
    stream: int
    frames: Any


class TensorRTLane:
    """See ``backend.Lane``. To be made and closed with the CUDA context current or not."""

    def __init__(self, engine: TensorRTEngine, cuda: Cuda, options: LaneOptions) -> None:
        self._engine, self._cuda, self._options = engine, cuda, options
        self._contract = engine.manifest.contract
        self._lowest, _, self._most = engine.manifest.batch
        # TensorRT for RTX captures by itself (its runtime settings say so); pycuda knows no graphs.
        self._captures = options.graph and cuda.has_graphs and not engine.is_rtx
        self._copy_in_graph = self._captures and not options.timings
        self._executions: dict[int, Execution] = {}
        self._running: _Running | None = None
        self._lock = threading.Lock()
        self._closed = self._failed = self._said_unconverged = False
        self._resources = contextlib.ExitStack()
        with cuda.current(), self._resources:
            self._stream = cuda.create_stream()
            self._resources.callback(cuda.destroy_stream, self._stream)
            self._clock = self._resources.enter_context(LaneClock(cuda, options.timings))
            self._buffers = self._resources.enter_context(LaneBuffers(engine, cuda))
            self._intake = self._resources.enter_context(FrameIntake(cuda))
            self._resources.callback(self._destroy_executions)
            self._resources = self._resources.pop_all()
        self._preprocess = GpuPreprocessor(cuda, self._contract)

    def entered(self) -> contextlib.AbstractContextManager[None]:
        return self._cuda.current()

    def submit(self, frames: Sequence[Any], stream: Any = None) -> None:
        with self._at_work():
            named = None if stream is None else self._cuda.stream_handle(stream) or LEGACY_STREAM
            self._clock.start()
            device_frames, run_on = self._intake.read(frames, self._stream, named, self._captures)
            self._check_resize(device_frames)
            sizes = [self._size(frame, found) for frame, found in zip(frames, device_frames, strict=True)]
            placements = [place(size, self._contract.canvas, self._contract.resize) for size in sizes]
            batch = max(len(frames), self._lowest)
            execution = self._execution(batch)
            self._running = _Running(placements, run_on, (frames, device_frames))
            self._clock.mark(run_on, "preprocess")
            self._fill(frames, device_frames, placements, batch, run_on)
            self._run(execution, run_on)

    def collect(self) -> LaneResult:
        with self._at_work():
            running = self._running
            assert running is not None
            self._cuda.synchronize(running.stream)
            self._running = None
            timings = self._clock.finish()
            return LaneResult(self._outputs(len(running.placements)), running.placements, timings)

    def infer(
        self, inputs: dict[str, NDArray[np.generic]]
    ) -> tuple[dict[str, NDArray[np.generic]], dict[str, float]]:
        """Prepared arrays of the host in, copies of the outputs and the seconds by stage out."""
        images, image_sizes = (self._checked(tensor, inputs[tensor.name]) for tensor in self._engine.inputs)
        count = len(images)
        if not 1 <= count <= self._most or len(image_sizes) != count:
            raise SettingsError(
                f"{self._engine.path}: a batch of {count} images and {len(image_sizes)} sizes; the engine "
                f"takes 1 to {self._most} of both"
            )
        with self._at_work():
            batch = max(count, self._lowest)
            execution = self._execution(batch)
            self._clock.start()
            self._clock.mark(self._stream, "preprocess")
            self._buffers.images[:count] = images
            self._buffers.sizes[:count] = image_sizes
            self._pad(count, batch)
            self._clock.mark(self._stream, "upload")
            self._buffers.copy_in(batch, self._stream)
            self._run(execution, self._stream)
            self._cuda.synchronize(self._stream)
            return self._outputs(count), self._clock.finish()

    def _checked(self, tensor: Tensor, values: NDArray[np.generic]) -> NDArray[np.generic]:
        found = np.asarray(values)
        if found.dtype != tensor.dtype or found.shape[1:] != tensor.shape:
            sides = ", ".join(map(str, tensor.shape))
            raise SettingsError(
                f"{self._engine.path}: {tensor.name} is {found.dtype} {list(found.shape)}; expected "
                f"{tensor.dtype} [B, {sides}]"
            )
        return found

    def _outputs(self, count: int) -> dict[str, NDArray[np.generic]]:
        """Copies of the first ``count`` images' outputs: the buffers may be freed or filled at any time."""
        self._check_converged()
        return {name: values[:count].copy() for name, values in self._buffers.outputs.items()}

    def _check_converged(self) -> None:
        """Say once, where a fixed-point NMS ran out of rounds."""
        converged = self._buffers.outputs.get(NMS_CONVERGED)
        if converged is None or converged[0] or self._said_unconverged:
            return
        self._said_unconverged = True
        log.warning(
            "%s: the fixed-point NMS was not finished after its rounds, duplicates may be left; build the "
            "engine with --nms plugin for scenes with long rows of overlapping objects",
            self._engine.path,
        )

    def drain(self) -> None:
        with self._at_work():
            if self._running is not None:
                self._cuda.synchronize(self._running.stream)
                self._running = None

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(CudaError), self._cuda.current():
                self._wait_for_everything()
                self._resources.close()
            for execution in self._executions.values():
                execution.context = None  # whatever became of the GPU, none may outlive the engine

    def _wait_for_everything(self) -> None:
        """Nothing may be freed that the GPU still works with."""
        for stream in {self._stream, self._running.stream if self._running else self._stream}:
            with contextlib.suppress(CudaError):
                self._cuda.synchronize(stream)

    def _fill(
        self,
        frames: Sequence[Any],
        device_frames: Sequence[Any],
        placements: list[Placement],
        batch: int,
        stream: int,
    ) -> None:
        """Queue whatever puts the frames onto the device's canvases."""
        on_gpu = {}
        for index, (frame, found, placement) in enumerate(
            zip(frames, device_frames, placements, strict=True)
        ):
            if found is None and self._resized_by_cpu(frame):
                pixels = host_bgr(frame) if isinstance(frame, Nv12) else frame
                to_canvas(pixels, placement, self._buffers.images[index])
                self._buffers.sizes[index] = placement.valid
            else:
                on_gpu[index] = found
        self._pad(len(frames), batch)
        self._clock.mark(stream, "upload")
        if len(on_gpu) < batch:
            self._buffers.copy_in(batch, stream)
        staged = {
            index: found or self._intake.stage(index, frames[index], stream)
            for index, found in on_gpu.items()
        }
        self._clock.mark(stream, "preprocess")
        for index, found in staged.items():
            canvas, size = self._buffers.input_addresses(index)
            self._preprocess(found, placements[index], canvas, size, stream)

    def _resized_by_cpu(self, frame: Any) -> bool:
        """Whether a frame of the host is resized before the copy: a small one, or as the GPU cannot."""
        return not resizes_as(self._contract) or not self._intake.is_large(frame, self._contract.canvas)

    def _check_resize(self, device_frames: Sequence[Any]) -> None:
        if not resizes_as(self._contract) and any(found is not None for found in device_frames):
            raise FrameError(
                "Expected a frame in host memory, since the model's antialiased resize (Pillow's) is done by "
                "the CPU; got one on the GPU, copy it to the host first"
            )

    def _pad(self, count: int, batch: int) -> None:
        """Fill a batch that is smaller than the engine's smallest with black images."""
        self._buffers.images[count:batch] = 0
        self._buffers.sizes[count:batch] = self._contract.canvas

    def _execution(self, batch: int) -> Execution:
        """The execution for a batch size; the first time it is warmed up and captured, on black images."""
        if batch not in self._executions:
            buffers, stream = self._buffers, self._stream
            execution = self._executions[batch] = self._engine.create_execution(
                batch, buffers.addresses, buffers.activations, self._options.graph
            )
            self._pad(0, batch)
            buffers.copy_in(batch, stream)
            self._engine.execute(execution, stream)
            self._cuda.synchronize(stream)
            if self._captures:
                execution.graph = self._cuda.capture(stream, lambda: self._record(execution))
            self._engine.save_cache()
        return self._executions[batch]

    def _record(self, execution: Execution) -> None:
        self._engine.execute(execution, self._stream)
        if self._copy_in_graph:
            self._buffers.copy_out(self._stream)

    def _run(self, execution: Execution, stream: int) -> None:
        self._clock.mark(stream, "network")
        if execution.graph is not None:
            self._cuda.launch_graph(execution.graph, stream)
        else:
            self._engine.execute(execution, stream)
        if execution.graph is None or not self._copy_in_graph:
            self._clock.mark(stream, "download")
            self._buffers.copy_out(stream)
        self._clock.mark(stream, "end")

    def _destroy_executions(self) -> None:
        """Graphs first, then the contexts they were captured from."""
        for execution in self._executions.values():
            if execution.graph is not None:
                with contextlib.suppress(CudaError):
                    self._cuda.destroy_graph(execution.graph)
            execution.context = None

    @staticmethod
    def _size(frame: Any, found: Any) -> tuple[int, int]:
        if found is not None:
            return (found.size[0], found.size[1])
        return FrameIntake.host_size(frame)

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """After anything but a refused frame or argument the state is not known: it takes no more work."""
        with self._lock, self._cuda.current():
            if self._closed:
                raise SettingsError(f"{self._engine.path}: the model is closed; open it again")
            if self._failed:
                raise GpuError(f"{self._engine.path}: an earlier batch failed here; open it again")
            try:
                yield
            except (FrameError, SettingsError):
                raise
            except BaseException:
                self._failed = True
                raise
