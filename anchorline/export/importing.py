"""Other libraries' checkpoints as ours: ``model.safetensors`` with the same detections."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from anchorline import __version__
from anchorline.evaluation.names import list_names
from anchorline.export.checkpoint_files import CheckpointFile, read_checkpoint_file, read_weights_enum
from anchorline.export.torchvision_keys import (
    ARCHITECTURES,
    KNOWN_NAMES,
    adapted,
    current_names,
    fit_state,
    output_count,
)
from anchorline.runtime.canvas import padded
from anchorline.runtime.contract import Contract, ResizeRule
from anchorline.runtime.errors import SettingsError
from anchorline.train.checkpoint import contract_of, save_checkpoint
from anchorline.train.model_settings import ModelSettings
from anchorline.train.setting_checks import expect, settings_from
from anchorline.train.settings import parse_override

# The start of the SHA-256 of fasterrcnn_resnet50_fpn_coco-258fb6c6.pth. It was trained with eps 0, and
# torchvision sets that back (``overwrite_eps``) for this file alone.
_EPS_0_SHA256 = "258fb6c6"
_EPS_0_WEIGHTS = "FasterRCNN_ResNet50_FPN_Weights."
_USUAL_EPS = 1e-5
_BACKGROUND = ("__background__", "background")


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
    classes: Path | None = None,
    canvas: tuple[int, int] | None = None,
    resize: ResizeRule | None = None,
    batch_norm_eps: float | None = None,
    fast_resize: bool = False,
    overrides: Sequence[str] = (),
) -> ImportResult:
    """Write the torchvision detector in ``checkpoint`` to ``out`` as a checkpoint of ours.

    ``checkpoint`` is a file or the name of torchvision's weights; ``arch`` a name in ``ARCHITECTURES``
    (the weights know theirs). ``classes`` names the classes, one a line or as a JSON list, without the
    background; COCO's are the default where the model has as many outputs. ``resize`` replaces the
    architecture's own, and ``canvas`` (height, width; multiples of 32) the one that holds landscape
    frames. ``batch_norm_eps`` belongs to the body's batch norms. ``fast_resize`` resizes in whole grey
    levels. ``overrides`` change settings that the tensors do not show, as ``score_threshold=0.3``.
    Raises ``ArtefactError`` and ``SettingsError``.
    """
    if out.suffix != ".safetensors":
        raise SettingsError(f"output is {str(out)!r}; expected a file name that ends in .safetensors")
    source, arch = _read(checkpoint, arch)
    state = current_names(source.state)
    outputs = output_count(state)
    architecture = ARCHITECTURES[arch]
    resize = resize or architecture.resize
    settings = adapted(_changed(architecture.settings, overrides), state)
    eps, warnings = _choose_eps(batch_norm_eps, source, arch, state)
    settings = dataclasses.replace(settings, backbone_norm_eps=eps, canvas=canvas or landscape_canvas(resize))
    fitted = fit_state(state, settings, outputs - 1, source.name, arch)
    names, ids = _class_names(classes, outputs, source.name)
    contract = dataclasses.replace(
        contract_of(settings, names, ids, _source(source, arch)),
        profile="torchvision",
        resize=resize,
        input_dtype="uint8" if fast_resize else "float32",
    )
    save_checkpoint(out, fitted, settings, contract)
    return ImportResult(out, contract, settings, warnings)


def landscape_canvas(resize: ResizeRule) -> tuple[int, int]:
    """The canvas that holds every landscape frame at the scale ``resize`` gives it, in multiples of 32."""
    shorter, longer = resize.shorter_side, resize.longer_side
    if shorter is None or longer is None or shorter > longer:
        raise SettingsError(
            f"resize is {shorter} and {longer}; expected a shorter and a longer side in pixels"
        )
    return padded((shorter, longer))


def _read(checkpoint: str | Path, arch: str | None) -> tuple[CheckpointFile, str]:
    """The checkpoint and the name of its architecture."""
    if arch is not None and arch not in ARCHITECTURES:
        raise SettingsError(f"arch is {arch!r}; expected {KNOWN_NAMES}")
    name = str(checkpoint)
    if "_Weights." in name and not Path(name).exists():
        own = _arch_of_weights(name)
        if arch not in (None, own):
            raise SettingsError(f"arch is {arch!r}; {name} are weights of {own}, leave --arch out")
        return read_weights_enum(name), own
    if arch is None:
        raise SettingsError(f"{name}: tensors alone do not tell the architecture; give --arch, {KNOWN_NAMES}")
    return read_checkpoint_file(Path(checkpoint)), arch


def _arch_of_weights(name: str) -> str:
    """torchvision's builder of the weights ``name``: FasterRCNN_X_Weights belongs to fasterrcnn_x."""
    arch = name.partition("_Weights.")[0].lower()
    if arch not in ARCHITECTURES:
        raise SettingsError(f"{name}: not weights of a Faster R-CNN; expected those of {KNOWN_NAMES}")
    return arch


