"""Hand-over between two stages: in order, ended by the giver, or cut off for everybody."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class _Ending:
    """What can be ended: ``_items`` wait for a taker, ``_changed`` tells of each change."""

    _items: deque[Any] | dict[int, Any]

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ended = False

    def end(self) -> None:
        """No more will be put; what is there can still be taken."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def cut(self) -> None:
        """End at once and forget what is there."""
        with self._changed:
            self._ended = True
            self._items.clear()
            self._changed.notify_all()


class Channel(_Ending, Generic[Item]):
    """A queue without a bound of its own: the intake bounds what is under way in the whole pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self._items: deque[Item] = deque()

    def put(self, item: Item) -> None:
        """Append an item; after ``end`` or ``cut`` it is forgotten."""
        with self._changed:
            if not self._ended:
                self._items.append(item)
                self._changed.notify()

    def get(self) -> Item | None:
        """The next item, waited for; ``None`` when there will be none any more."""
        with self._changed:
            while not self._items and not self._ended:
                self._changed.wait()
            return self._items.popleft() if self._items else None


class OrderedChannel(_Ending, Generic[Item]):
    """A channel whose items are taken by number, 0, 1, 2 ..., in whatever order they are put."""

    def __init__(self) -> None:
        super().__init__()
        self._items: dict[int, Item] = {}
        self._next = 0

    def put(self, number: int, item: Item) -> None:
        """Add the item with this number."""
        with self._changed:
            if not self._ended:
                self._items[number] = item
                self._changed.notify()

    def get(self) -> Item | None:
        """The item whose turn it is, waited for; ``None`` when there will be none any more."""
        with self._changed:
            while self._next not in self._items and not self._ended:
                self._changed.wait()
            item = self._items.pop(self._next, None)
            self._next += 1
            return item
