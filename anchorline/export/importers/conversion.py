"""Other libraries' checkpoints as ours: ``model.safetensors`` with the same detections."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorline import __version__
from anchorline.data.synthetic import scenes
from anchorline.export.importers import detectron2, mmdetection, py_faster_rcnn, torchvision
from anchorline.export.importers.checkpoint_files import (
    CheckpointFile,
    read_checkpoint_file,
    read_weights_enum,
)
from anchorline.export.importers.library import (
    Library,
    Misfit,
    State,
    choose_class_names,
    fit_state,
    listed,
    output_count,
    with_widths,
)
from anchorline.runtime.contract import NAMES_VARIABLE, Contract, ResizeRule, most_names
from anchorline.runtime.io.errors import ArtefactError, SettingsError
from anchorline.runtime.io.files import atomic_path
from anchorline.train.checkpoint import LIBRARY_KEY, contract_of, load_checkpoint, save_checkpoint
from anchorline.train.model.settings import ModelSettings, expect, settings_from
from anchorline.train.predict import checkpoint_subject
from anchorline.train.settings import parse_override
from anchorline.verify.compare import TOLERANCES
from anchorline.verify.stages import Subject
from anchorline.verify.verification import settle, verify_subjects, write_not_executed

LIBRARIES = tuple(module.LIBRARY for module in (torchvision, detectron2, mmdetection, py_faster_rcnn))

# torchvision computes the same in another order, and differs from itself by as much when only the memory
# layout of its tensors changes.
TOLERANCE = dataclasses.replace(TOLERANCES["fp32"], score=1e-3, matched=0.98, confident=0.98)

_NO_FILE = CheckpointFile("", {}, "")


@dataclass(frozen=True)
class ImportResult:
    """The file that was written, its contract and architecture, and what the user should know.

    ``verification`` is how it compared with torchvision, or that it was not compared, and why.
    """

    path: Path
    contract: Contract
    settings: ModelSettings
    warnings: tuple[str, ...]
    verification: str


def import_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    arch: str | None = None,
    classes: Path | tuple[str, ...] | None = None,
    canvas: tuple[int, int] | None = None,
    resize: ResizeRule | None = None,
    batch_norm_eps: float | None = None,
    fast_resize: bool = False,
    overrides: Sequence[str] = (),
    config: Path | None = None,
    weights: str | None = None,
    verify: bool = True,
    warn: Callable[[Sequence[str]], None] = lambda lines: None,
) -> ImportResult:
    """Write the detector in ``checkpoint``, of any of ``LIBRARIES``, to ``out`` as a checkpoint of ours.

    ``checkpoint`` is a file or the name of torchvision's weights; ``arch`` a name in the libraries'
    ``architectures`` (torchvision's weights know theirs, Detectron2's and MMDetection's tensors show it).
    ``classes`` are the class names without the background, or a file of them, one a line or a JSON list;
    the checkpoint's own are the default, and COCO's where the model has as many outputs. The sides of
    ``resize`` replace the architecture's own; frames are scaled to fit ``canvas`` (height, width; multiples
    of 32) as well. ``batch_norm_eps`` belongs to the body's batch norms. ``fast_resize``
    resizes plainly and in whole grey levels. ``overrides`` change settings that the tensors do not show,
    as ``score_threshold=0.3``. ``config`` is the configuration that Detectron2 or MMDetection wrote in
    training; the default is that in the checkpoint or beside it. ``weights`` is the key of the state dict, of
    several in the checkpoint; the default is an averaged one. With ``verify`` a model of torchvision's
    must give what torchvision's own detector gives before it is published; the verdict, or that there is
    none, goes to the record beside the file. ``warn`` is told the result's ``warnings`` before. Raises
    ``ArtefactError``, ``SettingsError`` and ``ParityError``.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise SettingsError(f"output is {str(out)!r}; expected a file name that ends in .safetensors")
    source, library, arch, taken_as = _read(checkpoint, arch, config, weights)
    state = library.current_names(source.state)
    described = library.describe(source, state, arch)
    settings = with_widths(library, described.settings, state)
    eps_warnings = described.eps_warnings if batch_norm_eps is None else ()
    settings = _changed(settings, batch_norm_eps, overrides)
    rule = _resize_rule(described.resize, resize, fast_resize)
    rule = dataclasses.replace(rule, within=canvas, padding=settings.padding)
    settings = dataclasses.replace(settings, canvas=canvas or _landscape_canvas(rule))
    outputs = output_count(library, state, settings)
    fitted = _fitted(library, arch, state, settings, outputs - 1, source.name)
    chosen = choose_class_names(classes, described.names, library.coco_classes(), outputs, source.name)
    changed = {"resize"} if resize is not None else set()
    changed |= {text.partition("=")[0].strip().removeprefix("model.") for text in overrides}
    used = _open_settings(library, settings, rule)
    assumed = [name for name in used if name not in described.known | changed]
    origin = {
        "imported_from": source.name,
        "sha256": source.sha256,
        LIBRARY_KEY: library.name,
        "arch": arch,
        "imported_by": f"anchorline {__version__}",
        "configuration": described.configuration and Path(described.configuration).name,
        "settings": used,
        "assumed": assumed,
    }
    contract = dataclasses.replace(
        contract_of(settings, chosen.names, chosen.category_ids, origin),
        resize=rule,
        input_dtype="uint8" if fast_resize else library.input_dtype,
    )
    warnings = (
        *source.notes,
        *taken_as,
        *_assumptions({name: used[name] for name in assumed}, arch, library, described.configuration),
        *described.warnings,
        *eps_warnings,
    )
    warn(warnings)
    with atomic_path(out) as draft:
        save_checkpoint(draft, fitted, settings, contract)
        if verify:
            verification = _verify(draft)
        else:
            verification = "not verified"
            write_not_executed(draft, "imported with --no-verify")
    return ImportResult(out, contract, settings, warnings, verification)


