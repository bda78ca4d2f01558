"""The viewers who are connected, and how they learn that there is something new."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from anchorline.serving.painting import Painter, Picture

MOST_VIEWERS = 64


class Viewer:
    """One connection that waits for pictures of ``sources``. It belongs to the server's loop."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sources)
        self.gone = False
        self._news = asyncio.Event()
        self._seen: dict[str, int] = {}

    def wake(self) -> None:
        """There may be something new."""
        self._news.set()

    async def wait(self, seconds: float) -> None:
        """Until something may be new, or the time is up."""
        timer = asyncio.get_running_loop().call_later(seconds, self._news.set)
        await self._news.wait()
        timer.cancel()
        self._news.clear()

    def unseen(self, pictures: Mapping[str, Picture]) -> Iterator[tuple[int, Picture]]:
        """The newest picture of each source that this viewer has not had, with the source's place."""
        for place, source in enumerate(self.sources):
            picture = pictures.get(source)
            if picture is not None and picture.number > self._seen.get(source, 0):
                self._seen[source] = picture.number
                yield place, picture


class Audience:
    """All viewers. ``wake`` may be called from any thread, the rest belongs to the server's loop."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._abort: Callable[[object], None] = lambda client: None
        self._viewers: set[Viewer] = set()
        self.closed = False
        self.dropped = 0  # viewers that read too slowly

    def begin(self, loop: asyncio.AbstractEventLoop, abort: Callable[[object], None]) -> None:
        """The server runs on this loop; ``abort(client)`` cuts the connection of a client's address."""
        self._loop, self._abort = loop, abort

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._viewers)

    @property
    def is_full(self) -> bool:
        """Whether no more are let in."""
        return len(self._viewers) >= MOST_VIEWERS

    def join(self, viewer: Viewer, painter: Painter) -> None:
        """From now on the viewer is woken, and what it watches is painted."""
        self._viewers.add(viewer)
        painter.watch(viewer.sources)

    def leave(self, viewer: Viewer, painter: Painter) -> None:
        """The viewer has gone."""
        self._viewers.discard(viewer)
        painter.unwatch(viewer.sources)

    def turn(self, viewer: Viewer, sources: tuple[str, ...], painter: Painter) -> None:
        """The viewer looks at other sources."""
        painter.unwatch(viewer.sources)
        viewer.sources = sources
        painter.watch(sources)

    def drop(self, viewer: Viewer, client: object) -> None:
        """The viewer, at this address, has read nothing for too long."""
        self.dropped += 1
        viewer.gone = True
        self._abort(client)

    def wake(self) -> None:
        """Tell every viewer that something is new."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._wake)

    def close(self) -> None:
        """Send everybody home."""
        self.closed = True
        self.wake()

    def _wake(self) -> None:
        for viewer in self._viewers:
            viewer.wake()
