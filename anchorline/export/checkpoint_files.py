"""Reading other people's checkpoints safely: tensors by name, and no code of the file is ever run."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anchorline.runtime.errors import ArtefactError

# Where training scripts keep the weights inside what they save; torchvision's own writes "model".
_NESTED = ("model", "state_dict", "model_state_dict")

# Tensors may share memory or repeat it (stride 0), so a small file can claim any size.
_LARGEST_CLAIM = 4  # times the file's size


@dataclass(frozen=True)
class CheckpointFile:
    """The tensors of a checkpoint by name, what to call it, and the SHA-256 of its bytes."""

    name: str
    state: Mapping[str, Tensor]
    sha256: str


def read_checkpoint_file(path: Path) -> CheckpointFile:
    """Read a state dict from ``path``: a ``.safetensors`` file, or whatever ``torch.save`` wrote.

    A state dict may stand alone or under ``model``, ``state_dict`` or ``model_state_dict``. Tensors are
    mapped from the file where its format allows it. Raises ``ArtefactError`` for a file that is missing,
    empty, damaged, holds Python objects other than tensors, or claims more than it can hold.
    """
    if not path.is_file():
        raise ArtefactError(
            f"{path}: no such file; expected a checkpoint saved with torch.save or safetensors"
        )
    size = path.stat().st_size
    if not size:
        raise ArtefactError(f"{path}: the file is empty; copy or download the checkpoint again")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    state = _find_state(content, path)
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > _LARGEST_CLAIM * size:
        raise ArtefactError(
            f"{path}: its tensors claim {claimed / 1e9:.3g} GB in a file of {size / 1e6:.3g} MB; "
            "refused as damaged or hostile"
        )
    return CheckpointFile(path.name, state, _sha256(path))


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
    return CheckpointFile(name, state, _sha256(cached) if cached.is_file() else "")


def _is_safetensors(path: Path) -> bool:
    """Whether the file is in safetensors' format, whatever its name says: a length, then a JSON object."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ArtefactError(
            f"{path}: not a readable safetensors file ({_one_line(error)}); it may be cut short or hostile"
        ) from None


def _read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote, through torch's unpickler of tensors and plain containers."""
    try:
        # torchvision's training reference keeps its command-line arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):  # files from before torch 1.6
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class|operand)[^\w]*([\w.]+)", str(error))
        what = next((name for name in (found.groups() if found else ()) if name), "unknown objects")
        if "Weights only load failed" not in str(error) or found is None:
            raise ArtefactError(
                f"{path}: not a checkpoint that torch.load reads ({_one_line(error)}); expected a state dict"
            ) from None
        raise ArtefactError(
            f"{path}: holds Python objects ({what}), and loading those could run code; refused. Save the "
            "weights alone: torch.save(model.state_dict(), path)"
        ) from None
    except Exception as error:  # the readers raise many kinds for damaged files
        raise ArtefactError(
            f"{path}: cannot be read as a checkpoint ({_one_line(error)}); it may be cut short, copy it again"
        ) from None


def _find_state(content: Any, path: Path) -> dict[str, Tensor]:
    for state in (content, *(content.get(key) for key in _NESTED if isinstance(content, Mapping))):
        if isinstance(state, Mapping) and state and all(map(_is_entry, state.items())):
            return dict(state)
    if isinstance(content, Mapping):
        shown = ", ".join(str(key) for key in list(content)[:5]) or "nothing"
        raise ArtefactError(
            f"{path}: holds no state dict, only {shown}; expected tensors by name, alone or under "
            f"{' or '.join(map(repr, _NESTED))}"
        )
    raise ArtefactError(
        f"{path}: holds a {type(content).__name__}, expected tensors by name; save model.state_dict()"
    )


def _is_entry(item: tuple[object, object]) -> bool:
    """Whether a dictionary's item is a dense tensor with a name."""
    key, value = item
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
