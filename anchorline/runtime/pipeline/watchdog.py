"""Noticing a source that is open and delivers nothing."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from anchorline.runtime.pipeline.figures import SourceFigures

_LOOKS = 5  # within one stall


def watch(sources: Sequence[SourceFigures], stall: float, ended: threading.Event) -> None:
    """Report each live source that has delivered nothing for ``stall`` seconds, until ``ended``.

    Readers that can end a hanging read by themselves do so after the same time; this also sees those
    that cannot, such as a webcam's driver or an iterator of the caller's.
    """
    while not ended.wait(min(1.0, stall / _LOOKS)):
        for source in sources:
            if source.live and source.silent_for() > stall:
                source.stalled(stall)
