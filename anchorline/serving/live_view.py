"""A run in the browser: the sink that the pipeline writes to, where it is served, and the server."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.video.frames import Result
from anchorline.runtime.video.pipeline import VideoPipeline
from anchorline.serving.access import Gate
from anchorline.serving.application import Pages, content_policy, read_page
from anchorline.serving.connections import BACKLOG, Limits, Server
from anchorline.serving.live_state import LiveState

_LOOPBACK = "127.0.0.1"
_FORM = re.compile(r"(?:(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):)?(\d{1,5})")
_LAST_PORT = 65535
# What the kernel may hold for one viewer. Its own choice grows to megabytes, seconds of pictures that
# a slow viewer would have to see before the newest one.
_SEND_BUFFER = 256 * 1024
_REASONS = {
    errno.EADDRINUSE: "port {port} is in use; end the program that has it, or choose another port",
    errno.EACCES: "port {port} is for the system's services; choose one from 1024 on",
    errno.EADDRNOTAVAIL: "{host} is no address of this machine; expected one of its own, or 127.0.0.1",
}
_HEADERS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class LiveView:
    """Serves a page with every source's annotated stream and figures, ``/metrics`` and ``/healthz``.

    >>> with LiveView("127.0.0.1:8080") as view:
    ...     with VideoPipeline(detector, ["cam1=rtsp://camera/live"], sinks=[view]) as pipeline:
    ...         view.watch(pipeline)
    ...         for result in pipeline:
    ...             ...

    ``where`` is ``HOST:PORT``, or a port alone for this machine only; port 0 is any free one, and ``url``
    says which. The port is taken at once, served inside the ``with`` block. ``token`` is what viewers have to
    show, ``names`` are host names of this machine beside its own, ``limits`` what connections may take.
    ``warnings`` are lines for whoever starts it. Raises ``SettingsError`` for an address, token or name that
    cannot be used, such as a port that is taken.
    """

    wants_drawing = False

    def __init__(
        self,
        where: str | int,
        *,
        token: str | None = None,
        names: Iterable[str] = (),
        limits: Limits | None = None,
    ) -> None:
        html = read_page()
        self._live = LiveState()
        gate = Gate(Pages(self._live, html).router, token, names)
        self._socket = listen(parse_address(str(where)))
        self.address = Address(*self._socket.getsockname()[:2])
        self.url = self.address.url
        self.warnings: list[str] = []
        if token is None and not self.address.is_loopback:
            self.warnings.append(
                f"the live view at {self.address} has no token: whoever reaches it on the network sees the "
                "pictures and moves the controls; set --serve-token, or serve at 127.0.0.1"
            )
        headers = {**_HEADERS, "content-security-policy": content_policy(html)}
        self._server = Server(gate, headers, limits or Limits())
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="anchorline live server", daemon=True)

    def watch(self, pipeline: VideoPipeline) -> None:
        """Show this run; to be called before it begins."""
        self._live.watch(pipeline)

    def write(self, result: Result) -> None:
        """Lay the result down for the viewers; takes no time that depends on them."""
        self._live.note(result)

    def close(self) -> None:
        """The run has ended well."""
        self._live.phase = "ended"

    def abandon(self) -> None:
        """The run has failed."""
        self._live.phase = "failed"

    def __enter__(self) -> LiveView:
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise SettingsError(
                    f"the live view cannot be served ({self._error}); see the packages' versions"
                )
            time.sleep(0.01)
        self._live.painter.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.closed = True
        self._live.wake()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        self._live.painter.stop()

    def _serve(self) -> None:
        try:
            self._server.run([self._socket])
        except BaseException as error:  # SystemExit included, which is uvicorn's way to fail
            self._error = error


@dataclass(frozen=True)
class Address:
    """A host (name or IP address, IPv6 without brackets) and a port; 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback

    @property
    def url(self) -> str:
        """The address for a browser on this machine."""
        anywhere = ipaddress.ip_address(self.host.partition("%")[0]).is_unspecified
        return f"http://{Address('localhost', self.port) if anywhere else self}/"


def parse_address(text: str) -> Address:
    """``HOST:PORT``, ``[IPV6]:PORT``, or a port alone for this machine only; else ``SettingsError``."""
    matched = _FORM.fullmatch(text.strip())
    if matched is None or int(matched.group(2)) > _LAST_PORT:
        raise SettingsError(
            f"the address to serve at is {text!r}; expected HOST:PORT such as {_LOOPBACK}:8080, "
            f"with a port from 0 (any free one) to {_LAST_PORT}"
        )
    return Address((matched.group(1) or _LOOPBACK).strip("[]"), int(matched.group(2)))


def listen(address: Address) -> socket.socket:
    """A socket that listens there, so that nobody else can take the port. Raises ``SettingsError``."""
    host, port = address.host, address.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, place = min(found, key=lambda each: each[0] != socket.AF_INET)
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        opened = socket.create_server(place, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except (socket.gaierror, UnicodeError):
        reason = f"there is no host {host!r}; expected this machine's name or IP address"
        raise SettingsError(f"{address}: {reason}") from None
    except OSError as error:
        number = error.errno or 0
        reason = _REASONS.get(number, f"cannot be served at ({os.strerror(number)}); choose another address")
        raise SettingsError(f"{address}: {reason.format(host=host, port=port)}") from None
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)  # for all that it accepts
    return opened
