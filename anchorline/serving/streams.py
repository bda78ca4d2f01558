"""One viewer's connection: pictures as they come, for as long as the viewer reads."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from typing import Literal

from starlette.types import Receive, Scope, Send

from anchorline.serving.audience import Viewer
from anchorline.serving.live_state import LiveState

PATIENCE = 10.0  # seconds that a viewer may read nothing
_TICK = 1.0  # seconds between two states of the figures
_BOUNDARY = "frame"
_STATUS = 0xFFFFFFFF  # where a picture would have its source's place
_TYPES = {
    "mjpeg": f"multipart/x-mixed-replace; boundary={_BOUNDARY}",
    "feed": "application/octet-stream",
}


class LiveStream:
    """An ASGI response without an end.

    ``mjpeg`` is a multipart stream of one source's JPEGs, which browsers, players and OpenCV read.
    ``feed`` carries the pictures of all sources and the status on one connection, since a browser
    opens no more than six to a server: records of two big-endian uint32 and the content, the first
    being the source's place (then it is a JPEG) or 2^32 - 1 (the status as JSON), the second the
    content's length. A viewer who reads slowly gets fewer pictures, always the newest one; who reads
    nothing for ``PATIENCE`` seconds is dropped.
    """

    def __init__(self, live: LiveState, kind: Literal["mjpeg", "feed"], sources: tuple[str, ...]) -> None:
        self._live, self._kind = live, kind
        self._viewer = Viewer(sources)
        self._status = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", _TYPES[self._kind].encode())],
            }
        )
        if scope["method"] != "HEAD":
            await self._play(scope, receive, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _play(self, scope: Scope, receive: Receive, send: Send) -> None:
        audience, viewer = self._live.audience, self._viewer
        gone = asyncio.create_task(_tell_when_gone(receive, viewer))
        audience.join(viewer, self._live.painter)
        loop = asyncio.get_running_loop()
        begin = b"" if self._kind == "feed" else f"--{_BOUNDARY}\r\n".encode()
        try:
            while not (viewer.gone or audience.closed):
                timer = loop.call_later(PATIENCE, audience.drop, viewer, scope["client"])
                try:
                    await self._send_news(begin, send)
                finally:
                    timer.cancel()
                begin = b""
                await viewer.wait(_TICK)
        finally:
            gone.cancel()
            audience.leave(viewer, self._live.painter)

    async def _send_news(self, begin: bytes, send: Send) -> None:
        """First a piece that may be empty and waits until the last one is under way: what follows is then
        the newest picture of that moment."""
        await send({"type": "http.response.body", "body": begin, "more_body": True})
        for piece in self._pieces():
            await send({"type": "http.response.body", "body": piece, "more_body": True})

    def _pieces(self) -> Iterator[bytes]:
        """What this viewer has not seen yet."""
        if self._kind == "mjpeg":
            for _, picture in self._viewer.unseen(self._live.painter.pictures):
                yield _part(picture.jpeg)
            return
        if tuple(self._live.run.sources) != self._viewer.sources:  # the run has begun since
            self._live.audience.turn(self._viewer, tuple(self._live.run.sources), self._live.painter)
        status = self._live.status()
        if status is not self._status:
            self._status = status
            yield _record(_STATUS, status)
        for place, picture in self._viewer.unseen(self._live.painter.pictures):
            yield _record(place, picture.jpeg)


def _part(jpeg: bytes) -> bytes:
    """One picture and the boundary after it, without which a browser would hold it back."""
    head = f"Content-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
    return b"".join((head.encode(), jpeg, f"\r\n--{_BOUNDARY}\r\n".encode()))


def _record(place: int, content: bytes) -> bytes:
    return struct.pack(">II", place, len(content)) + content


async def _tell_when_gone(receive: Receive, viewer: Viewer) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    viewer.gone = True
    viewer.wake()
