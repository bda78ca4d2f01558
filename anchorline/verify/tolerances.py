"""How far two artefacts may be apart, by precision, and which detections count; see docs/verify.md."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypedDict

from anchorline.runtime.canvas import boxes_to_canvas, place
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections


@dataclass(frozen=True)
class Tolerance:
    """Limits for one precision.

    ``stage_rms`` and ``stage_peak`` bound what one stage adds, given the reference's inputs: the root
    mean square of the difference by that of the stage, and the largest difference by its largest
    magnitude. ``box_px`` (canvas pixels) and ``score`` bound a matched pair of detections, ``tie_iou`` is
    how near to the NMS threshold an overlap counts as undecided. ``matched`` is the smallest share of all
    detections that must be matched within these bounds (ties excused), ``confident`` that of those with a
    score of at least 0.5, ``traps`` that in the traps. There only scores from ``trap_score`` on count:
    the images are far from any training data and leave many boxes undecided. ``map50_drop`` and
    ``recall_drop`` bound what labelled data may lose.
    """

    stage_rms: float
    stage_peak: float
    box_px: float
    score: float
    tie_iou: float
    matched: float
    confident: float
    traps: float
    trap_score: float
    map50_drop: float
    recall_drop: float


# By precision, from the most to the least exact.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 1e-3, 0.05, 1e-4, 1e-3, 1.0, 1.0, 1.0, 0.0, 0.001, 0.001),
    "fp16": Tolerance(0.05, 0.05, 2.0, 0.02, 0.02, 0.95, 0.99, 0.95, 0.5, 0.003, 0.005),
    "bf16": Tolerance(0.3, 0.3, 8.0, 0.1, 0.05, 0.85, 0.95, 0.85, 0.5, 0.01, 0.01),
    "int8": Tolerance(0.75, 1.0, 16.0, 0.25, 0.1, 0.75, 0.9, 0.75, 0.5, 0.02, 0.02),
}


def tolerance_for(*precisions: str) -> Tolerance:
    """The tolerance of the least exact of ``precisions``; an unknown one counts as int8."""
    order = list(TOLERANCES)
    return TOLERANCES[max((p if p in order else order[-1] for p in precisions), key=order.index)]


# Comparing two results as verification does: on the canvas, knowing the cuts that both went through.


class CompareOptions(TypedDict):
    """The keywords of ``compare.compare_detections``."""

    score_threshold: float
    box_tolerance_px: float
    score_tolerance: float
    nms_iou: float | None
    max_detections: int | None
    tie_iou: float
    order_ties: bool


def on_canvas(detections: Detections, contract: Contract) -> Detections:
    """The same with boxes in canvas pixels, in which rounding has one size whatever the frame's."""
    assert detections.size is not None
    placement = place(detections.size, contract.canvas, contract.resize)
    return dataclasses.replace(
        detections, boxes=boxes_to_canvas(detections.boxes, placement), size=contract.canvas
    )


def detection_cuts(contract: Contract, tolerance: Tolerance, order_ties: bool = False) -> CompareOptions:
    """For the outputs of the contract's task; ``order_ties`` as in ``alignment.Cuts``."""
    if contract.task == "proposals":
        return {**proposal_cuts(contract, tolerance), "order_ties": order_ties}
    thresholds = contract.thresholds
    return {
        "score_threshold": thresholds.score,
        "box_tolerance_px": tolerance.box_px,
        "score_tolerance": tolerance.score,
        "nms_iou": thresholds.nms_iou,
        "max_detections": thresholds.max_detections,
        "tie_iou": tolerance.tie_iou,
        "order_ties": order_ties,
    }


def proposal_cuts(contract: Contract, tolerance: Tolerance) -> CompareOptions:
    """For proposals: no score threshold, the RPN's NMS."""
    thresholds = contract.thresholds
    return {
        "score_threshold": 0.0,
        "box_tolerance_px": tolerance.box_px,
        "score_tolerance": tolerance.score,
        "nms_iou": thresholds.rpn_nms_iou,
        "max_detections": thresholds.max_proposals,
        "tie_iou": tolerance.tie_iou,
        "order_ties": False,
    }
