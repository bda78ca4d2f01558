"""Writing files whole or not at all: made in a hidden folder beside their place, renamed when complete."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anchorline.runtime.io.addresses import without_secrets
from anchorline.runtime.io.errors import UNPRINTABLE, AnchorlineError, ArtefactError, DataError, OutputError

_OPEN_FILES = ("/dev", "/dev/fd", "/proc/self/fd")
_SPECIAL = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}

# The hidden folder that this or another process of the same kernel is making something in.
_HIDDEN = re.compile(r"\.anchorline-(?P<kernel>[0-9a-f]{8})-(?P<pid>\d{1,9})-(?P<begun>\d{1,19})-[0-9a-f]{8}")
_LOOKED_AT = 10_000  # names of a folder among which those of dead processes are looked for
_tidied: set[str] = set()  # folders in which this process has done so


class Draft:
    """The hidden folder beside ``target`` in which it is made, under its own name as ``path``.

    Missing parent folders are made. What is put beside ``path``, such as the record of an artefact, is
    published with it. A draft ends with ``publish`` or ``discard``; one whose process was killed is removed
    by the next that writes into the same folder. Raises ``OutputError``.
    """

    def __init__(self, target: Path) -> None:
        if target.is_dir():
            raise OutputError(f"{target}: is a folder, expected a file to write; give a file name")
        self._target = target
        with output_errors(target):
            self._folder = make_hidden_folder(target.parent)
        self.path = self._folder / target.name

    def publish(self) -> None:
        """Give all files their names: ``target`` last, so that it never stands there without the others.

        Everything is flushed to the disk before, where late "no space left" errors appear. Permissions are
        those that ``open`` would give: a file that is replaced passes its own on, a new one has what the
        umask allows.
        """
        usual = self._folder.stat().st_mode & 0o666
        beside = [path for path in self._folder.iterdir() if path != self.path]
        moves = [(path, self._target.with_name(path.name)) for path in (*beside, self.path)]
        for path, place in moves:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if place.is_dir():
                raise OutputError(f"{place}: is a folder, expected a file to write; remove or rename it")
            with contextlib.suppress(OSError):  # a file system without permissions
                path.chmod(stat.S_IMODE(place.stat().st_mode) if place.is_file() else usual)
        for path, place in moves:
            os.replace(path, place)

    def discard(self) -> None:
        """Remove the draft, if it is there."""
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield the path of a draft of ``path`` (``Draft``); publish it on success.

    On any failure, an interrupt included, the draft is removed and files that stood there before are left
    as they were. An ``OSError`` inside the block becomes an ``OutputError``, and our own errors name
    ``path`` where they would name the draft. A device or a pipe (``/dev/stdout``) is handed out as it is.
    """
    target = Path(path)
    if is_stream(target):
        with output_errors(target):
            yield target
        return
    draft = Draft(target)
    try:
        with output_errors(target):
            yield draft.path
            draft.publish()
    except AnchorlineError as error:
        hidden = f"{draft.path.parent.name}{os.sep}"
        error.args = tuple(arg.replace(hidden, "") if isinstance(arg, str) else arg for arg in error.args)
        raise
    finally:
        draft.discard()


def make_hidden_folder(place: Path, mode: int = 0o777) -> Path:
    """A new folder inside ``place``, with what the umask leaves of ``mode``, that goes with this process.

    Where that was killed, the next one that makes one in ``place`` removes it: on the same machine since it
    was started, and in the same container. Whether processes elsewhere are alive cannot be known.
    """
    place.mkdir(parents=True, exist_ok=True)
    _tidy(place)
    pid, kernel = os.getpid(), _kernel()
    process = process_state(pid) if kernel else None
    owner = "0" if process is None else f"{kernel}-{pid}-{process.begun}"
    folder = place / f".anchorline-{owner}-{secrets.token_hex(4)}"
    folder.mkdir(mode)
    return folder


