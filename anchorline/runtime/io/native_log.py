"""Keeping what C libraries print on stderr, past Python: FFmpeg's lines for us, OpenCV's for nobody."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator

import cv2

_STDERR = 2
_FFMPEG = re.compile(rb"^(?:\[[^\]\n]+ @ 0x[0-9a-f]+\]|OpenCV: FFMPEG:).*\n?", re.MULTILINE)
_SILENT = 0
_stderr = threading.Lock()
_quiet = threading.Lock()
_quiet_blocks = 0  # running now, in any thread
_level_before = _SILENT


@contextlib.contextmanager
def ffmpeg_lines() -> Iterator[list[str]]:
    """Catch what the FFmpeg inside OpenCV says: the list holds its lines when the block has ended.

    OpenCV tells of damage in no other way. stderr belongs to the whole process, so these blocks exclude
    each other, and what is not FFmpeg's, such as another thread's progress bar, is passed on. Not reentrant.
    """
    lines: list[str] = []
    with _stderr:
        try:
            saved = os.dup(_STDERR)
        except OSError:  # there is no stderr
            yield lines
            return
        # In memory where the system has that, so that a full disk does no harm.
        memory = os.memfd_create("anchorline-native-log") if hasattr(os, "memfd_create") else None
        with tempfile.TemporaryFile() if memory is None else open(memory, "rb") as scratch:
            os.dup2(scratch.fileno(), _STDERR)
            try:
                yield lines
            finally:
                os.dup2(saved, _STDERR)
                os.close(saved)
                scratch.seek(0)
                text = scratch.read()
                lines += [line.decode("utf-8", "replace").strip() for line in _FFMPEG.findall(text)]
                if rest := _FFMPEG.sub(b"", text):
                    with contextlib.suppress(OSError):
                        os.write(_STDERR, rest)


@contextlib.contextmanager
def quiet_opencv() -> Iterator[None]:
    """Silence OpenCV's own logger inside the block, where an error of ours says it better.

    Its level is process-wide: the first block to begin lowers it and the last to end puts it back, so
    blocks may overlap in several threads.
    """
    global _quiet_blocks, _level_before
    with _quiet:
        if _quiet_blocks == 0:
            _level_before = cv2.utils.logging.getLogLevel()
            cv2.utils.logging.setLogLevel(_SILENT)
        _quiet_blocks += 1
    try:
        yield
    finally:
        with _quiet:
            _quiet_blocks -= 1
            if _quiet_blocks == 0:
                cv2.utils.logging.setLogLevel(_level_before)