def _resize_rule(usual: ResizeRule, given: ResizeRule | None, fast: bool) -> ResizeRule:
    """The library's rule with the sides that are ``given``, or plain where it shall be ``fast``."""
    rule = usual
    if given is not None:
        rule = dataclasses.replace(rule, shorter_side=given.shorter_side, longer_side=given.longer_side)
    return dataclasses.replace(rule, interpolation="bilinear") if fast else rule


def _landscape_canvas(rule: ResizeRule) -> tuple[int, int]:
    """That which holds every landscape frame at the scale that the rule gives it."""
    shorter, longer = rule.shorter_side, rule.longer_side
    if shorter is None or longer is None or shorter > longer:
        raise SettingsError(
            f"resize is {shorter} and {longer}; expected a shorter and a longer side in pixels"
        )
    height, width = (-(-side // 32) * 32 for side in (shorter, longer))
    return height, width


def _verify(path: Path) -> str:
    """Compare an imported checkpoint with torchvision's own detector, and record it; says how it went.

    On one scene. Where the model is resized otherwise, or is of a library that has no detector here, that is
    recorded and said. Raises ``ParityError``.
    """
    with checkpoint_subject(path) as ours:
        contract, reason = ours.detector.contract, None
        library = contract.source[LIBRARY_KEY]
        if library != torchvision.LIBRARY.name:
            reason = f"there is no {library} here to compare with (docs/import.md)"
        elif contract.input_dtype != "float32":
            reason = "the fast resize is not torchvision's"
        elif contract.resize.within is not None:
            reason = "torchvision scales no frame to fit a canvas"
        if reason is not None:
            write_not_executed(path, reason)
            return f"not verified: {reason}"
        report = verify_subjects(
            Subject(path, torchvision.TorchvisionDetector.of(*load_checkpoint(path))),
            ours,
            scenes(contract.names, 1),
            which_traps=(),
            tolerance=TOLERANCE,
        )
    settle(path, report, "the imported model and torchvision")
    return report.describe()


def _open_settings(library: Library, settings: ModelSettings, rule: ResizeRule) -> dict[str, Any]:
    """What the library's users change and no tensor shows, by our names, as the model has it."""
    values = {**dataclasses.asdict(settings), "resize": [rule.shorter_side, rule.longer_side]}
    shown = {"rpn_channels", *(() if settings.box_head == "res5" else ("roi_size",))}
    return {name: listed(values[name]) for name in library.open_settings if name not in shown}


def _assumptions(
    assumed: Mapping[str, Any], arch: str, library: Library, configuration: str | None
) -> tuple[str, ...]:
    """Which configuration the settings are from, or one line that lists those that were assumed."""
    if not assumed:
        return (f"the settings are those of {configuration}",) if configuration else ()
    where = "the configuration of the training is not known" if library.takes_configuration else ""
    where = f"{configuration} does not give all settings" if configuration else where
    sides = {"resize": "--resize {}x{}"}
    text = ", ".join(
        sides[name].format(*value) if name in sides else f"{name}={json.dumps(value).replace(chr(34), '')}"
        for name, value in assumed.items()
    )
    remedy = "--config FILE, or " if library.takes_configuration else ""
    return (
        f"{where or 'the checkpoint holds no settings'}: assumed {arch}'s usual {text}; where the model was "
        f"trained with others every box is wrong: give {remedy}those with --set NAME=VALUE",
    )


def _read(
    checkpoint: str | Path, arch: str | None, config: Path | None, weights: str | None
) -> tuple[CheckpointFile, Library, str, tuple[str, ...]]:
    """The checkpoint, its library, the name of its architecture, and what was assumed about that."""
    name = str(checkpoint)
    known = "; ".join(f"for {library.name} {library.known_names}" for library in LIBRARIES)
    given = next((library for library in LIBRARIES if arch in library.architectures), None)
    if arch is not None and given is None:
        raise SettingsError(f"arch is {arch!r}; expected {known}")
    if "_Weights." in name and not Path(name).exists():
        # torchvision's builder of the weights: FasterRCNN_X_Weights belongs to fasterrcnn_x.
        own, library = name.partition("_Weights.")[0].lower(), torchvision.LIBRARY
        if own not in library.architectures:
            raise SettingsError(
                f"{name}: not weights of a Faster R-CNN; expected those of {library.known_names}"
            )
        if arch not in (None, own):
            raise SettingsError(f"arch is {arch!r}; {name} are weights of {own}, leave --arch out")
        _takes(library, config)
        if weights is not None:
            raise SettingsError(f"--weights is {weights!r}; {name} is one set of weights, leave it out")
        return read_weights_enum(name), library, own, ()
    source = dataclasses.replace(read_checkpoint_file(Path(checkpoint), weights), config=config)
    if given is not None and arch is not None:
        _takes(given, config)
        return source, given, arch, ()
    for library in LIBRARIES:
        shown = library.recognise(source, library.current_names(source.state))
        if shown is not None:
            _takes(library, config)
            assumed = f"no --arch given; by its tensors the checkpoint is {library.name}'s, taken as {shown}"
            return source, library, shown, (assumed,)
    raise SettingsError(
        f"{source.name}: its tensors alone do not tell the architecture; give --arch, {known}"
    )


def _takes(library: Library, config: Path | None) -> None:
    if config is not None and not library.takes_configuration:
        raise SettingsError(
            f"--config is {config}, and {library.name} writes no configuration that is read; expected --set "
            "NAME=VALUE for what was not as usual"
        )


def _changed(settings: ModelSettings, eps: float | None, overrides: Sequence[str]) -> ModelSettings:
    """``settings`` as the user changes them."""
    values = dataclasses.asdict(settings)
    if eps is not None:
        expect(eps >= 0, "batch norm eps", eps, "a number of at least 0")
        values["backbone_norm_eps"] = eps
    for text in overrides:
        named = "." in text.partition("=")[0]
        table, name, value = parse_override(text if named else f"model.{text}")
        expect(table == "model", "override", text, "a setting of the model")
        values[name] = value
    return settings_from(ModelSettings, values, "model")


def _fitted(
    library: Library, arch: str, state: State, settings: ModelSettings, classes: int, name: str
) -> State:
    """``state`` in our shapes, or an ``ArtefactError`` of what the file ``name`` is likely to be instead."""
    if classes > (most := most_names()):
        raise ArtefactError(
            f"{name}: has {classes} classes; expected at most {most} (the environment variable "
            f"{NAMES_VARIABLE} sets another bound)"
        )
    try:
        return fit_state(library, state, settings, classes)
    except Misfit as error:
        cause = _likely_cause(library, arch, state, settings)
        raise ArtefactError(f"{name}: does not fit {arch}: {error}{cause}") from None
    except ArtefactError as error:
        raise ArtefactError(f"{name}: {error}") from None


def _likely_cause(library: Library, arch: str, state: State, settings: ModelSettings) -> str:
    """What the checkpoint looks like instead, as the end of a message."""
    for other in LIBRARIES:
        if other is not library and (shown := other.recognise(_NO_FILE, state)) is not None:
            return f"; it looks like {other.name}'s {shown}: give --arch {shown}"
    for pattern, kind in library.marks:
        if any(re.search(pattern, name) for name in state):
            return f"; it looks like {kind}, which this command does not read"
    if cause := library.likely_cause(state, settings):
        return cause
    best = library.recognise(_NO_FILE, state)
    if best is not None:
        likely = library.architectures[best].settings
        if (likely.backbone, likely.neck) != (settings.backbone, settings.neck):
            return f"; it looks like {best}: give --arch {best}"
    scores = state.get(library.their_name("rpn.head.cls_logits.bias", settings))
    anchors = 0 if scores is None else scores.numel() // (2 if settings.rpn_score == "softmax" else 1)
    if scores is None or anchors == settings.anchors_per_place:
        return ""
    # An example that fits: three ratios where they divide the number, and as many sizes as are left.
    ratios = [0.5, 1, 2] if anchors % 3 == 0 else [1]
    each = max(1, anchors // len(ratios))
    firsts = [level[0] for level in library.architectures[arch].settings.anchor_sizes]
    sizes = [[round(first * 2 ** (step / each)) for step in range(each)] for first in firsts]
    if len(firsts) == 1:
        sizes = [[int(firsts[0]) * 2**step for step in range(each)]]
    return (
        f"; its RPN predicts {anchors} anchors at each place: give the ones it was trained with, as in "
        f'--set "anchor_sizes={sizes}" --set "aspect_ratios={ratios}"'
    )
