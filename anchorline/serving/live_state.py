"""Everything that the requests share, and the status that all viewers are shown."""

from __future__ import annotations

import json
import time
from typing import Any

from anchorline.serving.access import Access
from anchorline.serving.audience import Audience
from anchorline.serving.controls import Controls
from anchorline.serving.painting import Painter
from anchorline.serving.run_state import RunState

_KEPT = 0.9  # seconds that a status is good for


class LiveState:
    """The run, its viewers, what they chose, and who may be one."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.run = RunState()
        self.audience = Audience()
        self.controls = Controls(self._control_changed)
        self.painter = Painter(self.controls, self.audience.wake)
        self._status = b""
        self._made, self._version = -1.0, -1

    def _control_changed(self) -> None:
        self.painter.repaint()
        self.audience.wake()

    def controls_json(self) -> dict[str, Any]:
        """The shared controls as plain values."""
        shown = self.controls.shown
        return {
            "min_score": shown.min_score,
            "lowest_score": self.controls.lowest_score,
            "hidden": sorted(shown.hidden),
            "version": shown.version,
        }

    def status(self) -> bytes:
        """The status as JSON, made once a second for all viewers, and after each change of a control."""
        now, version = time.monotonic(), self.controls.shown.version
        if now - self._made > _KEPT or version != self._version:
            self._made, self._version = now, version
            self._status = json.dumps(self._plain_status(), ensure_ascii=False).encode()
        return self._status

    def _plain_status(self) -> dict[str, Any]:
        return {
            "phase": self.run.phase,
            "problems": self.run.problems(),
            "seconds": round(self.run.seconds(), 1),
            "viewers": self.audience.count,
            "sources": self.run.figures_of_sources(),
            "controls": self.controls_json(),
            "classes": [{"name": name, "count": count} for name, count in self.run.known_classes().items()],
        }
