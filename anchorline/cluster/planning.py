"""From the command's sources to files and items, before any cluster is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anchorline.cluster.job import WorkItem
from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.paths import Item
from anchorline.runtime.video.source import Source, parse_source, plan

_ROUNDS = 4  # items of images for each worker at least, so that none idles for long at the end


def plan_files(sources: Sequence[str | Path], save: str | Path | None, stride: int) -> list[Item]:
    """The files in the order of the local run, each with the place of its annotated copy.

    Raises ``SettingsError`` for what is no file, and the errors of ``sources.plan_items``.
    """
    for given in sources:
        _check_file(given)
    planned = plan(sources, save, stride=stride)
    return [item for source in planned for item in source.items]


def make_items(files: Sequence[Item], workers: int, most_images: int) -> list[WorkItem]:
    """Groups of up to ``most_images`` images that follow each other, and each video on its own.

    Groups are smaller where there would be too few for all workers.
    """
    images = sum(not file.is_video for file in files)
    size = max(1, min(most_images, -(-images // (workers * _ROUNDS))))
    items: list[WorkItem] = []
    group: list[str] = []
    for index, file in enumerate(files):
        if not file.is_video:
            group.append(str(file.path))
        if group and (file.is_video or len(group) == size):
            items.append(WorkItem(index - len(group) + (not file.is_video), tuple(group), False))
            group = []
        if file.is_video:
            items.append(WorkItem(index, (str(file.path),), True))
    if group:
        items.append(WorkItem(len(files) - len(group), tuple(group), False))
    return items


def _check_file(given: str | Path) -> None:
    source: Source = parse_source(given)
    if isinstance(source.where, int) or source.live or "://" in str(source.where):
        raise SettingsError(
            f"{source.describe() or given}: no file; a cluster reads images, folders of images and videos, "
            "not webcams and streams; leave out --ray"
        )
    if source.name:
        raise SettingsError(
            f"{given}: names are for sources that are read side by side; a cluster's results stand in the "
            f"order of the files; give {source.where} without a name"
        )
