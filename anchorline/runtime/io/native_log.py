"""Catching what C libraries print on stderr, past Python: FFmpeg, onnxruntime, OpenCV."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator

import cv2

_STDERR = 2


class NativeLog:
    """Collects the lines of ``pattern`` that the process writes to stderr inside ``capture`` blocks.

    stderr belongs to the whole process, so a block catches what every thread writes. Blocks of one
    ``group`` therefore exclude each other, and a line is known to come from the one that runs; blocks
    of different groups, such as reading and writing, overlap, and each sees the lines of its own
    pattern. What no running block wants, such as another thread's progress bar, is passed on to
    stderr. Where there is no stderr, and after ``close``, the blocks run without a capture. Not
    reentrant: do not nest blocks.
    """

    def __init__(self, pattern: bytes, group: str = "default") -> None:
        self._pattern = re.compile(rb"^(?:" + pattern + rb").*\n?", re.MULTILINE)
        with _redirection.lock:
            self._group = _groups.setdefault(group, threading.Lock())
        self._open = True

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[str]]:
        """Run the block with stderr caught; the list holds the matching lines when it has ended."""
        lines: list[str] = []
        if not self._open:
            yield lines
            return
        with self._group:
            _redirection.enter(lines, self._pattern)
            try:
                yield lines
            finally:
                _redirection.leave(lines)

    def close(self) -> None:
        """Catch nothing any more. Safe to call twice."""
        self._open = False


class _Redirection:
    """stderr pointed at a scratch file while at least one block runs.

    Two scratch files take turns: the one to be read is no longer the one that is written to.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._running: list[tuple[list[str], re.Pattern[bytes]]] = []
        self._scratch: list[int] = []
        self._saved = -1
        self._begun = b""  # a line that C code has not finished writing

    def enter(self, lines: list[str], pattern: re.Pattern[bytes]) -> None:
        with self.lock:
            if not self._running:
                self._redirect()
            else:
                self._drain()
            self._running.append((lines, pattern))

    def leave(self, lines: list[str]) -> None:
        with self.lock:
            last = len(self._running) == 1
            self._drain(back=last)
            self._running = [block for block in self._running if block[0] is not lines]

    def _redirect(self) -> None:
        try:
            self._saved = os.dup(_STDERR)
        except OSError:
            return  # there is no stderr
        if not self._scratch:
            self._scratch = [_scratch_file(), _scratch_file()]
        os.dup2(self._scratch[0], _STDERR)

    def _drain(self, back: bool = False) -> None:
        """Sort what has come so far: lines to the blocks that want them, the rest to stderr."""
        if self._saved < 0:
            return
        os.dup2(self._saved if back else self._scratch[1], _STDERR)
        self._scratch.reverse()
        text = self._begun + _take(self._scratch[1])
        text, self._begun = (text, b"") if back else _whole_lines(text)
        rest = text
        if text:
            for lines, pattern in self._running:
                lines.extend(line.decode("utf-8", "replace").strip() for line in pattern.findall(text))
                rest = pattern.sub(b"", rest)
        if rest:
            with contextlib.suppress(OSError):
                os.write(self._saved, rest)
        if back:
            os.close(self._saved)
            self._saved = -1


_redirection = _Redirection()
_groups: dict[str, threading.Lock] = {}


def _whole_lines(text: bytes) -> tuple[bytes, bytes]:
    """``text`` without the line that has only begun, and that line; what is not a log's stays."""
    end = text.rfind(b"\n") + 1
    return (text[:end], text[end:]) if text[end : end + 1] == b"[" else (text, b"")


def _take(scratch: int) -> bytes:
    """The content of a scratch file, which is emptied."""
    length = os.lseek(scratch, 0, os.SEEK_CUR)
    if length == 0:
        return b""
    os.lseek(scratch, 0, os.SEEK_SET)
    text = os.read(scratch, length)
    os.ftruncate(scratch, 0)
    os.lseek(scratch, 0, os.SEEK_SET)
    return text


def _scratch_file() -> int:
    """A file descriptor in memory where the system has that, so that a full disk does no harm."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("anchorline-native-log")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


# Keeping OpenCV's own log lines off stderr where an error of ours says it better.


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
