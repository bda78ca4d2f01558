"""What C libraries print on stderr, past Python: FFmpeg's lines kept for us or stripped of secrets, OpenCV's
for nobody."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator

import cv2

from anchorline.runtime.io.addresses import HIDDEN, hidden_parts, shown_address, without_secrets

_STDERR = 2
_FFMPEG = re.compile(rb"^(?:\[[^\]\n]+ @ 0x[0-9a-f]+\]|OpenCV: FFMPEG:).*\n?", re.MULTILINE)
_SILENT = 0
_stderr = threading.Lock()
_passage: tuple[int, threading.Thread] | None = None  # where stderr led before, and who passes lines on
_passage_blocks = 0
_addresses: set[str] = set()  # since the passage began: a line may come out after its block
_JOIN_SECONDS = 1.0
_PIPE_SIZE = 1 << 20  # bytes, the most that Linux gives everybody
_LINE_END = re.compile(rb"(?<=[\r\n])")
_NATIVE = "[", "\x1b["  # as FFmpeg and OpenCV begin their lines, without and with colours
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
                found = [line.decode("utf-8", "replace").strip() for line in _FFMPEG.findall(text)]
                lines += map(without_secrets, found)
                if rest := _FFMPEG.sub(b"", text):
                    with contextlib.suppress(OSError):
                        os.write(_STDERR, rest)


@contextlib.contextmanager
def without_secrets_on_stderr(address: str) -> Iterator[None]:
    """Inside the block nothing that is printed on stderr shows what is to be hidden of the address.

    The FFmpeg inside OpenCV quotes the address, or one that it was led to, in some of its complaints, and has
    no other switch than for the whole process. So stderr leads through a pipe, whose lines a thread passes
    on at once. Blocks may overlap in several threads.
    """
    global _passage_blocks
    with _stderr:
        if _passage_blocks == 0:
            _begin_passage()
        _passage_blocks += 1
        _addresses.add(address)
    try:
        yield
    finally:
        with _stderr:
            _passage_blocks -= 1
            if _passage_blocks == 0:
                _end_passage()


def _begin_passage() -> None:
    global _passage
    try:
        before = os.dup(_STDERR)
        outlet, inlet = os.pipe()
    except OSError:  # there is no stderr, or no room for more files
        return
    # Room for what a library prints while it holds Python's lock, and the thread cannot read.
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    os.dup2(inlet, _STDERR)
    os.close(inlet)
    thread = threading.Thread(target=_pass_on, args=(outlet, before), name="stderr", daemon=True)
    thread.start()
    _passage = before, thread


@atexit.register  # or the last lines would stay in the pipe where a camera hangs
def _end_passage() -> None:
    global _passage
    if _passage is not None:
        (before, thread), _passage = _passage, None
        os.dup2(before, _STDERR)
        thread.join(_JOIN_SECONDS)  # it ends with the pipe, which a child of this process may still hold
        _addresses.clear()


def _pass_on(source: int, target: int) -> None:
    """The thread's work: whole lines, and what is no beginning of a line of a C library's."""
    rest = b""
    with open(source, "rb", buffering=0) as pipe:
        while piece := pipe.read(1 << 16):
            *lines, rest = _LINE_END.split(rest + piece)
            if not rest.decode("latin-1").startswith(_NATIVE):
                lines, rest = [*lines, rest], b""
            _write(target, b"".join(map(_stripped, lines)))
    _write(target, _stripped(rest))
    os.close(target)


def _stripped(line: bytes) -> bytes:
    text = line.decode("utf-8", "surrogateescape")
    known = sorted(_addresses.copy(), key=len, reverse=True)
    if text.startswith(_NATIVE):
        text = without_secrets(text)
        for part in sorted({part for each in known for part in hidden_parts(each)}, key=len, reverse=True):
            text = text.replace(part, HIDDEN)
    for each in known:  # what others say of other addresses is theirs, and so are their words
        text = text.replace(each, shown_address(each))
    return text.encode("utf-8", "surrogateescape")


def _write(target: int, text: bytes) -> None:
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(target, text) :]


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
