"""Reading other people's checkpoints safely: tensors by name, and no code of the file is ever run.

Four kinds of file: safetensors, what ``torch.save`` wrote, pickles of NumPy arrays (Detectron2's ``.pkl``)
and caffe's ``.caffemodel``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import mmap
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anchorline.runtime.io.errors import ArtefactError
from anchorline.runtime.io.files import sha256_of
from anchorline.runtime.io.protobuf import fields, packed_numbers

# Where training scripts keep the weights inside what they save; torchvision's own writes "model".
_NESTED = ("model", "state_dict", "model_state_dict")
# Tensors may share memory or repeat it (stride 0), so a small file can claim any size.
_LARGEST_CLAIM = 4  # times the file's size


@dataclass(frozen=True)
class CheckpointFile:
    """The tensors of a checkpoint by name, what to call it, and the SHA-256 of its bytes.

    ``meta`` is what MMDetection keeps beside the tensors: texts, numbers and plain containers.
    """

    name: str
    state: Mapping[str, Tensor]
    sha256: str
    meta: Mapping[str, object] = field(default_factory=dict)


def read_checkpoint_file(path: Path) -> CheckpointFile:
    """Read the tensors in ``path``: safetensors, what ``torch.save`` wrote, a pickle of arrays, caffe's.

    A state dict may stand alone or under ``model``, ``state_dict`` or ``model_state_dict``. Tensors are
    mapped from the file where its format allows it. Raises ``ArtefactError`` for a file that is missing,
    empty, damaged, holds Python objects other than tensors and arrays, or claims more than it can hold.
    """
    if not path.is_file():
        raise ArtefactError(
            f"{path}: no such file; expected a checkpoint saved with torch.save or safetensors"
        )
    size = path.stat().st_size
    if not size:
        raise ArtefactError(f"{path}: the file is empty; copy or download the checkpoint again")
    content = _read(path)
    state = _find_state(content, path)
    claimed = sum(value.nbytes for value in state.values())
    if claimed > _LARGEST_CLAIM * size:
        raise ArtefactError(
            f"{path}: its tensors claim {claimed / 1e9:.3g} GB in a file of {size / 1e6:.3g} MB; "
            "refused as damaged or hostile"
        )
    tensors = {
        # A copy of one's own: the file's bytes are read-only, and may be in the other byte order.
        name: value
        if isinstance(value, Tensor)
        else torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
        for name, value in state.items()
    }
    meta = content.get("meta")
    return CheckpointFile(path.name, tensors, sha256_of(path), meta if isinstance(meta, Mapping) else {})


def read_weights_enum(name: str) -> CheckpointFile:
    """The weights that torchvision publishes under ``name``: ``FasterRCNN_ResNet50_FPN_Weights.COCO_V1``.

    torchvision's loader downloads them once and keeps them. Raises ``ArtefactError`` without a network.
    """
    from torchvision.models import get_weight

    try:
        weights = get_weight(name)
    except (ValueError, KeyError):
        raise ArtefactError(
            f"{name}: no such file, and not the name of torchvision weights; expected a checkpoint or a name "
            "such as FasterRCNN_ResNet50_FPN_Weights.COCO_V1"
        ) from None
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no disk space, or a broken download
        raise ArtefactError(
            f"{name}: cannot be downloaded ({_one_line(error)}); download {weights.url} elsewhere and give "
            "the file"
        ) from None
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    return CheckpointFile(name, state, sha256_of(cached) if cached.is_file() else "")


def _read(path: Path) -> Any:
    """The contents by the format that the file has; only caffe's is told by its name."""
    if path.suffix == ".caffemodel":
        return read_caffemodel(path)
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":  # a length, then a JSON object
        try:
            with safe_open(path, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no dict)
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            raise ArtefactError(
                f"{path}: not a readable safetensors file ({_one_line(error)}); it may be cut short or "
                "hostile"
            ) from None
    # torch's own pickles begin with a number.
    plain_pickle = start[:1] == b"\x80" and start[2:4] != b"\x8a\x0a"
    return read_array_pickle(path) if plain_pickle else read_torch_pickle(path)


