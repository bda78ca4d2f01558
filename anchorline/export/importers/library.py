"""What is known of a library, and how a checkpoint of it comes under our names and in our order."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anchorline.data.dataset import list_names
from anchorline.export.importers.checkpoint_files import CheckpointFile
from anchorline.export.importers.configuration import Configuration
from anchorline.runtime.contract import ResizeRule
from anchorline.runtime.io.errors import AnchorlineError, ArtefactError, SettingsError, reason_of, shown
from anchorline.runtime.io.files import expect_regular
from anchorline.runtime.io.schema import LARGEST_TEXT
from anchorline.train.checkpoint import expected_shapes
from anchorline.train.model.backbones import BACKBONES
from anchorline.train.model.settings import ModelSettings, settings_from

State = Mapping[str, Tensor]

OPEN_SETTINGS = (
    *("resize", "anchor_sizes", "aspect_ratios", "mean", "std", "box_weights", "rpn_pre_nms", "rpn_post_nms"),
    *("rpn_nms_iou", "score_threshold", "nms_iou", "max_detections"),
)

CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"
_PREDICTOR = "roi_heads.box_predictor"
_RPN = "rpn.head"
_POOLED_STRIDE = {"single": 16, "dc5": 32}  # of the body's map that RoIs are pooled from, without a pyramid
_STEP_COUNTER = "num_batches_tracked"  # no result depends on it, and frozen batch norms have none
_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 3
_BACKGROUND = ("__background__", "background")


# What Detectron2 and MMDetection have in common, and what is otherwise on MSRA's weights, caffe's.
RESNET_FPN = ModelSettings(
    backbone="resnet50",
    neck="fpn",
    anchor_style="unrounded",
    rpn_pre_nms=1000,
    rpn_post_nms=1000,
    rpn_min_side=0.0,
    roi_sampling=0,
    roi_aligned=True,
    box_min_side=0.0,
)
MSRA: dict[str, Any] = {
    "bottleneck_stride": "1x1",
    "channel_order": "bgr",
    "mean": (103.53, 116.28, 123.675),
    "std": (1.0, 1.0, 1.0),
}


@dataclass(frozen=True)
class Architecture:
    """A detector as its library builds it: our settings for it, and how it resizes images.

    Of a checkpoint also its class names, where it has them, and warnings; its settings are right but for the
    widths. ``eps_warnings`` do not matter where the user gives the eps of the batch norms. ``known`` names
    the settings that are not just usual: the checkpoint or its ``configuration`` has them. ``resize`` may be
    one.
    """

    settings: ModelSettings
    resize: ResizeRule
    names: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()
    eps_warnings: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()
    configuration: str | None = None


@dataclass(frozen=True)
class ClassNames:
    """Names without the background, and COCO's category ids where the classes are COCO's."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...] | None = None


def coco_90() -> ClassNames:
    """COCO's 90 classes in the order of torchvision's labels, whose numbers are COCO's category ids.

    Ten of the numbers were never used. Their outputs stay, since they take part in the softmax, under
    names such as ``N/A 12``; a trained model does not detect them.
    """
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
    shown = tuple(f"N/A {number}" if name == "N/A" else name for number, name in enumerate(names, start=1))
    return ClassNames(shown, tuple(range(1, len(shown) + 1)))


def coco_80() -> ClassNames:
    """COCO's 80 classes without the gaps in their numbers, as all but torchvision order them."""
    names = coco_90().names
    used = [(name, id_) for id_, name in enumerate(names, start=1) if not name.startswith("N/A ")]
    return ClassNames(tuple(name for name, _ in used), tuple(id_ for _, id_ in used))


