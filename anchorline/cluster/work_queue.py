"""Which item is next, and how often one is tried again."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import replace

from anchorline.cluster.job import WorkItem


class WorkQueue:
    """Items in the order of their files; those that come back go before the ones behind them.

    An item is tried ``most_tries`` times. A group of images that fails once is split into single ones,
    so that one bad image costs no other its answer.
    """

    def __init__(self, items: Iterable[WorkItem], most_tries: int) -> None:
        self._most_tries = most_tries
        self._waiting = [(item.first, item) for item in items]
        heapq.heapify(self._waiting)
        self._under_way = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def finished(self) -> bool:
        """Whether every item was answered or given up."""
        return not self._waiting and not self._under_way

    def take(self) -> WorkItem | None:
        """The next item with its files' sizes, or None where none waits just now."""
        while self._waiting:
            item = heapq.heappop(self._waiting)[1].measured()
            if len(item.paths) > 1 and None in item.sizes:  # a file has gone: it is answered on its own
                self._add(item.split())
                continue
            self._under_way += 1
            return item
        return None

    def done(self) -> None:
        """An item that was taken is answered."""
        self._under_way -= 1

    def put_back(self, item: WorkItem) -> None:
        """Nobody has tried this item yet."""
        self._under_way -= 1
        self._add([item])

    def failed(self, item: WorkItem) -> bool:
        """One try of this item has failed. Whether it is given up; else it waits for the next try."""
        self._under_way -= 1
        item = replace(item, tries=item.tries + 1)
        if item.tries >= self._most_tries:
            return True
        self._add(item.split())
        return False

    def _add(self, items: Iterable[WorkItem]) -> None:
        for item in items:
            heapq.heappush(self._waiting, (item.first, item))
