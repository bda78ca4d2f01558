"""What TensorRT complained of: it says why in its log alone, and the calls only that they failed."""

from __future__ import annotations

import logging
from collections import deque

from anchorline.runtime.tensorrt_library import log

_KEPT = 32
_LONGEST = 300  # characters of a reason


class ErrorLog(logging.Handler):
    """Keeps the latest errors of TensorRT's log; attached once, so that nothing is done for each frame."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._errors: deque[tuple[int, str]] = deque(maxlen=_KEPT)
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._count += 1
        self._errors.append((self._count, " ".join(record.getMessage().split())))

    def mark(self) -> int:
        """A point in the log, for ``since``."""
        return self._count

    def since(self, mark: int) -> list[str]:
        """The errors after ``mark``, each on one line; those of other threads may be among them."""
        return [text for number, text in list(self._errors) if number > mark]

    def reason(self, mark: int) -> str:
        """The first error after ``mark``: the cause, which later ones follow from."""
        text = next(iter(self.since(mark)), "no reason given")
        return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


errors = ErrorLog()
log.addHandler(errors)
