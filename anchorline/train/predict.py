"""PyTorch models as detectors: a whole model, its RPN alone, its detection head on stored proposals.

And one side of a verification, with every stage and layer of the network.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anchorline.data.proposals import ImageProposals
from anchorline.runtime.canvas import (
    Placement,
    Preprocessor,
    boxes_to_canvas,
    check_frame,
    held_to,
    to_detections,
    usual_canvas,
)
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import ArtefactError, DataError
from anchorline.train.checkpoint import load_checkpoint
from anchorline.train.model.faster_rcnn import OUTPUTS, FasterRCNN, run_task
from anchorline.train.model.ops import SUPPRESSED, tapped
from anchorline.train.model.rpn import Proposals
from anchorline.verify.stages import Subject

# In ``Contract.source`` of a model without a trained RPN: it detects on stored proposals alone.
STORED_PROPOSALS = "stored_proposals"


def check_own_proposals(path: Path, contract: Contract, task: str = "detections") -> None:
    """Raise ``ArtefactError`` where the model in ``path`` cannot do ``task`` by itself."""
    if contract.source.get(STORED_PROPOSALS):
        raise ArtefactError(
            f"{path}: was trained on stored proposals and has no trained RPN; "
            "evaluate it with --proposals FILE, or train with --schedule joint or alternating"
        )
    if contract.task == "proposals" and task == "detections":
        raise ArtefactError(
            f"{path}: holds a trained RPN alone, whose task is proposals; expected a detector, "
            "as --schedule joint or alternating trains it"
        )


class TorchDetector:
    """Runs a ``FasterRCNN`` with the runtime's own preprocessing; for evaluation and comparison."""

    provider = "pytorch"
    precision = "fp32"

    def __init__(self, model: FasterRCNN, contract: Contract, device: str = "cpu") -> None:
        self.model, self.contract, self.device = model.to(device), contract, torch.device(device)
        self.preprocess = Preprocessor(contract)

    @classmethod
    def load(cls, path: Path, device: str = "cpu", canvas: tuple[int, int] | None = None) -> TorchDetector:
        """The detector in a ``model.safetensors``, on a ``canvas`` or each frame's own; raises
        ``ArtefactError``."""
        model, contract = load_checkpoint(path)
        check_own_proposals(path, contract, contract.task)
        return cls(model, held_to(contract, canvas, None), device)

    def __call__(self, frame: NDArray[np.uint8]) -> Detections:
        """Detections of one BGR frame [H, W, 3], boxes in its own pixels."""
        return self.batch([frame])[0]

    def prepare(
        self, frames: Sequence[NDArray[np.uint8]]
    ) -> tuple[dict[str, NDArray[np.generic]], list[Placement]]:
        """The network's inputs for ``frames``, as the runtime's ``Detector.prepare``."""
        return self.preprocess([check_frame(frame) for frame in frames])

    @torch.inference_mode()
    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of several frames of any sizes."""
        inputs, placements = self.prepare(frames)
        was_training = self.model.training
        self.model.eval()
        images, sizes = (torch.from_numpy(array).to(self.device) for array in inputs.values())
        found = self.infer(images, sizes, placements)
        self.model.train(was_training)
        outputs = {name: tensor.cpu().numpy() for name, tensor in found.items()}
        return to_detections(outputs, placements, self.contract)

    def infer(self, images: Tensor, sizes: Tensor, placements: Sequence[Placement]) -> dict[str, Tensor]:
        """The contract's outputs for a batch on its canvas, where ``placements`` say what lies."""
        return run_task(self.model, self.contract.task, images, sizes)


def load_rpn(
    path: Path, device: str = "cpu", pre_nms: int | None = None, post_nms: int | None = None
) -> TorchDetector:
    """The RPN of a ``model.safetensors``, whatever its task, as a detector of the one class ``object``.

    ``pre_nms`` candidates per level and ``post_nms`` proposals an image; by default the model's own
    numbers. Raises ``ArtefactError``.
    """
    model, contract = load_checkpoint(path)
    check_own_proposals(path, contract, "proposals")
    model.rpn.pre_nms = pre_nms or model.rpn.pre_nms
    model.rpn.post_nms = post_nms or model.rpn.post_nms
    contract = dataclasses.replace(contract, task="proposals", outputs=OUTPUTS["proposals"])
    return TorchDetector(model, contract, device)


