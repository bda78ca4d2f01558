"""uvicorn in a thread of its own, with an eye on connections that do nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from anchorline.runtime.io.errors import SettingsError

_IDLE_SECONDS = 15.0  # that a connection may take to send a request, or to take the answer
_MOST_CONNECTIONS = 256
_LEAVE_SECONDS = 1  # that connections get to end in good order
_TICKS = 10  # of uvicorn's loop in a second

# Nonsense from outside is no event, and our own mistakes are logged by the gate. uvicorn's own loggers are
# left alone: they may be those of the program that we run in.
_nowhere = logging.getLogger("anchorline.live.http")
_nowhere.addHandler(logging.NullHandler())
_nowhere.propagate = False

Begun = Callable[[asyncio.AbstractEventLoop, Callable[[object], None]], None]


class WatchedProtocol(H11Protocol):
    """uvicorn's, with two gaps closed: requests that never come, and damage in the middle of an answer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.logger = _nowhere
        self.access_log = False  # it would show tokens
        self.idle_since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Refuse; where an answer is under way already, only cut the connection."""
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            self.transport.abort()

    def look(self, now: float) -> None:
        """End the connection where it has been idle for too long."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.idle_since = now
        elif now - self.idle_since > _IDLE_SECONDS:
            self.transport.abort()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, begun: Begun) -> None:
        super().__init__(config)
        self._begun = begun

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._begun(asyncio.get_running_loop(), self._abort)

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                if isinstance(connection, WatchedProtocol):
                    connection.look(now)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(_LEAVE_SECONDS, self._abort)
        await super().shutdown(sockets)

    def _abort(self, client: object = None) -> None:
        """Cut the connection of this client, or all."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, WatchedProtocol) and client in (None, connection.client):
                connection.transport.abort()


class ServerThread:
    """Serves ``app`` on a listening socket. ``begun`` is called in its loop once it serves."""

    def __init__(self, app: ASGIApp, listening: socket.socket, begun: Begun) -> None:
        self._socket, self._begun = listening, begun
        self._ready = threading.Event()
        self._error: BaseException | None = None
        config = uvicorn.Config(
            app,
            http=WatchedProtocol,
            loop="asyncio",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=2 * _LEAVE_SECONDS,
        )
        self._server = _Server(config, self._tell)
        self._thread = threading.Thread(target=self._run, name="anchorline live server", daemon=True)

    def start(self) -> None:
        """Serve from now on. Raises ``SettingsError`` where that is not possible."""
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise SettingsError(f"the live view cannot be served ({self._error}); see the packages' versions")

    def stop(self) -> None:
        """End, and wait for it."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            self._socket.close()

    def _tell(self, loop: asyncio.AbstractEventLoop, abort: Callable[[object], None]) -> None:
        self._begun(loop, abort)
        self._ready.set()

    def _run(self) -> None:
        try:
            self._server.run([self._socket])
        except BaseException as error:  # SystemExit included, which is uvicorn's way to fail
            self._error = error
        finally:
            self._ready.set()
