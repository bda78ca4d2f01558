"""Settings from plain values: types, choices and ranges, each failure one line that names the field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from anchorline.runtime.errors import SettingsError

# By field name: the values it may have.
Choices = Mapping[str, tuple[object, ...]]

# By range: the names, with a space between, of the fields whose numbers lie in it.
Ranges = Mapping[str, str]

_Settings = TypeVar("_Settings")

_INSIDE: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda v: v >= 1,
    "above 0": lambda v: v > 0,
    "0 or more": lambda v: v >= 0,
    "from 0 to 1": lambda v: 0 <= v <= 1,
}


def settings_from(cls: type[_Settings], values: Mapping[str, Any], table: str) -> _Settings:
    """Build ``cls`` from plain values, checking names and types; raises ``SettingsError``."""
    expect(isinstance(values, Mapping), table, values, "fields and their values")
    hints = get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise SettingsError(
            f"{table}.{sorted(unknown)[0]} is not a setting; expected one of {', '.join(sorted(hints))}"
        )
    return cls(**{name: coerce(value, hints[name], f"{table}.{name}") for name, value in values.items()})


def coerce(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the type of its field: lists become tuples, whole numbers become floats where asked."""
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        expect(abs(value) < 1e30, name, value, "a finite number")  # false for NaN as well
        return float(value)
    if isinstance(hint, type):
        matches = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
        expect(matches, name, value, f"a value of type {hint.__name__}")
        return value
    expect(isinstance(value, list | tuple), name, value, "a list")
    inner = [h for h in hint.__args__ if h is not Ellipsis]
    if len(inner) > 1:
        expect(len(value) == len(inner), name, value, f"a list of {len(inner)}")
    return tuple(coerce(item, inner[min(i, len(inner) - 1)], name) for i, item in enumerate(value))


def check_choices(settings: object, table: str, choices: Choices) -> None:
    """Raise ``SettingsError`` for the first field that has none of its ``choices``."""
    for name, allowed in choices.items():
        value = getattr(settings, name)
        expect(value in allowed, f"{table}.{name}", value, f"one of {', '.join(map(repr, allowed))}")


def check_ranges(settings: object, table: str, ranges: Ranges) -> None:
    """Raise ``SettingsError`` for the first field with a number, on any level of its tuples, out of range."""
    for range_, names in ranges.items():
        for name in names.split():
            value = getattr(settings, name)
            kind = "numbers" if isinstance(value, tuple) else "a number"
            expect(all(map(_INSIDE[range_], _numbers(value))), f"{table}.{name}", value, f"{kind} {range_}")


def _numbers(value: Any) -> list[float]:
    """A number, or all numbers of nested tuples."""
    return [n for item in value for n in _numbers(item)] if isinstance(value, tuple) else [value]


def expect(condition: bool, name: str, value: object, expectation: str) -> None:
    """Raise ``SettingsError`` that ``name`` is ``value`` unless ``condition`` holds."""
    if not condition:
        raise SettingsError(f"{name} is {value!r}; expected {expectation}")
