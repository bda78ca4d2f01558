"""Pickles of NumPy arrays and plain containers, as Detectron2's ``.pkl``, and what any pickle may ask for.

A pickle is a program. Here it may build numbers, text, bytes, tuples, lists and dictionaries, and name the
few functions that NumPy names when it pickles an array (``_CALLS``); each stands for a function of this
module that checks what it is given. No class and no function of the file's choosing is looked up.
"""

from __future__ import annotations

import math
import mmap
import pickle
import pickletools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from anchorline.runtime.io.errors import ArtefactError, reason_of

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
# Hashing a tuple within a tuple within ... takes C stack, and a dictionary hashes its keys.
_DEEPEST_TUPLE = 1000
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
            check_operations(cast(IO[bytes], content), len(content), _OPERATIONS)
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


def check_operations(content: IO[bytes], size: int, allowed: Collection[str] | None = None) -> None:
    """Refuse what would take the unpickler's memory or stack before it looks up the first name.

    Sizes are checked against the file on the way: ``genops`` raises where the file ends too early. The
    unpickler makes its memo as long as the highest index, of which the pickler leaves none out. A bytearray
    may be asked for by its length. Followed are the tuples within each value on the stack; a mark has none.
    """
    depths: list[int | None] = []
    memo: dict[int, int | None] = {}
    longest, lengths = 0, False
    for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
        name = operation.name
        if allowed is not None and name not in allowed:
            raise Refused(f"the pickle operation {name}, which arrays do not need")
        if name in ("BINPUT", "LONG_BINPUT"):
            if cast(int, argument) > count:
                raise Refused(f"a memo index of {argument} after {count} operations")
            memo[cast(int, argument)] = depths[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = depths[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            depths.append(memo.get(cast(int, argument)))
        else:
            taken: list[int | None] = []
            before = operation.stack_before
            if pickletools.markobject in before:
                while (depth := depths.pop()) is not None:
                    taken.append(depth)
                before = before[: before.index(pickletools.markobject)]
            for _ in before:
                taken.append(depths.pop())
            depth = 1 + max((each or 0 for each in taken), default=0) if name.startswith("TUPLE") else 0
            if depth > _DEEPEST_TUPLE:
                raise Refused(f"more than {_DEEPEST_TUPLE} tuples within each other")
            depths += [None if name == "MARK" else depth] * len(operation.stack_after)
        if isinstance(argument, int):
            longest = max(longest, argument)
        lengths |= isinstance(argument, str) and argument.endswith("bytearray")
    if lengths and longest > size:
        raise Refused(f"a bytearray of up to {longest} bytes in a file of {size}")
