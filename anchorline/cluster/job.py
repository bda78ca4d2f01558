"""What travels to the workers: the settings of the run, and one piece of work after the other."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from anchorline.runtime.video.options import DetectOptions


@dataclass(frozen=True)
class ModelFile:
    """A file that a detector is opened from: its absolute path on the command's machine, and its hash."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Job:
    """What all items of a run have in common.

    ``folder`` is where the command was called, which relative names start from; ``model`` the files of
    the model, the one to open first. The ``jsonl`` of the ``options`` tells whether lines are wanted;
    ``copies`` is the folder for annotated copies that are not yet
    complete, and ``token`` the content of the file ``token`` in it, by which a worker knows that it
    sees this very folder.
    """

    version: str
    folder: str
    model: tuple[ModelFile, ...]
    options: DetectOptions = field(default_factory=DetectOptions)
    copies: str | None = None
    token: str = ""


@dataclass(frozen=True)
class WorkItem:
    """Files that one worker answers in one go: some images, or one video.

    ``first`` is the place of the first of them among all files of the run. ``sizes`` are in bytes as
    the command sees them, ``None`` for a file that is not there any more. ``tries`` counts the
    attempts that have failed.
    """

    first: int
    paths: tuple[str, ...]
    is_video: bool
    sizes: tuple[int | None, ...] = ()
    tries: int = 0

    def split(self) -> list[WorkItem]:
        """One item for each file."""
        return [
            WorkItem(self.first + index, (path,), self.is_video, tries=self.tries)
            for index, path in enumerate(self.paths)
        ]

    def measured(self) -> WorkItem:
        """The same with the sizes that the files have now."""
        return replace(self, sizes=tuple(map(_size, self.paths)))

    def describe(self) -> str:
        """What to call it in a message."""
        if len(self.paths) == 1:
            return self.paths[0]
        return f"{self.paths[0]} ... {self.paths[-1]} ({len(self.paths)} files)"


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None
