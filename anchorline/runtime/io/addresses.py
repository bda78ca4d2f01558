"""What may be shown of an address: where it leads, and nothing that lets anybody in.

Cameras and servers take their passwords and tokens in many places of it: ``//user:password@host``,
``?token=...``, ``/user=admin&password=...``, ``?passphrase=...``. Therefore scheme, host, port and path are
shown and all else is hidden, in the path whatever looks like a credential; and where it cannot be told what
is what, as with a password that holds a slash, all behind the scheme.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import quote, unquote

HIDDEN = "..."
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(.*)", re.DOTALL)
_PLACE = re.compile(r"(\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[\w.-]*)(?::\d{0,5})?")
_NAMED = re.compile(r"([\w .-]{1,64}=)(.+)", re.DOTALL)
_SECRET = (
    r"(?:user(?:name)?|admin|login|pass(?:word|wd|phrase)?|pwd?|\bpin|(?:\b|api|auth|[_-])key|token|jwt|bearer"
    r"|secret|auth|credentials?|sig(?:nature)?|session(?:[_-]?id)?|\bsid)"
)
# Of a path: words and numbers, unless they follow the name of a secret or look as if drawn by chance.
_PLAIN = re.compile(r"[\w.~+, -]*")
_BEFORE_SECRET = re.compile(rf"[\w.-]*?{_SECRET}", re.IGNORECASE)
_IN_ONE = re.compile(rf"{_SECRET}[_-]", re.IGNORECASE)  # a secret behind its name
_MIXED = re.compile(r"\d[A-Za-z]+\d")
_SHORTEST_KEY = 16  # letters and digits
_GROUPS = re.compile(r"(?:[0-9A-Za-z]{4}-){3,}[0-9A-Za-z]{4}")  # a UUID, or a key as people are given it
# What is no address, and yet may be one with a mistake in it, or a pipeline.
_ODD = re.compile(rf"^[\w+.-]{{2,}}:[/\\]|://|[?&]|^[^@:]*:[^@]*@|^[^@]*@[^/]*/|{_SECRET}=", re.IGNORECASE)
# In a text: also with the one slash that a path makes of two, and not where a message says how to write one.
_IN_TEXT = re.compile(
    r"(?<![A-Za-z0-9+.-])(?!SCHEME:)(?:[A-Za-z0-9+.-]+://|(?:rtsp|rtmp|http|srt|s?ftp)[a-z]?:/)\S*"
)
_ONE_SLASH = re.compile(r"^([\w+.= -]*):/(?!/)")
_BEHIND = "\"'`)]>,.:;"  # what ends a sentence or a quotation, and no address
_SHORTEST_PART = 4  # characters; shorter ones stand in other words by chance


class AddressParts(NamedTuple):
    """``scheme://userinfo@place path rest``, taken apart as FFmpeg does it; not to be shown itself."""

    scheme: str
    userinfo: str
    place: str  # host:port
    path: str
    rest: str  # query and fragment

    @property
    def is_valid(self) -> bool:
        """Whether the place is a host and a port, as far as can be told."""
        return _PLACE.fullmatch(self.place) is not None

    @property
    def host(self) -> str:
        """Name or IP address, IPv6 without brackets; empty where there is none or it cannot be told."""
        matched = _PLACE.fullmatch(self.place)
        if matched is None or "@" in self.path + self.rest:  # the @ may be the one before the host
            return ""
        return matched.group(1).strip("[]").lower()

    @property
    def shown(self) -> str:
        """What may be shown of it."""
        if not self.is_valid or "@" in self.path + self.rest:
            return f"{self.scheme}://{HIDDEN}"
        segments, is_secret = [], False
        for segment in self.path.split("/"):
            meant = unquote(unquote(segment))
            words = re.findall("[A-Za-z0-9]+", meant)
            is_secret |= any(len(word) >= _SHORTEST_KEY and _MIXED.search(word) for word in words)
            is_secret |= any(each.search(meant) for each in (_GROUPS, _IN_ONE))
            if segment and (is_secret or not _PLAIN.fullmatch(meant)):
                segments.append(HIDDEN)  # with all behind it: a password in a path may hold a slash
                break
            segments.append(segment)
            is_secret = _BEFORE_SECRET.fullmatch(meant) is not None
        rest = self.rest[:1] + (HIDDEN if self.rest[1:] else "")
        return f"{self.scheme}://{self.place}{'/'.join(segments)}{rest}"


def take_apart(text: str) -> AddressParts | None:
    """The parts of ``SCHEME://...``; ``None`` for anything else."""
    matched = _ADDRESS.fullmatch(text)
    if matched is None:
        return None
    scheme, authority, path, rest = matched.groups()
    userinfo, _, place = authority.rpartition("@")
    return AddressParts(scheme, userinfo, place, path, rest)


def shown_address(text: str) -> str:
    """What may be shown of a source: of an address, ``NAME=`` before it included, or of a file's name.

    What is neither, such as an address without its scheme or a pipeline, is hidden whole.
    """
    named = _NAMED.fullmatch(text)
    for name, where in (("", text), named.groups() if named else ("", "")):
        if (address := take_apart(where)) is not None:
            return name + address.shown
    return HIDDEN if _ODD.search(text) else text


def without_secrets(text: str, known: Iterable[str] = ()) -> str:
    """``text`` with each address in it as it may be shown; ``known`` ones may also hold spaces."""

    def shown(address: str) -> str:
        return shown_address(_ONE_SLASH.sub(r"\1://", address))

    def show(found: re.Match[str]) -> str:
        address = found[0].rstrip(_BEHIND)
        return shown(address) + found[0][len(address) :]

    for each in filter(_IN_TEXT.search, known):
        for spelled in (each, re.sub("/+", "/", each)):
            text = text.replace(spelled, shown(each))
    return _IN_TEXT.sub(show, text)


def hidden_parts(address: str) -> list[str]:
    """The parts of an address that may not be shown, as it spells them and unquoted; longest first."""
    shown, parts = shown_address(address), take_apart(address)
    found = {address, address.partition("://")[2], *re.split(r"[^\w.%~+-]+", address)}
    if parts is not None:
        found |= {parts.userinfo, *parts.userinfo.split(":", 1), *re.split("[&?#=]", parts.rest)}
    found |= {spell(part) for part in tuple(found) for spell in (unquote, quote)}
    return sorted(
        (part for part in found if len(part) >= _SHORTEST_PART and part not in shown), key=len, reverse=True
    )
