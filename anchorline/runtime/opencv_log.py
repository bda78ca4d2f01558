"""Keeping OpenCV's own log lines off stderr where an error of ours says it better."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import cv2

_SILENT = 0
_lock = threading.Lock()
_inside = 0  # blocks running now, in any thread
_level_before = _SILENT


@contextlib.contextmanager
def quiet_opencv() -> Iterator[None]:
    """Silence OpenCV's logger inside the block. Its level is process-wide: the first block to begin
    lowers it and the last to end puts it back, so blocks may overlap in several threads."""
    global _inside, _level_before
    with _lock:
        if _inside == 0:
            _level_before = cv2.utils.logging.getLogLevel()
            cv2.utils.logging.setLogLevel(_SILENT)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                cv2.utils.logging.setLogLevel(_level_before)
