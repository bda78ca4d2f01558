"""What ``torch.save`` wrote, through torch's unpickler of tensors and plain containers.

Training checkpoints hold more than weights. Objects that the libraries which we import from keep beside
them are replaced by empty ones: none of their code runs, nothing is called, and what they held is dropped.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from anchorline.runtime.errors import ArtefactError

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

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

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
            name = _refused_name(error)
            root = name.partition(".")[0]
            if root not in _EMPTIED and name not in _EMPTIED_FUNCTIONS:
                raise _refusal(path, error) from None
            allowed.append(_replacement(name))
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


def _replacement(name: str) -> tuple[type, str]:
    """What stands for ``name``; dictionaries remain such, since torch fills no other class."""
    full = f"builtins.{name}" if name in _EMPTIED_FUNCTIONS else name
    return (OrderedDict if name.endswith(".ConfigDict") else _Empty, full)


def _refused_name(error: pickle.UnpicklingError) -> str:
    """The name that torch's unpickler did not know, or nothing."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found.group(1) if found else ""


def _refusal(path: Path, error: pickle.UnpicklingError) -> ArtefactError:
    name = _refused_name(error)
    if not name:
        return ArtefactError(
            f"{path}: not a checkpoint that torch.load reads ({_one_line(error)}); expected a state dict"
        )
    return ArtefactError(
        f"{path}: holds Python objects ({name[:60]}), and loading those could run code; refused. Save the "
        "weights alone: torch.save(model.state_dict(), path)"
    )


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    # Behind torch's advice to load the file all the same.
    reason = next(
        (line.partition("WeightsUnpickler error: ")[2] for line in lines if "WeightsUn" in line), ""
    )
    text = (reason or (lines[0] if lines else "")).strip() or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