@contextlib.contextmanager
def hidden_folder(place: Path, mode: int = 0o777) -> Iterator[Path]:
    """A hidden folder inside ``place`` for the time of the block; raises ``OutputError``."""
    with output_errors(place):
        folder = make_hidden_folder(place, mode)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tidy(place: Path) -> None:
    """Remove what killed processes have left in ``place``; once for each folder and process."""
    key = os.path.abspath(place)
    if key in _tidied or not (kernel := _kernel()):
        return
    _tidied.add(key)
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        for entry in itertools.islice(entries, _LOOKED_AT):
            made = _HIDDEN.fullmatch(entry.name)
            if made and made["kernel"] == kernel and not is_alive(int(made["pid"]), made["begun"]):
                shutil.rmtree(entry.path, ignore_errors=True)


@functools.cache
def _kernel() -> str:
    """Eight digits for the run of the kernel and the container, in which alone a process id means something.

    Empty on systems that do not tell.
    """
    try:
        run = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        container = os.stat("/proc/self/ns/pid").st_ino
        numbered_here = os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return ""
    if not numbered_here:  # /proc is another container's
        return ""
    return hashlib.sha256(f"{platform.node()} {run} {container}".encode()).hexdigest()[:8]


class ProcessState(NamedTuple):
    """What proc_pid_stat(5) has of a process: its program, R, S, Z and so on, and when it began."""

    name: str
    state: str
    begun: str


def process_state(pid: int) -> ProcessState | None:
    """The state of a process; None where it is not shown, or there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return ProcessState(name, fields[0], fields[19])


def is_alive(pid: int, begun: str) -> bool:
    """Whether the process runs that had this id and began then; yes where it cannot be known."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's, which may be hidden in /proc
    process = process_state(pid)
    return process is None or (process.begun == begun and process.state not in "ZX")  # else dead, or another


def discard(path: Path) -> None:
    """Remove a file, if it is there."""
    with contextlib.suppress(OSError):
        path.unlink()


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
        reason = error.strerror or error
        raise OutputError(
            f"{_shown(path)}: cannot be written ({reason}); free space or choose another place for the output"
        ) from error


def expect_regular(path: str | Path, error_class: type[AnchorlineError] = ArtefactError) -> None:
    """Raise ``error_class`` where ``path`` is a pipe, a socket or a device: opening it may block for ever,
    and what it gives can be read once only; or where it is no path. Anything else, or nothing, is left to
    whoever opens it."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        given = "nothing" if isinstance(path, str) else type(path).__name__
        raise error_class(f"{given} is given, expected the path of a file")
    try:
        kind = _SPECIAL.get(stat.S_IFMT(os.stat(path).st_mode))
    except ValueError:  # a null character, half of a surrogate pair
        raise error_class(f"{str(path)!a}: no file can be called so; check the name") from None
    except OSError:
        return
    if kind is not None:
        raise error_class(f"{path}: is a {kind}, expected a file; write what it carries to a file first")


def utf8_path(path: str | Path, error_class: type[AnchorlineError] = DataError) -> str:
    """``path`` for OpenCV, which ends the process over a name whose bytes are no UTF-8."""
    text = str(path)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise error_class(f"{path}: the name is not UTF-8, as OpenCV needs it; rename the file") from None
    return text


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
        raise error_class(f"{_shown(path)}: no such file; {missing}") from None
    except AnchorlineError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise error_class(f"{_shown(path)}: cannot be read ({reason}); check the file") from error


def _shown(path: str | Path) -> str:
    return without_secrets(str(path), [str(path)])  # it may be a URL, which none of our files is


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
    atomic_write_text(path, json_text(plain(value), indent=2, allow_nan=False) + "\n")


def json_text(value: Any, **options: Any) -> str:
    """``value`` as JSON that can be printed and is UTF-8, whatever it holds: ``UNPRINTABLE`` characters and
    what a file name in another encoding has are escaped, which says the same."""
    text = json.dumps(value, ensure_ascii=False, **options)  # line ends in it are those of the layout
    return UNPRINTABLE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


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
