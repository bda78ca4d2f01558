"""The bodies of the Open Inference Protocol: requests read, answers written. Nothing here knows of HTTP.

The protocol is KServe's version 2 (github.com/kserve/open-inference-protocol), with Triton's extension for
binary tensors: a JSON object whose length a header states, and behind it the tensors' bytes, little-endian.
A model takes one frame a request, as pixels (``image``) or as the bytes of a JPEG or PNG (``encoded``).
"""

from __future__ import annotations

import binascii
import math
import sys
from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from anchorline.runtime.detections import Detections
from anchorline.runtime.io.errors import DataError, SettingsError, one_line, shown
from anchorline.runtime.video.options import (
    Filters,
    parse_classes,
    parse_min_scores,
    parse_regions,
)

HEADER_LENGTH = "inference-header-content-length"
VERSION = "1"  # of each model, the only one
INPUTS = (
    {"name": "image", "datatype": "UINT8", "shape": [-1, -1, 3]},
    {"name": "encoded", "datatype": "BYTES", "shape": [1]},
)
OUTPUTS = (
    {"name": "boxes", "datatype": "FP32", "shape": [-1, 4]},
    {"name": "scores", "datatype": "FP32", "shape": [-1]},
    {"name": "labels", "datatype": "INT64", "shape": [-1]},
    {"name": "names", "datatype": "BYTES", "shape": [-1]},
)
_OUTPUT_NAMES = tuple(str(each["name"]) for each in OUTPUTS)
_MICROSECONDS = 1_000_000
# Parameters of the protocol's servers that mean nothing here, and of whole families of them.
_IGNORED = {"binary_data_output", "content_type", "headers", "priority", "timeout"}
_IGNORED_STARTS = ("sequence_", "triton_")
_MOST_BINARY = 1 << 40

_Level = Annotated[int, Meta(ge=0, le=255)]
_LEVELS = {1: list[_Level], 3: list[list[list[_Level]]]}  # by the depth of the JSON arrays
_MOST_TENSORS = 16  # of a request that is answered with what is wrong; one that is right has fewer
_MOST_SIDES = 8  # the product of a million of them would take minutes, in which nobody else is answered
_LONGEST_PARAMETER = 10_000  # characters; regions with hundreds of corners have fewer
_Side = Annotated[int, Meta(ge=0, le=1 << 31)]
_Parameters = dict[str, Any]


class _Input(msgspec.Struct):
    name: str
    shape: Annotated[list[_Side], Meta(max_length=_MOST_SIDES)]
    datatype: str
    parameters: _Parameters = {}
    data: msgspec.Raw = msgspec.Raw()


class _Output(msgspec.Struct):
    name: str
    parameters: _Parameters = {}


class _Request(msgspec.Struct):
    inputs: Annotated[list[_Input], Meta(max_length=_MOST_TENSORS)]
    id: str | None = None
    parameters: _Parameters = {}
    outputs: Annotated[list[_Output], Meta(max_length=_MOST_TENSORS)] = []


@dataclass(frozen=True, eq=False)
class InferRequest:
    """A request that was read. ``frame`` is uint8 BGR [H, W, 3], or what a JPEG or PNG holds; ``outputs`` are
    those that are wanted, each with whether it is to be binary; ``timeout`` is in seconds."""

    frame: NDArray[np.uint8] | bytes
    id: str | None
    outputs: Sequence[tuple[str, bool]]
    filters: Filters
    timeout: float | None


def read_request(body: bytes, header_length: int | None) -> InferRequest:
    """The request in ``body``, of which the first ``header_length`` bytes are JSON, or all where it is None.

    Raises ``DataError`` or ``SettingsError`` for what does not follow the protocol, or not what the model
    takes.
    """
    length = len(body) if header_length is None else header_length
    if not 0 <= length <= len(body):
        raise DataError(f"{HEADER_LENGTH} is {length}; expected at most the body's {len(body)} bytes")
    try:
        stated = msgspec.json.decode(memoryview(body)[:length], type=_Request)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"the request is none of the protocol: {one_line(error)}") from None
    tensors = _with_bytes(stated.inputs, memoryview(body)[length:])
    if len(tensors) != 1 or tensors[0][0].name not in ("image", "encoded"):
        names = ", ".join(shown(each.name) for each in stated.inputs) or "none"
        raise DataError(f"the inputs are {names}; expected one, image or encoded")
    ((tensor, content),) = tensors
    frame = _pixels(tensor, content) if tensor.name == "image" else _encoded(tensor, content)
    texts = {name: [_text(name, value)] for name, value in stated.parameters.items() if not _ignored(name)}
    return InferRequest(
        *(frame, stated.id, _wanted(stated)),
        filters=read_filters(texts),
        timeout=_timeout(stated.parameters.get("timeout")),
    )


