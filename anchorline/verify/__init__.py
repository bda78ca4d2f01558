"""Two artefacts compared: stage by stage, detection by detection, in traps. Never imports PyTorch.

>>> report = verify("model.safetensors", "model.onnx", data=["voc:DIR@test"])
>>> report.passed, report.first_divergence

``verify`` itself opens files, checkpoints with PyTorch included, so it is loaded when it is first used.
"""

from typing import TYPE_CHECKING

from anchorline.runtime.on_demand import on_demand

if TYPE_CHECKING:
    from anchorline.artefacts import verify as verify
    from anchorline.verify.compare import Comparison as Comparison
    from anchorline.verify.compare import ComparisonSummary as ComparisonSummary
    from anchorline.verify.compare import compare_all as compare_all
    from anchorline.verify.compare import compare_detections as compare_detections

__all__, __getattr__, __dir__ = on_demand(
    __name__,
    {".artefacts": "verify", "compare": "Comparison ComparisonSummary compare_all compare_detections"},
)