def _changed(settings: ModelSettings, overrides: Sequence[str]) -> ModelSettings:
    values = dataclasses.asdict(settings)
    for text in overrides:
        named = "." in text.partition("=")[0]
        table, name, value = parse_override(text if named else f"model.{text}")
        expect(table == "model", "override", text, "a setting of the model")
        values[name] = value
    return settings_from(ModelSettings, values, "model")


def _choose_eps(
    given: float | None, source: CheckpointFile, arch: str, state: Mapping[str, Tensor]
) -> tuple[float, tuple[str, ...]]:
    """The eps of the body's batch norms, and what to warn of."""
    if given is not None:
        expect(given >= 0, "batch norm eps", given, "a number of at least 0")
        return given, ()
    official = source.sha256.startswith(_EPS_0_SHA256) or _EPS_0_SHA256 in source.name
    if official or source.name.startswith(_EPS_0_WEIGHTS):
        return 0.0, ()
    frozen = not any(name.endswith("num_batches_tracked") for name in state)
    if arch == "fasterrcnn_resnet50_fpn" and frozen:
        return _USUAL_EPS, (
            f"batch-norm eps taken as {_USUAL_EPS:g}; if the model was built with weights=...COCO_V1 and "
            "trained on, torchvision has set it to 0: import again with --batch-norm-eps 0",
        )
    return _USUAL_EPS, ()


def _class_names(
    path: Path | None, outputs: int, where: str
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Class names without the background, and COCO's category ids where the names are COCO's."""
    coco = coco_classes()
    if path is None:
        if outputs != len(coco) + 1:
            raise SettingsError(
                f"{where}: has {outputs} outputs, background included; name its {outputs - 1} classes with "
                f"--classes FILE (COCO's names are known, and need {len(coco) + 1})"
            )
        return coco, tuple(range(1, len(coco) + 1))
    names = _read_classes(path)
    if len(names) == outputs and names[0].lower() in _BACKGROUND:
        names = names[1:]
    if len(names) != outputs - 1:
        raise SettingsError(
            f"{path}: names {len(names)} classes ({list_names(names)}); {where} has {outputs - 1} and the "
            "background"
        )
    return names, None


def coco_classes() -> tuple[str, ...]:
    """COCO's 90 classes in the order of torchvision's labels, whose numbers are COCO's category ids.

    Ten of the numbers were never used. Their outputs stay, since they take part in the softmax, under
    names such as ``N/A 12``; a trained model does not detect them.
    """
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
    return tuple(f"N/A {number}" if name == "N/A" else name for number, name in enumerate(names, start=1))


def _read_classes(path: Path) -> tuple[str, ...]:
    """The names in ``path``: a JSON list, or one a line."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        found = json.loads(text) if text.startswith("[") else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{path}: cannot be read as class names ({error}); expected one name a line, or a JSON list"
        ) from None
    names = [name for name in found if name != ""]
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise SettingsError(f"{path}: expected class names, each once; got {str(found)[:80]}")
    return tuple(names)


def _source(source: CheckpointFile, arch: str) -> dict[str, str]:
    return {
        "imported_from": source.name,
        "sha256": source.sha256,
        "arch": arch,
        "imported_by": f"anchorline {__version__}",
    }
