"""An engine on a GPU as a backend, and its lanes: buffers, a stream, a slot for each shape of batches.

The life of a batch, all of it queued on one stream and waited for once:

    frames -> pinned canvases ---one copy---> device canvases -> graph [network, copy out] -> pinned outputs
    large frames -> pinned, as they are -> device -> kernel ->^
    device frames ---------------------------------- kernel ->^

Two lanes at work give the double buffering: while one computes, the other's frames are copied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.backends.base import LaneResult
from anchorline.runtime.canvas import Placement, fit, lies_within, to_canvas
from anchorline.runtime.contract import NMS_CONVERGED, Contract
from anchorline.runtime.io.errors import FrameError, GpuError, SettingsError
from anchorline.runtime.nv12 import bgr_of, frame_size
from anchorline.runtime.tensorrt.cuda import (
    LEGACY_STREAM,
    BindingsCuda,
    Cuda,
    CudaError,
    GpuOptions,
    NoGpuError,
    open_cuda,
)
from anchorline.runtime.tensorrt.engine import REMEDY, InferenceSlot, Tensor, TensorRTEngine
from anchorline.runtime.tensorrt.frames import DeviceCanvas, DeviceFrame, FrameIntake, resizes_as
from anchorline.runtime.tensorrt.library import load_tensorrt
from anchorline.runtime.tensorrt.manifest import CannotRunHereError, EngineManifest, check_fit
from anchorline.runtime.timing import DETECTOR_STAGES

_STAGES = DETECTOR_STAGES[:-1]  # all but what follows the lane
_MARKS = 6  # the most of a batch: preprocess, upload, preprocess, network, download, end
_KEPT_CANVASES = 4  # whose contexts and graphs a lane keeps; the one that was used longest ago goes
_ALIGNMENT = 256  # bytes; what TensorRT asks of a tensor's address

log = logging.getLogger("anchorline.runtime")


class TensorRTBackend:
    """An engine on a GPU, by TensorRT or TensorRT for RTX.

    Raises ``CannotRunHereError`` where there is no GPU, no TensorRT or another release of it, or where the
    engine is for another GPU; ``ArtefactError`` for an engine that is damaged.
    """

    device_frames = True
    threads: int | None = None  # those of a processor, of which it needs none

    def __init__(self, path: Path, manifest: EngineManifest, options: GpuOptions) -> None:
        self.path = path
        self.contract = dataclasses.replace(manifest.contract, max_batch=manifest.batch[2])
        self.provider, self.precision = manifest.flavour, manifest.precision
        self._options = options
        self._engine: TensorRTEngine | None = None
        try:
            trt = load_tensorrt(manifest.flavour)
            self._cuda: Cuda = open_cuda(options.cuda, options.device)
        except (SettingsError, NoGpuError) as error:
            raise CannotRunHereError(str(error)) from None
        try:
            cuda = self._cuda
            check_fit(manifest, str(trt.__version__), cuda.compute_capability, cuda.device_name)
            with cuda.current():
                self._engine = TensorRTEngine(path, manifest, trt, cuda)
        except BaseException:
            self.close()
            raise

    def create_lane(self) -> TensorRTLane:
        """A lane; raises ``OutOfDeviceMemoryError`` where its buffers do not fit, ``SettingsError`` where the
        detector is held to a canvas that the engine does not take."""
        if self._engine is None:
            raise SettingsError(f"{self.path}: the model is closed; open it again")
        canvases, held = self._engine.manifest.canvases, self.contract.canvas
        if held is not None and not any(lies_within(held, each) for each in canvases):
            raise SettingsError(
                f"canvas is {held}; this engine was built for those from {canvases[0][0]} to {canvases[0][2]}"
                + "".join(f", or from {least} to {most}" for least, _, most in canvases[1:])
            )
        return TensorRTLane(self._engine, self._cuda, self._options, self.contract)

    def close(self) -> None:
        """Release engine and runtime, then the GPU. The lanes must be closed before."""
        if self._engine is not None:
            with contextlib.suppress(GpuError), self._cuda.current():
                self._engine.save_cache()
                self._engine.close()
            self._engine.close()  # whatever became of the GPU: it must not outlive it
            self._engine = None
        self._cuda.close()


class TensorRTLane:
    """The methods are those of ``HostLane``. To be made and closed with the CUDA context current or not."""

    def __init__(self, engine: TensorRTEngine, cuda: Cuda, options: GpuOptions, contract: Contract) -> None:
        self._engine, self._cuda, self._contract = engine, cuda, contract
        self._lowest = engine.manifest.batch[0]
        self._graph = options.graph is not False
        # TensorRT for RTX captures by itself (its runtime settings say so); pycuda knows no graphs.
        self._graphs = cuda if self._graph and isinstance(cuda, BindingsCuda) and not engine.is_rtx else None
        self._copy_in_graph = self._graphs is not None and not options.timings
        # By profile and canvas, and then by batch size; the canvas that was used last stands last.
        self._slots: dict[tuple[int, tuple[int, int]], dict[int, InferenceSlot]] = {}
        # What was submitted and not yet collected: placements, stream, and the frames, kept alive meanwhile.
        self._running: tuple[list[Placement], int, Any] | None = None
        self._lock = threading.Lock()
        self._closed = self._failed = self._said_unconverged = False
        with cuda.current(), contextlib.ExitStack() as resources:
            self._stream = cuda.create_stream()
            resources.callback(cuda.destroy_stream, self._stream)
            self._clock = _LaneClock(cuda, options.timings, resources)
            self._buffers = _LaneBuffers(engine, cuda, resources)
            self._intake = FrameIntake(cuda, self._contract)
            resources.callback(self._intake.close)
            resources.callback(self._destroy_slots)
            self._resources = resources.pop_all()

    def entered(self) -> contextlib.AbstractContextManager[None]:
        return self._cuda.current()

    def submit(self, frames: Sequence[Any], stream: Any = None) -> None:
        contract = self._contract
        with self._at_work():
            named = None if stream is None else self._cuda.stream_handle(stream) or LEGACY_STREAM
            self._clock.start()
            device_frames, run_on = self._intake.read(
                frames, self._stream, named, follow=self._graphs is not None
            )
            if not resizes_as(contract) and any(found is not None for found in device_frames):
                raise FrameError(
                    "Expected a frame in host memory, since the model's antialiased resize (Pillow's) is "
                    "done by the CPU; got one on the GPU, copy it to the host first"
                )
            there = zip(frames, device_frames, strict=True)
            sizes = [found.size if found else frame_size(frame) for frame, found in there]
            profile, canvas, placements = fit(sizes, self._engine.manifest.canvases, contract)
            batch = max(len(frames), self._lowest)
            slot = self._slot(profile, canvas, batch)
            self._running = placements, run_on, (frames, device_frames)
            self._clock.mark(run_on, "preprocess")
            self._fill(frames, device_frames, placements, batch, canvas, run_on)
            self._run(slot, run_on)

    def collect(self) -> LaneResult:
        with self._at_work():
            assert self._running is not None
            placements, stream, _ = self._running
            self._cuda.synchronize(stream)
            self._running = None
            timings = self._clock.finish()
            converged = self._buffers.outputs.get(NMS_CONVERGED)
            if converged is not None and not converged[0] and not self._said_unconverged:
                self._said_unconverged = True
                log.warning(
                    "%s: the fixed-point NMS was not finished after its rounds, duplicates may be left; "
                    "build the engine with --nms plugin for scenes with long rows of overlapping objects",
                    self._engine.path,
                )
            # Copies: the buffers may be freed or filled at any time.
            outputs = {n: values[: len(placements)].copy() for n, values in self._buffers.outputs.items()}
            return outputs, placements, timings

    def drain(self) -> None:
        with self._at_work():
            if self._running is not None:
                self._cuda.synchronize(self._running[1])
                self._running = None

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(CudaError), self._cuda.current():
                # Nothing may be freed that the GPU still works with.
                for stream in {self._stream, self._running[1] if self._running else self._stream}:
                    with contextlib.suppress(CudaError):
                        self._cuda.synchronize(stream)
                self._resources.close()
            for slots in self._slots.values():
                for slot in slots.values():
                    slot.context = None  # whatever became of the GPU, none may outlive the engine

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

    def _fill(
        self,
        frames: Sequence[Any],
        device_frames: Sequence[DeviceFrame | None],
        placements: list[Placement],
        batch: int,
        canvas: tuple[int, int],
        stream: int,
    ) -> None:
        """Queue whatever puts the frames onto the device's canvases."""
        images = self._buffers.images(canvas)
        on_gpu: dict[int, DeviceFrame | None] = {}
        for index, (frame, found) in enumerate(zip(frames, device_frames, strict=True)):
            if found is None and self._intake.resized_by_cpu(frame, canvas):
                to_canvas(bgr_of(frame), placements[index], images[index])
                self._buffers.sizes[index] = placements[index].valid
            else:
                on_gpu[index] = found
        self._pad(len(frames), batch, canvas)
        self._clock.mark(stream, "upload")
        if len(on_gpu) < batch:
            self._buffers.copy_in(batch, canvas, stream)
        staged = {
            index: found or self._intake.stage(index, frames[index], stream)
            for index, found in on_gpu.items()
        }
        self._clock.mark(stream, "preprocess")
        for index, there in staged.items():
            self._intake.to_canvas(there, placements[index], self._buffers.canvas(index, canvas), stream)

    def _pad(self, count: int, batch: int, canvas: tuple[int, int]) -> None:
        """Fill a batch that is smaller than the engine's smallest with black images."""
        self._buffers.images(canvas)[count:batch] = 0
        self._buffers.sizes[count:batch] = canvas

    def _slot(self, profile: int, canvas: tuple[int, int], batch: int) -> InferenceSlot:
        """The slot of a shape; the first time it is warmed up and captured, on black images."""
        slots = self._slots.pop((profile, canvas), {})
        if len(self._slots) == _KEPT_CANVASES:
            self._destroy(self._slots.pop(next(iter(self._slots))))
        self._slots[profile, canvas] = slots
        if batch not in slots:
            buffers, stream = self._buffers, self._stream
            slot = slots[batch] = self._engine.create_slot(
                batch,
                buffers.addresses,
                buffers.activations,
                self._graph,
                profile=profile,
                canvas=canvas,
                stream=stream,
            )
            self._pad(0, batch, canvas)
            buffers.copy_in(batch, canvas, stream)
            self._engine.execute(slot, stream)
            self._cuda.synchronize(stream)
            if self._graphs is not None:

                def record() -> None:
                    self._engine.execute(slot, stream)
                    if self._copy_in_graph:
                        buffers.copy_out(stream)

                slot.graph = self._graphs.capture(stream, record)
            self._engine.save_cache()
        return slots[batch]

    def _run(self, slot: InferenceSlot, stream: int) -> None:
        self._clock.mark(stream, "network")
        if self._graphs is not None and slot.graph is not None:
            self._graphs.launch_graph(slot.graph, stream)
        else:
            self._engine.execute(slot, stream)
        if slot.graph is None or not self._copy_in_graph:
            self._clock.mark(stream, "download")
            self._buffers.copy_out(stream)
        self._clock.mark(stream, "end")

    def _destroy_slots(self) -> None:
        for slots in self._slots.values():
            self._destroy(slots)

    def _destroy(self, slots: dict[int, InferenceSlot]) -> None:
        """Graphs first, then the contexts they were captured from."""
        for slot in slots.values():
            if self._graphs is not None and slot.graph is not None:
                with contextlib.suppress(CudaError):
                    self._graphs.destroy_graph(slot.graph)
            self._engine.destroy_context(slot)


