"""Pickles of arrays: every protocol reads the same, and nothing that a hostile one asks for happens."""

from __future__ import annotations

import builtins
import contextlib
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from anchorline.export.importers.array_pickle import PickledArray, read_array_pickle
from anchorline.export.importers.checkpoint_files import read_checkpoint_file
from anchorline.runtime.io.errors import ArtefactError

ARRAYS: dict[str, NDArray[Any]] = {
    "weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "transposed": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "half": np.array([0.5, -2.0], np.float16),
    "double": np.array([[1e-9]], np.float64),
    "counter": np.array(7, np.int64),
    "other byte order": np.array([1.5, 2.5], ">f4"),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float32),
}


def write(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("names", ["numpy 1", "numpy 2"])
def test_every_protocol_gives_the_same_tensors(tmp_path: Path, protocol: int, names: str) -> None:
    """Detectron2's form: the arrays under ``model``, their author beside them."""
    content = pickle.dumps({"model": ARRAYS, "__author__": "Detectron2 Model Zoo"}, protocol)
    assert b"numpy._core" in content
    if names == "numpy 1":  # in a text whose length stands before it from protocol 4 on
        content = content.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
        for module in ("multiarray", "numeric"):
            new, old = f"numpy._core.{module}".encode(), f"numpy.core.{module}".encode()
            content = content.replace(bytes([len(new)]) + new, bytes([len(old)]) + old)
        if protocol >= 4:  # the frame is two bytes shorter for each name
            content = unframed(content)
        assert b"numpy._core" not in content
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    state = read_checkpoint_file(path).state
    assert list(state) == list(ARRAYS)
    for name, array in ARRAYS.items():
        expected = torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")))
        assert torch.equal(state[name], expected), name
        assert state[name].dtype == expected.dtype
    state["weight"][0] = 5  # a copy of its own, not the file's bytes


def unframed(content: bytes) -> bytes:
    """``content`` without its frames, which only say how far to read ahead."""
    kept, frames = b"", 0
    while (at := content.find(b"\x95")) >= 0 and at in (2, len(kept)):
        content, frames = content[:at] + content[at + 9 :], frames + 1
        kept = content[:2]
    assert frames == 1
    return content


def test_python_2_and_state_dicts_of_arrays(tmp_path: Path) -> None:
    """Python 2 wrote bytes as texts; a state dict keeps attributes that say nothing here."""
    raw = np.array([1.0, -2.0], np.float32).tobytes()
    path = tmp_path / "model.pkl"
    path.write_bytes(
        b"\x80\x02" + EMPTY + b"(K\x01K\x02\x85" + F4 + b"\x89U" + bytes([len(raw)]) + raw + b"tb."
    )
    found = read_array_pickle(path)
    assert isinstance(found, PickledArray)
    assert found.values is not None
    assert found.values.tolist() == [1.0, -2.0]
    state = OrderedDict(weight=np.ones(2, np.float32))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    assert read_checkpoint_file(write(path, {"model": state})).state["weight"].tolist() == [1, 1]


def test_scalars_and_plain_containers(tmp_path: Path) -> None:
    content = {
        "iteration": 3,
        "rate": np.float64(0.25),
        "x": [1, (2.5, None, True)],
        "b": b"raw",
        "n": 1 << 80,
    }
    for protocol in (2, 3, 4, 5):
        found = read_array_pickle(write(tmp_path / "plain.pkl", content, protocol))
        assert found == {**content, "rate": 0.25}


class Reduces:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


class Plain:
    """A class of this file."""


def witness_command(path: Path) -> str:
    return f"touch {path}"


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "os.system": (lambda w: Reduces(os.system, witness_command(w)), "posix.system"),
    "eval": (lambda w: Reduces(eval, f"open({str(w)!r}, 'w')"), ".eval"),
    "exec": (lambda w: Reduces(exec, f"open({str(w)!r}, 'w')"), ".exec"),
    "open": (lambda w: Reduces(open, str(w), "w"), "open"),
    "getattr": (lambda w: Reduces(getattr, Reduces(__import__, "os"), "system"), ".getattr"),
    "import": (lambda w: Reduces(__import__, "antigravity"), ".__import__"),
    "an object": (lambda w: Plain(), "Plain"),
    "a class": (lambda w: Plain, "Plain"),
    "numpy.load": (lambda w: Reduces(np.load, str(w)), "numpy"),
    "memmap": (lambda w: Reduces(np.memmap, str(w), "f4", "w+", 0, (4,)), "numpy.memmap"),
    "an array of objects": (lambda w: np.array([Plain(), None], object), "'O8'"),
    "a structured array": (lambda w: np.zeros(2, [("a", "f4")]), "'V4'"),
    "a torch tensor": (lambda w: torch.zeros(2), "torch."),
    "a set": (lambda w: {1, 2}, "EMPTY_SET"),
    "a frozenset": (lambda w: frozenset((1, 2)), "FROZENSET"),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_array_is_refused(tmp_path: Path, kind: str, protocol: int) -> None:
    make, part = HOSTILE[kind]
    path, witness = tmp_path / "model.pkl", tmp_path / "witness"
    write(path, {"model": {**ARRAYS, "x": make(witness)}}, protocol)
    text = refusal(path)
    if "set" not in kind or protocol >= 4:  # older protocols name the class
        assert part in text
    assert not witness.exists()


def refusal(path: Path) -> str:
    with pytest.raises(ArtefactError) as caught:
        read_array_pickle(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    assert str(path) in text
    return text


# From here on pickles written by hand, operation by operation.
NDARRAY, DTYPE = b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"
RECONSTRUCT = b"cnumpy._core.multiarray\n_reconstruct\n"
EMPTY = RECONSTRUCT + b"(" + NDARRAY + b"K\x00\x85C\x01btR"  # _reconstruct(ndarray, (0,), b"b")
F4 = DTYPE + b"(X\x02\x00\x00\x00f4K\x00K\x01tR"


def state_of(shape: bytes, kind: bytes, raw: bytes) -> bytes:
    """An array's state: version, shape, dtype, order and bytes."""
    return b"(K\x01" + shape + kind + b"\x89" + b"B" + struct.pack("<I", len(raw)) + raw + b"t"


BY_HAND: dict[str, tuple[bytes, str]] = {
    "attributes for a function": (RECONSTRUCT + b"}X\x01\x00\x00\x00aK\x01sb", "attributes for a function"),
    "attributes for OrderedDict": (b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb", "attributes"),
    "slots of a function": (RECONSTRUCT + b"}}X\x04\x00\x00\x00__c__K\x01s\x86b", "cannot be read"),
    "ndarray called": (NDARRAY + b"(K\x7ftR", "a call of numpy.ndarray"),
    "ndarray as a class": (NDARRAY + b")\x81", "cannot be read"),
    "another array class": (RECONSTRUCT + b"(" + DTYPE + b"K\x00\x85C\x01btR", "another class"),
    "an array without state": (b"}X\x01\x00\x00\x00w" + EMPTY + b"s", ""),
    "a claim of 4 TB": (
        EMPTY + state_of(b"\x8a\x05\x00\x00\x00\x00\x01\x85", F4, b"1234") + b"b",
        "in 4 bytes",
    ),
    "a negative side": (EMPTY + state_of(b"J\xff\xff\xff\xff\x85", F4, b"1234") + b"b", "not NumPy's"),
    "sides whose product is huge": (
        EMPTY + state_of(b"(" + b"\x8a\x05\xff\xff\xff\xff\x0f" * 8 + b"t", F4, b"1234") + b"b",
        "in 4 bytes",
    ),
    "bytes left over": (EMPTY + state_of(b"K\x01\x85", F4, b"12345") + b"b", "in 5 bytes"),
    "state of another kind": (EMPTY + b"K\x05b", "cannot be read"),
    "a text encoding with code": (
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR",
        "encoding 'hex'",
    ),
    "an object array": (DTYPE + b"(X\x02\x00\x00\x00O8K\x00K\x01tR", "'O8'"),
    "a dotted name": (b"\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93", "OrderedDict.__init__"),
    "a persistent id": (b"Pabc\n", "PERSID"),
    "an extension": (b"\x82\x01", "EXT1"),
    "an instance": (b"(ios\nsystem\n", "INST"),
    "a memo of 32 GB": (b"K\x01r\xff\xff\xff\xff", "a memo index of 4294967295"),
    "a text of 4 GB": (b"X\xff\xff\xff\xffabc", "cut short"),
    "bytes of 8 EB": (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc", "cut short"),
    "a number of 2 GB": (b"\x8b\xff\xff\xff\x7f\x01", "cut short"),
    "tuples in tuples as a key": (b"}K\x01" + b"\x85" * 100_000 + b"K\x01s", "tuples"),
    "lists in lists": (b"]" * 5_000 + b"a" * 4_999, ""),
    "a dictionary as a key": (b"}}K\x01s", "cannot be read"),
    "append to a function": (RECONSTRUCT + b"K\x01a", "cannot be read"),
    "an item of a function": (RECONSTRUCT + b"K\x01K\x01s", "cannot be read"),
    "a call of a number": (b"K\x01)R", "cannot be read"),
    "nothing on the stack": (b"0", "cannot be read"),
    "an unknown operation": (b"\xff", "cannot be read"),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_pickles_written_by_hand_are_refused(tmp_path: Path, kind: str) -> None:
    operations, part = BY_HAND[kind]
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x04" + operations + b".")
    if part:
        assert part in refusal(path)
    else:  # harmless, and no state dict
        read_array_pickle(path)
        with pytest.raises(ArtefactError, match="expected tensors by name"):
            read_checkpoint_file(path)


def test_nothing_of_a_refused_pickle_stays(tmp_path: Path) -> None:
    """A pickle cannot change what the next one is read with."""
    for kind in ("attributes for a function", "slots of a function", "attributes for OrderedDict"):
        (tmp_path / "bad.pkl").write_bytes(b"\x80\x04" + BY_HAND[kind][0] + b".")
        refusal(tmp_path / "bad.pkl")
    assert not hasattr(OrderedDict, "a")
    assert not hasattr(builtins, "a")
    found = read_checkpoint_file(write(tmp_path / "good.pkl", {"model": ARRAYS})).state
    assert torch.equal(found["weight"], torch.from_numpy(ARRAYS["weight"]))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_that_was_cut_short_is_refused(tmp_path: Path, share: float, protocol: int) -> None:
    content = pickle.dumps({"model": ARRAYS}, protocol)
    path = tmp_path / "model.pkl"
    path.write_bytes(content[: int(share * len(content))])
    assert "cannot be read" in refusal(path)


def test_damaged_bytes_end_in_one_line_or_in_tensors(tmp_path: Path) -> None:
    """Whatever single byte is wrong, no other exception comes out."""
    content = pickle.dumps({"model": {"w": ARRAYS["weight"], "c": ARRAYS["counter"]}}, 4)
    path = tmp_path / "model.pkl"
    for at in range(2, len(content)):
        change = 37 * at % 255 + 1
        path.write_bytes(content[:at] + bytes([content[at] ^ change]) + content[at + 1 :])
        with contextlib.suppress(ArtefactError):
            read_checkpoint_file(path)


def test_arrays_that_share_bytes_do_not_multiply_them(tmp_path: Path) -> None:
    """One array of 1 MB under a thousand names claims a thousand times the file."""
    array = np.zeros(1 << 18, np.float32)
    path = write(tmp_path / "model.pkl", {"model": {f"w{number}": array for number in range(1000)}})
    with pytest.raises(ArtefactError, match="hostile"):
        read_checkpoint_file(path)