def _find_state(content: Any, path: Path) -> dict[str, Tensor | NDArray[Any]]:
    """The first dictionary of dense tensors or arrays by name: the content itself, or one inside it."""
    for state in (content, *(content.get(key) for key in _NESTED if isinstance(content, Mapping))):
        if isinstance(state, Mapping) and state:
            values: dict[Any, Any] = {
                n: v.values if isinstance(v, PickledArray) else v for n, v in state.items()
            }
            if all(
                isinstance(name, str)
                and (isinstance(v, np.ndarray) or (isinstance(v, Tensor) and v.layout == torch.strided))
                for name, v in values.items()
            ):
                return values
    if isinstance(content, Mapping):
        shown = ", ".join(str(key)[:40] for key in list(content)[:5]) or "nothing"
        raise ArtefactError(
            f"{path}: holds no state dict, only {shown}; expected tensors by name, alone or under "
            f"{' or '.join(map(repr, _NESTED))}"
        )
    raise ArtefactError(
        f"{path}: holds a {type(content).__name__}, expected tensors by name; save model.state_dict()"
    )


def _is_dense(value: object) -> bool:
    return isinstance(value, np.ndarray) or (isinstance(value, Tensor) and value.layout == torch.strided)


def _one_line(error: Exception) -> str:
    """The first line of what ``error`` says; torch's reason stands behind its advice to load all the same."""
    lines = str(error).strip().splitlines() or [""]
    reasons = [line.partition("WeightsUnpickler error: ")[2] for line in lines if "WeightsUn" in line]
    text = (reasons[0] if reasons else "") or lines[0].strip() or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


# What ``torch.save`` wrote, through torch's unpickler of tensors and plain containers.
#
# Training checkpoints hold more than weights. Objects that the libraries which we import from keep beside
# them are replaced by empty ones: none of their code runs, nothing is called, and what they held is dropped.

# By the first part of a name. NumPy's arrays are in the logs of mmengine, and ``getattr`` is how pickle
# writes the methods in them; each is an ``_Empty`` like the others.
_EMPTIED = ("detectron2", "fvcore", "iopath", "yacs", "mmengine", "mmcv", "mmdet", "numpy")
_EMPTIED_FUNCTIONS = ("getattr",)
_MOST_EMPTIED = 100


class _Empty:
    """Takes whatever an object is made from, and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> _Empty:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def read_torch_pickle(path: Path) -> Any:
    """The contents of ``path``. Raises ``ArtefactError`` for other objects and damaged files."""
    # torchvision's training reference keeps its command-line arguments beside the weights.
    allowed: list[Any] = [argparse.Namespace]
    for _ in range(_MOST_EMPTIED):
        try:
            with torch.serialization.safe_globals(allowed):
                return _load(path)
        except pickle.UnpicklingError as error:
            unknown = re.search(r"GLOBAL ([\w.]+)", str(error))
            if unknown is None:
                raise ArtefactError(
                    f"{path}: not a checkpoint that torch.load reads ({_one_line(error)}); expected a state "
                    "dict"
                ) from None
            name = unknown.group(1)
            if name.partition(".")[0] not in _EMPTIED and name not in _EMPTIED_FUNCTIONS:
                raise ArtefactError(
                    f"{path}: holds Python objects ({name[:60]}), and loading those could run code; refused. "
                    "Save the weights alone: torch.save(model.state_dict(), path)"
                ) from None
            full = f"builtins.{name}" if name in _EMPTIED_FUNCTIONS else name
            # Dictionaries remain such, since torch fills no other class.
            allowed.append((OrderedDict if name.endswith(".ConfigDict") else _Empty, full))
        except Exception as error:  # the readers raise many kinds for damaged files
            raise ArtefactError(
                f"{path}: cannot be read as a checkpoint ({_one_line(error)}); it may be cut short, copy it "
                "again"
            ) from None
    raise ArtefactError(f"{path}: holds objects of more than {_MOST_EMPTIED} kinds; refused")


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):  # files from before torch 1.6
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


# Pickles of NumPy arrays and plain containers, as Detectron2's ``.pkl``, read without running any of them.
#
# A pickle is a program. Here it may build numbers, text, bytes, tuples, lists and dictionaries, and name
# the few functions that NumPy names when it pickles an array (``_CALLS``); each stands for a function of
# this module that checks what it is given. No class and no function of the file's choosing is looked up.

# What a pickle of protocol 2 to 5 needs for arrays and plain containers. NEWOBJ is on the list so that a
# foreign class is refused by its name, on the way to it: nothing that ``find_class`` gives is a class.
_OPERATIONS = frozenset(
    name
    for names in (
        "PROTO FRAME STOP MARK POP POP_MARK",
        "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT",
        "SHORT_BINSTRING BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8",
        "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8",
        "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS",
        "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET",
        "GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ",
    )
    for name in names.split()
)
# Hashing a tuple within a tuple within ... takes C stack, and a dictionary hashes its keys. Six tuples
# belong to each array, so this is enough for the deepest networks.
_MOST_TUPLES = 20_000
_KINDS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8", "b1"}


class Refused(pickle.UnpicklingError):
    """The pickle asks for something that arrays and plain containers do not need."""


class PickledArray:
    """An array of the file; ``values`` is a read-only view of the file's bytes once its state was read."""

    __slots__ = ("values",)

    def __init__(self, values: NDArray[Any] | None = None) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        _version, shape, kind, fortran, raw = state
        self.values = _array(raw, kind, shape, "F" if fortran else "C")


