"""What the pipeline needs of a detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.detections import Detections


class FrameDetector(Protocol):
    """What the pipeline calls: ``Detector``, or anything of its shape.

    ``timings``, where there, holds the seconds of this thread's last ``batch`` by stage; ``contract``
    gives the class names and the largest batch; ``provider`` and ``precision`` go to the summary;
    ``concurrent_calls`` is how many threads may usefully call ``batch`` at once (1 where not there).
    """

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Detections]: ...
