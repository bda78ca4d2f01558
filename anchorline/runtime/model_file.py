"""Model files as they lie on disk: what they carry, and whether they are what was written.

Read without onnx and safetensors, and before anything else opens them, so that every reader (``Detector``,
``doctor``, ``build``, ``export``) refuses the same files with the same words.

What anchorline writes has a digest under ``DIGEST_KEY`` in its metadata: the SHA-256 of all that is in the
file but that entry and the metadata of other tools, whose keys do not begin with ``anchorline.``; those may
be added and changed. A file without one, by an older version or with the entry taken out, opens as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
from msgspec import Meta

from anchorline.runtime.contract import CONTRACT_KEY, Contract
from anchorline.runtime.io.errors import ArtefactError, printable, shown
from anchorline.runtime.io.files import input_errors
from anchorline.runtime.io.protobuf import Buffer, bytes_field, fields
from anchorline.runtime.io.schema import LARGEST_TEXT

DIGEST_KEY = "anchorline.digest"
NO_DIGEST = "0" * 64  # in the header of a checkpoint until ``write_digest`` has been there
_OWN = "anchorline."  # how our metadata's keys begin
_PIECE = 1 << 20  # bytes that are read at a time
_BLOCK = 1 << 16  # of a file that is walked
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own bound
_LONGEST_LIST = 200  # characters

Parts = tuple[bytes | slice, ...]  # of a file: bytes that say what follows, and where that is
Natural = Annotated[int, Meta(ge=0)]


@dataclass(frozen=True)
class ModelFile:
    """A file with a contract. ``kind`` says in words what it is, ``hashed`` what its digest is of, ``shapes``
    which tensors a checkpoint holds."""

    path: Path
    kind: str
    metadata: Mapping[str, str]
    contract: Contract
    hashed: Parts = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    @property
    def digest(self) -> str | None:
        """The one that the file states."""
        return self.metadata.get(DIGEST_KEY)

    def check(self) -> str:
        """The digest of the file as it is; ``ArtefactError`` where it states another."""
        with input_errors(self.path), self.path.open("rb") as file:
            found = _sha256(file, self.hashed)
        if self.digest not in (None, found):
            raise ArtefactError(
                f"{self.path}: is not as anchorline wrote it (another SHA-256 than its {DIGEST_KEY}): it was "
                "damaged, or changed by another tool; copy it or make it again (or, for a change on purpose, "
                "take that entry out of its metadata)"
            )
        return found

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        """``check`` beside the block that loads the file; that it is damaged comes before what the block says
        of it. Where the file states no digest, nothing is read."""
        if self.digest is None:
            yield
            return
        with ThreadPoolExecutor(1, "anchorline-digest") as pool:  # hashing does not hold Python's lock
            checking = pool.submit(self.check)
            try:
                yield
            finally:
                checking.result()


def read_onnx(path: Path) -> ModelFile:
    """An exported ONNX file; raises ``ArtefactError`` for one that is missing, damaged, foreign or at odds
    with its contract, whose tensors are in other files, or whose functions call themselves."""
    with input_errors(path, "give an ONNX file written by anchorline export"):
        if path.is_dir():
            raise ArtefactError(f"{path}: is a folder, expected an ONNX file")
        with path.open("rb") as file:
            content = _Window(file)
            if not len(content):
                raise ArtefactError(f"{path}: the file is empty, expected an ONNX file; export it again")
            try:
                return _read_model_proto(path, content)
            except ArtefactError:
                raise
            except (ValueError, RecursionError) as error:
                reason = printable(str(error))[:_LONGEST_LIST]
                raise ArtefactError(
                    f"{path}: not an ONNX file, or one that was cut off ({reason}); export or copy it again"
                ) from None


def read_safetensors(path: Path) -> ModelFile:
    """A checkpoint by its header; raises ``ArtefactError`` for one that is missing, damaged or foreign."""
    with input_errors(path, "expected a model.safetensors written by anchorline train"):
        if path.is_dir():
            raise ArtefactError(f"{path}: is a folder, expected a model.safetensors")
        with path.open("rb") as file:
            start, table, metadata = _safetensors_header(path, file)
            size = file.seek(0, io.SEEK_END)
    missing = start + max((each.data_offsets[1] for each in table.values()), default=0) - size
    if missing > 0:
        raise ArtefactError(f"{path}: was cut short, {missing} bytes are missing at its end; copy it again")
    contract = _contract(path, metadata, "expected a checkpoint written by anchorline train or import")
    own = {key: text for key, text in metadata.items() if _is_hashed(key)}
    described = json.dumps([own, msgspec.to_builtins(table)], sort_keys=True).encode()
    kind = "checkpoint of PyTorch weights (safetensors)"
    shapes = {name: tuple(each.shape) for name, each in table.items()}
    return ModelFile(path, kind, metadata, contract, (described, slice(start, size)), shapes)


def with_digest(content: bytes) -> bytes:
    """A serialised ``ModelProto`` that has none with its digest: one more entry of metadata, at the end."""
    parts = [part for number, value, key, _ in _model_fields(content) for part in _parts(number, value, key)]
    digest = _sha256(io.BytesIO(content), tuple(parts))
    return content + bytes_field(
        _METADATA, bytes_field(1, DIGEST_KEY.encode()) + bytes_field(2, digest.encode())
    )


def write_digest(path: Path) -> None:
    """Put the digest of a checkpoint where its header has ``NO_DIGEST``."""
    model = read_safetensors(path)
    place = f'"{DIGEST_KEY}":"'.encode()
    with path.open("r+b") as file:
        digest = _sha256(file, model.hashed).encode()
        file.seek(0)
        at = file.read(_LARGEST_HEADER).index(place + NO_DIGEST.encode()) + len(place)
        file.seek(at)
        file.write(digest)


class _Window:
    """A file as a buffer of which is read what is asked for. Not mapped: were it cut short meanwhile, that
    would end the process."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, file.seek(0, io.SEEK_END)
        self._start, self._block = 0, b""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: slice) -> bytes:
        start, stop = place.start, min(place.stop, self._size)
        if start < self._start or stop > self._start + len(self._block):
            self._file.seek(start)
            self._start, self._block = start, self._file.read(max(stop - start, _BLOCK))
        return self._block[start - self._start : stop - self._start]


