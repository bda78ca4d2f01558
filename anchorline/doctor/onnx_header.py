"""Reading what stands around the graph of an ONNX file, without onnx and without the graph itself.

Only the outermost level of the protobuf message ``ModelProto`` (onnx.proto3) is walked, so that a
file of any size takes milliseconds.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anchorline.runtime.errors import ArtefactError

# Field numbers of ModelProto and of the messages inside it.
_IR_VERSION, _PRODUCER, _GRAPH, _OPSET_IMPORT, _METADATA = 1, 2, 7, 8, 14
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_KEY, _VALUE = 1, 2
# Wire types of protobuf.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES = 10

Buffer = bytes | mmap.mmap
Field = tuple[int, int, int, int]  # number, value of a varint, start and end of its bytes


@dataclass(frozen=True)
class OnnxHeader:
    """``opset`` is that of ONNX's own domain; ``metadata`` the file's ``metadata_props``."""

    producer: str
    opset: int
    metadata: dict[str, str]


def read_onnx_header(path: Path) -> OnnxHeader:
    """The header of an ONNX file; raises ``ArtefactError`` for one that is none, empty or cut off."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _parse(content)
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    except ValueError as error:
        reason = "it is empty" if path.stat().st_size == 0 else error
        raise ArtefactError(
            f"{path}: not an ONNX file, or one that was cut off ({reason}); export or copy it again"
        ) from None


def _parse(content: Buffer) -> OnnxHeader:
    producer, opset, metadata, has_graph = "", 0, {}, False
    for number, _, start, end in _fields(content, 0, len(content)):
        if number == _GRAPH:
            has_graph = True
        elif number == _PRODUCER:
            producer = _text(content, start, end)
        elif number == _OPSET_IMPORT:
            domain, version = _opset(content, start, end)
            opset = version if domain in ("", "ai.onnx") else opset
        elif number == _METADATA:
            key, value = _entry(content, start, end)
            metadata[key] = value
    if not has_graph or not opset:
        raise ValueError("it has no graph")
    return OnnxHeader(producer, opset, metadata)


def _opset(content: Buffer, start: int, end: int) -> tuple[str, int]:
    domain, version = "", 0
    for number, value, first, last in _fields(content, start, end):
        if number == _OPSET_DOMAIN:
            domain = _text(content, first, last)
        elif number == _OPSET_VERSION:
            version = value
    return domain, version


def _entry(content: Buffer, start: int, end: int) -> tuple[str, str]:
    texts = {
        number: _text(content, first, last)
        for number, _, first, last in _fields(content, start, end)
        if number in (_KEY, _VALUE)
    }
    return texts.get(_KEY, ""), texts.get(_VALUE, "")


def _fields(content: Buffer, position: int, end: int) -> Iterator[Field]:
    """The fields of one message; ``ValueError`` where the bytes are no such message."""
    while position < end:
        tag, position = _varint(content, position, end)
        number, wire = tag >> 3, tag & 7
        value, start = 0, position
        if wire == _VARINT:
            value, position = _varint(content, position, end)
        elif wire == _BYTES:
            length, start = _varint(content, position, end)
            position = start + length
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if number == 0 or position > end:
            raise ValueError(f"field {number} needs {position - end} bytes more than there are")
        yield number, value, start, position


def _varint(content: Buffer, position: int, end: int) -> tuple[int, int]:
    value = 0
    for index in range(_VARINT_BYTES):
        if position + index >= end:
            raise ValueError("it stops inside a number")
        byte = content[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError(f"no number at byte {position}")


def _text(content: Buffer, start: int, end: int) -> str:
    return content[start:end].decode("utf-8", "replace")