class _LaneBuffers:
    """The memory of a lane for the engine's largest batch on its largest canvas, allocated once and given
    back with ``resources``.

    ``images()``, ``sizes`` and ``outputs`` are views of pinned memory [largest batch, ...]; ``addresses`` are
    the tensors' places on the device, ``activations`` the network's scratch. Inputs lie one after the other,
    the sizes first, so that the first images of a batch and all sizes are one copy; the outputs are one copy
    as well.
    """

    def __init__(self, engine: TensorRTEngine, cuda: Cuda, resources: contextlib.ExitStack) -> None:
        def on_device(size: int, what: str) -> int:
            if size == 0:
                return 0
            address = cuda.allocate(size, f"{engine.path.name}: {what}", REMEDY)
            resources.callback(cuda.free, address)
            return address

        self._cuda = cuda
        self._images, self._sizes = engine.inputs
        self._most = engine.manifest.batch[2]
        canvases = [most for _, _, most in engine.manifest.canvases]
        largest = self._images.on(max(canvases, key=math.prod))
        inputs, input_bytes = _layout([self._sizes, largest], self._most)
        outputs, self._output_bytes = _layout(engine.outputs, self._most)
        self._images_at = inputs[self._images.name]
        self.activations = on_device(engine.activation_bytes, "one batch in work")
        self._inputs = on_device(input_bytes, "its inputs")
        self._outputs = on_device(self._output_bytes, "its outputs")
        self._pinned_in = cuda.allocate_pinned(input_bytes)
        resources.callback(cuda.free_pinned, self._pinned_in)
        self._pinned_out = cuda.allocate_pinned(self._output_bytes)
        resources.callback(cuda.free_pinned, self._pinned_out)
        self.addresses = {name: self._inputs + offset for name, offset in inputs.items()}
        self.addresses |= {name: self._outputs + offset for name, offset in outputs.items()}
        self.sizes = self._view(self._sizes, self._pinned_in.array, inputs[self._sizes.name])
        self.outputs = {
            tensor.name: self._view(tensor, self._pinned_out.array, outputs[tensor.name])
            for tensor in engine.outputs
        }

    def _view(self, tensor: Tensor, memory: NDArray[np.uint8], offset: int) -> NDArray[Any]:
        size = self._most * tensor.image_bytes
        return memory[offset : offset + size].view(tensor.dtype).reshape(self._most, *tensor.shape)

    def images(self, canvas: tuple[int, int]) -> NDArray[Any]:
        """The images on a canvas, one after the other: those on another one lie elsewhere."""
        return self._view(self._images.on(canvas), self._pinned_in.array, self._images_at)

    def canvas(self, index: int, canvas: tuple[int, int]) -> DeviceCanvas:
        """That of image ``index`` on the device."""
        pixels = self.addresses[self._images.name] + index * self._images.on(canvas).image_bytes
        valid_size = self.addresses[self._sizes.name] + index * self._sizes.image_bytes
        return DeviceCanvas(pixels, valid_size, canvas)

    def copy_in(self, batch: int, canvas: tuple[int, int], stream: int) -> None:
        """Queue the copy of all sizes and the first ``batch`` images to the device."""
        size = self._images_at + batch * self._images.on(canvas).image_bytes
        self._cuda.copy_in(self._inputs, self._pinned_in, size, stream)

    def copy_out(self, stream: int) -> None:
        """Queue the copy of the outputs to the host."""
        self._cuda.copy_out(self._pinned_out, self._outputs, self._output_bytes, stream)


def _layout(tensors: list[Tensor], batch: int) -> tuple[dict[str, int], int]:
    """Offsets of tensors laid one after the other, and the bytes of all."""
    offsets, end = {}, 0
    for tensor in tensors:
        offsets[tensor.name] = end
        end += -(-batch * tensor.image_bytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


class _LaneClock:
    """How long a lane's batch spends in each stage: ``mark`` begins one, ``finish`` gives the seconds.

    By the host's clock ``network`` is all the time until the results are there, and ``download`` 0: the
    work is only queued meanwhile. CUDA events tell them apart, at the cost of a few calls a batch.
    """

    def __init__(self, cuda: Cuda, by_events: bool, resources: contextlib.ExitStack) -> None:
        self._cuda = cuda
        self._marks: list[tuple[str, float | int]] = []
        self._events: list[int] = []
        for _ in range(_MARKS if by_events else 0):
            self._events.append(cuda.create_event(timing=True))
            resources.callback(cuda.destroy_event, self._events[-1])

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
        seconds = dict.fromkeys(_STAGES, 0.0)
        for (stage, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if self._events:
                seconds[stage] += self._cuda.seconds_between(int(start), int(end))
            else:
                seconds[stage] += end - start
        return seconds
