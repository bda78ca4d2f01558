"""Naming a source (a file, a folder, a camera, a stream, any iterator of frames), and laying out a run."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.addresses import shown_address, take_apart, without_secrets
from anchorline.runtime.io.errors import DataError, OutputError, SettingsError, printable, shown
from anchorline.runtime.io.files import is_stream
from anchorline.runtime.io.images import IMAGE_SUFFIXES, find_inputs, is_image, is_video
from anchorline.runtime.video.options import Option, Policy, check_fields

_LAST_WEBCAM = 99  # OpenCV takes hundreds for the ways to reach a camera
_LONGEST_NUMBER = 10  # digits; Python refuses to read thousands
_NAMED = re.compile(r"([^\W\d][\w.-]*)=(.+)", re.DOTALL)
_WEBCAM = re.compile(r"/dev/video([0-9]{1,9})")


@dataclass(frozen=True)
class Item:
    """One image or video file, and where its annotated copy goes (``None``: nowhere)."""

    path: Path
    is_video: bool
    target: Path | None


@dataclass(frozen=True, eq=False)
class Source:
    """Where frames come from, and what to do when they come too fast.

    ``where`` is a path, a webcam (its number, or ``/dev/video0``), a URL (rtsp, http, ...), or an iterable of
    uint8 BGR frames [H, W, 3], each an array of its own, since it is looked at later. A ``live`` source does
    not wait for us and is opened again when it is lost; ``None`` judges by ``where``: webcams and URLs are
    live, but for those of a video file. The ``policy`` is ``"wait"`` (every frame, in order) or
    ``"latest"`` (the newest one, older ones are dropped); ``None`` takes ``latest`` for live sources
    and ``wait`` for others. A file under ``latest`` is played at its own rate. Of every ``stride``
    frames the first is taken.
    """

    where: str | int | Path | Iterable[NDArray[np.uint8]]
    name: str = ""
    live: bool | None = None
    policy: Annotated[Policy | None, Option()] = None
    stride: Annotated[int, Option(low=1)] = 1
    items: tuple[Item, ...] = ()  # the files on this machine, which `plan` finds
    target: Path | None = None

    def __post_init__(self) -> None:
        where = self.where
        is_known = isinstance(where, str | int | Path | Iterable) and not isinstance(where, bool | bytes)
        if not is_known or (isinstance(where, str) and not where):
            given = without_secrets(shown(where))
            raise SettingsError(f"a source is {given}; expected a path, a webcam's number, a URL or frames")
        check_fields(self)
        object.__setattr__(self, "name", printable(self.name))  # for terminals, pages and figures
        if isinstance(self.where, str | Path):
            # What does not exist may be no name at all.
            exists = os.path.exists(self.where)
            webcam = _WEBCAM.fullmatch(os.path.realpath(self.where) if exists else str(self.where))
            if webcam is not None:
                object.__setattr__(self, "where", int(webcam[1]))
        if isinstance(self.where, int) and not 0 <= self.where <= _LAST_WEBCAM:
            raise SettingsError(f"webcam {self.where}; expected a number from 0 to {_LAST_WEBCAM}")
        live = isinstance(self.where, int)
        address = take_apart(self.where) if isinstance(self.where, str) else None
        if address is not None:
            if not address.is_valid:
                raise SettingsError(
                    f"{self.describe()}: no address; expected SCHEME://USER:PASSWORD@HOST:PORT/PATH, in a "
                    "user or password with %2F for /, %3F for ?, %23 for # and %40 for @"
                )
            live = not (address.scheme.lower() in ("http", "https", "file") and is_video(address.path))
        if self.live is None:
            object.__setattr__(self, "live", live)
        if self.policy is None:
            object.__setattr__(self, "policy", "latest" if self.live else "wait")

    @property
    def is_path(self) -> bool:
        """Whether this names a file or folder, rather than a camera, a URL or frames."""
        where = self.where
        return isinstance(where, Path) or (isinstance(where, str) and take_apart(where) is None)

    def describe(self) -> str:
        """What to call the source in a message: of an address only what may be shown."""
        if isinstance(self.where, str | Path):
            shown = str(self.where) if self.items else shown_address(str(self.where))
            return self.name if shown == self.name else f"{self.name} ({shown})" if self.name else shown
        return self.name

    def __repr__(self) -> str:
        what = self.describe() or (self.where if isinstance(self.where, int) else type(self.where).__name__)
        return f"Source({what!r}, live={self.live}, policy={self.policy!r}, stride={self.stride})"


def parse_source(text: str | Path | int) -> Source:
    """A source as the command line names it: ``clip.mp4``, ``0``, ``rtsp://...``, ``cam1=...``."""
    if not isinstance(text, str) or text == "" or os.path.exists(text):
        return Source(text)
    named = _NAMED.fullmatch(text)
    name, where = named.groups() if named else ("", text)
    return Source(int(where) if where.isdecimal() and len(where) < _LONGEST_NUMBER else where, name=name)


