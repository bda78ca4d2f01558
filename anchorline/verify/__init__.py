"""Two artefacts compared: stage by stage, detection by detection, in traps. Never imports PyTorch."""

from anchorline.verify.compare import Comparison, ComparisonSummary, compare_all, compare_detections

__all__ = ["Comparison", "ComparisonSummary", "compare_all", "compare_detections"]