def _sha256(file: BinaryIO, parts: Parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes):
            digest.update(part)
            continue
        file.seek(part.start)
        left = part.stop - part.start
        while left and (piece := file.read(min(_PIECE, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _is_hashed(key: str) -> bool:
    return key.startswith(_OWN) and key != DIGEST_KEY


def _contract(path: Path, metadata: Mapping[str, str], remedy: str) -> Contract:
    if CONTRACT_KEY not in metadata:
        raise ArtefactError(f"{path}: has no anchorline contract; {remedy}")
    return Contract.from_json(metadata[CONTRACT_KEY], str(path))


# Safetensors: eight bytes of length, a header of JSON, the tensors.


class _Tensor(msgspec.Struct):
    dtype: str
    shape: list[Natural]
    data_offsets: tuple[Natural, Natural]


def _safetensors_header(path: Path, file: BinaryIO) -> tuple[int, dict[str, _Tensor], dict[str, str]]:
    """Where the tensors begin, their table, and the header's ``__metadata__``."""
    length = int.from_bytes(file.read(8), "little")
    try:
        whole = file.read(length) if 0 < length <= _LARGEST_HEADER else b""
        header = json.loads(whole if len(whole) == length else b"")
        metadata = msgspec.convert(header.pop("__metadata__", {}), dict[str, str])
        return 8 + length, msgspec.convert(header, dict[str, _Tensor]), metadata
    except (msgspec.ValidationError, ValueError, OverflowError, AttributeError, RecursionError):
        raise ArtefactError(
            f"{path}: not a readable safetensors file; it may be cut short, copy it again"
        ) from None


# ONNX: a ModelProto by the field numbers of onnx.proto3.

_PRODUCER, _GRAPH, _OPSET_IMPORT, _METADATA, _FUNCTION = 2, 7, 8, 14, 25
_NODE, _INITIALIZER, _INPUT, _OUTPUT = 1, 5, 11, 12  # of GraphProto
_OP_TYPE, _NODE_DOMAIN, _FUNCTION_NAME, _FUNCTION_DOMAIN = 4, 7, 1, 10
_TENSOR_NAME, _EXTERNAL_DATA, _DATA_LOCATION = 8, 13, 14
_LOCATION = b"location"  # the key under which a tensor names another file
# What a message holds, by field: where tensors and calls of functions stand.
_HELD: Mapping[str, Mapping[int, str]] = {
    "graph": {_NODE: "node", _INITIALIZER: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse tensor",
        23: "sparse tensor",
    },
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 11: "attribute"},
}
_DEEPEST = 64  # of these inside each other
_LARGEST_FUNCTIONS = 1 << 24  # bytes
_MOST_INLINED = 10_000_000  # nodes, when every call of a function has become its body
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 10: "float16", 16: "bfloat16"}


def _message(content: Buffer, place: slice) -> Iterator[tuple[int, int | slice]]:
    return fields(content, "ONNX", place.start, place.stop)


def _model_fields(content: Buffer) -> Iterator[tuple[int, int | slice, str, str]]:
    """The fields of a ModelProto; key and text of those that are metadata."""
    for number, value in fields(content, "ONNX"):
        key = text = ""
        if number == _METADATA and isinstance(value, slice):
            if value.stop - value.start > LARGEST_TEXT:
                raise ValueError(f"an entry of metadata has over {LARGEST_TEXT} bytes")
            inner = dict(_message(content, value))
            key = _text(content, inner.get(1))
            text = _text(content, inner.get(2), "surrogateescape" if key.startswith(_OWN) else "replace")
        yield number, value, key, text


def _parts(number: int, value: int | slice, key: str) -> Parts:
    """What the digest is of in this field of a ModelProto."""
    if number == _METADATA and not _is_hashed(key):
        return ()
    if isinstance(value, int):
        return (f"{number}={value};".encode(),)
    return f"{number}:{value.stop - value.start};".encode(), value


def _read_model_proto(path: Path, content: Buffer) -> ModelFile:
    producer, opset = "", 0
    graphs: list[slice] = []
    functions: list[slice] = []
    metadata: dict[str, str] = {}
    parts: list[bytes | slice] = []
    for number, value, key, text in _model_fields(content):
        parts += _parts(number, value, key)
        if not isinstance(value, slice):
            continue
        if number == _PRODUCER:
            producer = _text(content, value)[:_LONGEST_LIST]
        elif number == _GRAPH:
            graphs.append(value)
        elif number == _FUNCTION:
            functions.append(value)
        elif number == _METADATA:
            metadata[key] = text
        elif number == _OPSET_IMPORT:  # a domain and a version
            inner = dict(_message(content, value))
            domain, version = _text(content, inner.get(1)), inner.get(2)
            if domain in ("", "ai.onnx") and isinstance(version, int):
                opset = version
    if len(graphs) != 1 or not opset:
        raise ValueError("it has no graph" if not graphs else "it has no opset, or several graphs")
    contract = _contract(
        path, metadata, "export it with anchorline export (a file that was cut off loses it as well)"
    )
    nodes, initializers = 0, set()
    for kind, place in (
        *_inside(content, "graph", graphs[0], _LOCATION),
        *(each for function in functions for each in _inside(content, "function", function, _LOCATION)),
    ):
        nodes += kind == "node"
        if kind == "tensor":
            initializers.add(_checked_tensor(path, content, place))
    _check_functions(path, content, functions, nodes)
    _check_tensors(path, content, graphs[0], initializers, contract)
    kind = f"ONNX graph, opset {opset}" + (f", written by {producer}" if producer else "")
    return ModelFile(path, kind, metadata, contract, tuple(parts))


def _inside(
    content: Buffer, kind: str, place: slice, needle: bytes = b"", room: int = _DEEPEST
) -> Iterator[tuple[str, slice]]:
    """The messages inside one that are in ``_HELD``, at any depth: their kinds and places. What is inside
    those without the bytes ``needle`` is passed over."""
    if not room:
        raise ValueError("its messages are nested too deeply")
    for number, value in _message(content, place):
        inner = _HELD[kind].get(number)
        if inner is None or not isinstance(value, slice):
            continue
        yield inner, value
        if inner != "tensor" and (not needle or needle in content[value]):
            yield from _inside(content, inner, value, needle, room - 1)


def _checked_tensor(path: Path, content: Buffer, place: slice) -> str:
    """The name of a tensor, which must not lie in another file."""
    name, elsewhere = "", False
    for number, value in _message(content, place):
        if number == _TENSOR_NAME:
            name = _text(content, value)
        elsewhere |= number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0)
    if elsewhere:
        raise ArtefactError(
            f"{path}: its tensor {shown(name)} lies in another file; expected one file that holds all, as "
            "anchorline export writes it; export the model again"
        )
    return name


