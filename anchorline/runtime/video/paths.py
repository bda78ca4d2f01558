"""Which files a detection run reads and where it writes the annotated ones."""

from __future__ import annotations

import itertools
import os
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anchorline.runtime.io.errors import DataError, OutputError, SettingsError
from anchorline.runtime.io.files import is_stream
from anchorline.runtime.io.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, find_images, is_image, is_video


@dataclass(frozen=True)
class Item:
    """One image or video file, and where its annotated copy goes (``None``: nowhere)."""

    path: Path
    is_video: bool
    target: Path | None


def plan_items(sources: Sequence[str | Path], save: str | Path | None = None) -> list[Item]:
    """Lay out a run before anything is opened.

    A source is an image, a folder of images or a video. ``save`` is an ``.mp4`` for one video, an
    image file for one image, else a folder. Raises ``DataError`` for a source that is missing or
    neither, ``OutputError`` and ``SettingsError`` where ``save`` does not go with the sources.
    """
    if not sources:
        raise SettingsError("no sources given; name an image, a folder of images or a video")
    paths: list[Path] = []
    for source in map(Path, sources):
        if not os.path.exists(source):  # unlike Path.exists, also False for a name that is too long
            raise DataError(f"{source}: no such file or folder; give an image, a folder of images or a video")
        if not source.is_dir() and not is_image(source) and not is_video(source):
            raise DataError(
                f"{source}: neither an image nor a video by its suffix; "
                f"expected one of {', '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)}"
            )
        paths += find_images(source)
    single = len(sources) == 1 and not Path(sources[0]).is_dir()
    return add_targets(paths, None if save is None else Path(save), single)


def add_targets(paths: list[Path], save: Path | None, single: bool) -> list[Item]:
    """Where the annotated copy of each file goes; ``single`` allows ``save`` to be a file's name.

    Raises ``OutputError`` and ``SettingsError`` where ``save`` does not go with the files.
    """
    if save is None:
        return [Item(path, is_video(path), None) for path in paths]
    if single and not save.is_dir() and save.suffix:
        _check_single(paths[0], save)
        targets = [save]
    else:
        if save.exists() and not save.is_dir():
            raise OutputError(f"{save}: is a file; several results need a folder to be saved in")
        if is_image(save) or is_video(save):
            raise SettingsError(f"save is {save}, one file; several results need a folder to be saved in")
        targets = _targets_in(save, paths)
    sources = {os.path.realpath(path) for path in paths}
    for target in targets:
        if os.path.realpath(target) in sources:
            raise SettingsError(f"saving to {target} would overwrite the source; choose another place")
    return [Item(path, is_video(path), target) for path, target in zip(paths, targets, strict=True)]


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


def _check_single(path: Path, save: Path) -> None:
    if is_video(path) and save.suffix.lower() != ".mp4":
        raise SettingsError(f"save is {save}; a video is saved as .mp4, or into a folder")
    if not is_video(path) and not is_image(save):
        raise SettingsError(f"save is {save}; an image is saved as one of {', '.join(IMAGE_SUFFIXES)}")


def _targets_in(folder: Path, paths: list[Path]) -> list[Path]:
    """Each file's own name inside ``folder``; a number is added where two sources share a name."""
    taken: set[str] = set()
    targets = []
    for path in paths:
        suffix = ".mp4" if is_video(path) else path.suffix
        name, number = f"{path.stem}{suffix}", 2
        while name.lower() in taken:
            name, number = f"{path.stem}-{number}{suffix}", number + 1
        taken.add(name.lower())
        targets.append(folder / name)
    return targets