def waits(sources: Iterable[str | Path], policy: Policy | None) -> bool:
    """Whether each frame of each source is waited for, so that their speed as a whole is what counts."""
    return policy != "latest" and all(parse_source(each).policy == "wait" for each in sources)


def plan(
    sources: Sequence[str | Path | int | Source],
    save: str | Path | None = None,
    *,
    policy: Policy | None = None,
    stride: int = 1,
) -> list[Source]:
    """Lay out a run before anything is opened: what is read side by side, and where copies go.

    Files and folders without a name are one source, read one after the other; each named one, camera
    and stream is a source of its own. ``save`` is an ``.mp4`` for one video or camera, an image file for
    one image, else a folder. Raises ``DataError`` for a file that is missing or neither image nor video,
    ``OutputError`` and ``SettingsError`` where ``save`` does not go with the sources, and
    ``SettingsError`` where two of them share a name.
    """
    if isinstance(sources, str | Path | int | Source) or not isinstance(sources, Iterable):
        wrong = without_secrets(shown(sources))
        raise SettingsError(f"the sources are {wrong}, a single one; expected several: [source]")
    given = [
        each if isinstance(each, Source) else replace(parse_source(each), policy=policy, stride=stride)
        for each in sources
    ]
    if not given:
        raise SettingsError("no sources given; name an image, a folder of images or a video")
    found = [_inputs(str(each.where), place) if each.is_path else [] for place, each in enumerate(given, 1)]
    others = [each for each in given if not each.is_path]
    names = _names(others)
    files = [file for each in found for file in each]
    single = len(given) == 1 and (bool(others) or files[0][0] == Path(str(given[0].where)))
    # A stand-in for the file that a camera does not have, where no file can be.
    places = [(Path(os.devnull) / (re.sub(r"[^\w.-]", "_", name) + ".mp4"), True) for name in names]
    targets = copy_targets([*files, *places], None if save is None else Path(save), single)
    items = iter([Item(*file, target) for file, target in zip(files, targets, strict=False)])
    named = iter(zip(names, targets[len(files) :], strict=True))
    unnamed = [str(Path(str(each.where))) for each in given if each.is_path and not each.name]
    planned: list[Source] = []
    chain: int | None = None  # the place of the source that all files without a name are
    for each, own_files in zip(given, found, strict=True):
        own = tuple(next(items) for _ in own_files)
        if not each.is_path:
            name, target = next(named)
            planned.append(replace(each, name=name, target=target))
        elif each.name:
            planned.append(replace(each, items=own))
        elif chain is None:
            chain = len(planned)
            planned.append(replace(each, name=unnamed[0] if len(unnamed) == 1 else "files", items=own))
        else:
            planned[chain] = replace(planned[chain], items=planned[chain].items + own)
    taken = [each.name for each in planned]
    for name in taken:
        if taken.count(name) > 1:
            raise SettingsError(f"two sources are called {name!r}; give each a name of its own, NAME=SOURCE")
    return planned


