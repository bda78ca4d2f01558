"""Comparing two results as verification does: on the canvas, knowing the cuts that both went through."""

from __future__ import annotations

import dataclasses
from typing import TypedDict

from anchorline.evaluation.verify.tolerances import Tolerance
from anchorline.runtime.canvas import boxes_to_canvas, place
from anchorline.runtime.contract import Contract
from anchorline.runtime.detections import Detections


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
