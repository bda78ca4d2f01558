"""How fast frames come and go just now, rather than over the whole run."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from anchorline.runtime.pipeline.figures import Figures

_SPAN = 1.0  # seconds that a rate is taken over, at least


class Rates(NamedTuple):
    """Frames a second that a source delivered, and that were answered."""

    read: float = 0.0
    answered: float = 0.0


class RecentRates:
    """The rates of about the last second. Safe to be asked by several threads."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._counts = dict.fromkeys(figures.sources, (0, 0))
        self._rates = dict.fromkeys(figures.sources, Rates())

    def now(self) -> dict[str, Rates]:
        """Each source's rates, taken anew where the last ones are a second old."""
        with self._lock:
            seconds = time.monotonic() - self._last
            if seconds >= _SPAN:
                for name, source in self._figures.sources.items():
                    counts, before = (source.frames_in, source.frames_out), self._counts[name]
                    self._rates[name] = Rates(
                        (counts[0] - before[0]) / seconds, (counts[1] - before[1]) / seconds
                    )
                    self._counts[name] = counts
                self._last += seconds
            return dict(self._rates)
