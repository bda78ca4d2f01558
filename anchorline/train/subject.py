"""A checkpoint as one side of a verification."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from anchorline.evaluation.verify.subject import Subject
from anchorline.runtime.contract import CANVAS_KEY, Contract
from anchorline.train.prediction import TorchDetector
from anchorline.train.stage_outputs import TorchStages
from anchorline.train.tasks import OUTPUTS


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
