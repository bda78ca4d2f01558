"""Catching what C libraries print on stderr, past Python: FFmpeg, onnxruntime."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator

_STDERR = 2
_lock = threading.Lock()  # the redirection is of the whole process: one block at a time


class NativeLog:
    """Collects the lines of ``pattern`` that the process writes to stderr inside ``capture`` blocks.

    Everything else that appears there meanwhile, such as another thread's progress bar, is passed
    on to stderr afterwards. Where there is no stderr, and after ``close``, the blocks run without a
    capture. Not reentrant: do not nest blocks.
    """

    def __init__(self, pattern: bytes) -> None:
        self._pattern = re.compile(rb"^(?:" + pattern + rb").*\n?", re.MULTILINE)
        self._scratch = _scratch_file()

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[str]]:
        """Run the block with stderr caught; the list holds the matching lines when it has ended."""
        lines: list[str] = []
        with _lock:
            try:
                saved = os.dup(_STDERR) if self._scratch >= 0 else -1
            except OSError:
                saved = -1
            if saved < 0:
                yield lines
                return
            os.dup2(self._scratch, _STDERR)
            try:
                yield lines
            finally:
                os.dup2(saved, _STDERR)
                os.close(saved)
                lines.extend(self._sort())

    def close(self) -> None:
        """Release the scratch file. Safe to call twice."""
        if self._scratch >= 0:
            os.close(self._scratch)
            self._scratch = -1

    def _sort(self) -> list[str]:
        """Empty the scratch file: matching lines are returned, the rest goes on to stderr."""
        length = os.lseek(self._scratch, 0, os.SEEK_CUR)
        if length == 0:
            return []
        os.lseek(self._scratch, 0, os.SEEK_SET)
        text = os.read(self._scratch, length)
        os.ftruncate(self._scratch, 0)
        os.lseek(self._scratch, 0, os.SEEK_SET)
        matching = [line.decode("utf-8", "replace").strip() for line in self._pattern.findall(text)]
        rest = self._pattern.sub(b"", text)
        if rest:
            with contextlib.suppress(OSError):
                os.write(_STDERR, rest)
        return matching


def _scratch_file() -> int:
    """A file descriptor in memory where the system has that, so that a full disk does no harm."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("anchorline-native-log")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
