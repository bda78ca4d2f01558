"""What the bodies share: their domain, and numbers as text."""

from __future__ import annotations

import numpy as np

# Not the domain of the custom ops: a registered plugin would take a node of that name, body or not.
BODY_DOMAIN = "anchorline.body"


def literal(value: float) -> str:
    """``value`` as a float32 literal of ONNX's text form, exactly."""
    text = repr(float(np.float32(value)))
    return text if "." in text or "e" in text else f"{text}.0"
