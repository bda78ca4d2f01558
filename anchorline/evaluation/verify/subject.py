"""What can be verified: an artefact that runs, whole and, where it can, stage by stage.

The PyTorch side lives in ``train/stage_outputs.py`` and is handed in by whoever has it; the ONNX side is
``onnx_stages.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.canvas import Placement
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections
from anchorline.runtime.files import sha256_of

Arrays = Mapping[str, NDArray[Any]]


class BatchDetector(Protocol):
    """Frames to detections, as the runtime's ``Detector``."""

    @property
    def contract(self) -> Contract: ...

    @property
    def provider(self) -> str: ...

    @property
    def precision(self) -> str: ...

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of several frames of any sizes, boxes in the frames' own pixels."""
        ...


class StageRunner(Protocol):
    """A network whose inside can be seen.

    ``prepare`` gives the network's inputs for frames, by name, as this side makes them, and where each
    frame lies on the canvas. ``run`` executes it on the contract's inputs and returns every stage by name
    (``stages.ORDER``), float32, and the contract's outputs. A stage in ``feed`` is still computed and
    returned, but what follows it is computed from the fed value, so an error is seen where it arises and
    nowhere else.
    ``layers`` names the layers with weights in the order of execution, and ``run_layers`` returns the
    outputs of some of them. ``release`` gives back what was kept for the next run.
    """

    @property
    def layers(self) -> tuple[str, ...]: ...

    def prepare(
        self, frames: Sequence[NDArray[np.uint8]]
    ) -> tuple[dict[str, NDArray[np.generic]], list[Placement]]: ...

    def run(self, inputs: Arrays, feed: Arrays) -> dict[str, NDArray[Any]]: ...

    def run_layers(
        self, inputs: Arrays, feed: Arrays, layers: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]: ...

    def release(self) -> None: ...


@dataclass(frozen=True)
class Subject:
    """One side of a verification. ``stages`` is None where only the whole can be run (an engine)."""

    path: Path
    detector: BatchDetector
    stages: StageRunner | None = None

    def identity(self) -> dict[str, Any]:
        """Name, sha256, provider and precision, as the record states them."""
        return {
            "name": self.path.name,
            "sha256": sha256_of(self.path) if self.path.is_file() else None,
            "provider": self.detector.provider,
            "precision": self.detector.precision,
        }

    def close(self) -> None:
        """Release what holds resources."""
        close = getattr(self.detector, "close", None)
        if close is not None:
            close()


def onnx_subject(path: Path, provider: str = "cpu") -> Subject:
    """An exported ONNX file, its inside on onnxruntime's CPU provider; raises ``ArtefactError``.

    A graph without the stages' names, as the first versions wrote it, is compared as a whole.
    """
    from anchorline.evaluation.verify.onnx_stages import OnnxStages
    from anchorline.runtime.detector import Detector

    detector = Detector(path, provider)
    inside = OnnxStages(path, detector.prepare)
    return Subject(path, detector, inside if inside.stages else None)
