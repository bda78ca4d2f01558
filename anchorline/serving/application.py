"""The pages of the server, and the streams of its viewers."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator, Iterator
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from anchorline.runtime.io.errors import SettingsError
from anchorline.serving.access import GRANTED, HEALTH, is_of_own_page
from anchorline.serving.connections import KEPT
from anchorline.serving.live_state import LiveState
from anchorline.serving.metrics import RunCollector, metrics_answer

MOST_VIEWERS = 64
PATIENCE = 10.0  # seconds that a viewer may read nothing
_TICK = 1.0  # seconds between two states of the figures
_LONGEST_BODY = 64 * 1024
_BODY_SECONDS = 5.0
_BOUNDARY = "frame"
_RECORDS = "application/octet-stream"
_MULTIPART = f"multipart/x-mixed-replace; boundary={_BOUNDARY}"
_STATUS = 0xFFFFFFFF  # where a picture would have its source's place


def read_page() -> str:
    """The page's HTML: one file with its style and script."""
    return files("anchorline.serving").joinpath("page.html").read_text(encoding="utf-8")


class Pages:
    """What each path answers."""

    def __init__(self, live: LiveState, html: str) -> None:
        self._live, self._html = live, html
        routes = [
            Route("/", self._page),
            Route("/feed", self._stream),
            Route("/stream/{source:path}", self._stream),
            Route("/status", self._status),
            Route("/controls", self._controls, methods=["POST"]),
            Route("/metrics", self._metrics),
            Route(HEALTH, self._health),
        ]
        self.router = Router(routes, redirect_slashes=False)

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(self._html)

    async def _status(self, request: Request) -> Response:
        return Response(self._live.status(), media_type="application/json")

    async def _metrics(self, request: Request) -> Response:
        return metrics_answer(RunCollector(self._live))

    async def _health(self, request: Request) -> Response:
        problems = self._live.problems()
        answer: dict[str, object] = {"status": "unhealthy" if problems else "ok"}
        if request.scope[GRANTED]:
            answer["problems"] = problems
        return JSONResponse(answer, 503 if problems else 200)

    async def _stream(self, request: Request) -> Response:
        """The pictures of one source, by its name or place, or of all of them."""
        source, sources = request.path_params.get("source"), self._live.sources
        if source is not None and source not in sources:
            source = {str(place): name for place, name in enumerate(sources)}.get(source)
            if source is None:
                return PlainTextResponse("There is no such source; /status names them.\n", 404)
        if len(self._live.viewers) >= MOST_VIEWERS:
            return PlainTextResponse("There are too many viewers.\n", 503, {"Retry-After": "10"})
        stream = LiveStream(self._live, source)
        return Response(media_type=stream.media_type) if request.method == "HEAD" else stream

    async def _controls(self, request: Request) -> Response:
        headers = request.headers
        if not is_of_own_page(headers):
            return _refused(403, "expected a request of this server's own page")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _refused(415, "expected the content type application/json")
        body, pieces, until = bytearray(), request.stream(), time.monotonic() + _BODY_SECONDS
        try:
            while piece := await asyncio.wait_for(anext(pieces, b""), until - time.monotonic()):
                body += piece
                if len(body) > _LONGEST_BODY:
                    return _refused(413, f"expected a body of at most {_LONGEST_BODY} bytes")
            self._live.change(json.loads(body))
        except asyncio.TimeoutError:
            return _refused(408, f"the body did not come within {_BODY_SECONDS:g} s")
        except SettingsError as error:
            return _refused(400, str(error))
        except (ValueError, RecursionError):
            return _refused(400, "expected JSON")
        return JSONResponse(self._live.controls())


def _refused(code: int, why: str) -> Response:
    return JSONResponse({"error": why}, code)


class LiveStream(StreamingResponse):
    """Pictures as they come, without an end, for as long as the viewer reads.

    Of one ``source`` as a multipart stream of JPEGs (MJPEG), which browsers, players and OpenCV read. Of all
    sources (``None``) with the status on one connection, since a browser opens no more than six to a server:
    records of two big-endian uint32 and the content, the first being the source's place (then it is a JPEG)
    or 2^32 - 1 (the status as JSON), the second the content's length. A viewer who reads slowly gets fewer
    pictures, always the newest one; who reads nothing for ``PATIENCE`` seconds is dropped.
    """

    def __init__(self, live: LiveState, source: str | None) -> None:
        self._live, self._source = live, source
        self._news = asyncio.Event()
        self._seen: dict[str, bytes] = {}
        self._told = b""
        self._timer: asyncio.TimerHandle | None = None
        super().__init__(self._content(), media_type=_RECORDS if source is None else _MULTIPART)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        live = self._live
        live.loop = asyncio.get_running_loop()
        self._abort = scope["state"]["abort"]
        scope[KEPT] = True
        live.viewers.add(self._news)
        live.painter.watch(self._source)
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            live.viewers.discard(self._news)
            live.painter.watch(self._source, -1)

    async def _content(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        begin = b"" if self._source is None else f"--{_BOUNDARY}\r\n".encode()
        while not self._live.closed:
            self._timer = loop.call_later(PATIENCE, self._drop)
            # A piece that may be empty waits until the last one is under way: what follows is then the
            # newest picture of that moment.
            yield begin
            begin = b""
            for piece in self._pieces():
                yield piece
            self._timer.cancel()
            self._timer = loop.call_later(_TICK, self._news.set)
            await self._news.wait()
            self._timer.cancel()
            self._news.clear()

    def _drop(self) -> None:
        self._live.dropped += 1
        self._abort()

    def _pieces(self) -> Iterator[bytes]:
        """What this viewer has not seen yet."""
        live = self._live
        if self._source is None and (status := live.status()) is not self._told:
            self._told = status
            yield struct.pack(">II", _STATUS, len(status)) + status
        for place, source in enumerate(live.sources if self._source is None else (self._source,)):
            jpeg = live.painter.pictures.get(source)
            if jpeg is None or jpeg is self._seen.get(source):
                continue
            self._seen[source] = jpeg
            if self._source is None:
                yield struct.pack(">II", place, len(jpeg)) + jpeg
            else:  # with the boundary after it, without which a browser would hold it back
                head = f"Content-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                yield b"".join((head.encode(), jpeg, f"\r\n--{_BOUNDARY}\r\n".encode()))
