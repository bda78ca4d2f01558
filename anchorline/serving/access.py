"""Who may use a server: the token, the names under which browsers may reach it, what they may do there."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import logging
import re
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anchorline.runtime.io.errors import SettingsError

_log = logging.getLogger("anchorline.live")
GRANTED = "anchorline.granted"  # in the scope: whether the request may see more than the bare health
HEALTH = "/healthz"
_SHORTEST_TOKEN = 8
_TOKEN = re.compile(r"[\x21-\x7e]+")  # what fits a header
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::\d{1,5})?")
# On every answer of a server.
HEADERS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Gate:
    """What every request passes before the pages.

    A request under a foreign host name gets 421: a browser that was led here by one (DNS rebinding) shows it
    in the ``Host`` header. Accepted are IP addresses, which Starlette's TrustedHostMiddleware cannot say,
    ``localhost``, this machine's own name and ``names``. With a ``token`` a request has to carry it or gets
    401: as ``Authorization: Bearer``, as ``?token=`` of the page, or by the cookie that the page sets then
    and that does not hold the token itself; only the bare health is told to everybody. The answer to a
    request that is not granted is the last one on its connection. Raises ``SettingsError`` for a token or a
    name that cannot be used.
    """

    no_token = (
        "This live view needs its token: open the page once as /?token=... "
        "or send the header 'Authorization: Bearer ...'."
    )
    wrong_host = (
        "This server is not known by that name; use an IP address or localhost, or start it with "
        "--serve-name NAME."
    )
    open_paths = frozenset({HEALTH})

    def __init__(self, app: ASGIApp, token: str | None, names: Iterable[str]) -> None:
        if token is not None and (len(token) < _SHORTEST_TOKEN or not _TOKEN.fullmatch(token)):
            raise SettingsError(  # and does not repeat the token, which would then stand in a log
                f"the token to serve with has {len(token)} characters; expected at least {_SHORTEST_TOKEN}, "
                "printable ASCII without spaces"
            )
        own = socket.gethostname().lower()
        self._names = {"localhost", own, f"{own.partition('.')[0]}.local"}
        for name in names:
            if not _NAME.fullmatch(name):
                raise SettingsError(
                    f"{name!r} is no host name; expected one such as camera.example, without a port"
                )
            self._names.add(name.rstrip(".").lower())
        self._app, self._token = app, token
        self._cookie = hmac.new((token or "").encode(), b"anchorline live view", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._refusal(scope) or self._app

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            await answer(scope, receive, send if scope.get(GRANTED) else send_last)
        except (ClientDisconnect, OSError):  # the client has gone
            return
        except Exception:
            _log.exception("a request for %s failed", ascii(scope["path"]))
            raise  # uvicorn answers with 500

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that goes no further, the redirection with the cookie included."""
        request, path = Request(scope), scope["path"]
        if not self._knows(request.headers.getlist("host")):
            return self.refused(self.wrong_host, 421)
        scope[GRANTED] = self._token is None
        if self._token is None:
            return None
        port = (scope["server"] or ("", 0))[1]
        cookie = f"anchorline-{port}"  # browsers share cookies between the ports of a host
        asked = request.query_params.getlist("token") if path == "/" else []
        if len(asked) == 1 and _same(asked[0], self._token):
            answer = RedirectResponse("./", 303)  # which takes the token out of the address bar
            answer.set_cookie(cookie, self._cookie, httponly=True, samesite="lax")
            return answer
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            granted = _same(bearer.strip(), self._token)
        else:
            granted = _same(request.cookies.get(cookie, ""), self._cookie)
        scope[GRANTED] = granted = granted and not asked
        if granted or (path in self.open_paths and not scheme and cookie not in request.cookies):
            return None
        return self.refused(self.no_token, 401, {"WWW-Authenticate": "Bearer"})

    def refused(self, why: str, code: int, headers: dict[str, str] | None = None) -> Response:
        """The answer to who may not come in."""
        return PlainTextResponse(f"{why}\n", code, headers)

    def _knows(self, given: list[str]) -> bool:
        """Whether the ``Host`` header is there, once, and names this server."""
        matched = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        if matched is None:
            return False
        host = matched.group(1).strip("[]").rstrip(".").lower()
        if host in self._names or host.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True


def is_of_own_page(headers: Headers) -> bool:
    """Whether a request comes from a page of this server, or from no page at all."""
    host = headers["host"].lower()
    origin = headers.get("origin", f"http://{host}")  # a browser states it
    is_own = origin.partition("://")[2].lower() == host
    return is_own and headers.get("sec-fetch-site", "none") in ("same-origin", "none")


def content_policy(html: str) -> str:
    """A Content-Security-Policy for the page: its own style and script by their hashes, nothing foreign."""
    rules = ["default-src 'none'"]
    for kind, text in re.findall(r"<(style|script)>(.*?)</\1>", html, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        rules.append(f"{kind}-src 'sha256-{digest}'")
    rules += ["img-src 'self' blob: data:", "connect-src 'self'"]
    return "; ".join([*rules, "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"])


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())
