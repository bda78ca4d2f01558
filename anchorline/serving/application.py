"""The pages of the server and what they answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from anchorline.runtime.io.errors import SettingsError
from anchorline.serving.access import same_origin
from anchorline.serving.gate import GRANTED, HEALTH, Gate
from anchorline.serving.live_state import LiveState
from anchorline.serving.metrics import CONTENT_TYPE, Metrics
from anchorline.serving.page import content_policy, read_page
from anchorline.serving.streams import LiveStream

_LONGEST_BODY = 64 * 1024
_BODY_SECONDS = 5.0
_LONGEST_PLACE = 4  # digits
Endpoint = Callable[[Request], Awaitable[ASGIApp]]


def create_application(live: LiveState) -> ASGIApp:
    """The whole application behind its gate."""
    html = read_page()
    routes = [
        Route("/", _page(html)),
        Route("/feed", _feed(live)),
        Route("/stream/{source:path}", _stream(live)),
        Route("/status", _status(live)),
        Route("/controls", _change_controls(live), methods=["POST"]),
        Route("/metrics", _metrics(live)),
        Route(HEALTH, _health(live)),
    ]
    application = Starlette(routes=routes)
    application.router.redirect_slashes = False
    return Gate(application, live.access, content_policy(html))


def _page(html: str) -> Endpoint:
    async def page(request: Request) -> Response:
        return HTMLResponse(html)

    return page


def _status(live: LiveState) -> Endpoint:
    async def status(request: Request) -> Response:
        return Response(live.status(), media_type="application/json")

    return status


def _metrics(live: LiveState) -> Endpoint:
    metrics = Metrics(live)

    async def text(request: Request) -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return text


def _health(live: LiveState) -> Endpoint:
    async def health(request: Request) -> Response:
        problems = live.run.problems()
        answer: dict[str, object] = {"status": "unhealthy" if problems else "ok"}
        if request.scope[GRANTED]:
            answer["problems"] = problems
        return JSONResponse(answer, 503 if problems else 200)

    return health


def _feed(live: LiveState) -> Endpoint:
    async def feed(request: Request) -> ASGIApp:
        return _too_many(live) or LiveStream(live, "feed", tuple(live.run.sources))

    return feed


def _stream(live: LiveState) -> Endpoint:
    async def stream(request: Request) -> ASGIApp:
        asked, sources = request.path_params["source"], list(live.run.sources)
        if asked not in sources:
            place = int(asked) if asked.isdecimal() and len(asked) <= _LONGEST_PLACE else len(sources)
            if place >= len(sources):
                return PlainTextResponse("There is no such source; /status names them.\n", 404)
            asked = sources[place]
        return _too_many(live) or LiveStream(live, "mjpeg", (asked,))

    return stream


def _too_many(live: LiveState) -> Response | None:
    if not live.audience.is_full:
        return None
    return PlainTextResponse("There are too many viewers.\n", 503, {"Retry-After": "10"})


def _change_controls(live: LiveState) -> Endpoint:
    async def change(request: Request) -> Response:
        if not same_origin(request.headers):
            return _refused(403, "expected a request of this server's own page")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _refused(415, "expected the content type application/json")
        try:
            body = await asyncio.wait_for(_body(request), _BODY_SECONDS)
        except asyncio.TimeoutError:
            return _refused(408, f"the body did not come within {_BODY_SECONDS:g} s")
        if body is None:
            return _refused(413, f"expected a body of at most {_LONGEST_BODY} bytes")
        try:
            live.controls.change(json.loads(body), tuple(live.run.known_classes()))
        except SettingsError as error:
            return _refused(400, str(error))
        except (ValueError, RecursionError):
            return _refused(400, "expected JSON")
        return JSONResponse(live.controls_json())

    return change


async def _body(request: Request) -> bytes | None:
    """The request's body, or ``None`` where it is too long."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _LONGEST_BODY:
            return None
    return bytes(body)


def _refused(code: int, why: str) -> Response:
    return JSONResponse({"error": why}, code)
