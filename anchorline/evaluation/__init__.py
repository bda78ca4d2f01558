"""Metrics of detections against labelled data, and their pictures. Never imports PyTorch.

A detector is anything that maps a list of frames to a list of ``Detections``.
"""

from anchorline.evaluation.evaluate import EvaluationReport, evaluate
from anchorline.evaluation.recall import ProposalReport, evaluate_proposals

__all__ = ["EvaluationReport", "ProposalReport", "evaluate", "evaluate_proposals"]
