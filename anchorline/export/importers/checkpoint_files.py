"""Reading other people's checkpoints safely: tensors by name, and no code of the file is ever run.

Four kinds of file: safetensors, what ``torch.save`` wrote, pickles of NumPy arrays (Detectron2's ``.pkl``)
and caffe's ``.caffemodel`` (``caffemodel.py``).
"""

from __future__ import annotations

import argparse
import math
import mmap
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anchorline.export.importers.caffemodel import read_caffemodel
from anchorline.runtime.io.errors import ArtefactError, reason_of
from anchorline.runtime.io.files import expect_regular, sha256_of

# Where training scripts keep the weights inside what they save; torchvision's own writes "model".
_NESTED = ("model", "state_dict", "model_state_dict")
# Tensors may share memory or repeat it (stride 0), so a small file can claim any size.
_LARGEST_CLAIM = 4  # times the file's size


@dataclass(frozen=True)
class CheckpointFile:
    """The tensors of a checkpoint by name, what to call it, and the SHA-256 of its bytes.

    ``meta`` is what MMDetection keeps beside the tensors: texts, numbers and plain containers. ``folder`` is
    where the file lies, and ``config`` the configuration that the user gives for it.
    """

    name: str
    state: Mapping[str, Tensor]
    sha256: str
    meta: Mapping[str, object] = field(default_factory=dict)
    folder: Path | None = None
    config: Path | None = None


def read_checkpoint_file(path: Path) -> CheckpointFile:
    """Read the tensors in ``path``: safetensors, what ``torch.save`` wrote, a pickle of arrays, caffe's.

    A state dict may stand alone or under ``model``, ``state_dict`` or ``model_state_dict``. Tensors are
    mapped from the file where its format allows it. Raises ``ArtefactError`` for a file that is missing,
    empty, damaged, holds Python objects other than tensors and arrays, or claims more than it can hold.
    """
    expect_regular(path)
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
    meta = meta if isinstance(meta, Mapping) else {}
    return CheckpointFile(path.name, tensors, sha256_of(path), meta, path.parent)


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
            f"{name}: cannot be downloaded ({reason_of(error, 160)}); download {weights.url} elsewhere and "
            "give the file"
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
                f"{path}: not a readable safetensors file ({reason_of(error, 160)}); it may be cut short or "
                "hostile"
            ) from None
    # torch's own pickles begin with a number.
    plain_pickle = start[:1] == b"\x80" and start[2:4] != b"\x8a\x0a"
    return read_array_pickle(path) if plain_pickle else read_torch_pickle(path)


def _find_state(content: Any, path: Path) -> dict[str, Tensor | NDArray[Any]]:
    """The first dictionary of dense tensors or arrays by name: the content itself, or one inside it."""
    if not isinstance(content, Mapping):
        raise ArtefactError(
            f"{path}: holds a {type(content).__name__}, expected tensors by name; save model.state_dict()"
        )
    for state in (content, *map(content.get, _NESTED)):
        if not isinstance(state, Mapping) or not state:
            continue
        values = {name: v.values if isinstance(v, PickledArray) else v for name, v in state.items()}
        if all(
            isinstance(name, str)
            and (isinstance(v, np.ndarray) or (isinstance(v, Tensor) and v.layout == torch.strided))
            for name, v in values.items()
        ):
            return cast(dict[str, Tensor | NDArray[Any]], values)
    shown = ", ".join(str(key)[:40] for key in list(content)[:5]) or "nothing"
    raise ArtefactError(
        f"{path}: holds no state dict, only {shown}; expected tensors by name, alone or under "
        f"{' or '.join(map(repr, _NESTED))}"
    )


# What ``torch.save`` wrote, through torch's unpickler of tensors and plain containers. Training checkpoints
# hold more than weights: objects of these libraries, by the first part of their names, are replaced by empty
# ones. None of their code runs, nothing is called, and what they held is dropped. NumPy's arrays are in the
# logs of mmengine, and ``getattr`` is how pickle writes the methods in them.
_EMPTIED = ("detectron2", "fvcore", "iopath", "yacs", "mmengine", "mmcv", "mmdet", "numpy", "getattr")
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
    mapped = True
    while len(allowed) <= _MOST_EMPTIED:
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            unknown = re.search(r"GLOBAL ([\w.]+)", str(error))
            if unknown is None:
                # torch's reason stands behind its advice to load all the same
                reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0][:160]
                raise ArtefactError(
                    f"{path}: not a checkpoint that torch.load reads ({reason}); expected a state dict"
                ) from None
            name = unknown.group(1)
            if name.partition(".")[0] not in _EMPTIED:
                raise ArtefactError(
                    f"{path}: holds Python objects ({name[:60]}), and loading those could run code; refused. "
                    "Save the weights alone: torch.save(model.state_dict(), path)"
                ) from None
            full = f"builtins.{name}" if name == "getattr" else name
            # Dictionaries remain such, since torch fills no other class.
            allowed.append((OrderedDict if name.endswith(".ConfigDict") else _Empty, full))
        except Exception as error:  # the readers raise many kinds for damaged files
            if mapped and "mmap can only be used" in str(error):  # files from before torch 1.6
                mapped = False
                continue
            raise ArtefactError(
                f"{path}: cannot be read as a checkpoint ({reason_of(error, 160)}); it may be cut short, "
                "copy it again"
            ) from None
    raise ArtefactError(f"{path}: holds objects of more than {_MOST_EMPTIED} kinds; refused")


# Pickles of NumPy arrays and plain containers, as Detectron2's ``.pkl``. A pickle is a program. Here it may
# build numbers, text, bytes, tuples, lists and dictionaries, and name the few functions that NumPy names when
# it pickles an array (``_CALLS``); each stands for a function of this module that checks what it is given. No
# class and no function of the file's choosing is looked up.

# What a pickle of protocol 2 to 5 needs for them. NEWOBJ is on the list so that a
# foreign class is refused by its name, on the way to it: nothing that ``find_class`` gives is a class.
_OPERATIONS = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1",
    "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINSTRING", "BINSTRING", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT",
    "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL",
    "STACK_GLOBAL", "REDUCE", "BUILD", "NEWOBJ",
}  # fmt: skip
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


def _ndarray(*_: Any) -> Any:
    raise Refused("a call of numpy.ndarray")


def _reconstruct(kind_of_array: Any, *_: Any) -> PickledArray:
    """NumPy's empty array, whose shape and contents come after it."""
    if kind_of_array is not _CALLS["numpy.ndarray"]:
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


_CALLS = {
    "collections.OrderedDict": _Named(_Mapping),
    "_codecs.encode": _Named(_encode),
    "__builtin__.bytes": _Named(_no_bytes),
    "numpy.ndarray": _Named(_ndarray),
    "numpy.dtype": _Named(_Kind),
    "numpy._core.multiarray._reconstruct": _Named(_reconstruct),
    "numpy._core.multiarray.scalar": _Named(lambda kind, raw: _array(raw, kind, (), "C").item()),
    # An array of protocol 5.
    "numpy._core.numeric._frombuffer": _Named(lambda *state: PickledArray(_array(*state))),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Named:
        """The function of ours that stands for ``module.name``."""
        found = _CALLS.get(f"{module}.{name}".replace("numpy.core.", "numpy._core.", 1))  # of NumPy 1
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
        raise ArtefactError(
            f"{path}: cannot be read as a pickle of arrays ({reason_of(error)}); it may be cut short, copy "
            "it again"
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
