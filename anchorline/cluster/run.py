"""Detection in files on a cluster: items to idle workers on Ray, their answers to the outputs, and what
failed back again.

Ray places the workers, carries the pieces of their answers, stops a worker whose pieces nobody takes, and
notices dead processes and machines. Its own retries are not used: they would go on amid the pieces of the
first try, could not split a group of images, start a worker again without end that dies as it opens, and say
of every death only that the worker is not available just now.
"""

from __future__ import annotations

import heapq
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anchorline import __version__
from anchorline.cluster.connection import (
    AUTO,
    ClusterError,
    Pulse,
    check_address,
    connected,
    share_out,
    why_dead,
)
from anchorline.cluster.outputs import Outputs, copies_folder
from anchorline.cluster.worker import DetectionWorker, Job, NotHere, Piece, WorkerState, WorkItem, model_files
from anchorline.runtime.io.addresses import shown_address
from anchorline.runtime.io.errors import AnchorlineError, DataError, SettingsError, check_count, one_line
from anchorline.runtime.timing import StageTimes
from anchorline.runtime.video.figures import DetectSummary, Looks
from anchorline.runtime.video.options import DetectOptions
from anchorline.runtime.video.pipeline import TERMINATED, signals_as_exit
from anchorline.runtime.video.source import Item, check_outputs, parse_source, plan

if TYPE_CHECKING:
    from rich.table import Table

_IMAGES = 16  # of an item: some seconds of work, which is what a lost machine costs
_TRIES = 3
_ROUNDS = 4  # items of images for each worker at least, so that none idles for long at the end
_SILENCE = 600.0  # seconds without a word in which a worker counts as dead: more than any frame takes
_LOOK = 0.25  # seconds between two looks at what is silent, and two reports
_WAITING = 30.0  # seconds without a worker before somebody should know
_AHEAD = 2  # pieces of an answer that wait to be taken, in Ray's memory
_PATIENCE, _NO_PATIENCE = 1.0, 0.05  # seconds for a worker to end; once one has not ended
_START_TRIES = 3
_FAILURES_IN_VAIN = 12


log = logging.getLogger("anchorline.cluster")


@dataclass(frozen=True)
class Progress:
    """How far a run is, in files; ``frames`` counts what was computed, ``failed`` the files given up."""

    files: int
    answered: int
    failed: int
    frames: int
    retries: int
    workers: tuple[WorkerState, ...]

    def describe(self) -> str:
        """What is done and who works, for people."""
        if not self.workers:
            return "waiting for workers"
        busy = sum(bool(worker.doing) for worker in self.workers)
        machines = len({worker.node for worker in self.workers})
        where = "one machine" if machines == 1 else f"{machines} machines"
        text = (
            f"{self.answered + self.failed} of {self.files} files, {self.frames} frames, "
            f"{busy} of {len(self.workers)} workers busy on {where}"
        )
        if self.retries or self.failed:
            text += f", {self.retries} retries, {self.failed} failed"
        return text


@dataclass(frozen=True)
class ClusterSummary:
    """``detect`` holds the figures of a local run: ``fps`` is over all workers, from the first ready one
    on; ``stages`` are those of every frame that was worked on.

    Of ``files`` files ``answered`` have their lines or a warning; ``failed`` has a line for each of the
    others that was given up. ``retries`` counts tries beyond the first. ``nodes`` holds each machine's
    ``{"workers", "files", "frames", "provider", "precision"}``.
    """

    detect: DetectSummary
    files: int
    answered: int
    failed: tuple[str, ...] = ()
    retries: int = 0
    nodes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was wrong with files and machines, a line each."""
        return self.detect.warnings

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``files.write_json``: those of the local run, and the cluster's."""
        own = asdict(self) | {"failed": list(self.failed)}
        del own["detect"]
        return {**self.detect.to_json(), **own}

    def render(self) -> Table:
        """The closing tables, one below the other, for ``rich``'s console."""
        from rich.table import Table
        from rich.text import Text

        nodes = Table(
            caption=f"{self.answered} of {self.files} files answered, {len(self.failed)} failed, "
            f"{self.retries} tried again"
        )
        nodes.add_column("machine", overflow="fold")
        columns = ("workers", "files", "frames", "provider", "precision")
        for column in columns:
            nodes.add_column(column, justify="right", no_wrap=True)
        for name, figures in self.nodes.items():
            nodes.add_row(Text(name), *(str(figures[column]) for column in columns))
        tables = Table.grid(padding=(0, 0))
        tables.add_row(self.detect.render())
        tables.add_row(nodes)
        return tables


