"""SIGTERM and SIGHUP as an orderly end: files are completed before the process goes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

TERMINATED = 128 + signal.SIGTERM

# SIGHUP comes when the terminal is closed or its connection is lost. Windows has none.
_KINDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def signals_as_exit() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise ``SystemExit`` with the shell's code for them (143, 129).

    Only in the main thread, and each only where nobody else handles or ignores it (as ``nohup`` does SIGHUP);
    elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [kind for kind in _KINDS if signal.getsignal(kind) is signal.SIG_DFL]
    for kind in ours:
        signal.signal(kind, _exit)
    try:
        yield
    finally:
        # A generator that nobody holds any more may be ended by another thread, which must not do this.
        with contextlib.suppress(ValueError):
            for kind in ours:
                signal.signal(kind, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
