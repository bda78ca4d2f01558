"""What every importer has: architectures with our settings, and a state dict under our names that fits."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from anchorline.data.dataset import list_names
from anchorline.export.importers.checkpoint_files import CheckpointFile
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.train.model.faster_rcnn import FasterRCNN
from anchorline.train.model.settings import ModelSettings

# Rows of the last layers in our order: the background first, and anchors ratio by ratio.


_PREDICTOR = "roi_heads.box_predictor"
_RPN = "rpn.head"


def background_first(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` (our names) of a library whose classes stand first and whose background is last.

    Logits [K + 1, ...]: the last row goes to the front. Deltas [4K, ...], which the background has none
    of: four rows of zeros for it, never read, before them. Deltas [4, ...] for all classes at once
    (class-agnostic regression): the same four rows for each class.
    """
    changed = dict(state)
    for kind in ("weight", "bias"):
        logits, deltas = (
            state.get(f"{_PREDICTOR}.cls_score.{kind}"),
            state.get(f"{_PREDICTOR}.bbox_pred.{kind}"),
        )
        if logits is None or deltas is None or min(logits.dim(), deltas.dim()) < 1:
            continue
        classes = len(logits) - 1
        if len(deltas) not in (4, 4 * classes):
            continue
        changed[f"{_PREDICTOR}.cls_score.{kind}"] = torch.cat((logits[-1:], logits[:-1]))
        repeats = classes if len(deltas) == 4 else 1
        rows = [torch.zeros_like(deltas[:4]), *[deltas] * repeats]
        changed[f"{_PREDICTOR}.bbox_pred.{kind}"] = torch.cat(rows)
    return changed


def ratio_by_ratio(state: Mapping[str, Tensor], settings: ModelSettings) -> dict[str, Tensor]:
    """``state`` (our names) of a library whose anchors run size by size, the ratios within each.

    Row ``size * ratios + ratio`` of the objectness becomes row ``ratio * sizes + size``; the four rows of an
    anchor's deltas move together.
    """
    changed, ratios = dict(state), len(settings.aspect_ratios)
    sizes = settings.anchors_per_place // ratios
    for name, rows in ((f"{_RPN}.cls_logits", 1), (f"{_RPN}.bbox_pred", 4)):
        for kind in ("weight", "bias"):
            tensor = state.get(f"{name}.{kind}")
            if tensor is not None and tensor.dim() and len(tensor) == sizes * ratios * rows:
                by_anchor = tensor.reshape(sizes, ratios, rows, *tensor.shape[1:])
                changed[f"{name}.{kind}"] = by_anchor.transpose(0, 1).reshape(tensor.shape)
    return changed


# The classes of an imported model: from the user's file, from the checkpoint, or COCO's.


_BACKGROUND = ("__background__", "background")


@dataclass(frozen=True)
class ClassNames:
    """Names without the background, and COCO's category ids where the classes are COCO's."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...] | None = None


def choose_class_names(
    given: Path | tuple[str, ...] | None,
    in_checkpoint: tuple[str, ...] | None,
    coco: ClassNames,
    outputs: int,
    where: str,
) -> ClassNames:
    """Names for a model with ``outputs``, background included.

    Those ``given``, or in that file, else those in the checkpoint, else ``coco``, in the order and with the
    gaps that the library gives it. Raises ``SettingsError`` where they do not fit.
    """
    if given is not None:
        names = given if isinstance(given, tuple) else _read(given)
        if not are_class_names(names):
            raise SettingsError(f"classes are {', '.join(names)!r}; expected class names, each once")
        return ClassNames(_fitting(names, outputs, "--classes" if given is names else str(given), where))
    if in_checkpoint is not None:
        names = _fitting(in_checkpoint, outputs, f"{where}: its description", "the model")
        return coco if names == coco.names else ClassNames(names)
    if outputs != len(coco.names) + 1:
        raise SettingsError(
            f"{where}: has {outputs} outputs, background included; name its {outputs - 1} classes with "
            "--classes A,B,... or --classes-file FILE (COCO's names are known, and need "
            f"{len(coco.names) + 1})"
        )
    return coco


def coco_80() -> ClassNames:
    """COCO's 80 classes without the gaps in their numbers, as Detectron2 and MMDetection order them."""
    from anchorline.export.importers.torchvision import coco_classes

    with_gaps = coco_classes()
    used = [
        (name, number) for number, name in enumerate(with_gaps.names, start=1) if not name.startswith("N/A ")
    ]
    return ClassNames(tuple(name for name, _ in used), tuple(number for _, number in used))


def _fitting(names: tuple[str, ...], outputs: int, source: str, where: str) -> tuple[str, ...]:
    if len(names) == outputs and names[0].lower() in _BACKGROUND:
        names = names[1:]
    if len(names) != outputs - 1:
        raise SettingsError(
            f"{source}: names {len(names)} classes ({list_names(names)}); {where} has {outputs - 1} and the "
            "background"
        )
    return names


def _read(path: Path) -> tuple[str, ...]:
    """The names in ``path``: a JSON list, or one a line."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        found = json.loads(text) if text.startswith("[") else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{path}: cannot be read as class names ({error}); expected one name a line, or a JSON list"
        ) from None
    names = [name for name in found if name != ""]
    if not are_class_names(names):
        raise SettingsError(f"{path}: expected class names, each once; got {str(found)[:80]}")
    return tuple(names)


def are_class_names(names: object) -> bool:
    """Whether ``names`` is a list or tuple of texts, each once and none empty."""
    if not isinstance(names, list | tuple) or not names:
        return False
    return all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)


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