class _Mapping(dict[Any, Any]):
    """What an ``OrderedDict`` becomes; attributes that the file gives it are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Kind:
    """A NumPy dtype: a code such as ``f4``, and the byte order that its state brings."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or code not in _KINDS:
            raise Refused(f"an array of the type {str(code)[:20]!r}; expected numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise Refused(f"the byte order {str(state[1])[:20]!r}")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Named:
    """A function that a pickle may name. It is no class, and a pickle cannot change it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise Refused("attributes for a function")


def _not_called(*_: Any) -> Any:
    raise Refused("a call of numpy.ndarray")


_NDARRAY = _Named(_not_called)


def _reconstruct(kind_of_array: Any, *_: Any) -> PickledArray:
    """NumPy's empty array, whose shape and contents come after it."""
    if kind_of_array is not _NDARRAY:
        raise Refused("an array of another class than numpy.ndarray")
    return PickledArray()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How bytes are written before protocol 3."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused(f"the text encoding {str(encoding)[:20]!r}; expected latin1")
    return text.encode("latin1")


def _no_bytes(*arguments: Any) -> bytes:
    """How no bytes at all are written before protocol 3."""
    if arguments:
        raise Refused("a call of bytes")
    return b""


def _array(raw: Any, kind: Any, shape: Any, order: Any) -> NDArray[Any]:
    """A view of ``raw``, which has to hold exactly the elements of ``shape``."""
    raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2's bytes
    sizes = isinstance(shape, tuple) and all(type(side) is int and 0 <= side < 1 << 40 for side in shape)
    fits = isinstance(raw, bytes | bytearray) and isinstance(kind, _Kind) and sizes and len(shape) <= 8
    if not fits or order not in ("C", "F"):
        raise Refused("an array whose state is not NumPy's")
    if math.prod(shape) * kind.dtype.itemsize != len(raw):
        raise Refused(f"an array of shape {str(list(shape))[:40]} in {len(raw)} bytes")
    return np.frombuffer(raw, kind.dtype).reshape(shape, order=order)


_CALLS: dict[tuple[str, str], _Named] = {
    ("collections", "OrderedDict"): _Named(_Mapping),
    ("_codecs", "encode"): _Named(_encode),
    ("__builtin__", "bytes"): _Named(_no_bytes),
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Named(_Kind),
    **{
        (f"numpy.{core}.{module}", name): _Named(function)
        for core in ("core", "_core")  # NumPy 1 and 2
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", lambda kind, raw: _array(raw, kind, (), "C").item()),
            # NumPy's array of protocol 5.
            ("numeric", "_frombuffer", lambda *state: PickledArray(_array(*state))),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Named:
        """The function of ours that stands for ``module.name``."""
        found = _CALLS.get((module, name))
        if found is None:
            raise Refused(f"Python objects ({module[:60]}.{name[:60]}), and loading those could run code")
        return found


def read_array_pickle(path: Path) -> Any:
    """What ``path`` holds, with ``PickledArray`` for each array. Raises ``ArtefactError``."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _check_operations(content)
            content.seek(0)
            return _Unpickler(content, encoding="latin1").load()
    except Refused as error:
        raise ArtefactError(
            f"{path}: holds {error}; refused. Expected a dictionary of NumPy arrays or tensors"
        ) from None
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
        raise ArtefactError(
            f"{path}: cannot be read as a pickle of arrays ({reason}); it may be cut short, copy it again"
        ) from None


def _check_operations(content: mmap.mmap) -> None:
    """Refuse what would take the unpickler's memory or stack before it looks up the first name.

    Sizes are checked against the file on the way: ``genops`` raises where the file ends too early. The
    unpickler makes its memo as long as the highest index, of which the pickler leaves none out.
    """
    tuples = 0
    for count, (operation, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], content))):
        if operation.name not in _OPERATIONS:
            raise Refused(f"the pickle operation {operation.name}, which arrays do not need")
        tuples += operation.name.startswith("TUPLE")
        if tuples > _MOST_TUPLES:
            raise Refused(f"more than {_MOST_TUPLES} tuples, perhaps within each other")
        if operation.name in ("BINPUT", "LONG_BINPUT") and cast(int, argument) > count:
            raise Refused(f"a memo index of {argument} after {count} operations")


# caffe's ``.caffemodel``, a protobuf message of layers with their weights (BVLC/caffe,
# src/caffe/proto/caffe.proto). Nothing in such a file is code.

# Of NetParameter: the fields that hold layers, and in those the fields of their name and their blobs.
_LAYERS = {2: (4, 6), 100: (1, 7)}
_SIDES, _DATA, _SHAPE, _DOUBLES = (1, 2, 3, 4), 5, 7, 8  # of BlobProto
_PARTS = ("weight", "bias")

_LARGEST = 2**31 - 1  # bytes; protobuf has no larger messages
_MOST_FIELDS = 100_000  # VGG-16 has about a thousand
_LONGEST_NAME = 200
_LONGEST_SHAPE = 100  # bytes


@dataclass
class _Blob:
    """Sides as they were before 2015, the shape since, and where the numbers are."""

    sides: list[int] = field(default_factory=lambda: [0] * 4)
    shape: list[int] | None = None
    numbers: dict[int, list[slice]] = field(default_factory=lambda: {_DATA: [], _DOUBLES: []})


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
        for index, blob in enumerate(blobs):
            name = f"{layer}.{_PARTS[index] if index < len(_PARTS) else index}"
            if name in tensors:
                raise ArtefactError(f"{path}: holds {name!r} twice; refused as damaged")
            tensors[name] = _tensor(content, blob, f"{path}: {name!r}")
    if not tensors:
        raise ArtefactError(
            f"{path}: holds no weights; expected a .caffemodel of 2014 or later (caffe's "
            "upgrade_net_proto_binary renews older ones)"
        )
    return tensors


def _layers(content: bytes) -> list[tuple[bytes, list[_Blob]]]:
    """Name and blobs of each layer; raises ``ValueError`` where fields do not add up, or are too many."""
    seen = itertools.count(1)

    def parts(place: slice) -> Iterator[tuple[int, int | slice]]:
        for each in fields(content, "caffe", place.start, place.stop):
            if next(seen) > _MOST_FIELDS:
                raise ValueError(f"more than {_MOST_FIELDS} fields")
            yield each

    found: dict[int, list[tuple[bytes, list[_Blob]]]] = {number: [] for number in _LAYERS}
    for number, layer in parts(slice(0, len(content))):
        if number not in _LAYERS or not isinstance(layer, slice):
            continue
        name, blobs = b"", []
        for inner, place in parts(layer):
            if isinstance(place, slice) and inner == _LAYERS[number][0]:
                name = content[place]
            elif isinstance(place, slice) and inner == _LAYERS[number][1]:
                blobs.append(_blob(content, parts(place)))
        found[number].append((name, blobs))
    return [layer for layers in found.values() for layer in layers]


def _blob(content: bytes, parts: Iterator[tuple[int, int | slice]]) -> _Blob:
    blob = _Blob()
    for number, value in parts:
        if isinstance(value, int):
            if number in _SIDES:
                blob.sides[number - 1] = value
        elif number in blob.numbers:
            blob.numbers[number].append(value)
        elif number == _SHAPE:
            if value.stop - value.start > _LONGEST_SHAPE:
                raise ValueError(f"a shape of {value.stop - value.start} bytes")
            blob.shape = []
            for _, side in fields(content, "caffe", value.start, value.stop):
                blob.shape += [side] if isinstance(side, int) else packed_numbers(content, side)
    return blob


def _tensor(content: bytes, blob: _Blob, where: str) -> Tensor:
    """A blob's numbers in its shape."""
    number, dtype = (_DOUBLES, np.dtype("<f8")) if blob.numbers[_DOUBLES] else (_DATA, np.dtype("<f4"))
    raw = b"".join(content[place] for place in blob.numbers[number])
    shape = blob.sides if blob.shape is None else blob.shape
    if min(shape, default=0) < 1 or math.prod(shape) * dtype.itemsize != len(raw):
        raise ArtefactError(
            f"{where} has the shape {shape[:8]} and {len(raw)} bytes of {dtype.name}; the file is damaged or "
            "hostile"
        )
    values: NDArray[Any] = np.frombuffer(raw, dtype).astype(np.float32)
    return torch.from_numpy(values.reshape(shape))
