"""A model and its training, by preset.

A preset is a TOML file in ``presets/`` with the tables ``[model]`` and ``[training]``; fields it does
not name keep the defaults written in ``train/model/settings.py`` and ``train/loop/settings.py``, and the
command line may override each one.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from anchorline.runtime.io.errors import SettingsError
from anchorline.train.loop.settings import RENAMED, TrainingSettings
from anchorline.train.model.settings import ModelSettings, expect, settings_from

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TABLES = {"model": ModelSettings, "training": TrainingSettings}

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Settings:
    """A model and its training."""

    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name: str, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a preset (a name, or the path of a TOML file), changed by ``overrides``.

    An override is ``table.field=value`` with a TOML value, such as ``training.epochs=20``; the
    table may be left out where only one has the field. Raises ``SettingsError``.
    """
    path = PRESETS / f"{name}.toml" if not name.endswith(".toml") else Path(name)
    if not path.is_file():
        raise SettingsError(
            f"preset {name!r} is not known; expected one of {', '.join(preset_names())} or a .toml file"
        )
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not a TOML file ({error}); mend it or use a preset") from None
    for table, content in tables.items():
        expect(isinstance(content, dict), f"{path}: {table}", content, "a table [model] or [training]")
    training = tables.get("training", {})
    for before in RENAMED.keys() & training.keys():
        now = _name_now(before, str(path))
        expect(now not in training, f"{path}: training.{before}", training[before], f"{now} alone")
        training[now] = training.pop(before)
    for text in overrides:
        table, field_name, value = parse_override(text)
        tables.setdefault(table, {})[field_name] = value
    unknown = tables.keys() - _TABLES.keys()
    if unknown:
        raise SettingsError(f"{path}: unknown table {sorted(unknown)[0]!r}; expected [model] and [training]")
    return Settings(
        settings_from(ModelSettings, tables.get("model", {}), "model"),
        settings_from(TrainingSettings, tables.get("training", {}), "training"),
    )


def parse_override(text: str) -> tuple[str, str, Any]:
    """Table, field and value of ``table.field=value``; the value is TOML, or text where it is none."""
    key, equals, literal = text.partition("=")
    table, dot, name = key.strip().rpartition(".")
    if table in ("", "training"):
        name = _name_now(name, text)
    if not dot:
        tables = [each for each, kind in _TABLES.items() if name in get_type_hints(kind)]
        expect(len(tables) == 1, "override", text, "table.field=value with the table model or training")
        table = tables[0]
    expect(bool(equals) and table in _TABLES, "override", text, "table.field=value")
    try:
        return table, name, tomllib.loads(f"value = {literal}")["value"]
    except tomllib.TOMLDecodeError:
        return table, name, literal.strip()


def _name_now(name: str, where: str) -> str:
    """The name of a field of ``[training]``, which may be given by an earlier one; that is said on stderr."""
    now = RENAMED.get(name, name)
    if now != name and os.environ.get("RANK", "0") == "0":  # of several processes one says it
        print(f"{where}: training.{name} is called training.{now} now; expected that name", file=sys.stderr)
    return now