def _check_functions(path: Path, content: Buffer, functions: list[slice], nodes: int) -> None:
    """No function may call itself, and all calls together become a bounded number of nodes."""
    if sum(place.stop - place.start for place in functions) > _LARGEST_FUNCTIONS:
        raise ArtefactError(f"{path}: its functions have over {_LARGEST_FUNCTIONS} bytes; export it again")
    calls: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for place in functions:
        own = dict(_message(content, place))
        called = [
            _name(content, dict(_message(content, node)), _NODE_DOMAIN, _OP_TYPE)
            for kind, node in _inside(content, "function", place)
            if kind == "node"
        ]
        calls.setdefault(_name(content, own, _FUNCTION_DOMAIN, _FUNCTION_NAME), []).extend(called)
    sizes: dict[tuple[str, str], int] = {}

    def size(name: tuple[str, str], callers: tuple[tuple[str, str], ...] = ()) -> int:
        if name in callers or len(callers) > _DEEPEST:
            what = "calls itself" if name in callers else "is called through too many others"
            raise ArtefactError(f"{path}: its function {shown(name[1])} {what}; export the model again")
        if name not in sizes:
            sizes[name] = sum(1 + size(each, (*callers, name)) for each in calls.get(name, ()))
        return sizes[name]

    inlined = nodes * max(map(size, calls), default=0)
    if inlined > _MOST_INLINED:
        raise ArtefactError(
            f"{path}: its functions may unfold to {inlined} nodes; expected at most {_MOST_INLINED}; export "
            "the model again"
        )