def detect_on_cluster(
    sources: Sequence[str | Path],
    model: str | Path,
    options: DetectOptions | None = None,
    *,
    address: str = AUTO,
    workers: int | None = None,
    images_per_item: int = _IMAGES,
    tries: int = _TRIES,
    silence: float = _SILENCE,
    progress: Callable[[Progress], object] | None = None,
    conclude: Callable[[ClusterSummary], object] | None = None,
    worker_type: type[DetectionWorker] = DetectionWorker,
) -> ClusterSummary:
    """``runtime.detect`` for files, by workers on a Ray cluster; lines and copies are those of the local run.

    ``address`` is ``"auto"`` (the cluster that this machine belongs to), ``"host:port"``, or ``"local"``
    (one that is started here). Up to ``workers`` are used, by default as many as the cluster has room
    for; ``options.threads`` are the cores of each. ``tries`` bounds how often an item (up to
    ``images_per_item`` images, or a video) is tried whose worker dies or says nothing for ``silence``
    seconds; files that are given up stand in the summary's ``failed``. ``progress`` is called a few times
    a second. ``conclude`` gets the summary in any case: on Ctrl-C and SIGTERM, and where the cluster is
    lost, the outputs hold the files that were answered, and ``KeyboardInterrupt``, ``SystemExit`` or
    ``ClusterError`` goes on. Raises ``SettingsError``,
    ``DataError`` (also where no file could be read), ``ArtefactError``, ``OutputError`` and
    ``ClusterError``; what can be checked before is checked before a cluster is started.
    """
    options = options or DetectOptions()
    for name, value in (
        ("--policy latest", options.policy == "latest"),
        ("--pictures", options.report),
        ("--track", options.track),
    ):
        if value:
            raise SettingsError(f"{name} does not go with --ray, which answers files; leave out one of them")
    for name, count in (("workers", workers), ("images_per_item", images_per_item), ("tries", tries)):
        if count is not None:
            check_count(name, count)
    files = plan_files(sources, options.save, options.stride)
    targets = [file.target for file in files if file.target]
    check_outputs([options.jsonl], [model, *(file.path for file in files), *targets])
    check_address(address)
    parts = model_files(model)
    ended: BaseException | None = None
    with copies_folder(files) as copies, connected(address) as ray, signals_as_exit():
        cpus, gpus, room = share_out(ray.nodes(), options.provider, options.threads)
        workers = workers or room
        actor = ray.remote(worker_type).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        with Outputs(files, options.jsonl, copies) as outputs:
            shared = options if gpus else replace(options, threads=cpus)
            job = Job(__version__, os.getcwd(), parts, shared, copies)
            items = make_items(files, workers, images_per_item)
            run = _Run(ray, actor, job, items, outputs, workers, tries, silence, Pulse(ray), progress)
            try:
                run.work()
            except (KeyboardInterrupt, SystemExit) as interrupt:
                ended = interrupt
            except ClusterError as error:
                if not run.answers:
                    raise
                answered = sum(len(each.item.paths) for each in run.answers)
                ended = ClusterError(f"{error}; the outputs hold {answered} of {len(files)} files")
        summary = run.summary()
        if conclude is not None:
            conclude(summary)
        if isinstance(ended, SystemExit) and ended.code == 1:
            raise SystemExit(TERMINATED)  # Ray makes 1 of whatever exit a signal asks for
        if ended is not None:
            raise ended
        return summary


