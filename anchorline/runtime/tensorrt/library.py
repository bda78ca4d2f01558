"""Loading TensorRT or TensorRT for RTX: one API under two module names, and the only place that imports them.

Both have one log for the whole process; it goes to Python's logging under ``anchorline.tensorrt``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import re
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorline.runtime.io.errors import SettingsError, one_line
from anchorline.runtime.io.files import cache_folder, make_hidden_folder


@dataclass(frozen=True)
class Flavour:
    """A distribution of TensorRT: its module, the extra that brings it, and the oldest usable version."""

    title: str
    module: str
    extra: str
    oldest: tuple[int, ...]


FLAVOURS = {
    "tensorrt": Flavour("TensorRT", "tensorrt", "gpu", (10, 12)),
    "tensorrt-rtx": Flavour("TensorRT for RTX", "tensorrt_rtx", "rtx", (1, 1)),
}

# In this order: the parser looks for the first among the libraries that are loaded.
_RTX_LIBRARIES = ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so")
_LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
    "VERBOSE": logging.DEBUG,
}

_KEPT = 32  # of its latest errors
_LONGEST = 300  # characters of a reason
_MEMORY_WORDS = ("out of memory", "outofmemory", "cudamalloc", "cuda_error_out_of_memory")

_loggers: dict[str, Any] = {}
_loading = threading.Lock()

log = logging.getLogger("anchorline.tensorrt")
log.addHandler(logging.NullHandler())  # otherwise Python prints warnings on stderr by itself


@functools.cache
def load_tensorrt(name: str) -> Any:
    """The module for flavour ``name``, a key of ``FLAVOURS``.

    Raises ``SettingsError`` when it is not installed, cannot be loaded or is too old.
    """
    flavour = FLAVOURS[name]
    install = f"pip install 'anchorline[{flavour.extra}]'"
    try:
        if name == "tensorrt-rtx" and sys.platform.startswith("linux"):
            _load_rtx_libraries()
        module = importlib.import_module(flavour.module)
    except ModuleNotFoundError:
        raise SettingsError(f"{flavour.title} is not installed, and this needs it: {install}") from None
    except (ImportError, OSError) as error:
        raise SettingsError(
            f"{flavour.title} cannot be loaded ({one_line(error)}); install it again: {install}"
        ) from None
    version = tuple(int(number) for number in re.findall(r"\d+", module.__version__)[:2])
    if version < flavour.oldest:
        raise SettingsError(
            f"{flavour.title} is {module.__version__}; expected at least "
            f"{'.'.join(map(str, flavour.oldest))}: {install}"
        )
    return module


def tensorrt_logger(name: str) -> Any:
    """The process's one logger of flavour ``name``, which every builder, parser and runtime is given.

    TensorRT goes on to use the first that it was given, so there must not be a second for a moment.
    """
    with _loading:
        if name not in _loggers:
            _loggers[name] = _logger_class(load_tensorrt(name))()
        return _loggers[name]


def _logger_class(trt: Any) -> type:
    class Logger(trt.ILogger):
        """TensorRT's messages as log records. Called from its threads; never raises."""

        def log(self, severity: Any, message: str) -> None:
            with contextlib.suppress(Exception):
                log.log(_LEVELS.get(severity.name, logging.INFO), "%s", message.strip())

    return Logger


class ErrorLog(logging.Handler):
    """The latest errors of TensorRT's log, which alone says why a call failed.

    Attached once, so that nothing is done for each frame.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._errors: deque[tuple[int, str]] = deque(maxlen=_KEPT)
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._count += 1
        self._errors.append((self._count, one_line(record.getMessage())))

    def mark(self) -> int:
        """A point in the log, for ``reason``."""
        return self._count

    def reason(self, mark: int) -> str:
        """The first error after ``mark``: the cause, which later ones follow from."""
        text = next(iter(self._since(mark)), "no reason given")
        return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."

    def tell_of_memory(self, mark: int) -> bool:
        """Whether an error after ``mark`` says that the GPU's memory was not enough."""
        complaints = " ".join(self._since(mark)).lower()
        return any(words in complaints for words in _MEMORY_WORDS)

    def _since(self, mark: int) -> list[str]:
        """Those of other threads may be among them."""
        return [text for number, text in list(self._errors) if number > mark]


errors = ErrorLog()
log.addHandler(errors)


@contextlib.contextmanager
def captured_log() -> Iterator[list[logging.LogRecord]]:
    """Collect what TensorRT logs inside the block, from INFO on."""
    records: list[logging.LogRecord] = []
    handler, level = logging.Handler(logging.INFO), log.level
    handler.emit = records.append  # type: ignore[assignment, method-assign]
    log.addHandler(handler)
    log.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield records
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _load_rtx_libraries() -> None:
    """Load the wheel's libraries under the names they look for each other by.

    The wheel ships ``libtensorrt_rtx.so.1`` and its ONNX parser opens ``libtensorrt_rtx.so``: without that
    name a plugin node aborts the process. The links stand in a cache folder, not in the installed package.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).resolve().parent
    names = [name for name in _RTX_LIBRARIES if (folder / f"{name}.1").is_file()]
    links = cache_folder() / f"tensorrt-rtx-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
    try:
        links.mkdir(parents=True, exist_ok=True)
        writable = os.access(links, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        links = make_hidden_folder(Path(tempfile.gettempdir()), 0o700)
    for name in names:
        for link in (links / f"{name}.1", links / name):
            _link(link, folder / f"{name}.1")
    for name in names:
        ctypes.CDLL(str(links / f"{name}.1"))


def _link(link: Path, target: Path) -> None:
    """Make or renew a link in one step, so that two processes may do it at once."""
    with contextlib.suppress(OSError):
        if Path(os.readlink(link)) == target:
            return
    temporary = link.with_name(f"{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
