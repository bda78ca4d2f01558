"""Labelled data (VOC, COCO, YOLO, generated scenes), metrics and comparisons. Never imports PyTorch.

A detector is anything that maps a list of frames to a list of ``Detections``.
"""

from anchorline.evaluation.compare import Comparison, ComparisonSummary, compare_all, compare_detections
from anchorline.evaluation.dataset import Dataset, LabelledImage
from anchorline.evaluation.evaluate import EvaluationReport, evaluate
from anchorline.evaluation.proposal_recall import ProposalReport, evaluate_proposals
from anchorline.evaluation.specs import load_dataset, load_datasets

__all__ = [
    "Comparison",
    "ComparisonSummary",
    "Dataset",
    "EvaluationReport",
    "LabelledImage",
    "ProposalReport",
    "compare_all",
    "compare_detections",
    "evaluate",
    "evaluate_proposals",
    "load_dataset",
    "load_datasets",
]