def _check_tensors(
    path: Path, content: Buffer, graph: slice, initializers: set[str], contract: Contract
) -> None:
    """The tensors that the contract names must be there, and ``images`` must have the canvas it states, or
    free sides."""
    found: dict[int, dict[str, slice]] = {_INPUT: {}, _OUTPUT: {}}
    for number, value in _message(content, graph):
        if number in found and isinstance(value, slice):
            name = _text(content, dict(_message(content, value)).get(1))
            found[number][name] = value
    inputs = {name: place for name, place in found[_INPUT].items() if name not in initializers}
    for kind, have, want in (
        ("inputs", [*inputs], contract.inputs),
        ("outputs", [*found[_OUTPUT]], contract.outputs),
    ):
        if set(want) - set(have) or (kind == "inputs" and len(have) != len(want)):
            there = printable(", ".join(have))[:_LONGEST_LIST]
            raise ArtefactError(
                f"{path}: graph {kind} are {there}; its contract expects {', '.join(want)}; "
                "export the model again"
            )
    images, expected = contract.inputs[0], [*(contract.canvas or ("height", "width")), 3]
    dtype, shape = _type(content, inputs[images])
    if dtype != contract.input_dtype or shape[1:] != expected:
        raise ArtefactError(
            f"{path}: input {images} is {dtype} {shown(shape)}; its contract expects {contract.input_dtype} "
            f"[B, {', '.join(map(str, expected))}]; export the model again"
        )


def _type(content: Buffer, value_info: slice) -> tuple[str, list[int | str]]:
    """Of a ValueInfoProto: the element type, and each side's size or name."""

    def held(place: Any, number: int, kind: type = slice) -> Any:
        inner = _message(content, place) if isinstance(place, slice) else ()
        return [value for each, value in inner if each == number and isinstance(value, kind)]

    tensors = [tensor for kind in held(value_info, 2) for tensor in held(kind, 1)]
    dtypes = [dtype for tensor in tensors for dtype in held(tensor, 1, int)]
    shape: list[int | str] = []
    for dim in (dim for tensor in tensors for sides in held(tensor, 2) for dim in held(sides, 1)):
        numbers, names = held(dim, 1, int), held(dim, 2)
        shape.append(numbers[-1] if numbers else _text(content, names[-1]) if names else "?")
    return _DTYPES.get(dtypes[-1] if dtypes else 0, "of another type"), shape


def _name(content: Buffer, message: Mapping[int, int | slice], domain: int, name: int) -> tuple[str, str]:
    return _text(content, message.get(domain)), _text(content, message.get(name))


def _text(content: Buffer, place: int | slice | None, errors: str = "replace") -> str:
    return content[place].decode("utf-8", errors) if isinstance(place, slice) else ""
