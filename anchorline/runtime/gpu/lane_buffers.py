"""The memory of a lane, allocated once: inputs and outputs on both sides, and the network's scratch."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.cuda.interface import Cuda
from anchorline.runtime.gpu.tensorrt_engine import REMEDY, Tensor, TensorRTEngine

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
