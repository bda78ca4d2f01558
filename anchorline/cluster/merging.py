"""Putting the answers together: JSON lines in the order of the files, copies under their names.

Answers that come before their turn wait in files beside the output, not in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from anchorline.cluster.job import WorkItem
from anchorline.cluster.replies import Copy
from anchorline.cluster.worker import TOKEN_FILE
from anchorline.runtime.io.errors import OutputError
from anchorline.runtime.io.files import discard, is_stream, output_errors
from anchorline.runtime.video.paths import Item
from anchorline.runtime.video.sinks import JsonLines


class Part:
    """The lines of one try of an item, in a file, which appears with the first of them."""

    def __init__(self, path: Path | None, item: WorkItem) -> None:
        self.item = item
        self._path = path
        self._file: IO[bytes] | None = None

    def append(self, lines: bytes) -> None:
        """Add whole lines; raises ``OutputError``."""
        if self._path is None or not lines:
            return
        with output_errors(self._path):
            if self._file is None:
                self._file = self._path.open("wb")
            self._file.write(lines)

    def close(self) -> Path | None:
        """All lines are there; where they are."""
        if self._file is None:
            return None
        assert self._path is not None
        with output_errors(self._path):
            self._file.close()
        return self._path

    def discard(self) -> None:
        """Forget them."""
        if self._file is not None and self._path is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            discard(self._path)


class OrderedLines:
    """JSON lines whose parts are completed in any order, in the order of the files.

    ``jsonl`` is as for ``JsonLines``; None keeps no lines. Each file is answered once: a second answer
    is a mistake of the caller. Raises ``OutputError``.
    """

    def __init__(self, jsonl: str | Path | None) -> None:
        self._next = 0
        self._waiting: dict[int, tuple[int, Path | None]] = {}  # by first file: how many files, their lines
        self._sink = None if jsonl is None else JsonLines(jsonl)
        self._folder: Path | None = None
        if jsonl is not None:
            try:
                self._folder = _parts_folder(jsonl)
            except BaseException:
                self.abandon()
                raise

    def part(self, item: WorkItem) -> Part:
        """Where the lines of this try of an item go."""
        path = None if self._folder is None else self._folder / f"{item.first}-{item.tries}"
        return Part(path, item)

    def complete(self, part: Part) -> None:
        """The item is answered by this part."""
        self._answered(part.item, part.close())

    def skip(self, item: WorkItem) -> None:
        """There will be no answer to this item."""
        self._answered(item, None)

    def close(self) -> None:
        """Complete the file with what there is: files without an answer are left out."""
        for first in sorted(self._waiting):
            self._write(self._waiting.pop(first)[1])
        try:
            if self._sink is not None:
                self._sink.close()
        finally:
            self._clear()

    def abandon(self) -> None:
        """Drop everything."""
        if self._sink is not None:
            self._sink.abandon()
        self._clear()

    def _answered(self, item: WorkItem, lines: Path | None) -> None:
        if item.first < self._next or item.first in self._waiting:
            raise RuntimeError(f"{item.describe()}: answered twice")
        self._waiting[item.first] = (len(item.paths), lines)
        while self._next in self._waiting:
            count, ready = self._waiting.pop(self._next)
            self._next += count
            self._write(ready)

    def _write(self, lines: Path | None) -> None:
        if lines is None or self._sink is None:
            return
        with output_errors(lines), lines.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                self._sink.write_line(line)
        discard(lines)

    def _clear(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class Copies:
    """Annotated copies: workers write them into a hidden folder beside the targets, and this names them.

    So a copy appears when its item is answered, once, and whole. ``folder`` is None where none are
    wanted; the targets are those of ``files``. A context manager. Raises ``OutputError``.
    """

    def __init__(self, files: Sequence[Item]) -> None:
        self._targets = [file.target for file in files]
        self._taken = {target for target in self._targets if target is not None}
        self.token = secrets.token_hex(8)
        self.folder: Path | None = None
        self._made: Path | None = None
        if not self._taken:
            return
        place = next(iter(self._taken)).parent.absolute()
        self._made = None if place.exists() else place
        self.folder = place / f".anchorline-{self.token}"
        with output_errors(place):
            self.folder.mkdir(parents=True)
            (self.folder / TOKEN_FILE).write_text(self.token, encoding="utf-8")

    def publish(self, item: WorkItem, copies: Sequence[Copy]) -> None:
        """Give the copies of an answered item their names."""
        if self.folder is None:
            return
        for copy in copies:
            target = self._targets[item.first + copy.file]
            assert target is not None
            if copy.part > 1:
                target = self._next_name(target)
            with output_errors(target):
                os.replace(self.folder / copy.name, target)

    def __enter__(self) -> Copies:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what belongs to no answer."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._made is not None:
            with contextlib.suppress(OSError):  # it is not empty
                self._made.rmdir()

    def _next_name(self, target: Path) -> Path:
        names = (target.with_name(f"{target.stem}-{n}{target.suffix}") for n in itertools.count(2))
        name = next(name for name in names if name not in self._taken)
        self._taken.add(name)
        return name


def _parts_folder(jsonl: str | Path) -> Path:
    """A folder for the parts: beside the output, where there is room for it, if that is a file."""
    place = Path(jsonl).parent
    beside = str(jsonl) != "-" and not is_stream(Path(jsonl)) and os.access(place, os.W_OK)
    try:
        return Path(tempfile.mkdtemp(prefix=".anchorline-lines-", dir=place if beside else None))
    except OSError as error:
        raise OutputError(
            f"{place}: no folder for parts of the results can be made ({error.strerror or error}); free "
            "space or choose another place for the output"
        ) from error
