"""Naming a source: a file, a folder, a camera, a stream, or any iterator of frames."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.io.images import find_images, is_video
from anchorline.runtime.video.options import Policy
from anchorline.runtime.video.paths import Item, add_targets, plan_items

_LAST_WEBCAM = 99  # OpenCV takes hundreds for the ways to reach a camera
_LONGEST_NUMBER = 10  # digits; Python refuses to read thousands
_NAMED = re.compile(r"([^\W\d][\w.-]*)=(.+)", re.DOTALL)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Source:
    """Where frames come from, and what to do when they come too fast.

    ``where`` is a path, the number of a webcam, a URL (rtsp, http, ...), or an iterable of uint8 BGR
    frames [H, W, 3], each an array of its own, since it is looked at later. A ``live`` source does not
    wait for us and is opened again when it is lost; ``None`` judges by ``where``: webcams and URLs are
    live, but for those of a video file. The ``policy`` is ``"wait"`` (every frame, in order) or
    ``"latest"`` (the newest one, older ones are dropped); ``None`` takes ``latest`` for live sources
    and ``wait`` for others. A file under ``latest`` is played at its own rate. Of every ``stride``
    frames the first is taken.
    """

    where: str | int | Path | Iterable[NDArray[np.uint8]]
    name: str = ""
    live: bool | None = None
    policy: Policy | None = None
    stride: int = 1
    items: tuple[Item, ...] = ()  # the files, where there are several
    target: Path | None = None

    def __post_init__(self) -> None:
        if self.policy is not None and self.policy not in get_args(Policy):
            raise SettingsError(f"policy is {self.policy!r}; expected one of {', '.join(get_args(Policy))}")
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 1:
            raise SettingsError(f"stride is {self.stride!r}; expected a whole number of at least 1")
        if isinstance(self.where, int) and not 0 <= self.where <= _LAST_WEBCAM:
            raise SettingsError(f"webcam {self.where}; expected a number from 0 to {_LAST_WEBCAM}")
        if isinstance(self.where, str) and _URL.fullmatch(self.where):
            _check_url(self.where)
        if self.live is None:
            object.__setattr__(self, "live", _is_live(self.where))
        if self.policy is None:
            object.__setattr__(self, "policy", "latest" if self.live else "wait")

    @property
    def chosen_policy(self) -> Policy:
        """The policy, which is set from the kind of source where the caller left it open."""
        return self.policy or "wait"

    @property
    def is_files(self) -> bool:
        """Whether these are files on this machine."""
        return bool(self.items)

    def describe(self) -> str:
        """What to call the source in a message; passwords in URLs are left out."""
        if isinstance(self.where, str | Path):
            shown = _without_password(str(self.where))
            return self.name if shown == self.name else f"{self.name} ({shown})" if self.name else shown
        return self.name


def _without_password(where: str) -> str:
    return re.sub(r"//[^/]*@", "//", where)


def _check_url(where: str) -> None:
    try:
        urlsplit(where)
    except ValueError as error:
        raise SettingsError(
            f"{_without_password(where)}: no address ({error}); expected SCHEME://HOST:PORT/PATH"
        ) from None


def parse_source(text: str | Path) -> Source:
    """A source as the command line names it: ``clip.mp4``, ``0``, ``rtsp://...``, ``cam1=...``."""
    if isinstance(text, Path) or text == "" or os.path.exists(text):
        return Source(text)
    named = _NAMED.fullmatch(text)
    name, where = named.groups() if named else ("", text)
    return Source(int(where) if where.isdecimal() and len(where) < _LONGEST_NUMBER else where, name=name)


def waits(sources: Iterable[str | Path], policy: Policy | None) -> bool:
    """Whether each frame of each source is waited for, so that their speed as a whole is what counts."""
    return policy != "latest" and all(parse_source(each).chosen_policy == "wait" for each in sources)


def plan(
    sources: Sequence[str | Path | int | Source],
    save: str | Path | None = None,
    *,
    policy: Policy | None = None,
    stride: int = 1,
) -> list[Source]:
    """Lay out a run before anything is opened: what is read side by side, and where copies go.

    Files and folders without a name are one source, read one after the other; each named one, camera
    and stream is a source of its own. Raises the errors of ``sources.plan_items``, and
    ``SettingsError`` where two sources share a name.
    """
    given = [each if isinstance(each, Source) else _parse(each, policy, stride) for each in sources]
    files = [each for each in given if _is_path(each)]
    others = [each for each in given if not _is_path(each)]
    items = plan_items([str(each.where) for each in files], None) if files or not others else []
    named = _named(others)
    places = [item.path for item in items] + [_place(each.name) for each in named]
    single = len(given) == 1 and (bool(others) or not Path(str(files[0].where)).is_dir())
    targets = [item.target for item in add_targets(places, None if save is None else Path(save), single)]
    items = [Item(item.path, item.is_video, target) for item, target in zip(items, targets, strict=False)]
    planned = _group_files(files, items)
    for before, each, target in zip(others, named, targets[len(items) :], strict=True):
        planned.append((before, replace(each, target=target)))
    _check_names([each for _, each in planned])
    return [each for _, each in sorted(planned, key=lambda pair: given.index(pair[0]))]


def _parse(given: str | Path | int, policy: Policy | None, stride: int) -> Source:
    source = Source(given) if isinstance(given, int) else parse_source(given)
    live = source.live
    return Source(source.where, name=source.name, live=live, policy=policy, stride=stride)


def _is_path(source: Source) -> bool:
    where = source.where
    return isinstance(where, Path) or (isinstance(where, str) and not _URL.fullmatch(where))


def _group_files(files: Sequence[Source], items: Sequence[Item]) -> list[tuple[Source, Source]]:
    """Sources of files as (given, planned): the unnamed ones together, each named one on its own."""
    planned: list[tuple[Source, Source]] = []
    chained: list[Item] = []
    left = list(items)
    for each in files:
        count = len(find_images(str(each.where)))
        own, left = left[:count], left[count:]
        if each.name:
            planned.append((each, replace(each, items=tuple(own))))
        else:
            chained += own
    unnamed = [each for each in files if not each.name]
    if unnamed:
        name = str(Path(str(unnamed[0].where))) if len(unnamed) == 1 else "files"
        planned.append((unnamed[0], replace(unnamed[0], name=name, items=tuple(chained))))
    return planned


def _named(sources: Sequence[Source]) -> list[Source]:
    """The sources with a name each: a webcam's is camera0, a stream's its host, an iterator's frames."""
    taken = {each.name for each in sources if each.name}
    named = []
    for each in sources:
        name = each.name or _default_name(each)
        number = 2
        while not each.name and name in taken:
            name, number = f"{_default_name(each)}-{number}", number + 1
        taken.add(name)
        named.append(replace(each, name=name))
    return named


def _default_name(source: Source) -> str:
    if isinstance(source.where, int):
        return f"camera{source.where}"
    if isinstance(source.where, str):
        return urlsplit(source.where).hostname or "stream"
    return "frames"


def _place(name: str) -> Path:
    """A stand-in for the file that a camera does not have, where no file can be."""
    return Path(os.devnull) / (re.sub(r"[^\w.-]", "_", name) + ".mp4")


def _check_names(sources: Sequence[Source]) -> None:
    names = [each.name for each in sources]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"two sources are called {name!r}; give each a name of its own, NAME=SOURCE")


def _is_live(where: object) -> bool:
    if isinstance(where, int):
        return True
    if isinstance(where, str) and _URL.fullmatch(where):
        parts = urlsplit(where)
        return not (parts.scheme.lower() in ("http", "https", "file") and is_video(parts.path))
    return False