@dataclass(frozen=True)
class Library:
    """A library whose checkpoints can be imported; each module beside this one has one, as ``LIBRARY``.

    A ``state`` is a checkpoint's tensors, from ``current_names`` on under the library's own names.

    ``architectures`` stand under the names that ``--arch`` takes, ``known_names`` is those as a phrase.
    ``input_dtype``: what its resize produces, ``float32``, or ``uint8`` for whole grey levels.
    ``names`` turns our names into its own, in order: patterns and what stands for them; ``body`` is its
    word for ``backbone.body.`` by neck. ``old_names`` renews names of earlier versions, ``tidy`` shapes.
    ``ignored``: how the names of tensors begin that are no weights.
    ``background_last`` and ``size_by_size``: the order of its classes and anchors where it is not ours.
    ``recognise``: the architecture that a file and its state show; None where they do not tell.
    ``describe``: the architecture of a file and its state; raises ``ArtefactError`` where we have none.
    ``open_settings``: what its users change and no tensor shows.
    ``takes_configuration``: whether it writes one that is read here.
    ``marks``: patterns of names by which to tell models that cannot be imported, and what those are;
    ``likely_cause``: what else a state that does not fit is, as the end of a message.
    """

    name: str
    architectures: Mapping[str, Architecture]
    known_names: str
    describe: Callable[[CheckpointFile, State, str], Architecture]
    recognise: Callable[[CheckpointFile, State], str | None] = lambda source, state: None
    open_settings: tuple[str, ...] = OPEN_SETTINGS
    takes_configuration: bool = True
    input_dtype: str = "uint8"
    coco_classes: Callable[[], ClassNames] = coco_80
    names: tuple[tuple[str, str], ...] = ()
    body: Mapping[str, str] = field(default_factory=dict)
    old_names: tuple[tuple[str, str], ...] = ()
    tidy: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    ignored: tuple[str, ...] = ()
    background_last: bool = False
    size_by_size: bool = False
    marks: tuple[tuple[str, str], ...] = ()
    likely_cause: Callable[[State, ModelSettings], str] = lambda state, settings: ""

    def their_name(self, ours: str, settings: ModelSettings) -> str:
        """The library's name for our parameter ``ours``."""
        for pattern, replacement in self.names:
            ours = re.sub(pattern, replacement, ours)
        return ours.replace("backbone.body.", self.body.get(settings.neck, "backbone.body."))

    def current_names(self, state: State) -> dict[str, Tensor]:
        """``state`` under the names of today, without what stands before them: ``module.``, ``model.``."""
        known = self.their_name(CLASSIFIER, next(iter(self.architectures.values())).settings)
        found = next((name for name in state if name == known or name.endswith(f".{known}")), known)
        prefix = found.removesuffix(known)
        plain = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        renamed = {}
        for name, tensor in plain.items():
            new = name
            for pattern, replacement in self.old_names:
                new = re.sub(pattern, replacement, new)
            new = name if new in plain else new
            renamed[new] = self.tidy(new, tensor)
        return renamed


def with_configuration(
    usual: Architecture,
    configuration: Configuration,
    said: Mapping[str, Any],
    sides: Mapping[str, Any],
    anchors: tuple[str, int | None],
    outputs: tuple[str, int | None],
) -> Architecture:
    """``usual`` with the settings and sides of images that its ``configuration`` said.

    ``anchors`` at each place and ``outputs`` of the classifier are those of the tensors, with the paths that
    say the same. Raises ``ArtefactError`` that names the configuration.
    """
    try:
        values = {**dataclasses.asdict(usual.settings), **said}
        settings = settings_from(ModelSettings, values, "model")
        resize = dataclasses.replace(usual.resize, **sides)
    except AnchorlineError as error:
        raise ArtefactError(f"{configuration.name}: {error}") from None
    if resize.shorter_side and resize.longer_side:  # no shorter side can be longer than the bound of both
        bound = min(resize.shorter_side, resize.longer_side)
        resize = dataclasses.replace(resize, shorter_side=bound)
    configuration.agree(*anchors, "anchors at each place", settings.anchors_per_place)
    configuration.agree(outputs[0], outputs[1] and outputs[1] - 1, "classes")
    return dataclasses.replace(
        usual,
        settings=settings,
        resize=resize,
        known=usual.known.union(said, {"resize"} if len(sides) == 2 else ()),
        configuration=configuration.name,
    )


