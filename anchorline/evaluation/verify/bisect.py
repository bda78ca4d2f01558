"""Down to the layer: the first layer with weights whose output differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anchorline.evaluation.verify.stage_check import Frames, canvas_inputs, same_inputs
from anchorline.evaluation.verify.stages import is_stage, tensor_error
from anchorline.evaluation.verify.subject import Subject
from anchorline.evaluation.verify.tolerances import Tolerance
from anchorline.runtime.errors import ArtefactError

# Layers whose outputs are held in memory at one time, on both sides.
CHUNK = 8


@dataclass(frozen=True)
class LayerResult:
    """The first layer that differs (None: none of those that both sides have), and how."""

    layer: str | None
    detail: str
    compared: int

    def to_json(self) -> dict[str, Any]:
        return {"layer": self.layer, "detail": self.detail, "compared": self.compared}


def first_differing_layer(
    reference: Subject, candidate: Subject, frames: Frames, tolerance: Tolerance
) -> LayerResult:
    """Compare layer after layer on ``frames``, every stage of the candidate fed by the reference.

    A fault shows in the layer where it is and in those behind it of the same stage, so the first counts.
    """
    assert reference.stages is not None
    assert candidate.stages is not None
    inputs, other_inputs = same_inputs(
        canvas_inputs(reference, frames)[0], reference.detector.contract, candidate.detector.contract
    )
    feed = {name: value for name, value in reference.stages.run(inputs, {}).items() if is_stage(name)}
    there = set(candidate.stages.layers)
    shared = [layer for layer in reference.stages.layers if layer in there]
    for start in range(0, len(shared), CHUNK):
        chunk = shared[start : start + CHUNK]
        expected = reference.stages.run_layers(inputs, {}, chunk)
        try:
            found = candidate.stages.run_layers(other_inputs, feed, chunk)
        except ArtefactError as failure:
            return LayerResult(
                None, f"its layers cannot be run with the reference's stages: {failure}", start
            )
        for number, layer in enumerate(chunk, start=start + 1):
            error = tensor_error(layer, expected[layer], found[layer], len(frames))
            if error.share_of(tolerance) > 1.0:
                return LayerResult(layer, error.describe(), number)
    return LayerResult(None, f"{len(shared)} layers agree; the fault lies between layers", len(shared))
