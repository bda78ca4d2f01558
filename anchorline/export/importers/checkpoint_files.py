"""Reading other people's checkpoints safely: tensors by name, and no code of the file is ever run.

Four kinds of file: safetensors, what ``torch.save`` wrote, pickles of NumPy arrays (Detectron2's ``.pkl``)
and caffe's ``.caffemodel`` (``caffemodel.py``).
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anchorline.export.importers.array_pickle import (
    PickledArray,
    Refused,
    check_operations,
    read_array_pickle,
)
from anchorline.export.importers.caffemodel import read_caffemodel
from anchorline.runtime.contract import CONTRACT_KEY
from anchorline.runtime.io.errors import ArtefactError, printable, reason_of
from anchorline.runtime.io.files import expect_regular, sha256_of

# Tensors may share memory or repeat it (stride 0), so a small file can claim any size.
_LARGEST_CLAIM = 4  # times the file's size


@dataclass(frozen=True)
class CheckpointFile:
    """The tensors of a checkpoint by name, what to call it, and the SHA-256 of its bytes.

    ``meta`` is what MMDetection keeps beside the tensors: texts, numbers and plain containers. ``folder`` is
    where the file lies, ``config`` the configuration that the user gives for it, and ``notes`` say which
    of several weights were taken.
    """

    name: str
    state: Mapping[str, Tensor]
    sha256: str
    meta: Mapping[str, object] = field(default_factory=dict)
    folder: Path | None = None
    config: Path | None = None
    notes: tuple[str, ...] = ()


def read_checkpoint_file(path: Path, weights: str | None = None) -> CheckpointFile:
    """Read the tensors in ``path``: safetensors, what ``torch.save`` wrote, a pickle of arrays, caffe's.

    ``weights`` names one of several state dicts in it (``choose_state``). Tensors are mapped from the file
    where its format allows it. Raises ``ArtefactError`` for a file that is missing, empty, damaged, of
    another kind, holds no tensors by name, names what runs code, or claims more than it can hold.
    """
    expect_regular(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise ArtefactError(f"{path}: {what}; expected a checkpoint saved with torch.save or safetensors")
    size = path.stat().st_size
    if not size:
        raise ArtefactError(f"{path}: the file is empty; copy or download the checkpoint again")
    content = _read(path)
    try:
        state, notes = choose_state(content, weights)
    except Refused as error:
        raise ArtefactError(f"{path}: {error}") from None
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
    return CheckpointFile(path.name, tensors, sha256_of(path), _meta(content), path.parent, notes=notes)


def _meta(content: Mapping[str, Any]) -> Mapping[str, object]:
    """``meta``, with the configuration that mmengine keeps in its message hub too."""
    meta, hub = content.get("meta"), content.get("message_hub")
    runtime = hub.get("runtime_info") if isinstance(hub, Mapping) else None
    kept = runtime.get("cfg") if isinstance(runtime, Mapping) else None
    return {**({"cfg": kept} if kept else {}), **(meta if isinstance(meta, Mapping) else {})}


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


# What lies under the name of a checkpoint and is none, by how it begins.
_OTHER_KINDS = (
    ((b"version https://git-lfs",), "a Git LFS pointer, which stands for the file; fetch it: git lfs pull"),
    ((b"<!doctype", b"<html", b"<?xml", b"<head"), "a web page, not the file that it offers; download that"),
    ((b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"\x28\xb5\x2f\xfd"), "compressed; unpack it first"),
    ((b"7z\xbc\xaf", b"rar!"), "an archive; unpack it first"),
    ((b"\x89hdf",), "an HDF5 file; expected what torch.save or safetensors wrote"),
)
_BEGINNING = 512  # bytes, the first block of a tar


def _read(path: Path) -> Any:
    """The contents by the format that the file has; only caffe's is told by its name."""
    if path.suffix == ".caffemodel":
        return read_caffemodel(path)
    with path.open("rb") as file:
        start = file.read(_BEGINNING)
    text = start.lstrip().lower()
    kind = next((kind for begins, kind in _OTHER_KINDS if text.startswith(begins)), None)
    if start[257:262] == b"ustar":
        kind = "a tar archive; unpack it, and give the checkpoint in it"
    elif text.startswith((b"{", b"[")) and 0 not in start[:8]:
        kind = "JSON or another text; expected a checkpoint"
    elif len(start) > 8 and not any(start):
        kind = "zeros where it begins, so it was not written to its end; copy or download it again"
    if kind is not None:
        raise ArtefactError(f"{path}: is {kind}")
    if start[8:9] == b"{":  # a length, then a JSON object
        return _read_safetensors(path)
    if path.suffix == ".safetensors":  # by which name torch.load goes
        raise ArtefactError(f"{path}: is no safetensors file; if torch.save wrote it, name it .pth")
    if start.startswith(b"PK"):
        _check_archive(path)
        return read_torch_pickle(path)
    if start[:1] == b"\x80":  # torch's own pickles begin with a number
        return read_torch_pickle(path) if start[2:4] == b"\x8a\x0a" else read_array_pickle(path)
    raise ArtefactError(
        f"{path}: is no checkpoint of a kind that is read, or its beginning is damaged; expected what "
        "torch.save or safetensors wrote, Detectron2's .pkl or a .caffemodel"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as tensors:
            if CONTRACT_KEY in (tensors.metadata() or {}):
                raise ArtefactError(f"{path}: is a model of Anchorline already; use it as it is")
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError, MemoryError, RuntimeError, TypeError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(
            f"{path}: not a readable safetensors file ({reason_of(error, 160)}); it may be cut short or "
            "hostile"
        ) from None


def _check_archive(path: Path) -> None:
    """Refuse a zip that torch.save did not write, that was cut short, or that unpacks to far more."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            inner = [entry for entry in entries if entry.filename.count("/") == 1]
            pickles = [entry for entry in inner if entry.filename.endswith("/data.pkl")]
            if any(entry.filename.endswith("/constants.pkl") for entry in inner):
                raise ArtefactError(
                    f"{path}: is a TorchScript archive, which holds a program; save model.state_dict()"
                )
            if not pickles:
                raise ArtefactError(f"{path}: is a zip that torch.save did not write; unpack it first")
            claimed = sum(entry.file_size for entry in entries)
            if claimed > _LARGEST_CLAIM * size:
                raise ArtefactError(
                    f"{path}: its parts claim {claimed / 1e9:.3g} GB in a file of {size / 1e6:.3g} MB; "
                    "refused as damaged or hostile"
                )
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(
            f"{path}: is a zip that was cut short or damaged ({reason_of(error)}; {size / 1e6:.4g} MB are "
            "there); copy or download it again"
        ) from None


# Which of the state dicts in a checkpoint is meant. Where a training keeps an average of its weights (EMA,
# the teacher of a student), it evaluates with that.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_AVERAGES = {"ema", "averaged", "swa", "shadow", "teacher", "modelteacher"}
_USUAL = {"model", "state_dict", "model_state_dict", "net", "network", "params", "weights", "detector"}
_LONGEST_NAME = 300
_COUNTERS = ("n_averaged", "steps")  # of those who average

_Path = tuple[str, ...]
_StateDict = dict[str, Tensor | NDArray[Any]]


def choose_state(content: Any, weights: str | None = None) -> tuple[_StateDict, tuple[str, ...]]:
    """The dense tensors or arrays that ``weights`` names, or that are meant, and a note on the choice.

    State dicts may stand alone, in a dictionary, or in a dictionary within that: ``weights`` is its key, or
    two with a dot between. Averages come first, then the usual names, then the most tensors. Names lose what
    wrappers such as DistributedDataParallel and torch.compile put into them. Raises ``Refused``.
    """
    if isinstance(content, _Empty):
        raise Refused(
            f"holds a whole object ({printable(content.name[:80])}), and building those could run code; "
            "refused. Save the weights alone: torch.save(model.state_dict(), path)"
        )
    if not isinstance(content, Mapping):
        raise Refused(f"holds a {type(content).__name__}, expected tensors by name; save model.state_dict()")
    found = dict(_states(content, ()))
    shown = {".".join(path): path for path in found}
    if weights is not None and weights not in shown:
        keys = ", ".join(sorted(filter(None, shown)))
        expected = f"expected one of {keys}" if keys else "there are no several to choose from, leave it out"
        raise Refused(f"--weights is {weights!r}; {expected}")
    if not found:
        keys = ", ".join(_described(key, value) for key, value in list(content.items())[:5]) or "nothing"
        raise Refused(
            f"holds no state dict, only {keys}; expected tensors by name, alone or under a key such as "
            "'model' or 'state_dict'"
        )
    averages = {path for path in found if any(map(_is_average, path))}
    if {("state_dict",), ("ema_state_dict",)} <= found.keys() and "message_hub" in content:
        averages = {("state_dict",)}  # mmengine swaps the two when it saves
    plain = {path: state for path, state in found.items() if path not in averages}
    largest = max(map(len, plain.values()), default=0)
    whole = {path for path in averages if len(found[path]) >= largest}  # not of the parameters alone
    chosen = (
        shown[weights]
        if weights is not None
        else min(found, key=lambda p: (p not in whole, not _USUAL & {*p}, -len(found[p])))
    )
    others = sorted(".".join(path) for path in found if path != chosen and len(found[path]) > len(_COUNTERS))
    name = ".".join(chosen)
    kind = ", the averaged ones, which such trainings evaluate with" if chosen in averages else ""
    note = (
        f"the weights are those under {name!r}{kind}; there are others too: --weights {' or '.join(others)}"
    )
    return found[chosen], (note,) if others and weights is None else ()


def _is_average(key: str) -> bool:
    return bool(_AVERAGES & {*re.split(r"[_\W]", key.lower())})


def _states(value: Any, path: _Path) -> Iterator[tuple[_Path, _StateDict]]:
    """The state dicts in ``value``, down to two levels, by the keys that lead to them."""
    if not isinstance(value, Mapping):
        return
    state = _tensors(value)
    if state is None:
        for key, inner in value.items() if len(path) < 2 else ():
            if isinstance(key, str):
                yield from _states(inner, (*path, key))
        return
    # A teacher and its student are parts of one model.
    parts = {name.partition(".")[0] for name in state}
    if len(parts) > 1 and any(map(_is_average, parts)):
        for part in sorted(parts):
            within = {n.partition(".")[2]: t for n, t in state.items() if n.startswith(f"{part}.")}
            if within:
                yield (*path, part), within
    elif state:
        yield path, state


def _tensors(value: Mapping[Any, Any]) -> _StateDict | None:
    """``value`` as tensors by plain names; ``None`` where it holds anything else."""
    found: _StateDict = {}
    for name, held in value.items():
        held = held.values if isinstance(held, PickledArray) else held
        if held is None or str(name).endswith("_extra_state"):  # of layers that have none here
            continue
        usable = isinstance(held, np.ndarray) or (
            isinstance(held, Tensor)
            and held.layout == torch.strided
            and held.device.type == "cpu"
            and not held.is_quantized
        )
        if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME or not usable:
            return None
        found[name] = held
    plain = {name: ".".join(p for p in name.split(".") if p not in _WRAPPERS) for name in found}
    if len(set(plain.values())) == len(plain):
        found = {plain[name]: held for name, held in found.items() if name not in _COUNTERS}
    return found or None


def _described(key: Any, value: Any) -> str:
    """A key and what kind of thing it leads to, for a message."""
    kind = value.name if isinstance(value, _Empty) else type(value).__name__
    return f"{printable(str(key)[:40])} ({printable(kind[:60])})"


# What ``torch.save`` wrote, through torch's unpickler of tensors and plain containers. Training checkpoints
# hold more than weights. Classes and functions of other names are replaced: by a dictionary or a list where
# the pickle fills one, else by an empty object. None of their code runs, nothing is looked up, and what they
# held is dropped. What no training needs and attackers do is refused by name all the same.
_HOSTILE = {
    "os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "importlib", "runpy", "pty", "ctypes",
    "code", "codeop", "pickle", "marshal", "webbrowser", "multiprocessing", "asyncio", "platform", "requests",
    "pdb", "profile", "cProfile", "doctest", "pydoc", "tempfile", "http", "urllib", "commands", "site",
}  # fmt: skip
_BUILTINS = {
    "getattr", "object", "type", "list", "dict", "tuple", "set", "frozenset", "int", "float", "bool", "str",
    "bytes", "complex", "slice", "range",
}  # fmt: skip
_MOST_REPLACED = 200


class _Empty:
    """Takes whatever an object is made from, and keeps nothing. ``name`` is that of what it stands for."""

    __slots__ = ()
    name = ""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Dictionary:
    """Makes dictionaries, also of a last argument that is one: torch's unpickler fills no other class."""

    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict(arguments[-1] if arguments and isinstance(arguments[-1], Mapping) else ())


class _List:
    """Makes lists."""

    def __new__(cls, *_: Any) -> Any:
        return []


def read_torch_pickle(path: Path) -> Any:
    """The contents of ``path``. Raises ``ArtefactError`` for hostile and damaged files."""
    try:
        _check_torch_operations(path)
    except Refused as error:
        raise ArtefactError(f"{path}: holds {error}; refused as hostile") from None
    except Exception:
        pass  # of what is damaged torch says so
    # torchvision's training reference keeps its command-line arguments beside the weights.
    replaced: dict[str, type] = {"argparse.Namespace": argparse.Namespace}
    mapped = True
    while len(replaced) <= _MOST_REPLACED:
        allowed: list[Any] = [(kind, name) for name, kind in replaced.items()]
        try:
            with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other pickle protocols
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            _replace(str(error), replaced, path)
        except Exception as error:  # the readers raise many kinds for damaged files
            if mapped and "mmap can only be used" in str(error):  # files from before torch 1.6
                mapped = False
                continue
            raise ArtefactError(
                f"{path}: cannot be read as a checkpoint ({reason_of(error, 160)}); it may be cut short, "
                "copy it again"
            ) from None
    raise ArtefactError(f"{path}: holds objects of more than {_MOST_REPLACED} kinds; refused")


_UNKNOWN = re.compile(r"GLOBAL (.+?) (?:was not an allowed|whose module)", re.DOTALL)
_FILLED = re.compile(r"Can only (SETITEM|append|extend).* <class '[\w.]*<(.+)>'>")


def _replace(error: str, replaced: dict[str, type], path: Path) -> None:
    """Let a class stand for the name that torch's unpickler stopped at, where that is no ``_HOSTILE`` one."""
    if (filled := _FILLED.search(error)) and replaced.get(filled.group(2)) not in (_Dictionary, _List):
        replaced[filled.group(2)] = _Dictionary if filled.group(1) == "SETITEM" else _List
        return
    unknown = _UNKNOWN.search(error)
    if unknown is None:
        # torch's reason stands behind its advice to load all the same
        reason = error.rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0][:160]
        if "Unsupported operand" in reason:
            reason = "another pickle protocol than torch.save's own, or damage"
        raise ArtefactError(
            f"{path}: not a checkpoint that torch.load reads ({reason}); expected a state dict"
        ) from None
    name = unknown.group(1)
    first, dot, _ = name.partition(".")
    if first in _HOSTILE or (first == "builtins" and dot) or (not dot and name not in _BUILTINS):
        raise ArtefactError(
            f"{path}: holds Python objects ({printable(name[:60])}), and loading those could run code; "
            "refused. Save the weights alone: torch.save(model.state_dict(), path)"
        ) from None
    full = name if dot else f"builtins.{name}"
    if full in replaced:
        raise ArtefactError(f"{path}: names {full[:60]!r}, which is no Python name; it is damaged") from None
    kind = type("Empty", (_Empty,), {"__slots__": (), "__qualname__": f"<{full}>", "name": full})
    replaced[full] = _Dictionary if name.endswith(".ConfigDict") else kind


def _check_torch_operations(path: Path) -> None:
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            (entry, *_) = [each for each in archive.infolist() if each.filename.endswith("/data.pkl")]
            check_operations(io.BytesIO(archive.read(entry)), size)
        return
    with path.open("rb") as file:
        for _ in range(_LEGACY_PICKLES):
            check_operations(file, size)


_LEGACY_PICKLES = 5  # a mark, the version, the machine, the content and the names of its storages
