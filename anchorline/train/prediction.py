"""A PyTorch model as a detector: frames in, ``Detections`` out, as the runtime's ``Detector`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from anchorline.runtime.canvas import Placement
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.postprocess import to_detections
from anchorline.runtime.preprocess import Preprocessor, check_frame
from anchorline.train.checkpoint import load_checkpoint
from anchorline.train.faster_rcnn import FasterRCNN
from anchorline.train.tasks import check_own_proposals, run_task


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
