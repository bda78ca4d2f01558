"""Other libraries' checkpoints as ours: ``model.safetensors`` with the same detections."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from anchorline import __version__
from anchorline.export.importers import detectron2, mmdetection, py_faster_rcnn, torchvision
from anchorline.export.importers.checkpoint_files import (
    CheckpointFile,
    read_checkpoint_file,
    read_weights_enum,
)
from anchorline.export.importers.library import (
    CLASSIFIER,
    Description,
    Library,
    choose_class_names,
    fit_state,
    output_count,
    to_our_names,
)
from anchorline.runtime.canvas import padded
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.train.checkpoint import contract_of, save_checkpoint
from anchorline.train.model.settings import ModelSettings, expect, settings_from
from anchorline.train.settings import parse_override

LIBRARIES: tuple[Library, ...] = (torchvision, detectron2, mmdetection, py_faster_rcnn)

LIBRARY_KEY = "library"
"""In ``Contract.source``: the library that an imported model comes from."""


@dataclass(frozen=True)
class ImportResult:
    """The file that was written, its contract and architecture, and what the user should know."""

    path: Path
    contract: Contract
    settings: ModelSettings
    warnings: tuple[str, ...]


def import_checkpoint(
    checkpoint: str | Path,
    out: Path,
    *,
    arch: str | None = None,
    classes: Path | tuple[str, ...] | None = None,
    canvas: tuple[int, int] | None = None,
    resize: ResizeRule | None = None,
    batch_norm_eps: float | None = None,
    fast_resize: bool = False,
    overrides: Sequence[str] = (),
) -> ImportResult:
    """Write the detector in ``checkpoint``, of any of ``LIBRARIES``, to ``out`` as a checkpoint of ours.

    ``checkpoint`` is a file or the name of torchvision's weights; ``arch`` a name in the libraries'
    ``ARCHITECTURES`` (torchvision's weights know theirs, Detectron2's and MMDetection's tensors show it).
    ``classes`` are the class names without the background, or a file of them, one a line or a JSON list;
    the checkpoint's own are the default, and COCO's where the model has as many outputs. The sides of
    ``resize`` replace the architecture's own, and ``canvas`` (height, width; multiples of 32) the one
    that holds landscape frames. ``batch_norm_eps`` belongs to the body's batch norms. ``fast_resize``
    resizes plainly and in whole grey levels. ``overrides`` change settings that the tensors do not show,
    as ``score_threshold=0.3``. Raises ``ArtefactError`` and ``SettingsError``.
    """
    if out.suffix != ".safetensors":
        raise SettingsError(f"output is {str(out)!r}; expected a file name that ends in .safetensors")
    source, library, arch, assumed = _read(checkpoint, arch)
    state = library.current_names(source.state)
    described = library.describe(source, state, arch)
    settings, eps_warnings = _changed(described, batch_norm_eps, overrides)
    resize, input_dtype = _resize(described.resize, resize, library.INPUT_DTYPE, fast_resize)
    settings = dataclasses.replace(settings, canvas=canvas or landscape_canvas(resize))
    outputs = output_count(state, library.their_name(CLASSIFIER, settings))
    fitted = _fitted(library, state, settings, outputs - 1, source.name, arch)
    chosen = choose_class_names(classes, described.names, library.coco_classes(), outputs, source.name)
    contract = dataclasses.replace(
        contract_of(settings, chosen.names, chosen.category_ids, _source(source, library, arch)),
        resize=resize,
        input_dtype=input_dtype,
    )
    save_checkpoint(out, fitted, settings, contract)
    return ImportResult(out, contract, settings, (*assumed, *described.warnings, *eps_warnings))


def landscape_canvas(resize: ResizeRule) -> tuple[int, int]:
    """The canvas that holds every landscape frame at the scale ``resize`` gives it, in multiples of 32."""
    shorter, longer = resize.shorter_side, resize.longer_side
    if shorter is None or longer is None or shorter > longer:
        raise SettingsError(
            f"resize is {shorter} and {longer}; expected a shorter and a longer side in pixels"
        )
    return padded((shorter, longer))


def _read(checkpoint: str | Path, arch: str | None) -> tuple[CheckpointFile, Library, str, tuple[str, ...]]:
    """The checkpoint, its library, the name of its architecture, and what was assumed about that."""
    name = str(checkpoint)
    library = None if arch is None else _library_of(arch)
    if "_Weights." in name and not Path(name).exists():
        own = _arch_of_weights(name)
        if arch not in (None, own):
            raise SettingsError(f"arch is {arch!r}; {name} are weights of {own}, leave --arch out")
        return read_weights_enum(name), torchvision, own, ()
    source = read_checkpoint_file(Path(checkpoint))
    if library is not None and arch is not None:
        return source, library, arch, ()
    library, arch = _recognise(source)
    assumed = f"no --arch given; by its tensors the checkpoint is {library.NAME}'s, taken as {arch}"
    return source, library, arch, (assumed,)


def _library_of(arch: str) -> Library:
    for library in LIBRARIES:
        if arch in library.ARCHITECTURES:
            return library
    raise SettingsError(f"arch is {arch!r}; expected {_known_names()}")


def _known_names() -> str:
    return "; ".join(f"for {library.NAME} {library.KNOWN_NAMES}" for library in LIBRARIES)


def _recognise(source: CheckpointFile) -> tuple[Library, str]:
    """The library and the architecture that the tensors show."""
    for library in LIBRARIES:
        arch = library.recognise(source, library.current_names(source.state))
        if arch is not None:
            return library, arch
    raise SettingsError(
        f"{source.name}: its tensors alone do not tell the architecture; give --arch, {_known_names()}"
    )


def _arch_of_weights(name: str) -> str:
    """torchvision's builder of the weights ``name``: FasterRCNN_X_Weights belongs to fasterrcnn_x."""
    arch = name.partition("_Weights.")[0].lower()
    if arch not in torchvision.ARCHITECTURES:
        raise SettingsError(
            f"{name}: not weights of a Faster R-CNN; expected those of {torchvision.KNOWN_NAMES}"
        )
    return arch


def _changed(
    described: Description, eps: float | None, overrides: Sequence[str]
) -> tuple[ModelSettings, tuple[str, ...]]:
    """The settings that were described, as the user changes them, and the warnings that remain."""
    values = dataclasses.asdict(described.settings)
    if eps is not None:
        expect(eps >= 0, "batch norm eps", eps, "a number of at least 0")
        values["backbone_norm_eps"] = eps
    for text in overrides:
        named = "." in text.partition("=")[0]
        table, name, value = parse_override(text if named else f"model.{text}")
        expect(table == "model", "override", text, "a setting of the model")
        values[name] = value
    return settings_from(ModelSettings, values, "model"), described.eps_warnings if eps is None else ()


def _resize(
    usual: ResizeRule, given: ResizeRule | None, input_dtype: str, fast: bool
) -> tuple[ResizeRule, str]:
    """How images are resized, and to what type of pixels."""
    if given is not None:
        usual = dataclasses.replace(usual, shorter_side=given.shorter_side, longer_side=given.longer_side)
    return (dataclasses.replace(usual, interpolation="bilinear"), "uint8") if fast else (usual, input_dtype)


def _fitted(
    library: Library, state: dict[str, Tensor], settings: ModelSettings, classes: int, where: str, arch: str
) -> dict[str, Tensor]:
    """``state`` as our model loads it; raises ``ArtefactError`` that says what does not fit."""
    their_name = partial(library.their_name, settings=settings)
    weights = {name: tensor for name, tensor in state.items() if not name.startswith(library.IGNORED)}
    ours = library.our_layout(to_our_names(weights, settings, classes, their_name), settings)
    try:
        return fit_state(ours, settings, classes, their_name)
    except ArtefactError as error:
        raise ArtefactError(
            f"{where}: does not fit {arch}: {error}{_likely_cause(library, state, settings)}"
        ) from None


def _likely_cause(library: Library, state: dict[str, Tensor], settings: ModelSettings) -> str:
    """What the checkpoint looks like instead, as the end of a message."""
    for other in LIBRARIES:
        if other is not library and (arch := other.recognise(_NOTHING, state)) is not None:
            return f"; it looks like {other.NAME}'s {arch}: give --arch {arch}"
    cause = library.likely_cause(state, settings)
    anchors = state.get(library.their_name("rpn.head.cls_logits.bias", settings))
    if not cause and anchors is not None and anchors.numel() != settings.anchors_per_place:
        return (
            f"; its RPN predicts {anchors.numel()} anchors at each place: give those it was trained with, as "
            'in --set "anchor_sizes=[[32], [64], [128], [256], [512]]" --set "aspect_ratios=[0.5, 1, 2]"'
        )
    return cause


_NOTHING = CheckpointFile("", {}, "")


def _source(source: CheckpointFile, library: Library, arch: str) -> dict[str, str]:
    return {
        "imported_from": source.name,
        "sha256": source.sha256,
        LIBRARY_KEY: library.NAME,
        "arch": arch,
        "imported_by": f"anchorline {__version__}",
    }
