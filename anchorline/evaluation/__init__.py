"""Metrics of detections against labelled data, and their pictures. Never imports PyTorch.

>>> detector = Detector("model.onnx")
>>> data = load_dataset("voc:DIR@test", names=detector.contract.names)
>>> report = evaluate(detector.batch, data, provider=detector.provider)
"""

from anchorline.evaluation.evaluation import EvaluationReport, ProposalReport, evaluate, evaluate_proposals

__all__ = ["EvaluationReport", "ProposalReport", "evaluate", "evaluate_proposals"]
