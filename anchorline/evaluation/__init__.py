"""Metrics of detections against labelled data, and their pictures. Never imports PyTorch.

>>> detector = Detector("model.onnx")
>>> data = load_dataset("voc:DIR@test", names=detector.contract.names)
>>> report = evaluate(detector.batch, data, provider=detector.provider)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anchorline.evaluation.evaluation import (
        EvaluationReport,
        ProposalReport,
        evaluate,
        evaluate_proposals,
    )

__all__ = ["EvaluationReport", "ProposalReport", "evaluate", "evaluate_proposals"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.evaluation"), name)
