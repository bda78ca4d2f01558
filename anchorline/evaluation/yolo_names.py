"""The class names of a YOLO data set: ``names`` in its YAML file, or the lines of ``classes.txt``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorline.evaluation.names import list_names
from anchorline.runtime.errors import DataError, SettingsError

_CLASS_FILES = ("classes.txt", "labels/classes.txt")


@dataclass(frozen=True)
class YoloConfig:
    """``names`` in the order of the labels' indices; ``keypoints``: labels hold keypoints after the box."""

    names: tuple[str, ...]
    keypoints: bool = False


def read_yolo_config(folder: Path) -> YoloConfig:
    """Read ``data.yaml``, else the one other YAML file in ``folder`` with ``names``, else ``classes.txt``.

    ``names`` may be a list or a mapping from 0, 1, ... to the names. Raises ``DataError`` when the
    names are missing, broken or contradictory, ``SettingsError`` when PyYAML is not installed.
    """
    found = [(path, content) for path in _yaml_files(folder) if "names" in (content := _read_yaml(path))]
    if len(found) > 1:
        files = ", ".join(path.name for path, _ in found)
        raise DataError(f"{folder}: class names stand in {files}; rename the right file to data.yaml")
    if found:
        path, content = found[0]
        return YoloConfig(_yaml_names(content, path), "kpt_shape" in content)
    for name in _CLASS_FILES:
        if (folder / name).is_file():
            return YoloConfig(_read_class_file(folder / name))
    raise DataError(
        f"{folder}: no class names; expected data.yaml with names, or classes.txt with one name a line "
        "in the order of the label files' indices"
    )


def _yaml_files(folder: Path) -> list[Path]:
    usual = folder / "data.yaml"
    return [usual] if usual.is_file() else sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])


def _read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping with every scalar as text, so that a class may be called ``no`` or ``1``."""
    try:
        import yaml
    except ImportError:
        raise SettingsError(
            f"{path}: reading it needs PyYAML, which is not installed; pip install pyyaml, or delete the "
            "file and write the class names, one a line, into classes.txt"
        ) from None
    try:
        content = yaml.load(path.read_bytes(), Loader=yaml.BaseLoader)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); expected YAML") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: broken YAML ({reason}); expected the class names as names") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected YAML with the class names as names, got no mapping")
    return content


def _yaml_names(content: dict[str, Any], path: Path) -> tuple[str, ...]:
    names = content["names"]
    if isinstance(names, dict):
        indices = [str(index) for index in range(len(names))]
        if set(names) != set(indices):
            raise DataError(
                f"{path}: names has the indices {list_names(list(names))}; expected 0 to {len(names) - 1}"
            )
        names = [names[index] for index in indices]
    if not isinstance(names, list):
        raise DataError(f"{path}: names is {names!r}; expected a list, or a mapping from 0, 1, ... to names")
    checked = _check_names(names, path)
    count = content.get("nc")
    if count is not None and count != str(len(checked)):
        raise DataError(f"{path}: nc is {count!r} and names has {len(checked)}; correct the wrong one")
    return checked


def _read_class_file(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected one class name a line") from None
    return _check_names([line.strip() for line in text.rstrip().splitlines()], path)


def _check_names(names: list[Any], path: Path) -> tuple[str, ...]:
    if not names:
        raise DataError(f"{path}: holds no class names; expected at least one")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            got = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"  # perhaps endless
            raise DataError(f"{path}: the name of class {index} is {got}; expected a text")
        if names.index(name) != index:
            raise DataError(
                f"{path}: classes {names.index(name)} and {index} are both {name!r}; expected each name once"
            )
    return tuple(names)