def read_filters(texts: Mapping[str, Sequence[str]]) -> Filters:
    """What to keep of the detections, by the texts of ``min_score``, ``classes``, ``region`` and
    ``max_detections``, each written as for ``anchorline detect``. Raises ``SettingsError``."""
    known = ("min_score", "classes", "region", "max_detections")
    for name in texts:
        if name not in known:
            raise SettingsError(f"the parameter {shown(name)} is not known; expected {', '.join(known)}")
    most = texts.get("max_detections", ())
    if any(not (each.isascii() and each.isdecimal() and len(each) < 10) for each in most):
        raise SettingsError(f"max_detections is {shown(most[-1])}; expected a whole number of at least 1")
    return Filters(
        classes=parse_classes(texts.get("classes", ())),
        min_scores=parse_min_scores(texts.get("min_score", ())),
        regions=parse_regions(texts.get("region", ())),
        max_detections=int(most[-1]) if most else None,
    )


def write_answer(found: Detections, model: str, asked: InferRequest) -> tuple[bytes, int | None]:
    """The body of the answer, and how many of its bytes are JSON where binary tensors follow."""
    arrays: dict[str, NDArray[Any]] = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}
    stated, tail = [], []
    for name, binary in asked.outputs:
        about = next(each for each in OUTPUTS if each["name"] == name)
        shape = [len(found), 4] if name == "boxes" else [len(found)]
        output: dict[str, Any] = {"name": name, "datatype": about["datatype"], "shape": shape}
        if binary:
            content = _bytes_of_texts(found.names) if name == "names" else _little(arrays[name])
            output["parameters"] = {"binary_data_size": len(content)}
            tail.append(content)
        else:
            output["data"] = found.names if name == "names" else arrays[name].ravel().tolist()
        stated.append(output)
    head: dict[str, Any] = {"model_name": model, "model_version": VERSION, "outputs": stated}
    if asked.id is not None:
        head["id"] = asked.id
    written = msgspec.json.encode(head)
    return b"".join([written, *tail]), len(written) if tail else None


def _with_bytes(inputs: Iterable[_Input], tail: memoryview) -> list[tuple[_Input, memoryview | None]]:
    """Each input with its part of what follows the JSON, or None where its data stands there."""
    found: list[tuple[_Input, memoryview | None]] = []
    at = 0
    for each in inputs:
        size = each.parameters.get("binary_data_size")
        if "shared_memory_region" in each.parameters:
            raise DataError(f"the input {shown(each.name)} lies in shared memory, which is not read; send it")
        if size is None:
            found.append((each, None))
            continue
        if type(size) is not int or not 0 <= size <= _MOST_BINARY or bytes(each.data):
            raise DataError(
                f"the input {shown(each.name)} has a binary_data_size of {shown(size)}; expected a number "
                "of bytes behind the JSON, and no data in it"
            )
        found.append((each, tail[at : at + size]))
        at += size
    if at != len(tail):
        raise DataError(
            f"there are {len(tail)} bytes behind the JSON, and the inputs state {at}; expected as many, and "
            f"the JSON's own length in the header {HEADER_LENGTH}"
        )
    return found


def _pixels(tensor: _Input, content: memoryview | None) -> NDArray[np.uint8]:
    shape = tensor.shape
    if tensor.datatype != "UINT8" or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise DataError(
            f"image is {shown(tensor.datatype)} {shape}; expected UINT8 [height, width, 3], pixels in BGR"
        )
    count = math.prod(shape)
    flat = _levels(bytes(tensor.data), shape) if content is None else np.frombuffer(content, np.uint8)
    if len(flat) != count:
        raise DataError(f"image has {len(flat)} values; expected {count} for the shape {shape}")
    return flat.reshape(shape)


