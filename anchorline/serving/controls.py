"""What all viewers see of the detections: one lowest score and one choice of classes, shared by all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import SettingsError


@dataclass(frozen=True)
class Shown:
    """Detections from ``min_score`` on whose class is not ``hidden``. ``version`` rises with each change."""

    min_score: float = 0.5
    hidden: frozenset[str] = frozenset()
    version: int = 0

    def __call__(self, detections: Detections) -> Detections:
        """The detections to draw."""
        kept = detections.scores >= self.min_score
        if self.hidden:
            kept &= np.array([name not in self.hidden for name in detections.names], bool)
        return detections[kept]


class Controls:
    """The shared choice, changed by viewers from the server's thread and read by the painter.

    It acts on what is shown only, after the pipeline's own filters: files and lines stay as they are.
    ``changed`` is called after each change.
    """

    def __init__(self, changed: Callable[[], object]) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self.shown = self.initial = Shown()
        self.lowest_score = 0.0

    def begin(self, lowest_score: float, shown_score: float) -> None:
        """What the pipeline lets through, and what it draws on its own copies: where a run begins."""
        with self._lock:
            self.lowest_score = min(lowest_score, 1.0)
            score = max(self.lowest_score, shown_score)
            self.shown = self.initial = Shown(score, version=self.shown.version + 1)
        self._changed()

    def change(self, wanted: object, names: Sequence[str]) -> Shown:
        """Take ``{"min_score": number, "hidden": [class names]}``, either or both.

        A score below what the pipeline lets through becomes that. ``names`` are the known classes.
        Raises ``SettingsError`` for anything else, and then changes nothing.
        """
        if not isinstance(wanted, Mapping) or not wanted or set(wanted) - {"min_score", "hidden"}:
            raise SettingsError('expected {"min_score": 0.5, "hidden": ["class", ...]}, either or both')
        fields: dict[str, Any] = {}
        if "min_score" in wanted:
            fields["min_score"] = max(_score(wanted["min_score"]), self.lowest_score)
        if "hidden" in wanted:
            fields["hidden"] = _classes(wanted["hidden"], names)
        with self._lock:
            changed = replace(self.shown, **fields)
            if changed == self.shown:
                return self.shown
            self.shown = replace(changed, version=changed.version + 1)
            shown = self.shown
        self._changed()
        return shown


def _score(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise SettingsError("min_score is no score; expected a number from 0 to 1")
    return float(value)


def _classes(value: object, names: Sequence[str]) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise SettingsError("hidden is no list of classes; expected their names")
    unknown = set(value) - set(names)
    if unknown:
        raise SettingsError(f"hidden names {len(unknown)} classes that this run does not know")
    return frozenset(value)
