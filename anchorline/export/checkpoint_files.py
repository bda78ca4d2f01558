"""Reading other people's checkpoints safely: tensors by name, and no code of the file is ever run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anchorline.export.array_pickle import PickledArray, is_plain_pickle, read_array_pickle
from anchorline.export.caffemodel_file import read_caffemodel
from anchorline.export.torch_pickle import read_torch_pickle
from anchorline.runtime.errors import ArtefactError

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
    tensors = {name: _tensor(value) for name, value in state.items()}
    meta = content.get("meta")
    return CheckpointFile(path.name, tensors, _sha256(path), meta if isinstance(meta, Mapping) else {})


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


def _read(path: Path) -> Any:
    """The contents by the format that the file has; only caffe's is told by its name."""
    if path.suffix == ".caffemodel":
        return read_caffemodel(path)
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:] == b"{":  # a length, then a JSON object
        return _read_safetensors(path)
    return read_array_pickle(path) if is_plain_pickle(start) else read_torch_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise ArtefactError(
            f"{path}: not a readable safetensors file ({_one_line(error)}); it may be cut short or hostile"
        ) from None


def _find_state(content: Any, path: Path) -> dict[str, Tensor | NDArray[Any]]:
    for state in (content, *(content.get(key) for key in _NESTED if isinstance(content, Mapping))):
        if isinstance(state, Mapping) and state:
            values = {name: _values(value) for name, value in state.items()}
            if all(isinstance(name, str) and value is not None for name, value in values.items()):
                return {name: value for name, value in values.items() if value is not None}
    if isinstance(content, Mapping):
        shown = ", ".join(str(key)[:40] for key in list(content)[:5]) or "nothing"
        raise ArtefactError(
            f"{path}: holds no state dict, only {shown}; expected tensors by name, alone or under "
            f"{' or '.join(map(repr, _NESTED))}"
        )
    raise ArtefactError(
        f"{path}: holds a {type(content).__name__}, expected tensors by name; save model.state_dict()"
    )


def _values(value: object) -> Tensor | NDArray[Any] | None:
    """A dense tensor or the values of an array; ``None`` for anything else."""
    if isinstance(value, PickledArray):
        return value.values
    return value if isinstance(value, Tensor) and value.layout == torch.strided else None


def _tensor(values: Tensor | NDArray[Any]) -> Tensor:
    if isinstance(values, Tensor):
        return values
    # A copy of one's own: the file's bytes are read-only, and may be in the other byte order.
    return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))


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
