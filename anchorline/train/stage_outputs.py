"""The inside of a PyTorch model, for verification: every stage, and every layer with weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anchorline.runtime.errors import ArtefactError
from anchorline.train.prediction import TorchDetector
from anchorline.train.stages import tapped
from anchorline.train.tasks import run_task

_LAYERS = (nn.Conv2d, nn.Linear)


class TorchStages:
    """Runs a ``TorchDetector``'s network as a ``StageRunner`` (``evaluation/verify/subject.py``).

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
