"""The budget: the time spent in all sittings of a study, kept in its state folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.io.files import write_json

_EVERY = 10.0  # seconds between two notes in the file: what a kill may lose


class BudgetSpent(KeyboardInterrupt):
    """The budget is used up; a training that it interrupts keeps its last full epoch."""


class Clock:
    """Counts the seconds of all sittings, and of each run in them, against ``budget`` seconds."""

    def __init__(self, path: Path, budget: float, now: Callable[[], float] = time.monotonic) -> None:
        self.path, self.budget, self.now = path, budget, now
        self._total, self._runs = self._read()
        self._last = self._noted = now()

    @property
    def spent(self) -> float:
        """Seconds of this sitting and those before it."""
        return self._total + self.now() - self._last

    @property
    def is_spent(self) -> bool:
        return self.spent >= self.budget

    def of_run(self, name: str) -> float:
        """Seconds that were counted for a run."""
        return self._runs.get(name, 0.0)

    def check(self) -> None:
        """Raise ``BudgetSpent`` where nothing is left; to be called before each evaluation."""
        if self.is_spent:
            self.note()
            raise BudgetSpent

    def tick(self, name: str) -> None:
        """Count the time since the last call for the run ``name``, and check; called at every step."""
        passed = self.count()
        self._runs[name] = self._runs.get(name, 0.0) + passed
        if self._last - self._noted >= _EVERY:
            self.note()
        self.check()

    def count(self) -> float:
        """Count the time since the last call, for no run; returns it."""
        now = self.now()
        passed, self._last = now - self._last, now
        self._total += passed
        return passed

    def note(self) -> None:
        """Write what is counted."""
        self.count()
        self._noted = self._last
        write_json(self.path, {"spent_s": self._total, "runs": self._runs})

    def _read(self) -> tuple[float, dict[str, float]]:
        if not self.path.is_file():
            return 0.0, {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return float(found["spent_s"]), {str(k): float(v) for k, v in found["runs"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(
                f"{self.path}: cannot be read ({error!r}); expected the time spent so far; "
                "remove the file to count from zero"
            ) from None
