"""What every request passes before the pages: names, tokens, headers, and errors kept inside."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anchorline.serving.access import Access

_log = logging.getLogger("anchorline.live")
GRANTED = "anchorline.granted"  # in the scope: whether the request may see more than the bare health
HEALTH = "/healthz"
_NO_TOKEN = (
    "This live view needs its token: open the page once as /?token=... "
    "or send the header 'Authorization: Bearer ...'.\n"
)
_WRONG_HOST = (
    "This server is not known by that name; use an IP address or localhost, or start it with "
    "--serve-name NAME.\n"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Gate:
    """Wraps the application. Every answer carries the strict ``headers``, those of refusals included.

    A request under a foreign host name gets 421, one without the token 401; only the bare health is
    told to everybody. The page's ``?token=`` becomes a cookie and leaves the address bar at once.
    """

    def __init__(self, app: ASGIApp, access: Access, policy: str) -> None:
        self._app, self._access = app, access
        self._headers = _encoded({**HEADERS, "Content-Security-Policy": policy})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun = False

        async def secured(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", ()), *self._headers]
            await send(message)

        try:
            await (self._refusal(scope) or self._app)(scope, receive, secured)
        except (ClientDisconnect, OSError):  # the client has gone
            return
        except Exception:
            _log.exception("a request for %s failed", ascii(scope["path"]))
            if not begun:
                await PlainTextResponse("Internal error.\n", 500)(scope, receive, secured)

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that goes no further, the redirection with the cookie included."""
        headers = Headers(scope=scope)
        if not self._access.knows_host(headers):
            return PlainTextResponse(_WRONG_HOST, 421)
        if scope["path"] == "/" and self._access.has_token:
            asked = self._access.query_standing(scope["query_string"])
            if asked == "granted":
                return self._with_cookie()
            if asked == "wrong":
                return _unauthorised()
        standing = self._access.standing(headers)
        scope[GRANTED] = standing == "granted"
        if standing == "granted" or (standing == "missing" and scope["path"] == HEALTH):
            return None
        return _unauthorised()

    def _with_cookie(self) -> Response:
        answer = RedirectResponse("./", 303)
        answer.set_cookie(self._access.cookie_name, self._access.cookie, httponly=True, samesite="lax")
        return answer


def _unauthorised() -> Response:
    return PlainTextResponse(_NO_TOKEN, 401, {"WWW-Authenticate": "Bearer"})


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]
