"""Two artefacts compared: stage by stage, detection by detection, in traps. Never imports PyTorch.

>>> report = verify("model.safetensors", "model.onnx", data=["voc:DIR@test"])
>>> report.passed, report.first_divergence

``verify`` itself opens files, checkpoints with PyTorch included, so it is loaded when it is first used.
"""

from typing import TYPE_CHECKING, Any

from anchorline.verify.compare import Comparison, ComparisonSummary, compare_all, compare_detections

if TYPE_CHECKING:
    from anchorline.artefacts import verify

__all__ = ["Comparison", "ComparisonSummary", "compare_all", "compare_detections", "verify"]


def __getattr__(name: str) -> Any:
    if name != "verify":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from anchorline.artefacts import verify

    return verify
