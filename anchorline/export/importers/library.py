"""What every importer has: architectures with our settings, and a state dict under our names that fits."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from anchorline.export.checkpoint_files import CheckpointFile
from anchorline.export.importers.class_names import ClassNames
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.errors import ArtefactError
from anchorline.train.faster_rcnn import FasterRCNN
from anchorline.train.model_settings import ModelSettings

CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"
_STEP_COUNTER = "num_batches_tracked"  # no result depends on it, and frozen batch norms have none
_UNKNOWN = "?"
_SHOWN = 3


@dataclass(frozen=True)
class Architecture:
    """A detector as its library builds it: our settings for it, and how it resizes images."""

    settings: ModelSettings
    resize: ResizeRule


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds: settings with its widths, its class names where it has them, and warnings.

    ``eps_warnings`` do not matter where the user gives the eps of the batch norms.
    """

    settings: ModelSettings
    resize: ResizeRule
    names: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()
    eps_warnings: tuple[str, ...] = ()


class Library(Protocol):
    """A module of this package. ``state`` is a checkpoint's tensors under the library's own names."""

    @property
    def NAME(self) -> str:
        """What the library is called."""

    @property
    def INPUT_DTYPE(self) -> str:
        """What its resize produces: ``float32``, or ``uint8`` for whole grey levels."""

    @property
    def ARCHITECTURES(self) -> Mapping[str, Architecture]:
        """By the name that ``--arch`` takes."""

    @property
    def KNOWN_NAMES(self) -> str:
        """Those names, as a phrase for a message."""

    @property
    def IGNORED(self) -> tuple[str, ...]:
        """How the names of tensors begin that are no weights."""

    def coco_classes(self) -> ClassNames:
        """COCO's classes as the library orders them."""

    def current_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state`` under the names that ``their_name`` gives, without what stands before them."""

    def recognise(self, source: CheckpointFile, state: Mapping[str, Tensor]) -> str | None:
        """The architecture whose names and shapes ``state`` has; ``None`` where they do not tell."""

    def describe(self, source: CheckpointFile, state: Mapping[str, Tensor], arch: str) -> Description:
        """Settings for ``state`` as an ``arch``; raises ``ArtefactError`` where we have none for it."""

    def their_name(self, ours: str, settings: ModelSettings) -> str:
        """The library's name for our parameter ``ours``."""

    def our_layout(self, state: Mapping[str, Tensor], settings: ModelSettings) -> dict[str, Tensor]:
        """``state``, under our names by now, in our order of classes and anchors.

        Tensors of a wrong shape stay as they are: ``fit_state`` refuses them.
        """

    def likely_cause(self, state: Mapping[str, Tensor], settings: ModelSettings) -> str:
        """What the names say the checkpoint is, as the end of a message; may be empty."""


def without_prefix(state: Mapping[str, Tensor], known: str) -> dict[str, Tensor]:
    """``state`` without what stands before the name ``known``: ``module.``, ``model.``."""
    prefix = next((name.removesuffix(known) for name in state if name.endswith(known)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def side_of(state: Mapping[str, Tensor], name: str, axis: int) -> int | None:
    """Length of the tensor ``name`` along ``axis``; ``None`` where there is no such tensor or axis."""
    tensor = state.get(name)
    return tensor.shape[axis] if tensor is not None and tensor.dim() > axis else None


def output_count(state: Mapping[str, Tensor], classifier: str) -> int:
    """Outputs of the classifier, background included; 2 where there is none, which ``fit_state`` refuses."""
    weight = state.get(classifier)
    return max(2, weight.shape[0]) if weight is not None and weight.dim() == 2 else 2


def with_widths(
    settings: ModelSettings, *, channels: int | None, pooled: int | None, representation: int | None
) -> ModelSettings:
    """``settings`` with the channels of the maps that RoIs are pooled from, and the widths of the box head.

    ``pooled`` is the number of inputs of its first layer, ``representation`` that of the classifier's.
    """
    found, channels = settings, channels or settings.fpn_channels
    if settings.neck in ("fpn", "fpn32"):
        found = dataclasses.replace(found, fpn_channels=channels)
    if pooled is not None:
        found = dataclasses.replace(found, roi_size=max(1, math.isqrt(pooled // channels)))
    if representation and settings.box_head != "res5":  # whose width is the stage's
        found = dataclasses.replace(found, representation=representation)
    return found


def to_our_names(
    state: Mapping[str, Tensor], settings: ModelSettings, classes: int, their_name: Callable[[str], str]
) -> dict[str, Tensor]:
    """``state`` under our names. What we have none for keeps its own, marked: it may be one of ours."""
    ours = {their_name(name): name for name in expected_shapes(settings, classes)}
    return {ours.get(name, _UNKNOWN + name): tensor for name, tensor in state.items()}


def fit_state(
    state: Mapping[str, Tensor], settings: ModelSettings, classes: int, their_name: Callable[[str], str]
) -> dict[str, Tensor]:
    """``state`` as ``FasterRCNN(settings, classes)`` loads it: float32, with step counters added.

    Raises ``ArtefactError`` that lists tensors which are missing, unknown, of another shape or not
    finite, by ``their_name``.
    """
    expected = expected_shapes(settings, classes)
    faults = find_faults(state, expected, their_name)
    if faults:
        raise ArtefactError("; ".join(faults))
    fitted = {}
    for name, shape in expected.items():
        if name.endswith(_STEP_COUNTER):
            fitted[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        fitted[name] = state[name].float()
        # Not isfinite(...).all(), which allocates as much again; a NaN comes through as both extremes.
        if not torch.isfinite(torch.stack(fitted[name].aminmax())).all():
            raise ArtefactError(f"tensor {their_name(name)!r} holds values that are not finite")
    return fitted


@functools.cache
def expected_shapes(settings: ModelSettings, classes: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the model has, by name; nothing is allocated."""
    with torch.device("meta"):
        model = FasterRCNN(settings, classes)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def find_faults(
    state: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    their_name: Callable[[str], str] = str,
) -> list[str]:
    """What keeps ``state`` from fitting, as phrases with the first names and the counts; empty if it fits."""
    needed = {name for name in expected if not name.endswith(_STEP_COUNTER)}
    given = {name for name in state if not name.endswith(_STEP_COUNTER)}
    wrong = [
        f"{their_name(name)} is {list(state[name].shape)}, expected {list(expected[name])}"
        for name in sorted(needed & given)
        if tuple(state[name].shape) != expected[name]
    ]
    kinds = (
        ("missing", sorted(map(their_name, needed - given))),
        ("unknown", sorted(name.removeprefix(_UNKNOWN) for name in given - needed)),
        ("of another shape", wrong),
    )
    return [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds if names]


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
