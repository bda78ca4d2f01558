"""Workers as actors of Ray."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from anchorline.cluster.connecting import Cluster
from anchorline.cluster.job import Job, WorkItem
from anchorline.cluster.replies import Dead, Reply
from anchorline.cluster.worker import DetectionWorker
from anchorline.runtime.video.signals import TERMINATED

_ERROR_LINE = re.compile(r"^\s*(\w+(?:\.\w+)*(?:Error|Exception): .+)$", re.MULTILINE)
_OUT_OF_MEMORY = ("OutOfMemoryError", "running low on memory")  # every page muses about the OOM killer


class RayFleet:
    """A ``dispatching.Fleet`` on a cluster, whose workers take ``cpus`` and ``gpus`` each.

    Ray neither restarts an actor nor repeats a call here; the dispatcher does what it takes. One call is
    under way with each worker, so no more than one piece of an answer of each waits in Ray's memory.
    """

    def __init__(
        self,
        cluster: Cluster,
        job: Job,
        cpus: int,
        gpus: int,
        worker_type: type[DetectionWorker] = DetectionWorker,
    ) -> None:
        self._ray, self._job = cluster.ray, job
        self._type = cluster.ray.remote(worker_type).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
        )
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, int] = {}  # ObjectRef to worker
        self._shipped: dict[int, Any] = {}  # number of the model's file to ObjectRef
        self._started = 0

    def start(self) -> int:
        """Start a worker, which may have to wait for its resources, and let it open its detector."""
        number = self._started
        self._started += 1
        self._actors[number] = self._type.remote(self._job.version, self._job)
        self._call(number, "open")
        return number

    def ship(self, worker: int, missing: Sequence[int]) -> None:
        """Send these files of the model; each goes into the object store once, whoever asks for it."""
        for number in missing:
            if number not in self._shipped:
                content = np.fromfile(self._job.model[number].path, np.uint8)
                self._shipped[number] = self._ray.put(content)
        self._call(worker, "open", list(missing), *(self._shipped[number] for number in missing))

    def begin(self, worker: int, item: WorkItem) -> None:
        """Ask for the first piece of an item's answer."""
        self._call(worker, "begin", item)

    def more(self, worker: int) -> None:
        """Ask for the next piece."""
        self._call(worker, "more")

    def wait(self, seconds: float) -> Iterator[tuple[int, Reply]]:
        """The answers that are there, waiting ``seconds`` at most for the first."""
        for call in _interruptible(self._ray.wait, list(self._calls), num_returns=1, timeout=seconds)[0]:
            worker = self._calls.pop(call)
            try:
                reply = _interruptible(self._ray.get, call)
            except self._ray.exceptions.RayError as error:
                reply = Dead(why(error))
            yield worker, reply

    def end(self, worker: int) -> None:
        """Kill a worker."""
        for call in [call for call, number in self._calls.items() if number == worker]:
            del self._calls[call]
        actor = self._actors.pop(worker, None)
        if actor is not None:
            self._ray.kill(actor, no_restart=True)

    def _call(self, worker: int, method: str, *arguments: object) -> None:
        self._calls[getattr(self._actors[worker], method).remote(*arguments)] = worker

    def close(self) -> None:
        """Kill all workers."""
        for worker in list(self._actors):
            self.end(worker)


def _interruptible(function: Callable[..., Any], *arguments: object, **options: object) -> Any:
    """Call Ray, which turns whatever exit a signal asks for into one with code 1."""
    try:
        return function(*arguments, **options)
    except SystemExit:
        raise SystemExit(TERMINATED) from None


def why(error: BaseException) -> str:
    """Ray's page about a dead actor as a few words."""
    text = str(error)
    if any(sign in text for sign in _OUT_OF_MEMORY):
        return "out of memory"
    raised = _ERROR_LINE.findall(text)
    if raised:
        return str(raised[-1]).strip()
    if "node" in text.lower() and "died" in text and "worker process has died" not in text:
        return "its machine is lost"
    return "its process ended"
