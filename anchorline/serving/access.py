"""Who may see the run: the token, and the names under which browsers may reach the server."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import Headers

from anchorline.runtime.io.errors import SettingsError

Standing = Literal["granted", "missing", "wrong"]
_SHORTEST_TOKEN = 8
_TOKEN = re.compile(r"[\x21-\x7e]+")  # what fits a header
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::\d{1,5})?")


class Access:
    """Checks of a request before anything else is done with it.

    With a ``token`` a request has to carry it: as ``Authorization: Bearer``, as ``?token=`` of the page,
    or by the cookie that the page sets then, which does not hold the token itself. ``names`` are host
    names that are accepted beside IP addresses, ``localhost`` and this machine's own name: a browser
    that was led here by a foreign name (DNS rebinding) shows that name in the ``Host`` header. Raises
    ``SettingsError`` for a token or a name that cannot be used.
    """

    def __init__(self, token: str | None, names: Iterable[str], port: int) -> None:
        if token is not None and (len(token) < _SHORTEST_TOKEN or not _TOKEN.fullmatch(token)):
            raise SettingsError(  # and does not repeat the token, which would then stand in a log
                f"the token to serve with has {len(token)} characters; expected at least {_SHORTEST_TOKEN}, "
                "printable ASCII without spaces"
            )
        self._names = {_checked_name(name) for name in names} | own_names()
        self.has_token = token is not None
        self._token = (token or "").encode("ascii")
        self.cookie_name = f"anchorline-{port}"  # browsers share cookies between the ports of a host
        self.cookie = hmac.new(self._token, b"anchorline live view", hashlib.sha256).hexdigest()

    def knows_host(self, headers: Headers) -> bool:
        """Whether the ``Host`` header is there, once, and names this server."""
        given = headers.getlist("host")
        matched = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        if matched is None:
            return False
        host = matched.group(1).strip("[]").rstrip(".").lower()
        return _is_address(host) or host in self._names or host.endswith(".localhost")

    def standing(self, headers: Headers) -> Standing:
        """What a request's header and cookie say about it."""
        if not self.has_token:
            return "granted"
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return "granted" if self._matches(given.strip()) else "wrong"
        cookie = _cookie(headers.get("cookie", ""), self.cookie_name)
        if cookie is None:
            return "wrong" if scheme else "missing"
        return "granted" if hmac.compare_digest(cookie.encode(), self.cookie.encode()) else "wrong"

    def query_standing(self, query: bytes) -> Standing:
        """What ``?token=`` says about a request for the page."""
        if not self.has_token:
            return "granted"
        try:
            given = [value for name, value in parse_qsl(query.decode("latin-1")) if name == "token"]
        except ValueError:
            return "wrong"
        if not given:
            return "missing"
        return "granted" if len(given) == 1 and self._matches(given[0]) else "wrong"

    def _matches(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._token)


def same_origin(headers: Headers) -> bool:
    """Whether a page of this server sent the request, or no browser did, which states an origin."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc.lower() == headers.get("host", "").lower() != ""
    except ValueError:
        return False


def own_names() -> set[str]:
    """The names by which others on the network know this machine, and ``localhost``."""
    name = socket.gethostname().lower()
    return {"localhost", name, f"{name.partition('.')[0]}.local"}


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise SettingsError(f"{name!r} is no host name; expected one such as camera.example, without a port")
    return name.rstrip(".").lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _cookie(header: str, name: str) -> str | None:
    try:
        morsel = SimpleCookie(header).get(name)
    except CookieError:
        return None
    return None if morsel is None else morsel.value
