"""``model.safetensors``: weights, with the contract and the architecture as JSON in the header."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anchorline.runtime.contract import CONTRACT_KEY, Contract, ResizeRule, Thresholds
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, one_line, shown
from anchorline.runtime.io.files import atomic_path
from anchorline.runtime.model_file import DIGEST_KEY, NO_DIGEST, ModelFile, read_safetensors, write_digest
from anchorline.train.model.faster_rcnn import OUTPUTS, FasterRCNN
from anchorline.train.model.settings import ModelSettings

MODEL_KEY = "anchorline.model"

LIBRARY_KEY = "library"
"""In ``Contract.source``: the library that an imported model comes from."""

# What safetensors and torch raise for damaged files, and torch for settings that no model can have.
_UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, ArithmeticError, MemoryError)


def contract_of(
    settings: ModelSettings,
    names: tuple[str, ...],
    category_ids: tuple[int, ...] | None = None,
    source: Mapping[str, Any] | None = None,
    task: str = "detections",
) -> Contract:
    """The contract that a model with these settings and class names fulfils in ``task``."""
    return Contract(
        task=task,
        outputs=OUTPUTS[task],
        names=names,
        canvas=None,
        mean=settings.mean,
        std=settings.std,
        channel_order=settings.channel_order,
        resize=ResizeRule(
            settings.shorter_side or None,
            settings.longer_side or None,
            within=settings.canvas,
            padding=settings.padding,
        ),
        profile=settings.profile,
        thresholds=Thresholds(
            score=settings.score_threshold,
            nms_iou=settings.nms_iou,
            max_detections=settings.max_detections,
            rpn_nms_iou=settings.rpn_nms_iou,
            max_proposals=settings.rpn_post_nms,
        ),
        category_ids=category_ids,
        source=source or {},
    )


def save_checkpoint(
    path: Path, state: Mapping[str, Tensor], settings: ModelSettings, contract: Contract
) -> None:
    """Write the weights, ``settings`` and ``contract`` to ``path``; all or nothing."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {
        CONTRACT_KEY: contract.to_json(),
        MODEL_KEY: settings.to_json(),
        DIGEST_KEY: NO_DIGEST,
        "format": "pt",
    }
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        write_digest(temporary)


@functools.cache
def expected_shapes(settings: ModelSettings, classes: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the model has, by name; nothing is allocated."""
    with torch.device("meta"):
        model = FasterRCNN(settings, classes)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def read_header(path: Path) -> tuple[ModelSettings, Contract]:
    """Architecture and contract of a checkpoint; raises ``ArtefactError`` if it is not one of ours."""
    settings, file = _read(path)
    return settings, file.contract


def _read(path: Path) -> tuple[ModelSettings, ModelFile]:
    file = read_safetensors(path)
    if MODEL_KEY not in file.metadata:
        raise ArtefactError(
            f"{path}: has no architecture in its header; expected a checkpoint written by anchorline train "
            "or import"
        )
    try:
        settings = ModelSettings.from_json(file.metadata[MODEL_KEY])
    except AnchorlineError as error:
        raise ArtefactError(f"{path}: damaged architecture in the header: {error}") from None
    return settings, dataclasses.replace(file, contract=_freed(file.contract, settings, path))


def _freed(contract: Contract, settings: ModelSettings, path: Path) -> Contract:
    """``contract`` with a free canvas, which those of version 1 had not, and the rule that gives its size.

    An imported model's frames are no longer scaled down to fit a canvas that its library does not have.
    """
    stated = contract.canvas or contract.resize.within
    if stated not in (None, settings.canvas):
        raise ArtefactError(
            f"{path}: damaged header: the architecture has the canvas {settings.canvas} and the contract "
            f"{stated}"
        )
    if contract.canvas is None:
        return contract
    within = None if LIBRARY_KEY in contract.source else contract.canvas
    rule = dataclasses.replace(contract.resize, within=within, padding=settings.padding)
    return dataclasses.replace(contract, canvas=None, resize=rule)


def load_checkpoint(path: Path) -> tuple[FasterRCNN, Contract]:
    """The model in ``path``, in evaluation mode, and its contract, whose canvas is free.

    Raises ``ArtefactError`` where the file's tensors are not those of its architecture, before any of the
    memory that this claims is taken.
    """
    settings, file = _read(path)
    contract, held = file.contract, file.shapes
    misfit = f"{path}: the weights do not fit the architecture in the header"
    try:
        expected = expected_shapes(settings, len(contract.names))
        for name in sorted(held.keys() ^ expected.keys()):
            what = "is no tensor of it" if name in held else "is missing"
            raise ArtefactError(f"{misfit} ({shown(name)} {what})")
        for name, shape in expected.items():
            if held[name] != shape:
                raise ArtefactError(f"{misfit} ({name} is {list(held[name])}, expected {list(shape)})")
        model = FasterRCNN(settings, len(contract.names))
        with file.checked():
            state = load_file(path)
        model.load_state_dict(state)
    except AnchorlineError as error:
        text = str(error)
        raise ArtefactError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    except _UNREADABLE as error:
        raise ArtefactError(f"{misfit} ({one_line(error)[:200]})") from None
    not_finite = [name for name, tensor in state.items() if not torch.isfinite(tensor.float()).all()]
    if not_finite:
        raise ArtefactError(
            f"{path}: tensor {not_finite[0]!r} holds values that are not finite; train or import again"
        )
    return model.eval(), contract
