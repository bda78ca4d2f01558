"""Putting the answers together: JSON lines in the order of the files, copies under their names."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from anchorline.cluster.worker import WorkItem
from anchorline.runtime.io.files import discard, hidden_folder, is_stream, output_errors
from anchorline.runtime.video.sinks import JsonLines
from anchorline.runtime.video.source import Item, copy_targets, next_name


class Outputs(contextlib.ExitStack):
    """The lines and annotated copies of ``files``, whose items are answered in any order.

    Lines that come before their turn wait in files beside the output, not in memory; ``jsonl`` is as for
    ``JsonLines``, and None keeps no lines. Workers write copies into the folder ``copies``
    (``copies_folder``), and each gets its name, whole, when its item is answered.

    Leaving it completes the lines with what there is (files without an answer are left out), or drops
    them after an error. Raises ``OutputError``.
    """

    def __init__(self, files: Sequence[Item], jsonl: str | Path | None, copies: Path | None = None) -> None:
        super().__init__()
        self._targets = [file.target for file in files if file.target is not None]  # of all files, or of none
        self._taken = set(self._targets)
        self._next = 0
        self._waiting: dict[int, int] = {}  # complete before their turn: the first file to how many
        self._sink: JsonLines | None = None
        self.copies = copies
        with contextlib.ExitStack() as undo:
            if jsonl is not None:
                self._sink = JsonLines(jsonl)
                undo.callback(self._sink.abandon)  # of no effect on one that is closed
                place = Path(jsonl).parent
                beside = str(jsonl) != "-" and not is_stream(Path(jsonl)) and os.access(place, os.W_OK)
                self._parts = undo.enter_context(
                    _folder_inside(place if beside else Path(tempfile.gettempdir()))
                )
                undo.push(self._finish)
            self.push(undo.pop_all())

    def add(self, item: WorkItem, lines: bytes | bytearray) -> None:
        """Whole lines of an item that is worked on."""
        if self._sink is not None and lines:
            path = self._parts / str(item.first)
            with output_errors(path), path.open("ab") as file:
                file.write(lines)

    def drop(self, item: WorkItem) -> None:
        """Forget the lines of a try that has failed."""
        if self._sink is not None:
            discard(self._parts / str(item.first))

    def answered(self, item: WorkItem) -> None:
        """The item's lines and copies are there."""
        if self.copies is not None:
            folder = item.folder_in(self.copies)
            files = [(Path(path), item.is_video) for path in item.paths]
            written = copy_targets(files, folder, single=False)
            for own, target in zip(filter(None, written), self._targets[item.first :], strict=False):
                copies = [own] if own.exists() else []
                if item.is_video:  # alone in its folder, in parts where the size of its pictures changes
                    copies = sorted(folder.glob("*"), key=lambda path: (len(path.name), path.name))
                for number, copy in enumerate(copies):
                    place = next_name(target, self._taken) if number else target
                    self._taken.add(place)
                    with output_errors(place):
                        os.replace(copy, place)
        self.ended(item)

    def ended(self, item: WorkItem) -> None:
        """Nothing more comes of the item; a second time is a mistake of the caller."""
        if item.first < self._next or item.first in self._waiting:
            raise RuntimeError(f"{item.describe()}: answered twice")
        self._waiting[item.first] = len(item.paths)
        while self._next in self._waiting:
            first = self._next
            self._next += self._waiting.pop(first)
            self._write(first)

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._sink is not None and kind is None:
            for first in sorted(self._waiting):
                self._write(first)
            self._sink.close()

    def _write(self, first: int) -> None:
        """Its turn has come."""
        if self._sink is not None and (path := self._parts / str(first)).exists():
            with path.open(encoding="utf-8", newline="\n") as file:
                for line in file:
                    self._sink.write_line(line)
            discard(path)


@contextlib.contextmanager
def copies_folder(files: Sequence[Item]) -> Iterator[Path | None]:
    """A hidden folder beside the targets of ``files`` for copies that are being written; None without any.

    It has to outlive the workers: one that goes on for a moment would make it again.
    """
    targets = [file.target for file in files if file.target is not None]
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(_folder_inside(targets[0].parent.absolute())) if targets else None


@contextlib.contextmanager
def _folder_inside(place: Path) -> Iterator[Path]:
    """A hidden folder inside ``place``, which is made where it is missing and then goes if nothing else is
    there."""
    made = not place.exists()
    try:
        with hidden_folder(place) as folder:
            yield folder
    finally:
        if made:
            with contextlib.suppress(OSError):
                place.rmdir()
