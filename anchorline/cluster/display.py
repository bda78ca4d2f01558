"""How far a run on a cluster is, for people at a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from anchorline.cluster.dispatching import Progress


@contextlib.contextmanager
def progress_display() -> Iterator[Callable[[Progress], None]]:
    """A bar of files on stderr, where that is a terminal, with frames, workers and machines beside it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("files"),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("detecting", total=None, state="starting the cluster")

        def show(now: Progress) -> None:
            bar.update(task, completed=now.answered + now.failed, total=now.files, state=_state(now))

        yield show


def _state(now: Progress) -> str:
    if not now.workers:
        return "waiting for workers"
    busy = sum(bool(worker.doing) for worker in now.workers)
    machines = len({worker.node for worker in now.workers})
    where = "one machine" if machines == 1 else f"{machines} machines"
    state = f"{now.frames} frames, {busy} of {len(now.workers)} workers busy on {where}"
    return f"{state}, {now.retries} retries, {now.failed} failed" if now.retries or now.failed else state
