"""What a worker answers. Plain values: no exception of ours has to travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Ready:
    """The detector is open."""

    node: str
    pid: int
    provider: str
    precision: str


@dataclass(frozen=True)
class NeedsModel:
    """These files of the model, by number, are not to be found on the worker's machine."""

    missing: tuple[int, ...]


@dataclass(frozen=True)
class Refused:
    """This worker cannot take part: the name of an ``AnchorlineError`` and its message."""

    node: str
    kind: str
    text: str


@dataclass(frozen=True)
class Absent:
    """The worker's machine does not have a file of the item that the command sees."""

    text: str


@dataclass(frozen=True)
class Broken:
    """The item raised something that no file is to blame for; the worker is not to be used again."""

    text: str


@dataclass(frozen=True)
class Chunk:
    """A piece of an item's answer: JSON lines as UTF-8, of how many frames, with how many detections.

    ``times`` holds the seconds of each frame by stage.
    """

    lines: bytes = b""
    frames: int = 0
    detections: int = 0
    times: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Copy:
    """An annotated copy of the item's file number ``file``: its name in the folder for copies.

    ``part`` counts from 1; there are more where the size of a video's pictures changes midway.
    """

    file: int
    part: int
    name: str


@dataclass(frozen=True)
class Done:
    """The last piece of an item's answer, and what became of its files.

    ``unreadable`` is the complaint about the first file of which there is no frame.
    """

    last: Chunk = field(default_factory=Chunk)
    warnings: tuple[str, ...] = ()
    unreadable: str | None = None
    copies: tuple[Copy, ...] = ()


@dataclass(frozen=True)
class Dead:
    """No answer of the worker itself: its process or its machine has gone, for this reason."""

    text: str


Reply = Ready | NeedsModel | Refused | Absent | Broken | Chunk | Done | Dead
