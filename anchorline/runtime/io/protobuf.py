"""Protobuf's wire format without its library: the fields of a message, and nothing of it copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

_VARINT, _BYTES = 0, 2  # wire types
_FIXED = {1: 8, 5: 4}  # the bytes of the others
_VARINT_BYTES = 10


class Buffer(Protocol):
    """Bytes, a mapped file, or what reads a file where it is asked to."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: slice, /) -> bytes: ...


def fields(
    content: Buffer, writer: str, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, int | slice]]:
    """Each field of the message in ``content[start:end]``: its number, and its value.

    The value of a number is itself; of a message, a text or packed numbers it is where their bytes are; of
    a number of fixed size 0, since no file that is read here has one. Raises ``ValueError`` where the bytes
    are no message that ``writer`` writes.
    """
    end = len(content) if end is None else end
    while start < end:
        tag, at = _varint(content, start, end)
        number, wire = tag >> 3, tag & 7
        value: int | slice = 0
        size = _FIXED.get(wire, 0)
        if wire == _VARINT:
            value, at = _varint(content, at, end)
        elif wire == _BYTES:
            size, at = _varint(content, at, end)
            value = slice(at, at + size)
        if number == 0 or not (size or wire in (_VARINT, _BYTES)):
            raise ValueError(f"byte {start} begins no field that {writer} writes")
        if size > end - at:
            raise ValueError(f"a field of {size} bytes, of which {end - at} are there")
        yield number, value
        start = at + size


def packed_numbers(content: Buffer, place: slice) -> Iterator[int]:
    """The numbers of a packed field, as int64."""
    at = place.start
    while at < place.stop:
        value, at = _varint(content, at, place.stop)
        yield (value + 2**63) % 2**64 - 2**63


def bytes_field(number: int, content: bytes) -> bytes:
    """The field ``number`` of a message, which holds these bytes."""
    return _number(number << 3 | _BYTES) + _number(len(content)) + content


def _number(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes((*written, value))


def _varint(content: Buffer, start: int, end: int) -> tuple[int, int]:
    """The number of seven bits a byte that begins at ``start``, and where it ends."""
    value = 0
    for index, byte in enumerate(content[start : min(start + _VARINT_BYTES, end)]):
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            return value, start + index + 1
    raise ValueError(f"a number at byte {start} that does not end")
