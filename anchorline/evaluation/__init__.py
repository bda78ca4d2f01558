"""Metrics of detections against labelled data, and their pictures. Never imports PyTorch.

>>> detector = Detector("model.onnx")
>>> data = load_dataset("voc:DIR@test", names=detector.contract.names)
>>> report = evaluate(detector.batch, data, provider=detector.provider)
"""

from typing import TYPE_CHECKING

from anchorline.runtime.on_demand import on_demand

if TYPE_CHECKING:
    from anchorline.evaluation.evaluation import EvaluationReport as EvaluationReport
    from anchorline.evaluation.evaluation import ProposalReport as ProposalReport
    from anchorline.evaluation.evaluation import evaluate as evaluate
    from anchorline.evaluation.evaluation import evaluate_proposals as evaluate_proposals

__all__, __getattr__, __dir__ = on_demand(
    __name__, {"evaluation": "EvaluationReport ProposalReport evaluate evaluate_proposals"}
)
