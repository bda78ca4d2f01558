"""Who holds a connection, and for how long: the server, and the end of those who only take up room."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import socket
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import h11
import uvicorn
from msgspec import Meta
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from anchorline.runtime.io.errors import SettingsError
from anchorline.runtime.io.schema import Count, check_fields
from anchorline.serving.access import GRANTED
from anchorline.serving.listening import BACKLOG

KEPT = "anchorline.kept"  # in the scope of a request whose connection is not cut for others
_AT_ONCE = 16  # taken in one turn of the loop, so that those who ask are heard before many others come
_LONGEST_HEAD = 16 * 1024  # bytes of a request line and headers
_SUBNET = 64  # bits of an IPv6 address, which are one customer's

# Nonsense from outside is no event, and our own mistakes are logged by the gate. uvicorn's own loggers are
# left alone: they may be those of the program that we run in.
_nowhere = logging.getLogger("anchorline.live.http")
_nowhere.addHandler(logging.NullHandler())
_nowhere.propagate = False


Seconds = Annotated[float, Meta(ge=0, le=sys.float_info.max, description="seconds from 0")]


@dataclass(frozen=True)
class Limits:
    """What connections may take of a server.

    A stranger is a connection whose request was not granted yet: one that has sent none, or not the token.
    Behind a proxy all of them have its address, so ``strangers`` is no less than the viewers that may come
    back at the same moment. Raises ``SettingsError``.
    """

    connections: Count = 256
    strangers: Count = 64  # of one address, or of one IPv6 network
    head_seconds: Seconds = 5.0  # until a first request is there, to the end of its headers
    idle_seconds: Seconds = 15.0  # until an answer that is no stream is taken, and until the next request
    young_seconds: Seconds = 1.0  # in which a stranger's request may be on its way

    def __post_init__(self) -> None:
        check_fields(self, "", SettingsError)


class Connection(H11Protocol):
    """uvicorn's, whose ``limit_concurrency`` and ``timeout_keep_alive`` wait for a request.

    Here a connection also ends that sends none in time, however it spreads its bytes, or does not take its
    answer. And where there are too many, room is made for the newest: one goes that waits for nothing, first
    a stranger, of the address with the most of them, then anybody, then a young stranger; and at last one
    that is answered. Of several it is the oldest. Streams are never cut; they drop who does not read by
    themselves.
    """

    def __init__(self, *arguments: Any, limits: Limits, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.logger = _nowhere
        self.access_log = False  # it would show tokens
        self._limits = limits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {"abort": transport.abort}  # the ``state`` of each request
        self.network = network_of(self.client[0] if self.client else "")
        self._timer = self.loop.call_later(self._limits.head_seconds, self._time_is_up)
        self.since = self.loop.time()  # when it began to wait, or to be answered
        self._make_room()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._allow(self._limits.idle_seconds)

    def on_response_complete(self) -> None:
        super().on_response_complete()  # goes on to the next request where it is there
        is_known = self.is_answering or self.is_granted
        self._allow(self._limits.idle_seconds if is_known else self._limits.head_seconds)

    @property
    def is_answering(self) -> bool:
        """Whether a request is there whose answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_granted(self) -> bool:
        """Whether its last request might see more than the bare health."""
        return self.cycle is not None and bool(self.cycle.scope.get(GRANTED))

    @property
    def is_kept(self) -> bool:
        """Whether it is answered with a stream, or its request is worked on."""
        return self.is_answering and KEPT in self.cycle.scope

    def cut(self) -> None:
        """End it now, and count it no more."""
        self.connections.discard(self)
        self.transport.abort()

    def _allow(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._time_is_up)
        self.since = self.loop.time()

    def _time_is_up(self) -> None:
        if self.is_kept:
            self._allow(self._limits.idle_seconds)
        else:
            self.cut()

    def _make_room(self) -> None:
        """Cut another connection where this one is one too many, or this one where all others are streams."""
        everybody: Iterable[Connection] = self.connections  # type: ignore[assignment]
        strangers = Counter(each.network for each in everybody if not each.is_granted)
        if len(self.connections) <= self._limits.connections:
            if strangers[self.network] <= self._limits.strangers:
                return
            everybody = [each for each in everybody if each.network == self.network and not each.is_granted]

        young = self.since - self._limits.young_seconds

        def order(each: Connection) -> tuple[bool, bool, bool, int, float]:
            is_young = each.since > young and not each.is_granted
            return each.is_answering, is_young, each.is_granted, -strangers[each.network], each.since

        others = (each for each in everybody if each is not self and not each.is_kept)
        min(others, key=order, default=self).cut()

    def send_400_response(self, msg: str) -> None:
        """Refuse; where an answer is under way already, only cut the connection."""
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.transport.abort()


def network_of(host: str) -> str:
    """What counts as one address: an IPv4 address, also inside an IPv6 one, or an IPv6 network of 64 bits."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:  # no IP socket
        return host
    if address.version == 4 or address.ipv4_mapped is not None:
        return str(getattr(address, "ipv4_mapped", None) or address)
    return str(ipaddress.ip_network((address, _SUBNET), strict=False))


class Server(uvicorn.Server):
    """Serves ``app`` over HTTP/1.1, quietly; ``run`` takes the sockets and blocks until ``should_exit``.

    Every answer carries the ``headers``, refusals and failures included. At the end connections have
    ``leave_seconds`` to end in good order.
    """

    def __init__(
        self, app: ASGIApp, headers: dict[str, str], limits: Limits, leave_seconds: float = 1.0
    ) -> None:
        self._leave_seconds = leave_seconds
        config = uvicorn.Config(
            app,
            http=partial(Connection, limits=limits),  # type: ignore[arg-type]
            loop="asyncio",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            headers=list(headers.items()),
            backlog=_AT_ONCE,
            h11_max_incomplete_event_size=_LONGEST_HEAD,
            timeout_graceful_shutdown=math.ceil(leave_seconds + 1),
            timeout_keep_alive=math.ceil(limits.idle_seconds),
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(BACKLOG)  # asyncio has made one number of this and of how many it takes at once

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Also cuts the connections of who does not read, for which uvicorn would wait and then complain."""

        def abort_all() -> None:
            for connection in list(self.server_state.connections):
                connection.transport.abort()

        asyncio.get_running_loop().call_later(self._leave_seconds, abort_all)
        await super().shutdown(sockets)
