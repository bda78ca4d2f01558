"""Reading caffe's ``.caffemodel``, a protobuf message of layers with their weights.

caffe.proto's few fields that lead to the weights are described below; the protobuf library skips all others.
Nothing in such a file is code. Before the library sees a file its fields are counted and their lengths added
up, because the library allocates something for every message that a file claims to hold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import Tensor

from anchorline.runtime.io.errors import ArtefactError

# By message: name, number and type of its fields (BVLC/caffe, src/caffe/proto/caffe.proto); * says repeated.
# Packed numbers have the form of a string of bytes, and as such millions of them are one object.
_FIELDS: dict[str, tuple[tuple[str, int, str], ...]] = {
    "BlobShape": (("dim*", 1, "int64"),),
    "BlobProto": (
        ("num", 1, "int64"),
        ("channels", 2, "int64"),
        ("height", 3, "int64"),
        ("width", 4, "int64"),
        ("data*", 5, "bytes"),
        ("shape", 7, "BlobShape"),
        ("double_data*", 8, "bytes"),
    ),
    "LayerParameter": (("name", 1, "bytes"), ("blobs*", 7, "BlobProto")),
    "V1LayerParameter": (("name", 4, "bytes"), ("blobs*", 6, "BlobProto")),
    "NetParameter": (("layers*", 2, "V1LayerParameter"), ("layer*", 100, "LayerParameter")),
}
_LAYERS = {2: 6, 100: 7}  # in NetParameter the fields of layers, and in those the fields of their blobs
_SHAPE = 7
_LENGTHS = 2  # the wire type of messages, strings and packed numbers
_SIZES = {1: 8, 5: 4}  # bytes by wire type

_LARGEST = 2**31 - 1  # bytes; protobuf has no larger messages
_MOST_FIELDS = 100_000  # VGG-16 has about a thousand
_LONGEST_NAME = 200
_LONGEST_SHAPE = 100  # bytes
_PARTS = ("weight", "bias")


def read_caffemodel(path: Path) -> dict[str, Tensor]:
    """The tensors in ``path``, float32, as ``layer.weight``, ``layer.bias``, ``layer.2`` and so on.

    Takes files of caffe since 2014 (``layer`` or ``layers``), with blobs in single or double precision.
    Shapes are the file's; in files of before 2015 all have four sides. Raises ``ArtefactError``
    for a file that is damaged, too large, of another kind, or claims more than it holds.
    """
    content = _read(path)
    try:
        _check_fields(memoryview(content))
        net = _message("NetParameter").FromString(content)
    except (ValueError, DecodeError, MemoryError) as error:
        reason = str(error) or "out of memory"
        raise ArtefactError(
            f"{path}: not a readable .caffemodel ({reason}); copy it again if it is one"
        ) from None
    del content  # the message holds a copy
    tensors: dict[str, Tensor] = {}
    for layer in (*net.layers, *net.layer):
        for index, blob in enumerate(layer.blobs):
            part = _PARTS[index] if index < len(_PARTS) else str(index)
            name = f"{_layer_name(layer.name, path)}.{part}"
            if name in tensors:
                raise ArtefactError(f"{path}: holds {name!r} twice; refused as damaged")
            tensors[name] = _tensor(blob, f"{path}: {name!r}")
    if not tensors:
        raise ArtefactError(
            f"{path}: holds no weights; expected a .caffemodel of 2014 or later (caffe's "
            "upgrade_net_proto_binary renews older ones)"
        )
    return tensors


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _LARGEST:
        raise ArtefactError(f"{path}: has {size / 1e9:.3g} GB; expected a .caffemodel of at most 2 GiB")
    content = path.read_bytes()
    for start, kind in (
        (b"\x89HDF", "weights in HDF5; save them with caffe's snapshot_format: BINARYPROTO"),
        (b"name:", "a prototxt, which describes a net; give the .caffemodel with its weights"),
    ):
        if content[:100].lstrip().startswith(start):
            raise ArtefactError(f"{path}: is {kind}")
    return content


def _layer_name(name: bytes, path: Path) -> str:
    text = name.decode("utf-8", "replace")
    if not name or len(name) > _LONGEST_NAME or not text.isprintable():
        raise ArtefactError(
            f"{path}: a layer with weights is called {text[:40]!r}; expected 1 to {_LONGEST_NAME} letters"
        )
    return text


def _tensor(blob: Any, where: str) -> Tensor:
    """A blob's numbers in its shape."""
    chunks, dtype = (blob.double_data, "<f8") if blob.double_data else (blob.data, "<f4")
    content = b"".join(chunks)
    shape = (
        tuple(blob.shape.dim)
        if blob.HasField("shape")
        else (blob.num, blob.channels, blob.height, blob.width)
    )
    claimed = math.prod(shape)
    if min(shape, default=0) < 1 or claimed * np.dtype(dtype).itemsize != len(content):
        raise ArtefactError(
            f"{where} has the shape {list(shape)[:8]} and {len(content)} bytes of "
            f"{np.dtype(dtype).name}; the file is damaged or hostile"
        )
    values: NDArray[Any] = np.frombuffer(content, dtype).astype(np.float32)
    return torch.from_numpy(values.reshape(shape))


@functools.cache
def _message(name: str) -> Any:
    """The class of the message ``name`` of ``_FIELDS``, in a pool of its own."""
    file = descriptor_pb2.FileDescriptorProto(name="anchorline/caffe.proto", package="caffe")
    for message, fields in _FIELDS.items():
        described = file.message_type.add(name=message)
        for field, number, kind in fields:
            added = described.field.add(name=field.rstrip("*"), number=number)
            added.label = added.LABEL_REPEATED if field.endswith("*") else added.LABEL_OPTIONAL
            if kind in _FIELDS:
                added.type, added.type_name = added.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                added.type = getattr(added, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}"))


def _check_fields(content: memoryview) -> None:
    """Raise ``ValueError`` where the fields of net, layers or blobs do not add up, or are too many."""
    seen = 0
    for number, net in _fields(content):
        seen += 1
        for inner, layer in _fields(net) if number in _LAYERS else ():
            seen += 1
            for innermost, blob in _fields(layer) if inner == _LAYERS[number] else ():
                seen += 1
                if innermost == _SHAPE and len(blob) > _LONGEST_SHAPE:
                    raise ValueError(f"a shape of {len(blob)} bytes")
                _check_count(seen)
            _check_count(seen)
        _check_count(seen)


def _check_count(seen: int) -> None:
    if seen > _MOST_FIELDS:
        raise ValueError(f"more than {_MOST_FIELDS} fields")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field of a message in protobuf's wire format."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        size = 0
        if kind == 0:
            _, at = _varint(message, at)
        elif kind == _LENGTHS:
            size, at = _varint(message, at)
        elif kind in _SIZES:
            size = _SIZES[kind]
        if number == 0 or (kind not in _SIZES and kind not in (0, _LENGTHS)):
            raise ValueError(f"byte {start} begins no field that caffe writes")
        if size > len(message) - at:
            raise ValueError(f"a field of {size} bytes, of which {len(message) - at} are there")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number of seven bits a byte that stands at ``at``, and where it ends."""
    value = 0
    for index, byte in enumerate(message[at : at + 10]):
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            return value, at + index + 1
    raise ValueError(f"a number at byte {at} that does not end")