def plan_files(sources: Sequence[str | Path], save: str | Path | None, stride: int) -> list[Item]:
    """The files in the order of the local run, each with the place of its annotated copy.

    Raises ``SettingsError`` for what is no file, and the errors of ``source.plan``.
    """
    for given in sources:
        source = parse_source(given)
        if not source.is_path:
            raise SettingsError(
                f"{source.describe() or given}: no file; a cluster reads images, folders of images and "
                "videos, not webcams and streams; leave out --ray"
            )
        if source.name:
            raise SettingsError(
                f"{source.name}=...: names are for sources that are read side by side; a cluster's results "
                f"stand in the order of the files; give {shown_address(str(source.where))} without a name"
            )
    return [item for source in plan(sources, save, stride=stride) for item in source.items]


def make_items(files: Sequence[Item], workers: int, most_images: int) -> list[WorkItem]:
    """Groups of up to ``most_images`` images that follow each other, and each video on its own.

    Groups are smaller where there would be too few for all workers.
    """
    images = sum(not file.is_video for file in files)
    size = max(1, min(most_images, -(-images // (workers * _ROUNDS))))
    items: list[WorkItem] = []
    for place, file in enumerate(files):
        last = items[-1] if items else None
        if file.is_video or last is None or last.is_video or len(last.paths) == size:
            items.append(WorkItem(place, (str(file.path),), file.is_video))
        else:
            items[-1] = replace(last, paths=(*last.paths, str(file.path)))
    return items


# What a worker's coroutine waits for: a call of Ray's, and for how many seconds; None: for work.
_Steps = Generator[tuple[Any, float] | None, None, None]


@dataclass
class _Answer:
    """A worker's answer to an item, as far as it is known."""

    item: WorkItem
    worker: WorkerState
    frames: int = 0
    detections: int = 0
    warnings: tuple[str, ...] = ()
    unreadable: str | None = None
    looks: Looks = field(default_factory=Looks)


@dataclass(eq=False)
class _Worker:
    """An actor, and what it says of itself and works on."""

    actor: Any
    state: WorkerState | None = None
    answer: _Answer | None = None

    def describe(self) -> str:
        if self.state is None:
            return "a worker"
        return f"the worker on {self.state.node} (process {self.state.pid})"


@dataclass(eq=False)
class _Run:
    """Answers every item with up to ``workers`` workers of Ray's kind ``actor``.

    Each file is answered once: only an answer that came to its end is taken, whatever happened before.
    An item whose worker dies, raises or says nothing for ``silence`` seconds is tried again by a new
    worker, ``tries`` times in all; a group of images is then split into single ones, so that one bad
    image costs no other its answer. A machine that refuses (another version, no such provider) or does
    not see the files takes no further part.
    """

    ray: Any
    actor: Any
    job: Job
    items: list[WorkItem]  # a heap: those that come back go before the ones behind them
    outputs: Outputs
    workers: int
    tries: int
    silence: float
    pulse: Pulse
    progress: Callable[[Progress], object] | None

    def __post_init__(self) -> None:
        self._files = sum(len(item.paths) for item in self.items)
        self._alive: list[_Worker] = []
        self._waiting: dict[Any, tuple[_Steps, float]] = {}  # by call: who waits for it, and until when
        self._idle: list[_Steps] = []
        self._contents: list[Any] = []  # of the model's files, in Ray's object store where one is lacking
        self._refusals: list[AnchorlineError] = []
        self._opened: list[WorkerState] = []
        self._answers: dict[int, _Answer] = {}  # by the first file's place
        self._failed: dict[int, str] = {}  # by the file's place
        self._computed = self._retries = self._failures = 0
        self._stages = StageTimes()
        self._seconds = self._told = 0.0
        self._patience = _PATIENCE
        self._begun: float | None = None
        self._without_since = time.monotonic()

    def work(self) -> None:
        """Work until every item is answered or given up; the workers are ended in any case.

        Raises ``AnchorlineError`` where no worker is left, ``DataError`` where no file could be read, and
        ``OutputError``.
        """
        self._idle = [self._serve() for _ in range(min(self.workers, len(self.items)))]
        try:
            while self.items or any(worker.answer for worker in self._alive):
                while self.items and self._idle:
                    self._go_on(self._idle.pop(0))
                if not self._waiting:
                    raise self._refusals[0]
                for call in self.ray.wait(list(self._waiting), num_returns=1, timeout=_LOOK)[0]:
                    self._go_on(self._waiting.pop(call)[0])
                self._look()
            if self.progress is not None:
                self.progress(self._state())
        finally:
            self._seconds = 0.0 if self._begun is None else time.monotonic() - self._begun
            for steps in (*self._idle, *(steps for steps, _ in self._waiting.values())):
                steps.close()
        unreadable = [each.unreadable for _, each in sorted(self._answers.items()) if each.unreadable]
        if unreadable and not self._failed and not any(each.frames for each in self._answers.values()):
            raise DataError(unreadable[0])

    def _go_on(self, steps: _Steps, error: Exception | None = None) -> None:
        """Let a worker's coroutine take its next step."""
        try:
            step = next(steps) if error is None else steps.throw(error)
        except StopIteration:
            return
        if step is None:
            self._idle.append(steps)
        else:
            self._waiting[step[0]] = (steps, time.monotonic() + step[1])

    def _serve(self) -> _Steps:
        """The life of a worker, and of those that take its place: open, then answer while there are items."""
        tries = _START_TRIES
        while tries:
            while not self.items:
                yield None
            worker = _Worker(self.actor.remote(self.job))
            self._alive.append(worker)
            tries -= 1
            try:
                yield from self._open(worker)
                tries = _START_TRIES
                while True:
                    while not self.items:
                        yield None
                    yield from self._answer(worker)
            except self.ray.exceptions.RayTaskError as error:  # it lives, and has raised something
                cause, answer = error.cause, worker.answer
                is_ours = isinstance(cause, AnchorlineError)
                if answer and isinstance(cause, NotHere) and answer.item.measured() == answer.item:
                    self._put_back([answer.item])  # which is no fault of the item's
                    worker.answer = None
                if is_ours and worker.answer is None:
                    self._refusals.append(cause)
                    return
                reason = one_line(cause) if is_ours else f"{type(cause).__name__}: {one_line(cause)}"
                is_changed = isinstance(cause, NotHere)
                told = "changed while it was read" if is_changed else f"{reason} ({worker.describe()})"
            except (self.ray.exceptions.RayError, TimeoutError) as error:
                reason = str(error) if isinstance(error, TimeoutError) else why_dead(error)
                told = f"{worker.describe()} died: {reason}"
            finally:
                self._alive.remove(worker)
                self._end(worker)
            if worker.answer is not None:
                self._try_again(worker.answer.item, told)
        self._refusals.append(ClusterError(f"a worker cannot be started: {reason}"))

    def _end(self, worker: _Worker) -> None:
        """End its process, if it has not ended; in a thread, since Ray waits here for a head that is lost."""
        ending = threading.Thread(
            target=self.ray.kill, args=[worker.actor], name="ray_ends_a_worker", daemon=True
        )
        ending.start()
        ending.join(self._patience)
        if ending.is_alive():
            self._patience = _NO_PATIENCE

    def _open(self, worker: _Worker) -> _Steps:
        """Let it open its detector, for which it may have to wait for its resources first."""
        contents: list[Any] = []
        while worker.state is None:
            call = worker.actor.open.remote(*contents)
            yield call, math.inf
            worker.state = self.ray.get(call)
            if worker.state is None:  # the model is not there: it is put into the object store once
                self._contents = contents = self._contents or [
                    self.ray.put(np.fromfile(path, np.uint8)) for path in self.job.model
                ]
        self._opened.append(worker.state)
        self._begun = self._begun or time.monotonic()

    def _answer(self, worker: _Worker) -> _Steps:
        """Let it answer the next item."""
        item = heapq.heappop(self.items).measured()
        if len(item.paths) > 1 and None in item.sizes:  # a file has gone: it is answered on its own
            self._put_back(item.split())
            return
        assert worker.state is not None
        worker.answer = answer = _Answer(item, worker.state)
        streamed = {"num_returns": "streaming", "_generator_backpressure_num_objects": _AHEAD}
        pieces = worker.actor.answer.options(**streamed).remote(item)
        yield pieces, self.silence
        while (call := next(pieces, None)) is not None:
            yield call, self.silence  # it may have to come from another machine
            piece: Piece = self.ray.get(call)
            self.outputs.add(item, piece.lines)
            answer.frames += len(piece.times)
            answer.detections += piece.detections
            answer.warnings, answer.unreadable = piece.warnings, piece.unreadable
            answer.looks = piece.looks
            self._computed += len(piece.times)
            for times in piece.times:
                self._stages.add(times)
            yield pieces, self.silence
        worker.answer = None
        self.outputs.answered(item)
        self._answers[item.first] = answer

    def _put_back(self, items: Iterable[WorkItem]) -> None:
        for item in items:
            heapq.heappush(self.items, item)

    def _try_again(self, item: WorkItem, reason: str) -> None:
        """One try of the item has failed."""
        log.warning("%s: %s", item.describe(), reason)
        self.outputs.drop(item)
        self._failures += 1
        if not self._answers and self._failures >= _FAILURES_IN_VAIN:
            raise ClusterError(f"the first {self._failures} tries have all failed, the last one so: {reason}")
        item = replace(item, tries=item.tries + 1)
        if item.tries < self.tries:
            self._retries += 1
            self._put_back(item.split())
            return
        self.outputs.ended(item)
        for place, path in enumerate(item.paths, item.first):
            self._failed[place] = f"{path}: given up after {item.tries} tries: {reason}"

    def _look(self) -> None:
        """What has to be noticed although nobody says it; and the report."""
        self.pulse.check()
        now = time.monotonic()
        for call, (steps, until) in list(self._waiting.items()):
            if now > until:
                del self._waiting[call]
                self._go_on(steps, TimeoutError(f"nothing came of it for {self.silence:g} s"))
        if any(worker.state for worker in self._alive):
            self._without_since = now
        elif now - self._without_since > _WAITING:
            self._without_since = math.inf  # said once
            log.warning("still no worker after %g s: is the cluster busy, or out of memory?", _WAITING)
        if self.progress is not None and now - self._told >= _LOOK:
            self._told = now
            self.progress(self._state())

    @property
    def answers(self) -> list[_Answer]:
        """In the order of the files."""
        return [answer for _, answer in sorted(self._answers.items())]

    def _state(self) -> Progress:
        return Progress(
            files=self._files,
            answered=sum(len(each.item.paths) for each in self._answers.values()),
            failed=len(self._failed),
            frames=self._computed,
            retries=self._retries,
            workers=tuple(
                replace(each.state, doing=each.answer.item.describe() if each.answer else "")
                for each in self._alive
                if each.state is not None
            ),
        )

    def summary(self) -> ClusterSummary:
        """What the run amounted to."""
        answers = self.answers
        nodes: dict[str, dict[str, Any]] = {}
        for each in sorted(self._opened, key=lambda each: each.node):
            node = nodes.setdefault(each.node, {"workers": 0, "files": 0, "frames": 0})
            node["workers"] += 1
            node |= {"provider": each.provider, "precision": each.precision}
        for answer in answers:
            nodes[answer.worker.node]["files"] += len(answer.item.paths)
            nodes[answer.worker.node]["frames"] += answer.frames
        warnings = [line for answer in answers for line in answer.warnings]
        warnings += dict.fromkeys(f"not used: {refusal}" for refusal in self._refusals)
        kinds = {name: f"{node['provider']} {node['precision']}" for name, node in nodes.items()}
        if len(set(kinds.values())) > 1:
            named = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
            warnings.append(
                f"the machines compute differently ({named}); figures may differ in the last digits: set "
                "--provider"
            )
        frames = sum(answer.frames for answer in answers)
        looks = sum((answer.looks for answer in answers), Looks())
        providers, precisions = (
            ", ".join(dict.fromkeys(node[key] for node in nodes.values())) or "none"
            for key in ("provider", "precision")
        )
        detect = DetectSummary(
            frames,
            frames / self._seconds if self._seconds > 0 else 0.0,
            self._stages.percentiles(),
            sum(answer.detections for answer in answers),
            providers,
            precisions,
            warnings=tuple(warnings),
            views=looks.views_a_frame,
            detect_ms=looks.ms_a_frame,
        )
        return ClusterSummary(
            detect=detect,
            files=self._files,
            answered=sum(len(answer.item.paths) for answer in answers),
            failed=tuple(line for _, line in sorted(self._failed.items())),
            retries=self._retries,
            nodes=nodes,
        )