class StoredProposalDetector(TorchDetector):
    """Fast R-CNN alone: classifies stored proposals, one entry an image, of frames in the same order."""

    def __init__(
        self, model: FasterRCNN, contract: Contract, proposals: Sequence[ImageProposals], device: str = "cpu"
    ) -> None:
        super().__init__(model, contract, device)
        self.proposals, self.next = proposals, 0

    @classmethod
    def open(
        cls, path: Path, proposals: Sequence[ImageProposals], device: str = "cpu"
    ) -> StoredProposalDetector:
        """The detection head in a ``model.safetensors``, on ``proposals``; raises ``ArtefactError``."""
        return cls(*load_checkpoint(path), proposals, device)

    def infer(self, images: Tensor, sizes: Tensor, placements: Sequence[Placement]) -> dict[str, Tensor]:
        """The outputs on the next proposals; raises ``DataError`` where the frames are not theirs."""
        given = self.proposals[self.next : self.next + len(placements)]
        self.next += len(placements)
        slots = max([1, *(len(each.boxes) for each in given)])
        boxes = torch.zeros(len(given), slots, 4)
        scores = torch.full((len(given), slots), SUPPRESSED)
        for row, (placement, each) in enumerate(zip(placements, given, strict=True)):
            if placement.source != each.size:
                found, wanted = (f"{height}x{width}" for height, width in (placement.source, each.size))
                raise DataError(
                    f"image {each.id!r} is {found}, its stored proposals are of {wanted}; "
                    "expected the images of the proposals in their order"
                )
            boxes[row, : len(each.boxes)] = torch.from_numpy(boxes_to_canvas(each.boxes, placement))
            scores[row, : len(each.boxes)] = torch.from_numpy(each.scores)
        proposals = Proposals(boxes.to(self.device), scores.to(self.device))
        return vars(self.model.roi_heads(self.model.features(images, sizes), proposals, sizes))


class TorchStages:
    """Runs a ``TorchDetector``'s network as a ``StageRunner`` (``verify/stages.py``).

    A layer is named as its module, with ``#2`` and so on where it runs on several levels. A convolution
    followed by batch norm counts as one layer, since exporters fold them.
    """

    def __init__(self, detector: TorchDetector) -> None:
        self._detector = detector
        self.prepare = detector.prepare
        modules = detector.model.named_modules()
        self._names = {module: name for name, module in modules if isinstance(module, nn.Conv2d | nn.Linear)}

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer in the order of execution, found by running an empty canvas once."""
        contract = self._detector.contract
        canvas = usual_canvas(contract)
        images = np.zeros((1, *canvas, 3), np.dtype(contract.input_dtype))
        sizes = np.array([canvas], np.float32)
        with self._recorded(()) as outputs:
            self.run(dict(zip(contract.inputs, (images, sizes), strict=True)), {})
        return tuple(outputs)

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

        names = detector.contract.inputs
        tensors = (torch.from_numpy(np.asarray(inputs[name])).to(detector.device) for name in names)
        with tapped(visit):
            outputs = run_task(detector.model.eval(), detector.contract.task, *tensors)
        return {**seen, **{name: value.cpu().numpy() for name, value in outputs.items()}}

    def run_layers(
        self, inputs: Mapping[str, NDArray[Any]], feed: Mapping[str, NDArray[Any]], layers: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        """The outputs of ``layers``."""
        with self._recorded(layers) as outputs:
            self.run(inputs, feed)
        return {name: value for name, value in outputs.items() if value is not None}

    def release(self) -> None:
        """Nothing is kept."""

    @contextlib.contextmanager
    def _recorded(self, wanted: Collection[str]) -> Iterator[dict[str, NDArray[np.float32] | None]]:
        """Fills what it gives with each layer that runs, in order, and the outputs of those ``wanted``."""
        outputs: dict[str, NDArray[np.float32] | None] = {}
        runs: Counter[str] = Counter()
        last: tuple[str, Tensor] | None = None

        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal last
            if module in self._names:
                name = self._names[module]
                runs[name] += 1
                name = name if runs[name] == 1 else f"{name}#{runs[name]}"
                last = (name, output)
            elif isinstance(module, nn.BatchNorm2d) and last is not None and inputs[0] is last[1]:
                name = last[0]
            else:
                return
            outputs[name] = _kept(output) if name in wanted else None

        handle = nn.modules.module.register_module_forward_hook(record)
        try:
            yield outputs
        finally:
            handle.remove()


def _kept(value: Tensor) -> NDArray[np.float32]:
    """A float32 copy: what follows may work in place (ReLU does)."""
    copied: NDArray[np.float32] = value.detach().float().cpu().numpy().copy()
    return copied


def checkpoint_subject(path: Path, other: Contract | None = None, device: str = "cpu") -> Subject:
    """The model in a ``model.safetensors`` as one side of a verification.

    With the contract of the ``other`` side it does that side's task, on its canvas. Raises
    ``ArtefactError``.
    """
    detector = TorchDetector.load(path, device, None if other is None else other.canvas)
    if other is not None:
        own = detector.contract
        detector.contract = dataclasses.replace(own, task=other.task, outputs=OUTPUTS[other.task])
    return Subject(path, detector, TorchStages(detector))
