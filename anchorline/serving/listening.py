"""The address of a server, and the socket that listens there."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from dataclasses import dataclass

from anchorline.runtime.io.errors import SettingsError

BACKLOG = 1024  # connections that wait to be taken; who finds no place here tries again after a second
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
