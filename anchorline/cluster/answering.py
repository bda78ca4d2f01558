"""A run from its first item to its summary, whatever fleet does the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from anchorline.cluster.dispatching import SILENCE, Dispatcher, Fleet, Progress
from anchorline.cluster.merging import Copies, OrderedLines
from anchorline.cluster.summary import ClusterSummary
from anchorline.cluster.tally import Tally
from anchorline.cluster.work_queue import WorkQueue
from anchorline.runtime.io.errors import DataError


class ClosableFleet(Fleet, Protocol):
    """A fleet whose workers can all be ended at once."""

    def close(self) -> None: ...


def answer(
    fleet: ClosableFleet,
    queue: WorkQueue,
    tally: Tally,
    copies: Copies,
    jsonl: str | Path | None,
    workers: int,
    *,
    silence: float = SILENCE,
    progress: Callable[[Progress], object] | None = None,
    conclude: Callable[[ClusterSummary], object] | None = None,
) -> ClusterSummary:
    """Answer the items of ``queue`` and complete the outputs; the workers are ended in any case.

    After an interrupt the outputs hold what was answered; after an error they are dropped. See
    ``detect_on_cluster``.
    """
    lines = OrderedLines(jsonl)
    dispatcher = Dispatcher(fleet, queue, lines, copies, tally, workers, silence=silence, progress=progress)
    try:
        try:
            dispatcher.run()
        finally:
            fleet.close()
            tally.end()
        if tally.nothing_read is not None:
            raise DataError(tally.nothing_read)
    except (KeyboardInterrupt, SystemExit):
        lines.close()
        _conclude(tally, conclude)
        raise
    except BaseException:
        lines.abandon()
        raise
    lines.close()
    if progress is not None:
        progress(dispatcher.state())
    return _conclude(tally, conclude)


def _conclude(tally: Tally, conclude: Callable[[ClusterSummary], object] | None) -> ClusterSummary:
    summary = tally.summary()
    if conclude is not None:
        conclude(summary)
    return summary
