"""A PyTorch model as a detector, and as one side of a verification with every stage and layer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anchorline.runtime.canvas import Placement, Preprocessor, check_frame, to_detections
from anchorline.runtime.contract import CANVAS_KEY, Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import ArtefactError
from anchorline.train.checkpoint import load_checkpoint
from anchorline.train.model.faster_rcnn import OUTPUTS, FasterRCNN, check_own_proposals, run_task
from anchorline.train.model.stages import tapped
from anchorline.verify.stages import Subject


class TorchDetector:
    """Runs a ``FasterRCNN`` with the runtime's own preprocessing; for evaluation and comparison."""

    provider = "pytorch"
    precision = "fp32"

    def __init__(self, model: FasterRCNN, contract: Contract, device: str = "cpu") -> None:
        self.model, self.contract, self.device = model.to(device), contract, torch.device(device)
        self.preprocess = Preprocessor(contract)

    @classmethod
    def load(cls, path: Path, device: str = "cpu", canvas: tuple[int, int] | None = None) -> TorchDetector:
        """The detector in a ``model.safetensors``; raises ``ArtefactError``."""
        model, contract = load_checkpoint(path, canvas)
        check_own_proposals(path, contract, contract.task)
        return cls(model, contract, device)

    def __call__(self, frame: NDArray[np.uint8]) -> Detections:
        """Detections of one BGR frame [H, W, 3], boxes in its own pixels."""
        return self.batch([frame])[0]

    def prepare(
        self, frames: Sequence[NDArray[np.uint8]]
    ) -> tuple[dict[str, NDArray[np.generic]], list[Placement]]:
        """The network's inputs for ``frames``, as the runtime's ``Detector.prepare``."""
        images, image_sizes, placements = self.preprocess([check_frame(frame) for frame in frames])
        return dict(zip(self.contract.inputs, (images, image_sizes), strict=True)), placements

    @torch.inference_mode()
    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of several frames of any sizes."""
        inputs, placements = self.prepare(frames)
        was_training = self.model.training
        self.model.eval()
        tensors = (torch.from_numpy(array).to(self.device) for array in inputs.values())
        found = run_task(self.model, self.contract.task, *tensors)
        self.model.train(was_training)
        outputs = {name: tensor.cpu().numpy() for name, tensor in found.items()}
        return to_detections(outputs, placements, self.contract)


# The inside of a PyTorch model, for verification: every stage, and every layer with weights.


_LAYERS = (nn.Conv2d, nn.Linear)


class TorchStages:
    """Runs a ``TorchDetector``'s network as a ``StageRunner`` (``verify/stages.py``).

    A layer is named as its module, with ``#2`` and so on where it runs several times (the RPN head, on
    each level). A convolution followed by batch norm counts as one layer, since exporters fold them.
    """

    def __init__(self, detector: TorchDetector) -> None:
        self._detector = detector
        self.prepare = detector.prepare
        self._names: dict[nn.Module, str] = {
            module: name for name, module in detector.model.named_modules() if isinstance(module, _LAYERS)
        }

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer in the order of execution, found by running an empty canvas once."""
        height, width = self._detector.contract.canvas
        dtype = np.dtype(self._detector.contract.input_dtype)
        empty = np.zeros((1, height, width, 3), dtype), np.array([[height, width]], np.float32)
        inputs = dict(zip(self._detector.contract.inputs, empty, strict=True))
        recorder = _LayerRecorder(self._names, None)
        with recorder:
            self.run(inputs, {})
        return tuple(recorder.order)

    @torch.inference_mode()
    def run(
        self, inputs: Mapping[str, NDArray[Any]], feed: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """All stages and outputs; a stage in ``feed`` is replaced for what follows it.

        Raises ``ArtefactError`` for a fed value of another shape than the stage's.
        """
        detector, seen = self._detector, {}

        def visit(name: str, value: Tensor) -> Tensor:
            seen[name] = _kept(value)
            fed = feed.get(name)
            if fed is None:
                return value
            if fed.shape != value.shape:
                raise ArtefactError(f"{name} is fed {list(fed.shape)}; expected {list(value.shape)}")
            # A copy: what follows may work in place.
            return torch.from_numpy(fed).to(value.device, value.dtype, copy=True)

        tensors = (
            torch.from_numpy(np.asarray(inputs[name])).to(detector.device)
            for name in detector.contract.inputs
        )
        with tapped(visit):
            outputs = run_task(detector.model.eval(), detector.contract.task, *tensors)
        return {**seen, **{name: value.cpu().numpy() for name, value in outputs.items()}}

    def run_layers(
        self, inputs: Mapping[str, NDArray[Any]], feed: Mapping[str, NDArray[Any]], layers: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        """The outputs of ``layers``."""
        recorder = _LayerRecorder(self._names, set(layers))
        with recorder:
            self.run(inputs, feed)
        return {name: value for name, value in recorder.values.items() if name in layers}

    def release(self) -> None:
        """Nothing is kept."""


class _LayerRecorder:
    """Forward hooks on the layers; keeps the values of the ``wanted`` ones (None: the order alone)."""

    def __init__(self, names: Mapping[nn.Module, str], wanted: set[str] | None) -> None:
        self._names, self._wanted = names, wanted
        self._runs: Counter[str] = Counter()
        self._last: tuple[str, Tensor] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.order: list[str] = []
        self.values: dict[str, NDArray[np.float32]] = {}

    def __enter__(self) -> _LayerRecorder:
        self._handles = [nn.modules.module.register_module_forward_hook(self._record)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.BatchNorm2d):
            if self._last is not None and inputs[0] is self._last[1]:
                self._keep(self._last[0], output)
        elif module in self._names:
            name = self._names[module]
            self._runs[name] += 1
            if self._runs[name] > 1:
                name = f"{name}#{self._runs[name]}"
            self.order.append(name)
            self._last = (name, output)
            self._keep(name, output)

    def _keep(self, name: str, output: Tensor) -> None:
        if self._wanted is not None and name in self._wanted:
            self.values[name] = _kept(output)


def _kept(value: Tensor) -> NDArray[np.float32]:
    """A float32 copy: what follows may work in place (ReLU does)."""
    copied: NDArray[np.float32] = value.detach().float().cpu().numpy().copy()
    return copied


# A checkpoint as one side of a verification.


def checkpoint_subject(path: Path, other: Contract | None = None, device: str = "cpu") -> Subject:
    """The model in a ``model.safetensors``.

    With the contract of the ``other`` side it does that side's task, on the canvas that side was
    deliberately exported for. Raises ``ArtefactError``.
    """
    chosen = None if other is None else other.source.get(CANVAS_KEY)
    detector = TorchDetector.load(path, device, None if chosen is None else (int(chosen[0]), int(chosen[1])))
    if other is not None:
        own = detector.contract
        detector.contract = dataclasses.replace(own, task=other.task, outputs=OUTPUTS[other.task])
    return Subject(path, detector, TorchStages(detector))