def _levels(data: bytes, shape: list[int]) -> NDArray[np.uint8]:
    """The numbers of a JSON array, in one row or as deep as the shape; as one row."""
    depth = len(data[:64].translate(None, b" \t\r\n")) - len(
        data[:64].translate(None, b" \t\r\n").lstrip(b"[")
    )
    if depth not in _LEVELS:
        raise DataError(f"image has its data in {depth} levels of arrays; expected 1, or 3 as its shape")
    try:
        levels = np.array(msgspec.json.decode(data, type=_LEVELS[depth]), np.uint8)
    except (msgspec.MsgspecError, ValueError) as error:
        raise DataError(f"image has data that does not fit: {one_line(error)}") from None
    if depth > 1 and list(levels.shape) != shape:
        raise DataError(f"image has data of the shape {list(levels.shape)}; expected {shape}")
    return levels.ravel()


def _encoded(tensor: _Input, content: memoryview | None) -> bytes:
    if tensor.datatype != "BYTES" or math.prod(tensor.shape) != 1:
        raise DataError(
            f"encoded is {shown(tensor.datatype)} {tensor.shape}; expected BYTES [1], a JPEG or PNG"
        )
    if content is not None:
        length = int.from_bytes(content[:4], "little")
        if len(content) < 4 or length != len(content) - 4:
            raise DataError(
                f"encoded has {len(content)} bytes; expected 4 that state a length, and as many as that"
            )
        return bytes(content[4:])
    try:
        (text,) = msgspec.json.decode(bytes(tensor.data), type=list[str])
        return b64decode(text, validate=True)
    except (msgspec.MsgspecError, ValueError, binascii.Error):
        raise DataError(
            "encoded has data that is no picture; expected one text of base64 in an array, or binary data"
        ) from None


def _wanted(stated: _Request) -> list[tuple[str, bool]]:
    """The outputs that are asked for, all where none is named, and whether as bytes."""
    by_default = stated.parameters.get("binary_data_output", False)
    wanted = []
    for each in stated.outputs or [_Output(name) for name in _OUTPUT_NAMES]:
        if each.name not in _OUTPUT_NAMES:
            raise DataError(f"the output {shown(each.name)} is none; expected {', '.join(_OUTPUT_NAMES)}")
        for unknown in ("classification", "shared_memory_region"):
            if unknown in each.parameters:
                raise DataError(f"the output {each.name} asks for {unknown}, which is not done; leave it out")
        binary = each.parameters.get("binary_data", by_default)
        if not isinstance(binary, bool):
            raise DataError(f"the output {each.name} has binary_data {shown(binary)}; expected true or false")
        wanted.append((each.name, binary))
    if len(dict(wanted)) != len(wanted):
        raise DataError("an output is asked for twice; expected each once")
    return wanted


def _ignored(name: str) -> bool:
    return name in _IGNORED or name.startswith(_IGNORED_STARTS)


def _text(name: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise SettingsError(f"the parameter {shown(name)} is {shown(value)}; expected a number or a text")
    text = str(value)
    if len(text) > _LONGEST_PARAMETER:
        raise SettingsError(
            f"the parameter {shown(name)} has {len(text)} characters; expected {_LONGEST_PARAMETER} at most"
        )
    return text


def _timeout(value: object) -> float | None:
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise SettingsError(f"timeout is {shown(value)}; expected a whole number of microseconds")
    return value / _MICROSECONDS or None  # 0: the server's own


def _little(array: NDArray[Any]) -> bytes:
    return (array if sys.byteorder == "little" else array.byteswap()).tobytes()


def _bytes_of_texts(texts: Iterable[str]) -> bytes:
    """As a binary tensor of BYTES: each with its length in 4 bytes before it."""
    encoded = [text.encode() for text in texts]
    return b"".join(part for each in encoded for part in (len(each).to_bytes(4, "little"), each))
