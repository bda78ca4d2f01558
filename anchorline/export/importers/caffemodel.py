"""caffe's ``.caffemodel``, a protobuf message (BVLC/caffe, src/caffe/proto/caffe.proto)."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.io.protobuf import fields, packed_numbers

# Of NetParameter: the fields that hold layers, and in those the fields of their name and their blobs.
_LAYERS = {2: (4, 6), 100: (1, 7)}
_SIDES, _DATA, _SHAPE, _DOUBLES = (1, 2, 3, 4), 5, 7, 8  # of BlobProto; sides are of before 2015
_Blob = tuple[list[int], int, list[slice]]  # the shape, the field of the numbers, and where those are
_PARTS = ("weight", "bias")

_LARGEST = 2**31 - 1  # bytes; protobuf has no larger messages
_MOST_FIELDS = 100_000  # VGG-16 has about a thousand
_LONGEST_NAME = 200
_LONGEST_SHAPE = 100  # bytes


def read_caffemodel(path: Path) -> dict[str, Tensor]:
    """The tensors in ``path``, float32, as ``layer.weight``, ``layer.bias``, ``layer.2`` and so on.

    Takes files of caffe since 2014 (``layer`` or ``layers``), with blobs in single or double precision.
    Shapes are the file's; in files of before 2015 all have four sides. Raises ``ArtefactError``
    for a file that is damaged, too large, of another kind, or claims more than it holds.
    """
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
    try:
        layers = _layers(content)
    except (ValueError, MemoryError) as error:
        reason = str(error) or "out of memory"
        raise ArtefactError(
            f"{path}: not a readable .caffemodel ({reason}); copy it again if it is one"
        ) from None
    tensors: dict[str, Tensor] = {}
    for raw, blobs in layers:
        layer = raw.decode("utf-8", "replace")
        if blobs and (not raw or len(raw) > _LONGEST_NAME or not layer.isprintable()):
            raise ArtefactError(
                f"{path}: a layer with weights is called {layer[:40]!r}; expected 1 to {_LONGEST_NAME} "
                "letters"
            )
        for index, (shape, number, places) in enumerate(blobs):
            name = f"{layer}.{_PARTS[index] if index < len(_PARTS) else index}"
            if name in tensors:
                raise ArtefactError(f"{path}: holds {name!r} twice; refused as damaged")
            dtype = np.dtype("<f8" if number == _DOUBLES else "<f4")
            raw = b"".join(content[place] for place in places)
            if min(shape, default=0) < 1 or math.prod(shape) * dtype.itemsize != len(raw):
                raise ArtefactError(
                    f"{path}: {name!r} has the shape {shape[:8]} and {len(raw)} bytes of {dtype.name}; the "
                    "file is damaged or hostile"
                )
            tensors[name] = torch.from_numpy(np.frombuffer(raw, dtype).astype(np.float32).reshape(shape))
    if not tensors:
        raise ArtefactError(
            f"{path}: holds no weights; expected a .caffemodel of 2014 or later (caffe's "
            "upgrade_net_proto_binary renews older ones)"
        )
    return tensors


def _layers(content: bytes) -> list[tuple[bytes, list[_Blob]]]:
    """Name and blobs of each layer; raises ``ValueError`` where fields do not add up, or are too many."""
    seen = itertools.count(1)

    def message(place: slice) -> tuple[dict[int, int], dict[int, list[slice]]]:
        """By the number of the field: numbers, and the places of all else."""
        numbers, places = defaultdict[int, int](int), defaultdict[int, list[slice]](list)
        for number, value in fields(content, "caffe", place.start, place.stop):
            if next(seen) > _MOST_FIELDS:
                raise ValueError(f"more than {_MOST_FIELDS} fields")
            if isinstance(value, slice):
                places[number].append(value)
            else:
                numbers[number] = value
        return numbers, places

    def blob(place: slice) -> _Blob:
        numbers, places = message(place)
        shape = [numbers[side] for side in _SIDES]
        for dims in places[_SHAPE]:
            if dims.stop - dims.start > _LONGEST_SHAPE:
                raise ValueError(f"a shape of {dims.stop - dims.start} bytes")
            shape = []
            for _, side in fields(content, "caffe", dims.start, dims.stop):
                shape += [side] if isinstance(side, int) else packed_numbers(content, side)
        kind = _DOUBLES if places[_DOUBLES] else _DATA
        return shape, kind, places[kind]

    layers = []
    _, net = message(slice(0, len(content)))
    for number, (name, blobs) in _LAYERS.items():
        for layer in net[number]:
            _, parts = message(layer)
            title = content[parts[name][-1]] if parts[name] else b""
            layers.append((title, [blob(place) for place in parts[blobs]]))
    return layers
