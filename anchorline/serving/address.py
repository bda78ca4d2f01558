"""Where the server listens: the address as the command line writes it, and its socket."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from dataclasses import dataclass

from anchorline.runtime.io.errors import SettingsError

LOOPBACK = "127.0.0.1"
_FORM = re.compile(r"(?:(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):)?(\d{1,5})")
_LAST_PORT = 65535
_BACKLOG = 128
# What the kernel may hold for one viewer. Its own choice grows to megabytes, seconds of pictures that
# a slow viewer would have to see before the newest one.
_SEND_BUFFER = 256 * 1024


@dataclass(frozen=True)
class Address:
    """A host (name or IP address, IPv6 without brackets) and a port; 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """``HOST:PORT``, ``[IPV6]:PORT``, or a port alone for this machine only; else ``SettingsError``."""
    matched = _FORM.fullmatch(text.strip())
    if matched is None or int(matched.group(2)) > _LAST_PORT:
        raise SettingsError(
            f"the address to serve at is {text!r}; expected HOST:PORT such as {LOOPBACK}:8080, "
            f"with a port from 0 (any free one) to {_LAST_PORT}"
        )
    host = (matched.group(1) or LOOPBACK).strip("[]")
    return Address(host, int(matched.group(2)))


def listen(address: Address) -> socket.socket:
    """A socket that listens there, so that nobody else can take the port. Raises ``SettingsError``."""
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError):
        raise SettingsError(
            f"{address}: there is no host {address.host!r}; expected this machine's name or IP address"
        ) from None
    family, kind, protocol, _, place = min(found, key=lambda each: each[0] != socket.AF_INET)
    opened = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two programs share the port
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        opened.bind(place)
        opened.listen(_BACKLOG)
        opened.setblocking(False)
    except OSError as error:
        opened.close()
        raise SettingsError(f"{address}: {_reason(error, address)}") from None
    return opened


def _reason(error: OSError, address: Address) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {address.port} is in use; end the program that has it, or choose another port"
    if error.errno == errno.EACCES:
        return f"port {address.port} is for the system's services; choose one from 1024 on"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{address.host} is no address of this machine; expected one of its own, or {LOOPBACK}"
    return f"cannot be served at ({error.strerror or error}); choose another address"


def bound_address(opened: socket.socket) -> Address:
    """Where the socket listens, with the port it was given."""
    host, port = opened.getsockname()[:2]
    return Address(str(host), int(port))


def is_loopback(address: Address) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(address.host.partition("%")[0]).is_loopback


def browser_url(address: Address) -> str:
    """The address for a browser on this machine."""
    anywhere = ipaddress.ip_address(address.host.partition("%")[0]).is_unspecified
    shown = Address("localhost", address.port) if anywhere else address
    return f"http://{shown}/"
