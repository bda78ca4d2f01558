"""The loop of a run: items to idle workers, their answers to the outputs, and what failed back again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from anchorline.cluster.connecting import ClusterError
from anchorline.cluster.job import WorkItem
from anchorline.cluster.merging import Copies, OrderedLines, Part
from anchorline.cluster.replies import Absent, Broken, Chunk, Dead, Done, NeedsModel, Ready, Refused, Reply
from anchorline.cluster.tally import Tally
from anchorline.cluster.work_queue import WorkQueue
from anchorline.runtime.io import errors
from anchorline.runtime.io.errors import AnchorlineError

SILENCE = 600.0  # seconds without a word in which a worker counts as dead: more than any frame takes
_LOOK = 0.25  # seconds between two looks at what is silent, and two reports
_WAITING = 30.0  # seconds without a worker before somebody should know
_START_TRIES = 3
_DEATHS_IN_VAIN = 12

log = logging.getLogger("anchorline.cluster")


class Fleet(Protocol):
    """Workers on some cluster, by number. A call is answered once, through ``wait``."""

    def start(self) -> int:
        """Start a worker and let it open its detector."""
        ...

    def ship(self, worker: int, missing: Sequence[int]) -> None:
        """Let it open the detector with these files of the model."""
        ...

    def begin(self, worker: int, item: WorkItem) -> None: ...

    def more(self, worker: int) -> None: ...

    def wait(self, seconds: float) -> Iterable[tuple[int, Reply]]:
        """Answers, as soon as there are some."""
        ...

    def end(self, worker: int) -> None:
        """Kill it; there will be no answer any more."""
        ...


@dataclass(frozen=True)
class WorkerState:
    """A worker as shown to people; ``doing`` is empty while it waits."""

    node: str
    pid: int
    doing: str


@dataclass(frozen=True)
class Progress:
    """How far a run is, in files; ``frames`` counts what was computed, ``failed`` the files given up."""

    files: int
    answered: int
    failed: int
    frames: int
    retries: int
    workers: tuple[WorkerState, ...]


@dataclass(eq=False)
class _Worker:
    number: int
    start_tries: int
    ready: Ready | None = None
    part: Part | None = None
    frames: int = 0
    detections: int = 0
    since: float = 0.0  # when it was last asked for something of an item

    def describe(self) -> str:
        return (
            "a worker"
            if self.ready is None
            else f"the worker on {self.ready.node} (process {self.ready.pid})"
        )


class Dispatcher:
    """Answers every item of ``queue`` with up to ``workers`` workers of ``fleet``.

    Each file is answered once: only an answer that came to its end is taken, whatever happened before.
    An item whose worker dies or whose computation raises is tried again by a new worker; one that is
    given up is told in ``tally`` and costs no other its answer. A machine that refuses (another
    version, no such provider) or does not see the files takes no further part. Raises
    ``AnchorlineError`` where no worker is left, and ``OutputError``.
    """

    def __init__(
        self,
        fleet: Fleet,
        queue: WorkQueue,
        lines: OrderedLines,
        copies: Copies,
        tally: Tally,
        workers: int,
        *,
        silence: float = SILENCE,
        progress: Callable[[Progress], object] | None = None,
    ) -> None:
        self._fleet, self._queue, self._lines, self._copies = fleet, queue, lines, copies
        self._tally, self._wanted = tally, workers
        self._silence, self._progress = silence, progress
        self._workers: dict[int, _Worker] = {}
        self._refusals: list[AnchorlineError] = []
        self._computed = self._deaths = 0
        self._told = 0.0
        self._without_since: float | None = time.monotonic()

    def run(self) -> None:
        """Work until every item is answered or given up."""
        for _ in range(min(self._wanted, len(self._queue))):
            self._start(_START_TRIES)
        while not self._queue.finished:
            self._hand_out()
            if not self._workers:
                raise self._refusals[0]
            for number, reply in self._fleet.wait(_LOOK):
                self._take(self._workers[number], reply)
            self._look()

    def _start(self, tries: int) -> None:
        number = self._fleet.start()
        self._workers[number] = _Worker(number, tries)

    def _hand_out(self) -> None:
        for worker in self._workers.values():
            if worker.ready is None or worker.part is not None:
                continue
            item = self._queue.take()
            if item is None:
                return
            worker.part = self._lines.part(item)
            worker.frames = worker.detections = 0
            worker.since = time.monotonic()
            self._fleet.begin(worker.number, item)

    def _take(self, worker: _Worker, reply: Reply) -> None:
        if isinstance(reply, Ready):
            worker.ready = reply
            self._tally.ready(reply)
        elif isinstance(reply, NeedsModel):
            self._fleet.ship(worker.number, reply.missing)
        elif isinstance(reply, Chunk):
            self._add(worker, reply)
            worker.since = time.monotonic()
            self._fleet.more(worker.number)
        elif isinstance(reply, Done):
            self._done(worker, reply)
        elif isinstance(reply, Refused):
            self._refuse(worker, getattr(errors, reply.kind, ClusterError)(f"{reply.node}: {reply.text}"))
        elif isinstance(reply, Absent):
            self._absent(worker, reply)
        else:
            self._lost(worker, reply)

    def _add(self, worker: _Worker, chunk: Chunk) -> None:
        assert worker.part is not None
        worker.part.append(chunk.lines)
        worker.frames += chunk.frames
        worker.detections += chunk.detections
        self._computed += chunk.frames
        self._tally.times(chunk)

    def _done(self, worker: _Worker, reply: Done) -> None:
        self._add(worker, reply.last)
        assert worker.part is not None
        assert worker.ready is not None
        part, worker.part = worker.part, None
        self._copies.publish(part.item, reply.copies)
        self._lines.complete(part)
        self._queue.done()
        self._tally.done(part.item, reply, worker.ready.node, worker.frames, worker.detections)

    def _refuse(self, worker: _Worker, error: AnchorlineError) -> None:
        """This worker takes no further part, nor does another in its place."""
        self._drop(worker)
        self._refusals.append(error)
        self._tally.warn(f"not used: {error}")

    def _absent(self, worker: _Worker, reply: Absent) -> None:
        """A file is not where the worker looks: the machine's fault if it is still here as it was."""
        assert worker.part is not None
        item = worker.part.item
        if item.measured().sizes != item.sizes:  # no, it has just changed
            self._failed(worker, "changed while it was read")
            return
        worker.part.discard()
        worker.part = None
        self._queue.put_back(item)
        self._refuse(worker, errors.DataError(reply.text))

    def _lost(self, worker: _Worker, reply: Broken | Dead) -> None:
        """The worker's process has gone, or is not to be trusted any more; another takes its place."""
        if worker.part is None:
            self._drop(worker)
            self._not_started(worker, reply.text)
            return
        died = isinstance(reply, Dead)
        reason = f"{worker.describe()} died: {reply.text}" if died else f"{reply.text} ({worker.describe()})"
        self._failed(worker, reason)
        self._drop(worker)
        if len(self._queue):
            self._start(_START_TRIES)

    def _not_started(self, worker: _Worker, text: str) -> None:
        """A worker died before it had an item: its place is filled again a few times."""
        if worker.ready is None and worker.start_tries <= 1:
            self._refuse(worker, ClusterError(f"a worker cannot be started: {text}"))
        elif len(self._queue):
            self._start(worker.start_tries - 1 if worker.ready is None else _START_TRIES)

    def _failed(self, worker: _Worker, reason: str) -> None:
        """One try of the worker's item has failed."""
        assert worker.part is not None
        part, worker.part = worker.part, None
        part.discard()
        self._deaths += 1
        if not self._tally.answered and self._deaths >= _DEATHS_IN_VAIN:
            raise ClusterError(f"the first {self._deaths} tries have all failed, the last one so: {reason}")
        if self._queue.failed(part.item):
            self._lines.skip(part.item)
            self._tally.gave_up(part.item, f"given up after {part.item.tries + 1} tries: {reason}")
        else:
            self._tally.retries += 1
        log.warning("%s: %s", part.item.describe(), reason)

    def _drop(self, worker: _Worker) -> None:
        self._workers.pop(worker.number, None)
        self._fleet.end(worker.number)

    def _look(self) -> None:
        """What has to be noticed although nobody says it; and the report."""
        now = time.monotonic()
        for worker in list(self._workers.values()):
            if worker.part is not None and now - worker.since > self._silence:
                self._lost(worker, Dead(f"nothing came of it for {self._silence:g} s"))
        if any(worker.ready for worker in self._workers.values()):
            self._without_since = now
        elif self._without_since is not None and now - self._without_since > _WAITING:
            self._without_since = None  # said once
            log.warning("still no worker after %g s: is the cluster busy, or out of memory?", _WAITING)
        if self._progress is not None and now - self._told >= _LOOK:
            self._told = now
            self._progress(self.state())

    def state(self) -> Progress:
        """How far the run is."""
        return Progress(
            files=self._tally.files,
            answered=self._tally.answered,
            failed=len(self._tally.failed),
            frames=self._computed,
            retries=self._tally.retries,
            workers=tuple(
                WorkerState(
                    each.ready.node, each.ready.pid, "" if each.part is None else each.part.item.describe()
                )
                for each in self._workers.values()
                if each.ready is not None
            ),
        )
