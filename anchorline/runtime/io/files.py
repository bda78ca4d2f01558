"""Writing files whole or not at all: a temporary sibling, renamed when it is complete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, DataError, OutputError

_OPEN_FILES = ("/dev", "/dev/fd", "/proc/self/fd")
_SPECIAL = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
_KEPT_NAME_LENGTH = 60  # of the target's name in the temporary one, well under the 255 bytes of a file name


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` with the same suffix; rename it to ``path`` on success.

    Missing parent folders are made. On any failure, an interrupt included, the temporary file is
    removed and a file that stood at ``path`` before is left as it was. An ``OSError`` inside the
    block becomes an ``OutputError``. A device or a pipe (``/dev/stdout``) is handed out as it is.
    """
    target = Path(path)
    if is_stream(target):
        with output_errors(target):
            yield target
        return
    temporary = temporary_sibling(target)
    try:
        with output_errors(target):
            yield temporary
            publish(temporary, target)
    except BaseException:
        discard(temporary)
        raise


def temporary_sibling(target: Path) -> Path:
    """A hidden, unused name beside ``target`` with its suffix; makes the folder when it is missing."""
    if target.is_dir():
        raise OutputError(f"{target}: is a folder, expected a file to write; give a file name")
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.stem[:_KEPT_NAME_LENGTH]}-{secrets.token_hex(4)}{target.suffix}")


def publish(temporary: Path, target: Path) -> None:
    """Flush ``temporary`` to the disk, where late "no space left" errors appear, and rename it."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, target)


def discard(temporary: Path) -> None:
    """Remove a temporary file, if it is there."""
    with contextlib.suppress(OSError):
        temporary.unlink()


def is_stream(path: Path) -> bool:
    """Whether ``path`` is a device or a pipe, which is written to directly and never renamed over.

    So is a name for an open file, such as ``/dev/stdout``, even where that is an ordinary file just now:
    what would be replaced is the name, for every program on the machine.
    """
    if path.is_dir():
        return False
    return str(path.absolute().parent) in _OPEN_FILES or (path.exists() and not path.is_file())


@contextlib.contextmanager
def output_errors(path: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into an ``OutputError`` of one line that names ``path``."""
    try:
        yield
    except AnchorlineError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another place for "
            "the output"
        ) from error


def expect_regular(path: str | Path, error_class: type[AnchorlineError] = ArtefactError) -> None:
    """Raise ``error_class`` where ``path`` is a pipe, a socket or a device: opening it may block for ever,
    and what it gives can be read once only. Anything else, or nothing, is left to whoever opens it."""
    try:
        kind = _SPECIAL.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):
        return
    if kind is not None:
        raise error_class(f"{path}: is a {kind}, expected a file; write what it carries to a file first")


@contextlib.contextmanager
def input_errors(
    path: str | Path, missing: str = "check the name", error_class: type[AnchorlineError] = ArtefactError
) -> Iterator[None]:
    """Turn an ``OSError`` of the block into one line that names ``path``; ``missing`` is the remedy for a
    file that is not there. What is no file (``expect_regular``) is refused before the block begins."""
    expect_regular(path, error_class)
    try:
        yield
    except FileNotFoundError:
        raise error_class(f"{path}: no such file; {missing}") from None
    except AnchorlineError:
        raise
    except OSError as error:
        raise error_class(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def files_below(folder: Path) -> list[Path]:
    """What lies in ``folder`` and its subfolders and is no folder itself, sorted by path.

    Links are followed. A folder with several paths, as in a loop of links, is read once: by its own path
    where that is below ``folder``, else by the first link. Hidden names are left out. Raises ``DataError``
    for a folder that cannot be read.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    own, linked = deque([folder]), deque[Path]()
    while own or linked:
        place = (own or linked).popleft()
        with input_errors(place, "expected a folder", DataError):
            status = place.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(place) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    path = place / entry.name
                    if entry.name.startswith("."):
                        continue
                    if not (path.is_dir() if entry.is_symlink() else entry.is_dir()):
                        found.append(path)
                    else:
                        (linked if entry.is_symlink() else own).append(path)
    return sorted(found)


def cache_folder() -> Path:
    """Where Anchorline keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anchorline"


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def atomic_write_text(path: str | Path, content: str) -> None:
    """Write ``content`` to ``path`` as UTF-8 with the line ends it has, whole or not at all."""
    atomic_write_bytes(path, content.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NumPy values become plain ones, NaN and infinities ``null``."""
    atomic_write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: NumPy values become plain ones, NaN and infinities None.

    A dataclass becomes what its ``to_json`` gives, or else its fields by name.
    """
    if is_dataclass(value) and not isinstance(value, type):
        to_json = getattr(value, "to_json", None)
        own = {field.name: getattr(value, field.name) for field in fields(value)}
        return plain(to_json() if to_json else own)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sha256_of(path: str | Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits; ``ArtefactError`` where it cannot be read."""
    digest = hashlib.sha256()
    with input_errors(path), Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
