"""The classes of an imported model: from the user's file, from the checkpoint, or COCO's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from anchorline.evaluation.names import list_names
from anchorline.runtime.errors import SettingsError

_BACKGROUND = ("__background__", "background")


@dataclass(frozen=True)
class ClassNames:
    """Names without the background, and COCO's category ids where the classes are COCO's."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...] | None = None


def choose_class_names(
    path: Path | None, in_checkpoint: tuple[str, ...] | None, coco: ClassNames, outputs: int, where: str
) -> ClassNames:
    """Names for a model with ``outputs``, background included.

    Those in the file ``path``, else those in the checkpoint, else ``coco``, in the order and with the gaps
    that the library gives it. Raises ``SettingsError`` where they do not fit.
    """
    if path is not None:
        return ClassNames(_fitting(_read(path), outputs, str(path), where))
    if in_checkpoint is not None:
        names = _fitting(in_checkpoint, outputs, f"{where}: its description", "the model")
        return coco if names == coco.names else ClassNames(names)
    if outputs != len(coco.names) + 1:
        raise SettingsError(
            f"{where}: has {outputs} outputs, background included; name its {outputs - 1} classes with "
            f"--classes FILE (COCO's names are known, and need {len(coco.names) + 1})"
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
