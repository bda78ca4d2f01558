"""Bodies on their way in: how large, how long, how much at once; and callers who leave."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from anchorline.runtime.io.errors import one_line

_Found = TypeVar("_Found")


class Refusal(Exception):
    """An answer other than 200: its code, one line for the caller, and further headers."""

    def __init__(self, code: int, why: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(why)
        self.code, self.why, self.headers = code, one_line(why), headers or {}


def busy(why: str) -> Refusal:
    """Of a server that has no room just now."""
    return Refusal(503, f"{why}; try again later", {"Retry-After": "1"})


class Room:
    """The bytes of bodies and frames that all requests hold together; a single one may hold more."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def share(self) -> Iterator[Share]:
        """What one request holds, until the end of the block."""
        share = Share(self)
        try:
            yield share
        finally:
            with self.lock:
                self.held -= share.held
                share.has_ended = True


class Share:
    """The part of a ``Room`` that one request holds; may grow in any thread."""

    def __init__(self, room: Room) -> None:
        self.held, self.has_ended, self._room = 0, False, room

    def grow(self, count: int) -> None:
        """Hold ``count`` bytes more. Raises ``Refusal`` where others hold too much, or it is over."""
        room = self._room
        with room.lock:
            if self.has_ended or (room.held > self.held and room.held + count > room.most):
                raise busy("the server holds as many bytes of requests as it may")
            room.held += count
            self.held += count


async def read_body(request: Request, share: Share, most: int, seconds: float) -> bytes:
    """The body of at most ``most`` bytes, which comes within ``seconds``.

    Raises ``Refusal``, and ``ClientDisconnect`` where the caller has left before its end.
    """
    stated = int(request.headers.get("content-length", "0"))
    too_large = Refusal(413, f"the body has more than {most} bytes; expected at most as many")
    if stated > most:
        raise too_large
    share.grow(stated)
    body = bytearray()

    async def read() -> None:
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body.extend(message.get("body", b""))
            more = message.get("more_body", False)
            if len(body) > most:
                raise too_large
            share.grow(max(0, len(body) - share.held))  # one in pieces, of no stated length

    try:
        await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise Refusal(408, f"the body did not come within {seconds:g} s", {"Connection": "close"}) from None
    return bytes(body)


async def while_there(request: Request, work: Coroutine[Any, Any, _Found]) -> _Found:
    """What ``work`` gives, which is cancelled where the caller leaves first: then ``ClientDisconnect``."""
    gone = asyncio.ensure_future(request.receive())  # the body is read: nothing else can come
    done = asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientDisconnect
        return done.result()
    finally:
        for each in (gone, done):
            each.cancel()
        await asyncio.gather(gone, done, return_exceptions=True)