def next_name(path: Path, taken: Container[Path]) -> Path:
    """``clip-2.mp4`` for ``clip.mp4``, or such a name with the next number that is not taken."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(name for name in names if name not in taken)


def check_outputs(outputs: Iterable[str | Path | None], kept: Iterable[str | Path]) -> None:
    """Raise ``SettingsError`` where an output is one of the ``kept`` files, or two outputs are one file.

    An output may be ``None``, stdout (``-``), a device or a pipe.
    """
    taken = {os.path.realpath(path) for path in kept}
    for output in outputs:
        if output is None or is_stdout(output) or is_stream(Path(output)):
            continue
        place = os.path.realpath(output)
        if place in taken:
            raise SettingsError(f"{output} is a source, the model or another output; choose another place")
        taken.add(place)


def is_stdout(path: str | Path | None) -> bool:
    """Whether lines for ``path`` go to stdout."""
    return str(path) in ("-", "/dev/stdout")


def _inputs(where: str, place: int) -> list[tuple[Path, bool]]:
    """What ``find_inputs`` finds for the source of this ``place``, from 1."""
    try:
        return find_inputs(Path(where))
    except DataError:
        shown = shown_address(where)
        if shown == where or os.path.exists(where):
            raise
        raise DataError(  # by its place: there may be another one of which no more can be said
            f"source {place} ({shown}): neither a file or folder that is there nor an address; expected "
            "SCHEME://HOST:PORT/PATH, where it has a name with NAME= before it, which begins with a letter "
            "and holds letters, digits, _, - and . only"
        ) from None


def _names(sources: Sequence[Source]) -> list[str]:
    """A name for each: its own, or a webcam's camera0, a stream's host, an iterator's frames."""
    taken = {each.name for each in sources}
    names = []
    for each in sources:
        default = "frames"
        if isinstance(each.where, int):
            default = f"camera{each.where}"
        elif isinstance(each.where, str):
            address = take_apart(each.where)
            default = (address and address.host) or "stream"
        name = each.name or _unused(default, "", taken)
        taken.add(name)
        names.append(name)
    return names


def copy_targets(
    files: Sequence[tuple[Path, bool]], save: Path | None, single: bool
) -> Sequence[Path | None]:
    """Where the annotated copy of each file goes, of which is told whether it is a video; ``single`` allows
    ``save`` to be a file's name."""
    if save is None:
        return [None] * len(files)
    targets: list[Path] = []
    if single and not save.is_dir() and save.suffix:
        _, of_video = files[0]
        if of_video and save.suffix.lower() != ".mp4":
            raise SettingsError(f"save is {save}; a video is saved as .mp4, or into a folder")
        if not of_video and not is_image(save):
            raise SettingsError(f"save is {save}; an image is saved as one of {', '.join(IMAGE_SUFFIXES)}")
        targets.append(save)
    else:
        if save.exists() and not save.is_dir():
            raise OutputError(f"{save}: is a file; several results need a folder to be saved in")
        if is_image(save) or is_video(save):
            raise SettingsError(f"save is {save}, one file; several results need a folder to be saved in")
        taken: set[str] = set()
        for path, of_video in files:
            suffix = ".mp4" if of_video else path.suffix if is_image(path) else ".png"
            name = _unused(path.stem, suffix, taken)
            taken.add(name.lower())
            targets.append(save / name)
    sources = {os.path.realpath(path) for path, _ in files}
    for target in targets:
        if os.path.realpath(target) in sources:
            raise SettingsError(f"saving to {target} would overwrite the source; choose another place")
    return targets


def _unused(stem: str, suffix: str, taken: set[str]) -> str:
    """``stem``, or ``stem-2`` and so on, which in lower case is not ``taken``."""
    name, number = f"{stem}{suffix}", 2
    while name.lower() in taken:
        name, number = f"{stem}-{number}{suffix}", number + 1
    return name
