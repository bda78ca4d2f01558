"""Sharing the cores of this process between detectors: networks that would crowd each other take turns."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator

from anchorline.runtime.cpu_options import usable_cores


class CoreBudget:
    """``cores`` to be lent, first come first served; whoever wants more than there are gets all of them.

    Two networks of as many threads as there are cores run no faster side by side than one after the other:
    their threads only evict each other. So each waits here for its cores; small ones run together.
    """

    def __init__(self, cores: int) -> None:
        self._cores = self._free = cores
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextlib.contextmanager
    def lent(self, threads: int) -> Iterator[None]:
        """The cores for a network of so many threads, while the block runs. Not to be nested."""
        wanted, place = min(threads, self._cores), object()
        with self._changed:
            self._waiting.append(place)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is place and self._free >= wanted)
                self._free -= wanted
            finally:  # an interrupt while waiting leaves the queue as well
                self._waiting.remove(place)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += wanted
                self._changed.notify_all()


_budgets: dict[int, CoreBudget] = {}  # by process, since a fork may inherit a lock that is held


def core_budget() -> CoreBudget:
    """That of this process: the cores that it may use."""
    process = os.getpid()
    return _budgets.get(process) or _budgets.setdefault(process, CoreBudget(usable_cores()))