def listed(value: Any) -> Any:
    """``value`` for a reader and for JSON: tuples as lists, whole numbers without a point."""
    if isinstance(value, tuple | list):
        return [listed(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def side_of(state: State, name: str, axis: int) -> int | None:
    """Length of the tensor ``name`` along ``axis``; ``None`` where there is no such tensor or axis."""
    tensor = state.get(name)
    return tensor.shape[axis] if tensor is not None and tensor.dim() > axis else None


def with_widths(library: Library, settings: ModelSettings, state: State) -> ModelSettings:
    """``settings`` with the widths of the pyramid, of the pooled RoIs and of the box head in ``state``."""

    def side(ours: str, axis: int) -> int | None:
        return side_of(state, library.their_name(ours, settings), axis)

    stride = _POOLED_STRIDE.get(settings.neck)
    if stride is None:
        channels = side("backbone.fpn.inner_blocks.0.0.weight", 0) or settings.fpn_channels
        settings = dataclasses.replace(settings, fpn_channels=channels)
    else:
        channels = BACKBONES[settings.backbone].maps[stride][1]
    pooled = side("roi_heads.box_head.fc6.weight", 1)
    if pooled is not None:
        settings = dataclasses.replace(settings, roi_size=max(1, math.isqrt(pooled // channels)))
    representation = side(CLASSIFIER, 1)
    if representation and settings.box_head != "res5":  # whose width is that of the body's last part
        settings = dataclasses.replace(settings, representation=representation)
    return settings


def output_count(library: Library, state: State, settings: ModelSettings) -> int:
    """Outputs of the classifier, background included; 2 where there is none, which ``fit_state`` refuses."""
    weight = state.get(library.their_name(CLASSIFIER, settings))
    return max(2, weight.shape[0]) if weight is not None and weight.dim() == 2 else 2


class Misfit(ArtefactError):
    """Tensors that are missing, unknown or of another shape."""


def has_shapes(state: State, settings: ModelSettings, classes: int) -> bool:
    """Whether ``state`` has our names and shapes, and no others."""
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = expected_shapes(settings, classes)
    return all(name.endswith(_STEP_COUNTER) for name, _ in found.items() ^ expected.items())


def fit_state(library: Library, state: State, settings: ModelSettings, classes: int) -> dict[str, Tensor]:
    """``state`` as ``FasterRCNN(settings, classes)`` loads it: float32, with step counters added.

    Raises ``Misfit`` that lists tensors which are missing, unknown or of another shape, by the library's
    names, and ``ArtefactError`` for one that is not of finite numbers.
    """
    expected = expected_shapes(settings, classes)
    their_name = {name: library.their_name(name, settings) for name in expected}
    our_name = {theirs: name for name, theirs in their_name.items()}
    given = {our_name[name]: tensor for name, tensor in state.items() if name in our_name}
    if library.background_last:
        given = background_first(given)
    if library.size_by_size:
        given = ratio_by_ratio(given, settings)
    needed = sorted(name for name in expected if not name.endswith(_STEP_COUNTER))
    kinds = {
        "missing": sorted(their_name[name] for name in needed if name not in given),
        "unknown": sorted(
            name
            for name in state
            if name not in our_name
            and not name.startswith(library.ignored)
            and not name.endswith(_STEP_COUNTER)
        ),
        "of another shape": [
            f"{their_name[name]} is {list(given[name].shape)}, expected {list(expected[name])}"
            for name in needed
            if name in given and tuple(given[name].shape) != expected[name]
        ],
    }
    faults = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for kind, names in kinds.items()
        if names
    ]
    if faults:
        raise Misfit("; ".join(faults))
    fitted = {}
    for name, shape in expected.items():
        if name.endswith(_STEP_COUNTER):
            fitted[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        if given[name].dtype not in _WEIGHTS:
            kind = str(given[name].dtype).removeprefix("torch.")
            raise ArtefactError(
                f"tensor {their_name[name]!r} is of {kind}; expected floating point of 16 to 64 bits, as "
                "before a model is quantised"
            )
        fitted[name] = given[name].float()
        # Not isfinite(...).all(), which allocates as much again; a NaN comes through as both extremes.
        extremes = torch.stack(fitted[name].aminmax())
        if name.endswith("running_var") and extremes[0] < -settings.backbone_norm_eps:
            raise ArtefactError(
                f"tensor {their_name[name]!r} holds variances below 0, which none can be; the file is damaged"
            )
        if not torch.isfinite(extremes).all():
            raise ArtefactError(
                f"tensor {their_name[name]!r} holds values that are not finite: the training diverged, or "
                "the file is damaged; take an earlier checkpoint"
            )
    return fitted


def background_first(state: State) -> dict[str, Tensor]:
    """``state`` (our names) of a library whose classes stand first and whose background is last.

    Logits [K + 1, ...]: the last row goes to the front. Deltas [4K, ...], which the background has none
    of: four rows of zeros for it, never read, before them. Deltas [4, ...] for all classes at once
    (class-agnostic regression): the same four rows for each class. Tensors of a wrong shape stay as they
    are: ``fit_state`` refuses them.
    """
    changed = dict(state)
    for kind in ("weight", "bias"):
        score, box = f"{_PREDICTOR}.cls_score.{kind}", f"{_PREDICTOR}.bbox_pred.{kind}"
        logits, deltas = state.get(score), state.get(box)
        if logits is None or deltas is None or min(logits.dim(), deltas.dim()) < 1:
            continue
        classes = len(logits) - 1
        if len(deltas) in (4, 4 * classes):
            changed[score] = torch.cat((logits[-1:], logits[:-1]))
            repeats = classes if len(deltas) == 4 else 1
            changed[box] = torch.cat([torch.zeros_like(deltas[:4]), *[deltas] * repeats])
    return changed


def ratio_by_ratio(state: State, settings: ModelSettings) -> dict[str, Tensor]:
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


# The classes of an imported model: from the user, from the checkpoint, or COCO's.


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
            raise SettingsError(f"classes are {shown(', '.join(names))}; expected class names, each once")
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
    expect_regular(path, SettingsError)
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise ValueError(f"more than {LARGEST_TEXT} bytes")
        text = path.read_text(encoding="utf-8-sig").strip()
        found = json.loads(text) if text.startswith("[") else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(
            f"{path}: cannot be read as class names ({reason_of(error)}); expected one a line or a JSON list"
        ) from None
    names = [name for name in found if name != ""]
    if not are_class_names(names):
        raise SettingsError(f"{path}: expected class names, each once; got {shown(found)}")
    return tuple(names)


def are_class_names(names: object) -> bool:
    """Whether ``names`` is a list or tuple of texts, each once and none empty."""
    if not isinstance(names, list | tuple) or not names:
        return False
    return all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names)
